import jax
import jax.numpy as jnp
import pytest

import nnx
from tests.models import Dense, Net, sgd


def stack(n=3):
    models = [Dense(seed=i) for i in range(n)]
    layers = jax.tree.map(lambda *leaves: jnp.stack(leaves), *models)
    return layers, models


def test_a_stack_of_layers_runs_like_the_loop(data):
    x, _ = data
    layers, models = stack()
    out, _ = nnx.scan(lambda x, layer: (jnp.tanh(layer(x)), None), x, layers)
    expected = x
    for m in models:
        expected = jnp.tanh(m(expected))
    assert jnp.allclose(out, expected, atol=1e-6) and layers.calls.tolist() == [1, 1, 1]


def test_gradients_through_scan_and_remat_are_those_of_the_loop(data):
    x, _ = data
    layers, _ = stack()

    def pure(w):
        h = x
        for i in range(3):
            h = jnp.tanh(h @ w[i])
        return h.sum()

    def plain(layers):
        return nnx.scan(lambda h, m: (jnp.tanh(m(h)), None), x, layers)[0].sum()

    def again(layers):
        body = nnx.remat(lambda h, m: jnp.tanh(m(h)))
        return nnx.scan(lambda h, m: (body(h, m), None), x, layers)[0].sum()

    expected = jax.grad(pure)(layers.w)
    for i, loss in enumerate((plain, again, nnx.jit(plain), nnx.jit(again))):
        assert jnp.allclose(nnx.grad(loss)(layers)["w"], expected, atol=1e-5)
        assert layers.calls.tolist() == [i + 1] * 3


def test_an_epoch_is_one_program(data):
    x, y = data
    a, b = Net(), Net()
    step = nnx.jit(lambda model, batch: sgd(model, *batch))
    batches = (jnp.stack([x, 2 * x, 3 * x]), jnp.stack([y] * 3))
    with jax.check_tracer_leaks():
        assert nnx.scan(lambda _, batch: (None, step(a, batch)), None, batches) == (None, None)
    for i in range(3):
        step(b, (batches[0][i], batches[1][i]))
    for path, value in nnx.split(a)[1].items():
        assert jnp.allclose(value, nnx.split(b)[1][path], atol=1e-6)
    nnx.jit(lambda m, bs: nnx.scan(lambda _, b: (None, step(m, b)), None, bs))(a, batches)
    assert a.blocks[0].calls == 12


def test_carry_module_argument_and_outputs(data):
    x, _ = data
    model = Dense()

    def body(carry, x):
        m, total = carry
        out = m(x[None])
        return (m, total + out.sum()), nnx.Ref(out[0], "out")

    (same, total), outs = nnx.scan(body, (model, jnp.array(0.0)), x)
    assert same is model and model.calls == 4
    assert outs.value.shape == (4, 2) and jnp.allclose(total, (x @ model.w).sum(), atol=1e-5)


def plus_one(m):
    m.b = m.b + 1
    return m


LOOPS = {
    "scan": lambda f, c: nnx.scan(lambda c, _: (f(c), None), c, None, length=3)[0],
    "fori_loop": lambda f, c: nnx.fori_loop(0, 3, lambda i, c: f(c), c),
    "while_loop": lambda f, c: nnx.while_loop(
        lambda c: c[1] < 3, lambda c: (f(c[0]), c[1] + 1), (c, 0)
    )[0],
    "jit of scan": lambda f, c: nnx.jit(
        lambda c: nnx.scan(lambda c, _: (f(c), None), c, None, length=3)[0]
    )(c),
    "python": lambda f, c: f(f(f(c))),
}


@pytest.mark.parametrize("loop", LOOPS)
def test_a_renewed_module_leaves_the_callers_alone(loop):
    model = Dense()
    new = LOOPS[loop](lambda m: plus_one(nnx.clone(m)), model)
    assert new is not model and (new.b == 3).all() and (model.b == 0).all()
    same = LOOPS[loop](plus_one, model)
    assert same is model and (model.b == 3).all()


@pytest.mark.parametrize("loop", LOOPS)
def test_modules_that_share_are_renewed_together(loop):
    model = Dense()
    pair = LOOPS[loop](lambda c: _both(nnx.clone(c)), (model, model))
    assert pair[0] is pair[1] is not model and (pair[0].b == 3).all() and (model.b == 0).all()


def _both(pair):
    plus_one(pair[0])
    return pair


