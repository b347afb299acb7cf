import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import refx
from refx import Node, Partition, Ref
from refx.walk import walk


class Box(Node):
    pass


def box(**attributes):
    node = Box()
    for name, value in attributes.items():
        setattr(node, name, value)
    return node


# ---- random graphs: a pool of identity objects that refer to each other at random, with cycles

leaf_values = st.one_of(st.integers(-3, 3), st.floats(-2, 2, width=32), st.booleans())
statics = st.one_of(st.none(), st.sampled_from(["a", "b"]), leaf_values)


@st.composite
def dags(draw):
    kinds = draw(st.lists(st.sampled_from(["ref", "box", "list", "dict"]), min_size=1, max_size=9))
    made = []
    for i, kind in enumerate(kinds):
        if kind == "ref":
            value = jnp.array(draw(st.integers(-9, 9)), draw(st.sampled_from(["int32", "float32"])))
            made.append(Ref(value, draw(st.sampled_from(["params", "stats", None])), tag=i % 2))
        else:
            made.append({"box": Box, "list": list, "dict": dict}[kind]())

    def content():
        what = draw(st.sampled_from(["object", "static", "array", "tuple"]))
        if what == "object":
            return made[draw(st.integers(0, len(made) - 1))]
        if what == "array":
            return np.arange(draw(st.integers(1, 3)))
        if what == "tuple":
            return (made[draw(st.integers(0, len(made) - 1))], draw(statics))
        return draw(statics)

    for x in made:
        for k in range(draw(st.integers(0, 3)) if not isinstance(x, Ref) else 0):
            if isinstance(x, Box):
                setattr(x, f"f{k}", content())
            elif isinstance(x, list):
                x.append(content())
            else:
                x[f"k{k}"] = content()
    return made


def same(a, b, pairs):
    """Equal as graphs: a bijection between the identity objects, equal values and statics."""
    assert type(a) is type(b)
    if isinstance(a, Ref | Box | list | dict):
        if id(a) in pairs:
            assert pairs[id(a)] is b
            return
        assert not any(b is seen for seen in pairs.values())
        pairs[id(a)] = b
    if isinstance(a, Ref):
        assert a is not b and a.collection == b.collection and a.metadata == b.metadata
        assert a.value.dtype == b.value.dtype and (a.value == b.value).all()
    elif isinstance(a, Box | dict):
        x, y = (vars(a), vars(b)) if isinstance(a, Box) else (a, b)
        assert list(x) == list(y)
        for k in x:
            same(x[k], y[k], pairs)
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            same(x, y, pairs)
    elif isinstance(a, np.ndarray):
        assert (a == b).all()
    else:
        assert repr(a) == repr(b)


@settings(max_examples=150, deadline=None)
@given(dags())
def test_merge_of_split_is_the_same_graph(tree):
    dagdef, partition = refx.split(tree)
    same(tree, refx.merge(dagdef, partition), {})
    assert refx.split(refx.clone(tree))[0] is dagdef
    assert len(partition) == len(dagdef.paths)


@settings(max_examples=60, deadline=None)
@given(dags())
def test_filters_divide_the_values_and_update_restores_them(tree):
    dagdef, params, rest = refx.split(tree, "params", ...)
    assert set(params) | set(rest) == set(dagdef.paths) and not set(params) & set(rest)
    same(tree, refx.merge(dagdef, rest, params), {})
    other = refx.clone(tree)
    refs = refx.refs(other)
    for ref in refs.values():
        ref.value = ref.value + 1
    refx.update(other, {p: v for p, v in (params | rest).items() if p in refs})
    same(tree, other, {})


@settings(max_examples=60, deadline=None)
@given(dags())
def test_a_node_is_a_pytree_of_its_values(tree):
    root = box(content=tree)
    leaves, treedef = jax.tree.flatten(root)
    same(root, jax.tree.unflatten(treedef, leaves), {})
    assert len(leaves) == len(refx.split(root)[1])
    assert treedef == jax.tree.structure(refx.clone(root))


@pytest.mark.parametrize("a, b", [(1, 1.0), (1, True), (0.0, -0.0), ((1,), (1.0,)), (2, "2")])
def test_equal_numbers_of_other_types_are_other_structures(a, b):
    assert refx.split(box(x=a))[0] is not refx.split(box(x=b))[0]
    assert refx.split(box(x=a))[0] is refx.split(box(x=a))[0]


def test_deep_trees_need_no_recursion():
    root = node = box()
    for _ in range(5000):
        node.next = box()
        node = node.next
    node.w = Ref(1.0, "params")
    assert refx.clone(root) is not root
    assert len(next(iter(refx.refs(root)))) == 5001


def test_split_says_what_no_filter_selects():
    tree = box(w=Ref(1.0, "params"), n=Ref(0, "counters"))
    with pytest.raises(refx.UnmatchedPathError, match=r"No filter selects 'n'.*Add \.\.\. as"):
        refx.split(tree, "params")


def test_merge_names_missing_and_unknown_paths():
    dagdef, part = refx.split(box(a=Ref(1.0), b=Ref(2.0)))
    with pytest.raises(refx.MissingPathError, match=r"lack 'b', which DagDef\(Box: 2 Refs"):
        refx.merge(dagdef, Partition({("a",): 1.0}))
    with pytest.raises(refx.UnknownPathError, match=r"have 'c', which .* does not have"):
        refx.merge(dagdef, part, {("c",): 1.0})


