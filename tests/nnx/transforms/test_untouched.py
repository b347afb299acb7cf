"""Lists and dicts accept any item, so changes by a body are noticed only afterwards."""

import functools

import jax
import jax.numpy as jnp
import pytest

import nnx


class Cached(nnx.Module):
    w: jax.Array = nnx.param()

    def __init__(self):
        self.w = jnp.array(2.0)
        self.cache = {"k": jnp.zeros(3), "a": 1}
        self.hist = []

    @functools.cached_property
    def table(self):
        return jnp.arange(3.0)

    def __call__(self, i):
        self.cache["k"] = self.cache["k"].at[i].set(self.w)
        return self.cache["k"].sum()


def state(model):
    return list(model.cache), model.cache["k"].tolist(), model.hist, sorted(vars(model))


UNTOUCHED = ["k", "a"], [0, 0, 0], [], ["cache", "hist", "w"]


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m(0),
        lambda m: m.hist.append(1),
        lambda m: m.hist.append(jnp.ones(2)),
        lambda m: m.cache.pop("a"),
        lambda m: m.cache.update(a=m.cache.pop("a"), k=m.cache.pop("k")),
        lambda m: m.table,
    ],
)
def test_a_closed_over_container_changed_in_jit(change):
    model = Cached()
    message = (
        r"A Cached that nnx\.jit.* closes over was changed inside it: .* Pass the module as an"
    )
    for _ in range(2):
        with pytest.raises(nnx.StructureError, match=message):
            nnx.jit(lambda: (model.w, change(model)) and None)()
        assert state(model) == UNTOUCHED

    def fails():
        change(model)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        nnx.jit(fails)()
    assert state(model) == UNTOUCHED


@pytest.mark.parametrize(
    "transform",
    [
        lambda f: nnx.vmap(f)(jnp.arange(3)),
        lambda f: nnx.remat(f)(0),
        lambda f: nnx.scan(lambda c, i: (c, f(i)), None, jnp.arange(3)),
        lambda f: nnx.cond(True, f, lambda i: 0.0, 1),
        lambda f: nnx.jit(lambda: nnx.remat(f)(0))(),
    ],
)
def test_a_tracer_in_a_closed_over_container(transform):
    model = Cached()
    with pytest.raises(
        nnx.StructureError, match=r"The body of nnx\..* of a Cached that it closes over.* a Ref"
    ):
        transform(lambda i: model(i))


def test_as_an_argument_such_changes_propagate():
    model = Cached()
    nnx.jit(lambda m: m(1))(model)
    nnx.jit(lambda m: m.hist.append(m.w))(model)
    assert model.cache["k"].tolist() == [0, 2, 0] and float(model.hist[0]) == 2


def inc(ref, by=1.0):
    ref.value["a"] = ref.value["a"] + by


@pytest.mark.parametrize(
    "count, transform",
    [
        (3, lambda r: nnx.scan(lambda c, x: (c, inc(r)), None, None, length=3)),
        (3, lambda r: nnx.scan(lambda r, x: (r, inc(r)), r, None, length=3)),
        (3, lambda r: nnx.while_loop(lambda r: r.value["a"] < 3, lambda r: (inc(r), r)[1], r)),
        (1, lambda r: nnx.cond(True, lambda: inc(r), lambda: None)),
        (1, lambda r: nnx.remat(lambda: inc(r))()),
        (1, lambda r: nnx.jit(lambda: inc(r))()),
        (1, lambda r: nnx.jit(inc)(r)),
        (
            1,
            lambda r: nnx.grad(lambda w, r: (inc(r, w.value), w.value)[1])(
                nnx.Ref(1.0, "params"), r
            ),
        ),
    ],
)
def test_a_dict_in_a_ref_changed_in_place(count, transform):
    ref = nnx.Ref({"a": jnp.zeros(())}, "cache")
    transform(ref)
    assert float(ref.value["a"]) == count and not isinstance(ref.value["a"], jax.core.Tracer)


def test_a_dict_in_a_ref_changed_in_place_where_it_may_not_be_written():
    ref = nnx.Ref({"a": jnp.zeros(())}, "cache")
    w = nnx.Ref(jnp.array(1.0), "params")

    def fails(w, ref):
        inc(ref, w.value)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        nnx.grad(fails)(w, ref)
    with pytest.raises(nnx.TraceLevelError, match="a closed-over Ref is a constant there"):
        nnx.grad(lambda w: (inc(ref, w.value), w.value)[1])(w)
    with pytest.raises(nnx.AxisError, match="value that differs between the lanes"):
        nnx.vmap(lambda x: inc(ref, x))(jnp.arange(3.0))
    assert ref.value == {"a": 0.0}


def test_other_keys_with_the_same_leaves_are_a_change():
    ref = nnx.Ref({"a": jnp.zeros(())}, "cache")
    nnx.jit(lambda r: r.value.update(b=r.value.pop("a")))(ref)
    nnx.jit(lambda r: r.value.update(c=None))(ref)
    assert ref.value == {"b": 0.0, "c": None}


