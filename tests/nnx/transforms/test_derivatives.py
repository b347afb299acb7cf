import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nnx
from tests.models import Dense


def close(a, b):
    np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-4)


def f(w, b, x):
    return jnp.tanh(x @ w + b)


def net(m, x):
    m.calls = m.calls + 1
    return f(m.w, m.b, x)


def test_vjp_and_jvp_are_those_of_jax(dense, data):
    x, y = data
    w, b = dense.w, dense.b
    for wrap in (lambda g: g, nnx.jit):
        out, pulled = wrap(lambda m, x, y: (lambda o, p: (o, p(y)))(*nnx.vjp(net, m, x)))(
            dense, x, y
        )
        expected, pull = jax.vjp(f, w, b, x)
        dw, db, dx = pull(y)
        close(out, expected)
        close(pulled[0]["w"], dw), close(pulled[0]["b"], db), close(pulled[1], dx)
        direction = ({"w": y.T @ x}, y)
        out, moved = wrap(lambda m, x, d: nnx.jvp(net, (m, x), d))(dense, x, direction)
        close(moved, jax.jvp(f, (w, b, x), (y.T @ x, jnp.zeros(2), y))[1])
    assert dense.calls == 4


def test_linearize_is_that_of_jax(dense, data):
    x, y = data
    w, b = dense.w, dense.b
    tangents = [(jnp.ones_like(w), -b, y), (0 * w, 0 * b, x)]

    def both(m, x):
        out, jvp_fn = nnx.linearize(net, m, x)
        return out, [jvp_fn({"w": dw, "b": db}, dx) for dw, db, dx in tangents]

    expected, linear = jax.linearize(f, w, b, x)
    for wrap in (lambda g: g, nnx.jit):
        out, moved = wrap(both)(dense, x)
        close(out, expected)
        for a, t in zip(moved, tangents):
            close(a, linear(*t))
    # The function ran once for each linearization, however often that was used.
    assert dense.calls == 2


def test_a_linearization_leaves_a_program_and_is_mapped(dense, data):
    x, y = data
    jvp_fn = nnx.jit(lambda m, x: nnx.linearize(net, m, x)[1])(dense, x)
    before = dense.w
    dense.w = dense.w * 0
    steps = jnp.stack([y, 2 * y, x])
    pushed = jax.vmap(lambda dx: jvp_fn({}, dx))(steps)
    expected = jax.linearize(lambda x: f(before, dense.b, x), x)[1]
    close(pushed, jnp.stack([expected(t) for t in steps]))


def test_linearize_has_bound_methods_closures_aux_and_modules_in_the_output(dense, data):
    x, y = data
    other = Dense()
    out, jvp_fn, aux = nnx.linearize(lambda m, x: (m(x) * other.w.sum(), m), dense, x, has_aux=True)
    assert aux is dense
    close(jvp_fn({}, y), y @ dense.w * other.w.sum())
    out, jvp_fn = nnx.linearize(dense.__call__, x)
    close(jvp_fn({"w": dense.w}, y), y @ dense.w + x @ dense.w)
    out, jvp_fn = nnx.linearize(lambda m: m, dense)
    assert out is dense
    close(jvp_fn({"w": x.T @ x})["w"], x.T @ x)


def test_aux_goes_along(dense, data):
    x, y = data
    out, pull, aux = nnx.vjp(lambda m, x: (net(m, x), (m, x)), dense, x, has_aux=True)
    assert aux[0] is dense and pull(y)[0]["w"].shape == (2, 2)
    _, _, aux = nnx.jvp(lambda m, x: (net(m, x), m), (dense, x), ({}, x), has_aux=True)
    assert aux is dense and dense.calls == 2