@pytest.mark.parametrize("loop", [x for x in LOOPS if x != "python"])
def test_a_module_is_not_kept_and_renewed_at_once(loop):
    model, other = Dense(), Dense()

    class Holder(nnx.Module):
        def __init__(self, inner):
            self.inner = inner

    def by_closure(m):
        plus_one(model)
        return nnx.clone(m)

    wrongs = {
        "kept and renewed": [
            lambda m: nnx.clone(plus_one(m)),
            by_closure,
        ],
        "another one came in": [lambda m: other],
    }
    for message, bodies in wrongs.items():
        for body in bodies:
            with pytest.raises(nnx.CarryError, match=message):
                LOOPS[loop](body, model)
    with pytest.raises(nnx.CarryError, match="kept and renewed"):
        LOOPS[loop](lambda h: Holder(h.inner), Holder(model))
    assert (model.b == 0).all() and (other.b == 0).all()


def test_a_loop_of_no_step_gives_what_came_in():
    model = Dense()
    renew = lambda m: plus_one(nnx.clone(m))
    assert nnx.scan(lambda c, _: (renew(c), None), model, None, length=0)[0] is model
    assert nnx.fori_loop(3, 3, lambda i, c: renew(c), model) is model


@pytest.mark.parametrize("how", ["closure", "argument", "slice"])
def test_refs_that_begin_with_one_array_are_two(how):
    one = jnp.array(1)
    a, b = nnx.Ref(one), nnx.Ref(one)

    def fibonacci(a, b):
        a.value, b.value = b.value, a.value + b.value

    if how == "closure":
        nnx.fori_loop(0, 6, lambda i, _: fibonacci(a, b), None)
    elif how == "argument":
        nnx.while_loop(
            lambda c: c[2] < 6, lambda c: (c[0], c[1], fibonacci(*c[:2]) or c[2] + 1), (a, b, 0)
        )
    else:
        ones = jnp.ones(6, jnp.int32)
        x, y = nnx.Ref(ones), nnx.Ref(ones)

        def body(_, pair):
            pair[0].value, a.value = a.value, pair[0].value + pair[1].value + a.value
            return None, None

        nnx.scan(body, None, (x, y))
        assert x.value.tolist() == [1, 3, 5, 7, 9, 11] and a.value == 13
        return
    assert (int(a.value), int(b.value)) == (13, 21)


def test_everything_is_carried_by_an_ellipsis():
    layer = Dense()
    _, ys = nnx.scan(
        lambda c, s: (c, s[0](s[1])), None, (layer, jnp.ones((5, 2))), axes={...: nnx.CARRY}
    )
    assert ys.shape == (5, 2) and layer.calls == 5


def test_axes_carry_by_filter(data):
    x, _ = data
    layers, _ = stack()
    layers.calls = jnp.array(0)
    nnx.scan(lambda h, m: (m(h), None), x, layers, axes={"counters": nnx.CARRY})
    assert layers.calls == 3


def test_random_numbers_in_a_scan_are_those_of_the_loop():
    def f(_, __):
        return None, jax.random.normal(nnx.make_rng("x"), ())

    with nnx.scope(1):
        _, scanned = nnx.scan(f, None, None, length=3)
        after = f(None, None)[1]
    with nnx.scope(1):
        looped = [f(None, None)[1] for _ in range(4)]
    assert jnp.allclose(jnp.append(scanned, after), jnp.stack(looped))


def test_reverse_unroll_length_and_nothing():
    assert nnx.scan(lambda c, x: (c * 2 + x, c), 0, jnp.arange(4), reverse=True, unroll=2)[0] == 34
    ref = nnx.Ref(jnp.array(1.0))

    def double(c, x):
        ref.value *= 2
        return c, x

    assert nnx.scan(double, 0, jnp.zeros((0, 2)))[1].shape == (0, 2) and ref.value == 1.0


def test_while_and_fori_carry_refs_and_closures():
    n = nnx.Ref(jnp.array(1))
    model = Dense()

    def body(carry):
        i, m = carry
        m.b = m.b + 1
        n.value *= 2
        return i + 1, m

    i, same = nnx.while_loop(lambda carry: n.value + carry[1].b[0] < 30, body, (0, model))
    assert same is model and (int(i), int(n.value), float(model.b[0])) == (5, 32, 5.0)

    def add(i, total):
        n.value += i
        return total + i

    assert nnx.fori_loop(0, 4, add, 0) == 6 and n.value == 38
    assert nnx.jit(lambda k: nnx.fori_loop(0, k, add, 0))(3) == 3 and n.value == 41