class Two(nnx.Module):
    w: jax.Array = nnx.param()

    def __init__(self):
        self.w = jnp.array(1.0)
        self.mode = "fast"
        self.kids = []
        self.table = {"a": 1}
        self.plain = jnp.array(5.0)


def look(m):
    slow = 100 if m.mode == "slow" else 0
    return m.w + slow + 10 * len(m.kids) + 1000 * getattr(m, "plain", 0) + 2 * len(m.table)


CHANGES = {
    "setting": lambda m: setattr(m, "mode", "slow"),
    "list": lambda m: m.kids.append(1),
    "dict": lambda m: m.table.update(b=2),
    "array": lambda m: setattr(m, "plain", m.plain + 1),
    "tie": lambda m: setattr(m, "w", nnx.Ref(jnp.array(7.0), "params")),
    "added": lambda m: setattr(m, "extra", Two()),
    "removed": lambda m: delattr(m, "plain"),
}


def with_rule(f):
    rule = nnx.custom_vjp(f)
    rule.defvjp(lambda m: (f(m), None), lambda residuals, g: (None,))
    return rule


TRANSFORMS = {
    "jit": lambda f, m: nnx.jit(f)(m),
    "remat": lambda f, m: nnx.remat(f)(m),
    "checkify": lambda f, m: nnx.checkify(f)(m)[1],
    "cond": lambda f, m: nnx.cond(True, f, f, m),
    "switch": lambda f, m: nnx.switch(0, [f, f], m),
    "scan": lambda f, m: nnx.scan(lambda c, _: (c, f(c)), m, None, length=1)[1][0],
    "map": lambda f, m: nnx.map(lambda _: f(m), jnp.arange(1))[0],
    "fori_loop": lambda f, m: nnx.fori_loop(0, 1, lambda i, c: (c[0], f(c[0])), (m, 0.0))[1],
    "while_loop": lambda f, m: nnx.while_loop(
        lambda c: c[1] < 1, lambda c: (c[0], c[1] + f(c[0])), (m, 0.0)
    )[1],
    "vmap": lambda f, m: nnx.vmap(f, in_axes=None, axis_size=2)(m)[0],
    "grad": lambda f, m: nnx.value_and_grad(f)(m)[0],
    "jvp": lambda f, m: nnx.jvp(f, (m,), ({},))[0],
    "custom_vjp": lambda f, m: with_rule(f)(m),
}


@pytest.mark.parametrize("around", ["nothing", "jit"])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_one_module_under_two_names(transform, around):
    run = TRANSFORMS[transform]

    def call(change):
        def body(n):
            change(n)
            return look(n) + look(m)

        m = Two()
        if around == "nothing":
            return m, lambda: run(body, m)
        return m, lambda: nnx.jit(lambda m: run(body, m))(m)

    names = (
        CHANGES if around == "nothing" and transform in ("remat", "cond") else ("setting", "list")
    )
    for name in names:
        m, attempt = call(CHANGES[name])
        # As an argument of `map`, it is one of the outer jit or none.
        kinds = (nnx.StructureError, nnx.TraceLevelError)
        with pytest.raises(kinds if transform == "map" or around == "jit" else kinds[0]):
            attempt()
        assert look(m) == 5003 and not hasattr(m, "extra")
    m, attempt = call(lambda n: setattr(n, "w", n.w + 1))
    assert attempt() == 10008 and m.w == 2


def test_the_message_says_which_name_to_use():
    m = Two()
    with pytest.raises(
        nnx.StructureError, match=r"A Two was changed in nnx\.remat.* the argument\."
    ):
        nnx.remat(lambda n: (CHANGES["setting"](n), look(m))[1])(m)
    kids = m.kids
    with pytest.raises(nnx.StructureError, match=r"A list of a module was changed in nnx\.remat"):
        nnx.remat(lambda n: (kids.append(1), look(n))[1])(m)
    assert m.kids == []
    # A change in another module, or one that only makes new modules, is not such a mistake.
    other = Two()
    assert nnx.remat(lambda n: (CHANGES["setting"](n), look(other))[1])(m) == 5003
    assert m.mode == "slow"


class Far:
    """An object that is far away: it is found in a list of objects."""

    def __init__(self, net):
        self.net = net


@pytest.mark.parametrize("transform", [nnx.jit, nnx.remat])
def test_one_module_under_two_names_far_away(transform):
    m = Two()
    far = [Far(m)]

    @transform
    def body(n):
        n.mode = "slow"
        return 1.0 if far[0].net.mode == "slow" else 0.0

    with pytest.raises(nnx.StructureError, match="A Two was changed"):
        body(m)
    assert m.mode == "fast"