@pytest.mark.parametrize("ours, theirs", [(nnx.jacrev, jax.jacrev), (nnx.jacfwd, jax.jacfwd)])
def test_jacobians(dense, data, ours, theirs):
    x, _ = data

    def g(m, x):
        return {"out": net(m, x), "sum": m.w.sum() * x.sum()}

    def pure(w, b, x):
        return {"out": f(w, b, x), "sum": w.sum() * x.sum()}

    jac = ours(g, argnums=(0, 1))(dense, x)
    expected = theirs(pure, argnums=(0, 1, 2))(dense.w, dense.b, x)
    for name in expected:
        close(jac[name][0]["w"], expected[name][0])
        close(jac[name][0]["b"], expected[name][1])
        close(jac[name][1], expected[name][2])
    assert dense.calls == 1
    jac, aux = nnx.jit(ours(lambda m, x: (net(m, x), x), has_aux=True))(dense, x)
    close(jac["w"], expected["out"][0])


def test_hessian(dense, data):
    x, _ = data
    h = nnx.hessian(lambda m: net(m, x).sum())(dense)
    expected = jax.hessian(lambda p: f(p["w"], p["b"], x).sum())({"w": dense.w, "b": dense.b})
    for a in "wb":
        for b in "wb":
            close(h[a][b], expected[a][b])
    assert dense.calls == 1
    plain = nnx.hessian(lambda x: (x**3).sum())(jnp.arange(2.0))
    close(plain, jnp.diag(6 * jnp.arange(2.0)))


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda m, x: nnx.jvp(net, (m, x), (x,)), nnx.DifferentiationError, "2 primals and 1 tangents"),
        (lambda m, x: nnx.jvp(net, (m, x), ({"c": x}, x)), nnx.UnknownPathError, r"'c', which is not .*'w', 'b'"),
        (lambda m, x: nnx.jvp(net, (m, x), ({"w": x}, x)), nnx.ShapeError, r"argument 0 at 'w' of float32\[4,2\], .* must be float32\[2,2\]"),
        (lambda m, x: nnx.linearize(net, m, x, wrt="none"), nnx.DifferentiationError, "'none' has nothing"),
        (lambda m, x: nnx.linearize(net, m, x, has_aux=True), nnx.DifferentiationError, r"nnx.linearize\(net\) must return \(out, aux\)"),
        (lambda m, x: nnx.linearize(lambda y: net(m, y), x), nnx.TraceLevelError, "constant there"),
        (lambda m, x: nnx.linearize(lambda m: m.w, m)[1](), nnx.DifferentiationError, r"takes 1 tangents.*got 0"),
        (lambda m, x: nnx.linearize(lambda m: m.w, m)[1]({"c": x}), nnx.UnknownPathError, r"'c', which is not .*'w', 'b'"),
        (lambda m, x: nnx.linearize(lambda m: m.w, m)[1]({"w": x}), nnx.ShapeError, r"at 'w' of float32\[4,2\], .* must be float32\[2,2\]"),
        (lambda m, x: nnx.vjp(net, m, x, wrt="none"), nnx.DifferentiationError, "'none' has nothing"),
        (lambda m, x: nnx.vjp(net, m, x, has_aux=True), nnx.DifferentiationError, r"must return \(out, aux\)"),
        (lambda m, x: nnx.jacrev(lambda: net(m, x))(), nnx.DifferentiationError, r"with 0 positional"),
        (lambda m, x: nnx.jacfwd(lambda y: net(m, y))(x), nnx.TraceLevelError, "constant there"),
    ],
)  # fmt: skip
def test_errors(dense, data, call, error, message):
    with pytest.raises(error, match=message):
        call(dense, data[0])
    assert dense.calls == 0


@nnx.custom_vjp
def clipped(m, x):
    m.calls = m.calls + 1
    return x @ m.w


def clipped_fwd(m, x):
    m.calls = m.calls + 1
    return x @ m.w, (m.w, x)


def clipped_bwd(residuals, g):
    w, x = residuals
    return {"w": jnp.clip(x.T @ g, -0.5, 0.5)}, g @ w.T


clipped.defvjp(clipped_fwd, clipped_bwd)


@nnx.custom_jvp
def doubled(m, x):
    m.calls = m.calls + 1
    return x @ m.w


@doubled.defjvp
def doubled_rule(primals, tangents):
    (m, x), (dm, dx) = primals, tangents
    m.calls = m.calls + 1
    return x @ m.w, 2 * (x @ dm["w"]) + dx @ m.w