def test_map():
    n = nnx.Ref(jnp.array(0))

    def f(x):
        n.value += 1
        return {"y": x * 2}

    assert nnx.map(f, jnp.arange(5))["y"].tolist() == [0, 2, 4, 6, 8] and n.value == 5
    assert nnx.map(lambda x: x * 2, jnp.arange(5), batch_size=2).tolist() == [0, 2, 4, 6, 8]
    with pytest.raises(nnx.AxisError, match="takes no modules or Refs in xs"):
        nnx.map(lambda r: r.value, nnx.Ref(jnp.ones(2)), batch_size=1)


def grow(m, what):
    setattr(m, what, jnp.ones(2))


X = jnp.ones((3, 2))


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda m: nnx.scan(lambda c, x: (c, grow(m, "w")), None, X), nnx.CarryError, r"Ref 'w' .* from float32\[2,2\] to float32\[2\] in one step"),
        (lambda m: nnx.scan(lambda c, x: (c, setattr(m, "b", m.b.astype(int))), None, X), nnx.CarryError, r"'b' .* float32\[2\] to int32\[2\]"),
        (lambda m: nnx.scan(lambda c, x: (x, None), 1.0, X), nnx.CarryError, r"The carry of .* to float32\[2\]"),
        (lambda m: nnx.scan(lambda c, x: ({"b": c["a"]}, None), {"a": 1.0}, X), nnx.CarryError, r"changes its structure"),
        (lambda m: nnx.scan(lambda c, x: c, None, X), nnx.CarryError, r"must return \(carry, y\), but it returned NoneType"),
        (lambda m: nnx.scan(lambda c, x: (1.0, None), m, X), nnx.CarryError, r"from Dense to float"),
        (lambda m: nnx.scan(lambda c, x: (Net(), None), m, X), nnx.CarryError, r"one with another structure or other settings"),
        (lambda m: nnx.scan(lambda c, x: (c, setattr(c, "n", 1)), m, X), nnx.StructureError, r"changes the structure of a module"),
        (lambda m: nnx.scan(lambda c, x: (c, setattr(m, "n", 1)), None, X), nnx.TraceLevelError, r"'n' of a Dense was set inside nnx\.scan"),
        (lambda m: nnx.scan(lambda c, x: (c, None), m, m), nnx.AxisError, r"two specifications .*nnx\.CARRY"),
        (lambda m: nnx.scan(lambda c, x: (c, None), None, (X, jnp.ones(2))), nnx.AxisError, r"two sizes to map over: 3 of .* and 2"),
        (lambda m: nnx.scan(lambda c, x: (c, None), None, X, axes={"params": 1}), nnx.AxisError, r"the axis 1. It slices the Refs in xs along axis 0"),
        (lambda m: nnx.while_loop(lambda _: m(X).sum() > 0, lambda _: None, None), nnx.TraceLevelError, r"calls.*constant there"),
        (lambda m: nnx.while_loop(lambda c: c(X).sum() > 0, lambda c: c, m), nnx.StructureError, r"'calls' was written in the condition of nnx\.while_loop"),
        (lambda m: nnx.fori_loop(0, 3, lambda i, c: grow(m, "w"), None), nnx.CarryError, r"Ref 'w' of nnx\.fori_loop"),
    ],
)  # fmt: skip
def test_errors_name_the_ref_and_change_nothing(call, error, message):
    model = Dense()
    before = {p: v for p, v in nnx.split(model)[1].items()}
    with pytest.raises(error, match=message):
        call(model)
    for path, value in nnx.split(model)[1].items():
        assert jnp.array_equal(value, before[path])


def test_an_exception_in_the_middle_changes_nothing(data):
    model = Dense()

    def bad(c, x):
        model(x)
        raise ZeroDivisionError

    for call in (
        lambda: nnx.scan(bad, None, data[0]),
        lambda: nnx.fori_loop(0, 3, lambda i, c: bad(c, data[0]), None),
        lambda: nnx.while_loop(lambda c: True, lambda c: bad(c, data[0]), None),
        lambda: nnx.cond(True, lambda: bad(None, data[0]), lambda: None),
        lambda: nnx.remat(lambda: bad(None, data[0]))(),
    ):
        with pytest.raises(ZeroDivisionError):
            call()
    assert model.calls == 0