def test_a_static_that_cannot_be_hashed_is_named():
    tree = box(layer=box(sizes={1, 2}))
    with pytest.raises(refx.UnhashableStaticError, match=r"'layer\.sizes' is a set.*Use a tuple"):
        refx.split(tree)


def test_refs_cannot_hide_in_a_frozenset():
    with pytest.raises(refx.StructureError, match=r"'x' is a frozenset that holds Refs"):
        refx.split(box(x=frozenset([Ref(1.0)])))


def test_shared_refs_have_one_canonical_path():
    shared = Ref(1.0, "params")
    tree = {"first": box(w=shared), "second": [shared]}
    assert list(refx.refs(tree)) == [("first", "w")]
    refx.update(tree, {("second", "0"): 5.0})
    assert shared.value == 5.0
    with pytest.raises(
        refx.UnknownPathError, match="one shared Ref, at 'first.w' and at 'second.0'"
    ):
        refx.update(tree, {("first", "w"): 1.0, ("second", "0"): 2.0})


@pytest.mark.parametrize(
    "new, error, message",
    [
        ({"b.q": 1.0}, refx.UnknownPathError, r"no Ref at path 'b\.q'; it has 'a', 'b\.w'"),
        ({"c": jnp.ones(2)}, refx.UnknownPathError, r"'c' is a plain array attribute"),
        ({"b.w": jnp.ones((3, 2))}, refx.ShapeError, r"'b\.w' .* shape \(2, 3\).* has \(3, 2\)"),
        ({"b.w": jnp.ones((2, 3), "int32")}, refx.DtypeError, r"float32.*int32.*astype.*strict"),
        ({"b.w": {"x": 1.0}}, refx.ValueTypeError, r"'b\.w' .* has the structure"),
        ({"b.w": Ref(1.0)}, refx.ValueTypeError, "holds a Ref"),
    ],
)
def test_a_failed_update_changes_nothing(new, error, message):
    tree = box(a=Ref(1.0, "params"), b=box(w=Ref(jnp.zeros((2, 3)), "params")), c=jnp.ones(2))
    with pytest.raises(error, match=message):
        refx.update(tree, {"a": 9.0}, new)
    assert tree.a.value == 1.0 and (tree.b.w.value == 0).all()


def test_update_may_change_shape_and_dtype_when_told():
    tree = box(w=Ref(jnp.zeros(2)))
    refx.update(tree, {"w": jnp.ones(3, "bfloat16")}, strict=False)
    assert tree.w.value.dtype == jnp.bfloat16 and tree.w.value.shape == (3,)


def test_clone_shares_no_mutable_value():
    tree = Ref({"a": 1})
    other = refx.clone(tree)
    other.value["a"] = 2
    assert tree.value == {"a": 1}


def test_mutable_limits_writes():
    w, n = Ref(1.0, "params"), Ref(0, "counters")
    with refx.mutable("counters"):
        n.value = 1
        with pytest.raises(refx.NotMutableError, match=r"'params', 1\.0.*mutable.*does not allow"):
            w.value = 2.0
        with refx.mutable(...), pytest.raises(refx.NotMutableError):
            w.value = 2.0
        with pytest.raises(refx.NotMutableError):
            refx.update([n, w], {"0": 5, "1": 5.0})
    assert (w.value, n.value) == (1.0, 1)
    w.value = 3.0


def test_mutable_by_path_needs_a_tree():
    tree = box(bn=box(mean=Ref(0.0)), head=box(w=Ref(0.0)))
    with pytest.raises(refx.FilterError, match=r"looks at paths.*tree=model"):
        refx.mutable(refx.PathContains("bn")).__enter__()
    with refx.mutable(refx.PathContains("bn"), tree):
        tree.bn.mean.value = 1.0
        Ref(0.0).value = 1.0  # not of the tree
        with pytest.raises(refx.NotMutableError):
            tree.head.w.value = 1.0


def test_mutable_is_of_one_thread():
    ref = Ref(0.0)
    with refx.mutable(None):
        thread = threading.Thread(target=lambda: setattr(ref, "value", 1.0))
        thread.start()
        thread.join()
    assert ref.value == 1.0


def test_arrays_are_values_and_may_be_numpy():
    dagdef, part = refx.split({"a": np.arange(3), "t": (jnp.ones(2), 5)})
    assert part["a"].tolist() == [0, 1, 2] and part["t.0"].shape == (2,)
    assert refx.merge(dagdef, jax.tree.map(lambda x: x * 0, part))["t"][1] == 5


def test_dagdef_is_hashable_picklable_and_short():
    import pickle

    dagdef, _ = refx.split(box(a=Ref(1.0, "params"), b=[1]))
    assert pickle.loads(pickle.dumps(dagdef)) is dagdef
    assert repr(dagdef) == "DagDef(Box: 1 Refs, 0 arrays, 2 nodes)"
    assert repr(refx.split(Ref(1))[0]) == "DagDef(Ref: 1 Refs, 0 arrays, 0 nodes)"
    ambiguous = walk(({1: Ref(1), "1": Ref(2)}, jnp.ones(2))).dagdef
    assert repr(ambiguous) == "DagDef(tree: 2 Refs, 1 arrays, 1 nodes)"
