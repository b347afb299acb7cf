"""Any change of structure crosses the boundary, compared with the same function run eagerly."""

import copy
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import nnx
from nnx import Ref
from tests.models import Dense, Net, sgd


class Box(nnx.Module):
    w: jax.Array = nnx.param()


def make_model():
    """A small graph with everything in it: ties, cycles, lists, dicts, tuples, arrays, statics."""
    root, left, right = Box(), Box(), Box()
    left.w, right.w, root.w = jnp.array(1), jnp.array(2), jnp.array(3)
    right.tied = nnx.get_ref(left, "w")
    root.left, root.right, root.up = left, right, root
    root.items = [left, Ref(jnp.array(4), "a"), [Ref(jnp.array(5), "b")], 7]
    root.table = {"l": left, "r": (right, Ref(jnp.array(6), "c"))}
    root.array, root.n = jnp.array(8), 1
    return root


def boxes(root):
    """The modules of a graph, in order, each once."""
    found, todo = [], [root]
    while todo:
        x = todo.pop(0)
        if any(x is y for y in found):
            continue
        if isinstance(x, nnx.Module | list | dict):
            found.append(x)
        if isinstance(x, nnx.Module):
            todo += list(vars(x).values())
        elif isinstance(x, list | tuple):
            todo += x
        elif isinstance(x, dict):
            todo += list(x.values())
    return found


def things(root):
    """Any part of the graph, to be put elsewhere."""
    found = []
    for x in boxes(root):
        found.append(x)
        values = x if isinstance(x, list) else (x if isinstance(x, dict) else vars(x)).values()
        found += [v for v in values if isinstance(v, Ref | tuple)]
    return found


def apply_op(root, op, x):
    kind, i, j, key = op
    containers = boxes(root)
    at, thing = containers[i % len(containers)], (t := things(root))[j % len(t)]
    new = {
        "array": lambda: jnp.asarray(x) + 1,
        "ref": lambda: Ref(jnp.asarray(x) * 2, key),
        "box": lambda: Box(),
        "static": lambda: [1, 1.0, True, "s", None][j % 5],
        "move": lambda: thing,
        "copy": lambda: [thing, j],
    }
    if kind == "write":
        refs = list(nnx.refs(root).values())
        if refs:
            ref = refs[j % len(refs)]
            ref.value = ref.value + x
        return
    if kind == "swap":
        if isinstance(at, list) and len(at) > 1:
            at[0], at[-1] = at[-1], at[0]
        elif isinstance(at, nnx.Module) and at is not root:
            names = list(vars(at))
            if len(names) > 1 and "w" not in (names[0], names[-1]):
                a, b = getattr(at, names[0]), getattr(at, names[-1])
                put(at, names[0], b)
                put(at, names[-1], a)
        return
    if kind == "delete":
        if isinstance(at, list):
            del at[j % len(at) if at else 0 : (j % len(at) if at else 0) + 1]
        elif isinstance(at, dict):
            at.pop(next(iter(at), None), None)
        else:
            names = [n for n in vars(at) if n != "w"]
            if names:
                delattr(at, names[j % len(names)])
        return
    value = new[kind]()
    if isinstance(at, list):
        at.insert(j % (len(at) + 1), value)
    elif isinstance(at, dict):
        at[key] = value
    else:
        put(at, key, value)


def put(module, name, value):
    if isinstance(vars(module).get(name), Ref) and not isinstance(value, Ref):
        # An array does not replace a Ref on its own.
        delattr(module, name)
    setattr(module, name, value)


ops = st.tuples(
    st.sampled_from(
        ["array", "ref", "box", "static", "move", "copy", "write", "write", "swap", "delete"]
    ),
    st.integers(0, 9),
    st.integers(0, 9),
    st.sampled_from(["p", "q", "l"]),
)


def same(a, b, pairs):
    """Equal as graphs, with equal values."""
    if isinstance(a, jax.Array | np.ndarray):
        assert isinstance(b, jax.Array | np.ndarray) and a.shape == b.shape and (a == b).all()
        return
    assert type(a) is type(b)
    if isinstance(a, Ref | Box | list | dict):
        if id(a) in pairs:
            assert pairs[id(a)] is b
            return
        assert not any(b is seen for seen in pairs.values())
        pairs[id(a)] = b
    if isinstance(a, Ref):
        assert a.collection == b.collection
        same(a.value, b.value, pairs)
    elif isinstance(a, Box | dict):
        x, y = (vars(a), vars(b)) if isinstance(a, Box) else (a, b)
        assert list(x) == list(y)
        for k in x:
            same(x[k], y[k], pairs)
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            same(x, y, pairs)
    else:
        assert repr(a) == repr(b)