def test_cond_and_switch_write_what_their_branch_writes(data):
    x, _ = data
    for wrap in (lambda f: f, nnx.jit):
        model, n = Dense(), nnx.Ref(jnp.array(0))

        def one(m, x, model=model):
            return m(x)

        def two(m, x, n=n):
            n.value += 10
            return x @ m.w

        f = wrap(lambda p, x, model=model, one=one, two=two: nnx.cond(p, one, two, model, x))
        assert jnp.allclose(f(True, x), x @ model.w) and (int(model.calls), int(n.value)) == (1, 0)
        f(False, x)
        assert (int(model.calls), int(n.value)) == (1, 10)
    branches = [lambda r, k=k: setattr(r, "value", r.value + k) for k in range(3)]
    r = nnx.Ref(jnp.array(0))
    for i in (2, 1, 7):
        nnx.switch(i, branches, r)
    assert r.value == 5


def test_the_same_change_of_structure_in_both_branches_propagates():
    model = Dense()

    def add(m, x):
        m.extra = nnx.Ref(x, "extra")

    nnx.cond(True, lambda m: add(m, jnp.array(1.0)), lambda m: add(m, jnp.array(2.0)), model)
    assert model.extra.value == 1.0


@pytest.mark.parametrize(
    "yes, no, message",
    [
        (lambda m: setattr(m, "b", jnp.ones(3)), lambda m: None, r"Ref 'b' .* float32\[3\] after .* float32\[2\]"),
        (lambda m: 1.0, lambda m: (1.0,), r"return different structures"),
        (lambda m: jnp.ones(2), lambda m: jnp.ones(3), r"The output .* float32\[2\] after .* float32\[3\]"),
        (lambda m: setattr(m, "n", 1), lambda m: None, r"leave different structures behind"),
    ],
)  # fmt: skip
def test_branches_that_differ(yes, no, message):
    model = Dense()
    with pytest.raises(nnx.BranchError, match=message):
        nnx.cond(True, yes, no, model)
    assert not hasattr(model, "n") and model.b.shape == (2,)


def test_remat_eval_shape_make_jaxpr_checkify(data):
    x, _ = data
    model = Dense()
    grads = nnx.grad(lambda m: nnx.remat(m)(x).sum())(model)
    assert jnp.allclose(grads["b"], 4) and model.calls == 1
    shape = nnx.eval_shape(lambda m, x: (m, m(x), Dense()), model, x)
    assert shape[0] is not model and shape[0].calls.shape == () and shape[1].shape == (4, 2)
    assert isinstance(shape[2].w, jax.ShapeDtypeStruct) and model.calls == 1
    jaxpr = nnx.make_jaxpr(lambda m, x: m(x))(model, x)
    assert len(jaxpr.jaxpr.outvars) == 2 and model.calls == 1

    from jax.experimental import checkify

    def checked(m, x):
        checkify.check((x > 0).all(), "x must be positive")
        return m(x)

    error, out = nnx.jit(nnx.checkify(checked))(model, jnp.abs(x) + 1)
    assert error.get() is None and out.shape == (4, 2) and model.calls == 2
    error, _ = nnx.checkify(checked)(model, -jnp.abs(x))
    with pytest.raises(Exception, match="x must be positive"):
        error.throw()


def test_every_level_nested(data):
    x, _ = data
    layers, _ = stack()
    head = Dense(seed=9)

    @nnx.jit
    def step(layers, x):
        def loss(layers):
            def body(h, layer):
                h = nnx.cond(h.sum() > 0, lambda h: layer(h), lambda h: layer(-h), h)
                return nnx.remat(jnp.tanh)(h), None

            h = nnx.vmap(lambda row: nnx.scan(body, row, layers)[0])(x)
            return (h @ head.w).sum()

        return nnx.value_and_grad(loss)(layers)

    with pytest.raises(nnx.RefError):
        step(layers, x)  # the layers are closed over by vmap, scan slices them in each lane
    layers.calls = jnp.zeros(3, int)

    def pure(w):
        def row(r):
            for i in range(3):
                r = jnp.tanh(jnp.where(r.sum() > 0, r @ w[i], -r @ w[i]))
            return r

        return (jax.vmap(row)(x) @ head.w).sum()

    @nnx.jit
    def batched(layers, x):
        def loss(layers):
            def body(h, layer):
                one = lambda r: nnx.cond(
                    r.sum() > 0, lambda r: r @ layer.w, lambda r: -r @ layer.w, r
                )
                return nnx.remat(jnp.tanh)(nnx.vmap(one)(h)), None

            return (nnx.scan(body, x, layers)[0] @ head.w).sum()

        return nnx.value_and_grad(loss)(layers)

    with jax.check_tracer_leaks():
        value, grads = batched(layers, x)
    expected, expected_grads = jax.value_and_grad(pure)(layers.w)
    assert jnp.allclose(value, expected, atol=1e-5)
    assert jnp.allclose(grads["w"], expected_grads, atol=1e-4)