@pytest.mark.parametrize("wrap", [lambda f: f, nnx.jit])
def test_custom_rules_are_used(data, wrap):
    x, _ = data
    model = Dense()
    g, gx = wrap(nnx.grad(lambda m, x: clipped(m, x).sum(), argnums=(0, 1)))(model, x)
    close(g["w"], jnp.clip(x.T @ jnp.ones((4, 2)), -0.5, 0.5))
    close(gx, jnp.ones((4, 2)) @ model.w.T)
    assert (g["b"] == 0).all() and model.calls == 1
    close(wrap(clipped)(model, x), x @ model.w)
    g = wrap(nnx.grad(lambda m: doubled(m, x).sum()))(model)
    close(g["w"], 2 * x.T @ jnp.ones((4, 2)))
    close(wrap(doubled)(model, x), x @ model.w)
    close(nnx.jvp(doubled, (model, x), ({"w": model.w}, jnp.zeros_like(x)))[1], 2 * x @ model.w)
    assert model.calls == 5


def test_custom_rules_nest_and_vmap_without_leaks(data):
    x, _ = data
    model = Dense()
    with jax.check_tracer_leaks():
        g = nnx.jit(nnx.grad(lambda m: nnx.vmap(lambda r: clipped(m, r[None]))(x).sum()))(model)
        close(g["w"], jnp.stack([jnp.clip(jnp.outer(r, jnp.ones(2)), -0.5, 0.5) for r in x]).sum(0))


def test_custom_rules_with_fixed_arguments_and_closures(data):
    x, _ = data
    scale = nnx.Ref(jnp.array(3.0))

    def power(m, n, x):
        return scale.value * (x @ m.w) ** n

    rule = nnx.custom_vjp(power, nondiff_argnums=(1,))
    rule.defvjp(
        lambda m, n, x: (power(m, n, x), (x, x @ m.w)),
        lambda n, res, g: ({"w": res[0].T @ (g * n * scale.value * res[1] ** (n - 1))}, None),
    )
    model = Dense()
    g = nnx.grad(lambda m: rule(m, 2, x).sum())(model)
    close(g["w"], nnx.grad(lambda m: (3.0 * (x @ m.w) ** 2).sum())(model)["w"])


@pytest.mark.parametrize(
    "fwd, bwd, message",
    [
        (clipped_fwd, lambda r, g: ({},), r"tuple of 2 cotangents.* returned 1"),
        (
            clipped_fwd,
            lambda r, g: ({"q": g}, None),
            r"for argument 0 at 'q', .* has only 'w', 'b'",
        ),
        (
            clipped_fwd,
            lambda r, g: ({"w": g}, None),
            r"argument 0 at 'w' of float32\[4,2\], .*be float32\[2,2\]",
        ),
        (
            clipped_fwd,
            lambda r, g: ({"w": r[0].T}, {"a": g}),
            r"argument 1 with the structure.*None",
        ),
        (clipped_fwd, lambda r, g: (r[0], None), r"argument 0 that is a .*a dict by path"),
        (lambda m, x: x @ m.w, lambda r, g: (None, None), r"must return \(out, residuals\)"),
    ],
)
def test_custom_rules_that_do_not_fit(dense, data, fwd, bwd, message):
    rule = nnx.custom_vjp(lambda m, x: x @ m.w)
    with pytest.raises(nnx.CustomRuleError, match=r"rule is not defined.*defvjp\(fwd, bwd\)"):
        rule(dense, data[0])
    with pytest.raises(nnx.CustomRuleError, match=r"not defined.*defjvp\(rule\)"):
        nnx.custom_jvp(lambda m, x: x @ m.w)(dense, data[0])
    rule.defvjp(fwd, bwd)
    with pytest.raises(nnx.CustomRuleError, match=message):
        nnx.grad(lambda m: rule(m, data[0]).sum())(dense)
    assert dense.calls == 0