@settings(max_examples=25, deadline=None)
@given(st.lists(ops, max_size=6), st.lists(ops, max_size=6))
def test_a_compiled_function_does_to_a_graph_what_it_does_without(inside, outside):
    def program(m, x):
        for op in inside:
            apply_op(m, op, x)
        last = [x for x in things(m) if isinstance(x, Ref | Box)][-1]
        return last, {"sum": sum(r.value for r in nnx.refs(m).values())}

    eager, compiled = make_model(), make_model()
    step = nnx.jit(program)
    for change in (None, outside):
        # The second call sees what the first one left behind, and the changes in between.
        for op in change or ():
            apply_op(eager, op, 1)
            apply_op(compiled, op, 1)
        before = [t for t in zip(things(eager), things(compiled), strict=True)]
        expected, result = program(eager, 10), step(compiled, 10)
        pairs = {}
        same((eager, expected), (compiled, result), pairs)
        # The caller still has the same objects: none of them was made again.
        for x, y in before:
            assert isinstance(x, tuple) or pairs.get(id(x), y) is y


@settings(max_examples=10, deadline=None)
@given(st.lists(ops, min_size=1, max_size=5), st.integers(0, 4))
def test_a_failure_at_any_point_leaves_the_graph_as_it_was(todo, after):
    model = make_model()
    twin = copy.deepcopy(model)
    before = things(model)

    @nnx.jit
    def bad(m, x):
        for op in todo[:after]:
            apply_op(m, op, x)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        bad(model, 10)
    same(twin, model, {})
    assert all(x is y for x, y in zip(things(model), before, strict=True))


def test_structure_changes_across_two_arguments():
    a, b = Box(), Box()
    a.layer, b.layer = Dense(seed=1), Dense(seed=2)
    first, second = a.layer, b.layer

    @nnx.jit
    def swap(a, b):
        a.layer, b.layer = b.layer, a.layer
        a.layer.b = a.layer.b + 1
        b.other = a
        a.me = a

    swap(a, b)
    assert a.layer is second and b.layer is first and b.other is a and a.me is a
    assert (second.b == 1).all() and (first.b == 0).all()


def test_a_tie_made_inside_holds_outside():
    a, b = Dense(seed=1), Dense(seed=2)

    @nnx.jit
    def tie(a, b):
        b.w = nnx.get_ref(a, "w")
        b.w = b.w + 1

    tie(a, b)
    assert nnx.get_ref(a, "w") is nnx.get_ref(b, "w")
    assert jnp.allclose(a.w, Dense(seed=1).w + 1)


def test_what_is_removed_inside_may_be_returned_and_keeps_what_was_written(net):
    removed = net.blocks[1]

    @nnx.jit
    def pop(m):
        layer = m.blocks.pop(1)
        layer.b = layer.b + 1
        return layer

    assert pop(net) is removed and len(net.blocks) == 2 and (removed.b == 1).all()


def test_a_ref_that_is_removed_inside_keeps_what_was_written():
    ref = Ref(jnp.array(1.0))
    box = Box()
    box.ref = ref

    @nnx.jit
    def f(m):
        m.ref.value = m.ref.value + 1
        del m.ref

    f(box)
    assert ref.value == 2.0 and not hasattr(box, "ref")


def test_array_attributes_written_inside_cost_no_new_trace():
    box, traces = Box(), []
    box.array = jnp.zeros(2)

    @nnx.jit
    def f(m):
        traces.append(1)
        m.array = m.array + 1

    for _ in range(3):
        f(box)
    assert (box.array == 3).all() and len(traces) == 1


def test_a_number_may_become_an_array_inside():
    box = Box()
    box.scale = 2.0

    @nnx.jit
    def f(m, x):
        m.scale = x

    f(box, jnp.ones(3))
    assert box.scale.shape == (3,)


def test_a_copy_made_by_tree_map_inside_is_an_ordinary_module_outside(dense):
    @nnx.jit
    def f(m):
        m.average = jax.tree.map(lambda x: x * 2, m)

    f(dense)
    dense.average.b = jnp.ones(2)
    assert (dense.average.w == 2 * dense.w).all() and (dense.b == 0).all()


def test_a_bound_method_goes_in_and_out(dense, data):
    out = nnx.jit(lambda f, x: (f, f(x)))(dense.__call__, data[0])
    assert out[0].__self__ is dense and dense.calls == 1


def test_what_a_body_makes_unhashable_is_named_and_changes_nothing(dense):
    @nnx.jit
    def f(m):
        m.b = m.b + 1
        m.options = {1}

    with pytest.raises(nnx.UnhashableStaticError, match="'options' is a set"):
        f(dense)
    assert (dense.b == 0).all() and not hasattr(dense, "options")


@pytest.mark.parametrize("make", [lambda r: {r}, lambda r: frozenset([r]), lambda r: iter([r])])
def test_refs_in_what_has_no_order_are_refused(make):
    with pytest.raises(nnx.RefError, match=r"rather than in a set or a generator"):
        nnx.jit(lambda s: 1)(make(Ref(1.0)))


def test_nan_checks_leave_the_model_as_it_was(dense):
    @nnx.jit
    def bad(m):
        m.calls = m.calls + 1
        m.b = jnp.log(m.b - 1)

    with jax.debug_nans(True), pytest.raises(FloatingPointError):
        bad(dense)
    assert (dense.b == 0).all() and dense.calls == 0