def test_modules_of_a_carry_do_not_change_places():
    def pair():
        return nnx.Ref(jnp.array(1.0)), nnx.Ref(jnp.array(2.0))

    message = "another one came in.*number of steps"
    for a, b in (pair(), (Dense(seed=0), Dense(seed=1))):
        with pytest.raises(nnx.CarryError, match=message):
            nnx.scan(lambda c, _: ((c[1], c[0]), None), (a, b), None, length=3)
        with pytest.raises(nnx.CarryError, match=message):
            nnx.fori_loop(0, 3, lambda i, c: {"a": c["b"], "b": c["a"]}, {"a": a, "b": b})
        with pytest.raises(nnx.CarryError, match=message):
            nnx.while_loop(lambda c: c[2] < 3, lambda c: (c[1], c[0], c[2] + 1), (a, b, 0))
    a, b = pair()
    c, d = nnx.fori_loop(0, 3, lambda i, c: nnx.clone((c[1], c[0])), (a, b))
    assert (float(c.value), float(d.value)) == (2, 1) and (float(a.value), float(b.value)) == (1, 2)


def test_one_ref_at_two_places_of_a_carry():
    ref = nnx.Ref(jnp.array(1.0))

    def body(c, _):
        return (c[0], nnx.Ref(c[1].value * 10)), None

    (x, y), _ = nnx.scan(body, (ref, ref), None, length=2)
    assert x is ref and (float(x.value), float(y.value)) == (1.0, 100.0)
    (x, y), _ = nnx.scan(lambda c, _: ((c[1], c[0]), None), (ref, ref), None, length=1)
    assert x is y is ref


def test_plain_arrays_of_a_module_in_a_carry():
    class Buffered(nnx.Module):
        def __init__(self):
            self.w = nnx.Ref(jnp.zeros(()), "params")
            self.table = jnp.zeros(2)

    def same_table(m, _):
        new = nnx.clone(m)
        new.w.value += 1
        return new, None

    came = Buffered()
    m, _ = nnx.scan(same_table, came, None, length=3)
    assert (float(m.w.value), float(came.w.value)) == (3, 0)
    plus = lambda m: jax.tree.map(lambda a: a + 1, m)
    for loop in (
        lambda m: nnx.scan(lambda m, _: (plus(m), None), m, None, length=3)[0],
        lambda m: nnx.fori_loop(0, 3, lambda i, m: plus(m), m),
        lambda m: nnx.while_loop(lambda m: m.table[0] < 3, plus, m),
    ):
        new = loop(m)
        assert float(new.w.value) == 6 and new.table.tolist() == [3, 3]
    assert float(m.w.value) == 3 and m.table.tolist() == [0, 0]
    wider = lambda m, _: (jax.tree.map(lambda a: jnp.stack([a, a]), m), None)
    with pytest.raises(nnx.CarryError, match=r"'table' .*float32\[2\] to float32\[2,2\]|Ref 'w'"):
        nnx.scan(wider, m, None, length=3)


@pytest.mark.parametrize(
    ("first", "body", "ok"),
    [
        (0, lambda c, x: (c + x, x), True),
        (0.0, lambda c, x: ((c + x).astype(jnp.bfloat16), x), True),
        (0.0, lambda c, x: (c.astype(int), x), False),
        (0, lambda c, x: (c > 0, x), False),
    ],
)
def test_a_python_number_in_the_carry_becomes_what_jax_makes_of_it(first, body, ok):
    xs = jnp.arange(3.0)
    if ok:
        got, wanted = nnx.scan(body, first, xs)[0], jax.lax.scan(body, first, xs)[0]
        assert got == wanted and got.dtype == wanted.dtype
        return
    with pytest.raises(TypeError, match="equal types"):
        jax.lax.scan(body, first, xs)
    with pytest.raises(
        nnx.CarryError, match=r"The carry of nnx\.scan\(.*\) changes from .* in one step"
    ):
        nnx.scan(body, first, xs)