def test_custom_rules_draw_from_the_ambient_stream(dense, data):
    x, _ = data
    rule = nnx.custom_vjp(lambda m, x: x @ m.w + jax.random.normal(nnx.make_rng("n"), ()))

    def fwd(m, x):
        noise = jax.random.normal(nnx.make_rng("n"), ())
        return x @ m.w + noise, noise

    rule.defvjp(fwd, lambda noise, g: ({"b": noise * jnp.ones(2)}, None))
    with nnx.scope(0):
        a = nnx.grad(lambda m: rule(m, x).sum())(dense)["b"]
        b = nnx.grad(lambda m: rule(m, x).sum())(dense)["b"]
    with nnx.scope(0):
        close(a, jax.random.normal(nnx.make_rng("n"), ()) * jnp.ones(2))
    assert not jnp.allclose(a, b)


def test_one_array_in_several_places_is_differentiated_at_each():
    a = jnp.array(2.0)
    m, n = Holder(a), Holder(a)

    def f(m, n, y):
        return m.a * 5 + n.a * 7 + y * 11

    g = nnx.grad(f, wrt=..., argnums=(0, 1, 2))(m, n, a)
    assert (g[0]["a"], g[1]["a"], g[2]) == (5, 7, 11)
    rule = nnx.custom_vjp(f)
    rule.defvjp(
        lambda *args: (f(*args), None), lambda _, g: ({"a": 50 * g}, {"a": 70 * g}, 110 * g)
    )
    g = nnx.grad(rule, wrt=..., argnums=(0, 1, 2))(m, n, a)
    assert (g[0]["a"], g[1]["a"], g[2]) == (50, 70, 110)
    assert nnx.grad(lambda a: rule(Holder(a), Holder(a), a))(a) == 230


class Holder(nnx.Module):
    def __init__(self, a):
        self.a = a
        self.r = nnx.Ref(jnp.array(1.0), "params")


def test_cotangents_of_a_shared_ref_add_up():
    rule = nnx.custom_vjp(lambda u, v: u.value * v.value)
    rule.defvjp(lambda u, v: (u.value * v.value, None), lambda _, g: ({"": 100 * g}, {"": g}))
    w = nnx.Ref(jnp.array(2.0), "params")
    assert nnx.grad(lambda w: rule(w, w))(w)[""] == 101
    assert nnx.grad(lambda d: rule(*d))([w, nnx.Ref(jnp.array(3.0), "params")])["0"] == 100


def _jvp_rule(k):
    rule = nnx.custom_jvp(lambda w: w.value * k.value)
    rule.defjvp(lambda p, t: (p[0].value * k.value, t[0][""] * k.value))
    return rule


def _vjp_rule(k):
    rule = nnx.custom_vjp(lambda w: w.value * k.value)
    rule.defvjp(lambda w: (w.value * k.value, None), lambda _, g: ({"": g * k.value},))
    return rule


WRAPS = {
    "jit": nnx.jit,
    "remat": nnx.remat,
    "scan": lambda f: lambda w: nnx.scan(lambda c, _: (c + f(w), None), 0.0, None, length=1)[0],
    "cond": lambda f: lambda w: nnx.cond(w.value > 0, lambda: f(w), lambda: 0.0),
}


@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize("make", [_jvp_rule, _vjp_rule])
def test_rules_that_run_late_see_the_refs_of_their_call(make, wrap):
    k, w = nnx.Ref(jnp.array(1.0)), nnx.Ref(jnp.array(2.0), "params")
    inner = WRAPS[wrap](make(k))
    kept = nnx.jit(lambda w: nnx.grad(inner)(w))
    with_argument = nnx.jit(lambda w, k: nnx.grad(inner)(w))
    for value in (1.0, 5.0):
        k.value = jnp.array(value)
        assert nnx.grad(inner)(w)[""] == value
        assert kept(w)[""] == value
        assert with_argument(w, k)[""] == value


def test_a_backward_rule_writes_nothing(dense, data):
    rule = nnx.custom_vjp(lambda m, x: x @ m.w)
    count = nnx.Ref(0)

    def bwd(_, g):
        count.value = count.value + 1
        return None, None

    rule.defvjp(clipped_fwd, bwd)
    with pytest.raises(
        nnx.CustomRuleError, match="backward rule .* changed or returned a Ref.*forward rule"
    ):
        rule(dense, data[0])
    assert count.value == 0