def test_a_closed_over_list_changed_where_the_body_runs_once():
    def add(m):
        m.kids.append(1)
        m.w = m.w + 1
        return look(m)

    for transform in (nnx.remat, nnx.checkify):
        m = Two()
        transform(lambda m=m: add(m))()
        assert m.kids == [1] and m.w == 2
    m = Two()
    nnx.jit(lambda m: nnx.remat(lambda: add(m))())(m)
    assert m.kids == [1] and m.w == 2


@pytest.mark.parametrize(
    "loop",
    [
        lambda f: nnx.cond(True, f, f),
        lambda f: nnx.cond(False, f, lambda: jnp.zeros(())),
        lambda f: nnx.switch(0, [f, f]),
        lambda f: nnx.scan(lambda c, _: (c, f()), None, None, length=3),
        lambda f: nnx.fori_loop(0, 3, lambda i, c: c + f(), 0.0),
        lambda f: nnx.while_loop(lambda c: c < 3 + 0 * f(), lambda c: c + 1, 0.0),
        lambda f: nnx.jit(lambda: nnx.cond(True, f, f))(),
    ],
)
def test_a_closed_over_list_changed_where_the_body_runs_more_often_or_never(loop):
    m = Two()

    def add():
        m.kids.append(1)
        return look(m)

    with pytest.raises(nnx.StructureError, match="A Two that .* closes over was changed inside it"):
        loop(add)
    assert m.kids == []


class Holder(nnx.Module):
    def __init__(self, head):
        self.head = head
        self.kids = []


@pytest.mark.parametrize("transform", [nnx.jit, nnx.remat, lambda f: nnx.jit(nnx.remat(f))])
@pytest.mark.parametrize(
    "give",
    [
        lambda m, leaf: setattr(m, "kids", [leaf, m]),
        lambda m, leaf: m.kids.append(leaf),
        lambda m, leaf: setattr(m, "again", Holder(leaf)),
        lambda m, leaf: setattr(m, "again", (leaf, {"a": m})),
    ],
)
def test_an_argument_that_is_given_what_it_holds_by_its_name_outside(transform, give):
    leaf = Cached()
    model = Holder(leaf)

    def count(m):
        give(m, leaf)
        return len({id(x) for x in nnx.modules(m).values()})

    message = (
        r"In nnx\.\w+\(.*count\), a (Holder|list of a module) that is an argument was given a Cached "
        r"that the function closes over.*Take it from the argument"
    )
    with pytest.raises(nnx.StructureError, match=message):
        transform(count)(model)
    assert vars(model).keys() == {"head", "kids"} and model.kids == [] and model.head is leaf


@pytest.mark.parametrize("transform", [nnx.jit, nnx.remat, nnx.checkify, nnx.eval_shape])
def test_what_was_set_by_one_name_is_not_there_by_the_other(transform):
    model = Holder(Cached())

    def body(m):
        m.mode = "fast"
        return len(model.mode)

    message = r"A Holder was changed in nnx\.\w+\(.*body\): .* Use only the argument"
    with pytest.raises(nnx.StructureError, match=message) as caught:
        transform(body)(model) if transform is not nnx.eval_shape else transform(body, model)
    assert isinstance(caught.value.__cause__, AttributeError)
    assert not hasattr(model, "mode")


CALLS = [
    lambda f, m: nnx.jit(f)(m),
    lambda f, m: nnx.remat(f)(m),
    lambda f, m: nnx.jit(nnx.jit(f))(m),
    lambda f, m: nnx.jit(nnx.remat(f))(m),
    lambda f, m: nnx.cond(True, f, f, m),
]


@pytest.mark.parametrize("call", CALLS)
def test_what_a_body_changes_and_lets_go_has_changed(call):
    leaf = Cached()
    model = Holder(leaf)
    kids = model.kids

    def body(m):
        m.head.mode = "fast"
        m.head.array = m.head.w * jnp.ones(2)
        m.head.extra = nnx.Ref(m.head.w + 1)
        m.head.w += 1
        m.head = None
        old, m.kids = m.kids, []
        old.append(Holder(None))

    call(body, model)
    assert model.head is None and model.kids == [] and [k.head for k in kids] == [None]
    assert (leaf.mode, leaf.w, leaf.array.tolist(), leaf.extra.value) == ("fast", 3, [2, 2], 3)


@pytest.mark.parametrize("call", CALLS)
def test_a_module_that_only_the_function_knows_becomes_a_part_of_an_argument(call):
    leaf, model = Cached(), Holder(None)
    call(lambda m: m.kids.append(leaf), model)
    assert model.kids == [leaf]


def test_a_list_that_is_put_into_itself():
    model = Holder(None)
    nnx.jit(lambda m: m.kids.append(m.kids))(model)
    assert len(model.kids) == 1 and model.kids[0] is model.kids
    with pytest.raises(nnx.StructureError, match="A Holder that nnx.jit.* closes over was changed"):
        nnx.jit(lambda: model.kids.append(model.kids))()
    assert len(model.kids) == 1