def test_a_failing_callback_leaves_the_model_as_it_was(dense):
    def fail(x):
        raise ValueError("from the callback")

    @nnx.jit
    def bad(m):
        m.calls = m.calls + 1
        m.b = jax.pure_callback(fail, jax.ShapeDtypeStruct((2,), jnp.float32), m.b)

    with pytest.raises(Exception, match="from the callback"):
        bad(dense)
    assert (dense.b == 0).all() and dense.calls == 0


def test_works_without_compiling(dense, data):
    x, _ = data
    with jax.disable_jit():
        out = nnx.jit(lambda m, x: m(x))(dense, x)
        nnx.jit(lambda x: dense(x))(x)
    assert jnp.allclose(out, x @ dense.w) and dense.calls == 2


def test_nothing_leaks_from_cycles_arrays_closures_and_failures(data):
    x, _ = data
    dense = Dense()
    box = Box()
    box.me, box.array, box.dense, hidden = box, jnp.ones(2), dense, [{"m": dense}]

    def grow(m, x):
        m.array = m.array + 1
        m.extra = Ref(m.dense(x).sum())
        return m

    def fail(m):
        m(x)
        raise ZeroDivisionError

    with jax.check_tracer_leaks():
        step = nnx.jit(grow)
        assert step(box, x) is box and step(box, x) is box
        nnx.jit(lambda x: hidden[0]["m"](x))(x)
        nnx.jit(lambda m: nnx.jit(lambda: m(x))())(dense)
        for bad in (nnx.jit(fail), nnx.grad(fail), nnx.jit(nnx.grad(fail))):
            with pytest.raises(ZeroDivisionError):
                bad(dense)
    assert dense.calls == 4


def run_threads(work, n=4):
    errors = []

    def guarded(k):
        try:
            work(k)
        except BaseException as error:
            errors.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=guarded, args=(k,)) for k in range(n)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
    finally:
        sys.setswitchinterval(interval)
    assert errors == []


def test_a_call_from_another_thread_while_structures_are_compared():
    class Setting:
        """A static argument; while its content is read, another thread calls the function."""

        def __init__(self, n):
            self.number = n

        @property
        def __dict__(self):
            if meanwhile:
                thread = threading.Thread(target=meanwhile.pop())
                thread.start()
                thread.join()
            return {"number": self.number}

        __slots__ = ("number",)

        @property
        def n(self):
            return self.number

    f = nnx.jit(lambda m, s: m.ref.value * s.n, static_argnums=1)
    first, second = Box(), Box()
    first.ref, second.ref, second.other = Ref(jnp.array(1.0)), Ref(jnp.array(5.0)), 1
    meanwhile, results = [], []
    f(first, Setting(1))
    meanwhile.append(lambda: results.append(f(second, Setting(3))))
    assert f(first, Setting(2)) == 2.0 and results == [15.0]


def test_threads_that_bring_new_structures_to_one_function():
    f = nnx.jit(lambda m: m.ref.value * m.n)

    def work(k):
        for i in range(10):
            box = Box()
            box.ref, box.n = Ref(jnp.array(1.0)), k * 10 + i
            assert f(box) == box.n

    run_threads(work)


def test_threads_that_trace_the_same_closure_at_once(data):
    class Holder:
        pass

    x, _ = data
    for _ in range(5):
        holder = Holder()
        holder.inner = Holder()
        holder.inner.model = model = Dense()
        seen = model.w
        f = nnx.jit(lambda x, h=holder, seen=seen: x @ h.inner.model.w - x @ model.w)
        run_threads(lambda k, f=f: np.testing.assert_allclose(f(x), 0.0, atol=1e-6))


def test_each_thread_sees_its_own_changes_of_structure():
    f = nnx.jit(lambda m: sum(r.value for r in m.items))

    def work(k):
        box = Box()
        box.items = []
        for i in range(8):
            box.items.append(Ref(jnp.array(float(k))))
            assert f(box) == k * (i + 1)

    run_threads(work, 2)


def test_each_thread_has_its_own_stream():
    draw = nnx.jit(lambda: jax.random.normal(nnx.make_rng(), ()))
    with nnx.scope(7):
        expected = [float(draw()) for _ in range(6)]

    def work(k):
        with nnx.scope(7):
            assert [float(draw()) for _ in range(6)] == expected

    run_threads(work, 2)


def test_a_step_inside_a_step_is_one_program(data):
    x, y = data
    inner, alone = Net(), Net()
    epoch = nnx.jit(lambda m: [nnx.jit(sgd)(m, x, y) for _ in range(3)])
    assert epoch(inner) == [None] * 3
    for _ in range(3):
        nnx.jit(sgd)(alone, x, y)
    for path, value in alone["params"].items():
        np.testing.assert_allclose(inner["params"][path], value, atol=1e-6)


def test_a_number_that_becomes_an_equal_one_inside_is_seen_by_other_functions():
    class Scaled(nnx.Module):
        def __init__(self):
            self.k = 2

    to_float = nnx.jit(lambda m: setattr(m, "k", 2.0))
    scaled = nnx.jit(lambda m, x: x * m.k)
    for model in (Scaled(), Scaled()):
        assert scaled(model, jnp.arange(2)).dtype == jnp.int32
        to_float(model)
        assert scaled(model, jnp.arange(2)).dtype == jnp.float32