@pytest.mark.parametrize(
    "inside",
    [
        lambda k: nnx.grad(lambda w: w.value * k.value),
        lambda k: lambda w: nnx.vjp(lambda w: w.value * k.value, w)[0],
        lambda k: nnx.jacrev(lambda w: w.value * k.value),
        lambda k: lambda w: nnx.vmap(lambda x: x * k.value)(jnp.ones(2)),
        lambda k: lambda w: nnx.cond(w.value > 0, lambda: k.value, lambda: 0.0),
        lambda k: _jvp_rule(k),
        lambda k: nnx.grad(_vjp_rule(k)),
    ],
)
def test_closed_over_refs_of_transformations_inside_a_plain_jit(inside):
    k = nnx.Ref(jnp.array(1.0), "scale")
    f = inside(k)
    with pytest.raises(
        nnx.ClosureError, match="'scale'.* by closure inside a plain jax .*compiles"
    ):
        jax.jit(lambda v: f(nnx.Ref(v, "params")))(2.0)


@pytest.mark.parametrize("wrap", [lambda f: f, nnx.jit])
def test_a_rule_may_call_its_own_function(wrap):
    f = nnx.custom_vjp(lambda w, x: jnp.sin(w.value * x))
    f.defvjp(lambda w, x: (f(w, x), None), lambda _, ct: ({"": 3 * ct}, 5 * ct))
    w = nnx.Ref(jnp.array(2.0), "params")
    assert wrap(f)(w, 1.0) == jnp.sin(2.0)
    gw, gx = wrap(nnx.grad(f, argnums=(0, 1)))(w, 1.0)
    assert (gw[""], gx) == (3, 5)
    g = nnx.custom_jvp(lambda x: jnp.sin(x))
    g.defjvp(lambda p, t: (g(p[0]), 7 * t[0]))
    assert wrap(nnx.grad(lambda x: g(x)))(1.0) == 7


def test_custom_rules_take_names_methods_and_negative_numbers():
    class Model(nnx.Module):
        def __init__(self):
            self.w = nnx.Ref(jnp.array(2.0), "params")

        @nnx.custom_jvp
        def power(self, x):
            return self.w.value * x

    Model.power.defjvp(lambda p, t: (p[0].w.value * p[1], 10 * t[1]))
    model = Model()
    assert model.power(3.0) == 6 and model.power(x=3.0) == 6
    assert nnx.grad(lambda x: model.power(x))(3.0) == 10
    rule = nnx.custom_vjp(lambda x, n: x**n, nondiff_argnums=(-1,))
    rule.defvjp(lambda x, n: (x**n, None), lambda n, _, g: (n * g,))
    assert nnx.grad(lambda x: rule(x, 3))(2.0) == 3
    with pytest.raises(nnx.CustomRuleError, match=r"nondiff_argnums=\(3,\), but was called with 1"):
        nnx.custom_vjp(lambda x: x, nondiff_argnums=(3,))(1.0)
    with pytest.raises(nnx.CustomRuleError, match=r"keyword-only arguments \['k'\].*positional"):
        nnx.custom_vjp(lambda x, *, k=1: x)(1.0, k=2)


def test_residuals_are_values():
    rule = nnx.custom_vjp(lambda m: m.w.sum())
    rule.defvjp(lambda m: (m.w.sum(), m), lambda m, g: (None,))
    with pytest.raises(nnx.CustomRuleError, match=r"residuals .* hold a module.*model\['params'\]"):
        nnx.grad(rule)(Holder2())


class Holder2(nnx.Module):
    w: jax.Array = nnx.param(default_factory=lambda: jnp.ones(2))


def test_jax_own_leak_error_says_what_to_do():
    r = nnx.Ref(jnp.array(1.0), "params")
    kept = jax.jit(lambda x: x * r.value)
    nnx.grad(lambda r: kept(2.0))(r)
    with pytest.raises(jax.errors.UnexpectedTracerError) as error:
        nnx.grad(lambda r: kept(2.0))(r)
    assert "closes over a module or a Ref" in "".join(error.value.__notes__)
