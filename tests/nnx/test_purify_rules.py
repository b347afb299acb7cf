"""purify: functions with custom derivative rules, and intermediates."""

import jax
import jax.numpy as jnp
import optax
import pytest
from jax import lax

import nnx
from nnx.purify import purify
from tests.nnx.test_purify import W, X, close, hlo

param = purify.param
intermediate = purify.intermediate
prefix = purify.prefix


@jax.custom_jvp
def forward_rule(x):
    return jnp.sin(param(3, "w") * x)


@forward_rule.defjvp
def _(primals, tangents):
    # Ten times the derivative, to distinguish it from JAX's own.
    (x,), (dx,) = primals, tangents
    w = param(3, "w")
    return forward_rule(x), 10 * jnp.cos(w * x) * w * dx


@jax.custom_vjp
def reverse_rule(x):
    return jnp.sin(param(3, "w") * x)


reverse_rule.defvjp(
    lambda x: (reverse_rule(x), x),
    lambda x, ct: (10 * ct * jnp.cos(param(3, "w") * x) * param(3, "w"),),
)


def by_hand_rule(w, x):
    return jnp.sin(w * x)


@pytest.mark.parametrize("f", [forward_rule, reverse_rule], ids=["custom_jvp", "custom_vjp"])
def test_custom_rules_hold_by_argument_and_jax_by_parameter(f):
    # The backward rule calls the marker twice, and both see the parameter of the function.
    model = purify(lambda x: f(x).sum())
    hand_w, hand_x = jax.grad(lambda w, x: by_hand_rule(w, x).sum(), (0, 1))(W, X)
    for grad in (jax.grad(model, (0, 1)), jax.grad(jax.jit(model), (0, 1))):
        got_w, got_x = grad({"w": W}, X)
        close(got_w["w"], hand_w)
        close(got_x, 10 * hand_x)
    close(model({"w": W}, X), by_hand_rule(W, X).sum())
    close(jax.grad(model)({"w": W}, X)["w"], hand_w)
    close(jax.grad(model, 1)({"w": W}, X), 10 * hand_x)
    close(jax.vmap(jax.grad(model, 1), (None, 0))({"w": W}, X[None]), 10 * hand_x[None])


@pytest.mark.parametrize("f", [forward_rule, reverse_rule], ids=["custom_jvp", "custom_vjp"])
def test_custom_rules_in_transformations_inside(f):
    def grad_in_scan(x):
        return lax.scan(lambda c, _: (c + jax.grad(lambda x: f(x).sum())(x), None), x, None, 2)[0]

    # The reverse rule calls the marker twice, and only in a call of its function are these one.
    if f is forward_rule:
        got = purify(grad_in_scan)({"w": W}, X)
        close(got, X + 2 * 10 * jnp.cos(W * X) * W)
    model = purify(lambda x: jax.vmap(jax.checkpoint(jax.jit(f)))(jnp.stack([x, x])).sum())
    close(jax.grad(model, 1)({"w": W}, X), 2 * 10 * jnp.cos(W * X) * W)
    close(jax.grad(model)({"w": W}, X)["w"], 2 * jnp.cos(W * X) * X)


def test_second_derivatives_through_a_forward_rule():
    model = purify(lambda x: forward_rule(x).sum())
    got = jax.jacfwd(jax.grad(model, 1), 1)({"w": W}, X)
    # The rule's own derivative is by hand that of 10 cos(w x) w.
    close(got, jnp.diag(-10 * jnp.sin(W * X) * W**2))
    mixed = jax.jacfwd(jax.grad(model, 1), 0)({"w": W}, X)["w"]
    close(mixed, jnp.diag(10 * (jnp.cos(W * X) - jnp.sin(W * X) * W * X)))


def test_a_rule_of_an_integer_argument_and_several_outputs():
    @jax.custom_vjp
    def pick(x, i):
        return x * param(3, "w"), i + 1

    def bwd(res, cts):
        return 5 * cts[0], None

    pick.defvjp(lambda x, i: (pick(x, i), None), bwd)
    model = purify(lambda x, i: pick(x, i)[0].sum())
    close(jax.grad(model, 1)({"w": W}, X, 3), 5 * jnp.ones(3))
    close(jax.grad(model)({"w": W}, X, 3)["w"], X)

    @jax.custom_jvp
    def count(x, i):
        return x * param(3, "w"), i + 1

    count.defjvp(lambda p, t: (count(*p), (7 * t[0], t[1])))
    model = purify(lambda x, i: count(x, i)[0].sum())
    close(jax.grad(model, (0, 1))({"w": W}, X, 3), ({"w": X}, 7 * jnp.ones(3)))


@pytest.mark.parametrize("kind", ["jvp", "fwd", "bwd"])
@pytest.mark.parametrize("own", [True, False], ids=["and another in the function", "alone"])
def test_a_marker_in_a_rule_alone_is_an_error(kind, own):
    def f(x):
        return x * param((), "w") if own else x * 2

    slope = lambda this: param((), "slope") if this == kind else 1.0
    if kind == "jvp":
        g = jax.custom_jvp(f)
        g.defjvp(lambda p, t: (g(*p), t[0] * slope("jvp")))
    else:
        g = jax.custom_vjp(f)
        g.defvjp(lambda x: (g(x), slope("fwd")), lambda s, ct: (ct * s * slope("bwd"),))
    model = purify(lambda x: jax.jit(g)(x))
    params = {"w": 1.0} if own else {}
    assert list(model.shapes(1.0)) == list(params)
    assert float(model(params, 3.0)) == (3.0 if own else 6.0)
    for grad in (jax.grad(model, 1), jax.grad(jax.jit(model), 1)):
        with pytest.raises(
            purify.MarkerError,
            match=r"param\('slope'\) is called in a derivative rule of .*f at .*Call the marker in the",
        ):
            grad(params, 2.0)


def test_stateful_rules_inside():
    @nnx.custom_vjp
    def f(x):
        return jnp.sin(x) * param(3, "w")

    f.defvjp(lambda x: (jnp.sin(x) * param(3, "w"), None), lambda _, ct: (3.0 * ct,))
    model = purify(lambda x: f(x).sum())
    close(model({"w": W}, X), (jnp.sin(X) * W).sum())
    close(jax.grad(model, (0, 1))({"w": W}, X), ({"w": jnp.sin(X)}, jnp.full(3, 3.0)))


def test_library_functions_with_rules_are_left_alone():
    def f(x):
        y = jax.nn.relu(x * param(3, "w"))
        return jax.nn.logsumexp(y) + optax.huber_loss(y).sum()

    hand = lambda p, x: (lambda y: jax.nn.logsumexp(y) + optax.huber_loss(y).sum())(
        jax.nn.relu(x * p["w"])
    )
    model, params = purify(f), {"w": W}
    assert hlo(jax.grad(model), params, X) == hlo(jax.grad(hand), params, X)


# Intermediates.


def test_intermediates_and_plain_outputs():
    @purify
    def model():
        y = intermediate({"a": param(3, "w") * 2, "b": (1.0, X)}, "both")
        return y["a"].sum()

    close(model.intermediates({"w": W}), {"both": {"a": 2 * W, "b": (1.0, X)}})
    close(model({"w": W}), 2 * W.sum())


def test_intermediates_are_stacked_by_loops_and_lanes():
    def step(c, _):
        c = intermediate(c * param((), "w"), "carry")
        return c, None

    model = purify(lambda x: lax.scan(step, x, None, length=3)[0])
    close(model.intermediates({"w": 2.0}, jnp.float32(1)), {"carry": jnp.array([2.0, 4.0, 8.0])})
    model = purify(lambda xs: jax.vmap(lambda x: intermediate(x * param((), "w"), "y"), 1, 1)(xs))
    xs = jnp.arange(6.0).reshape(2, 3)
    close(model.intermediates({"w": 2.0}, xs), {"y": 2 * xs.T})
    close(model({"w": 2.0}, xs), 2 * xs)
    both = purify(lambda xs: jax.vmap(lambda x: lax.scan(step, x, None, length=2)[0])(xs))
    got = both.intermediates({"w": 2.0}, jnp.ones(3))["carry"]
    assert got.shape == (2, 3)
    close(got[:, 0], jnp.array([2.0, 4.0]))
    nested = purify(lambda xs: lax.map(lambda x: lax.scan(step, x, None, length=2)[0], xs))
    assert nested.intermediates({"w": 2.0}, jnp.ones(3))["carry"].shape == (3, 2)


@pytest.mark.parametrize(
    "wrap",
    [jax.jit, jax.checkpoint, lambda f: prefix("part", f), lambda f: jax.jit(jax.jit(f))],
    ids=["jit", "remat", "prefix", "jit of jit"],
)
def test_intermediates_inside_transformations(wrap):
    model = purify(lambda x: wrap(lambda x: intermediate(x * param(3, "w"), "y").sum())(x))
    (name,) = model.shapes(X)
    got = model.intermediates({name: W}, X)
    assert list(got) == [name[:-1] + "y"]
    close(*got.values(), W * X)
    close(model({name: W}, X), (W * X).sum())
    close(
        jax.jit(jax.jacrev(model.intermediates))({name: W}, X)[name[:-1] + "y"][name], jnp.diag(X)
    )


@pytest.mark.parametrize("kind", ["jvp", "vjp"])
def test_intermediates_inside_custom_rules_and_inner_gradients(kind):
    def f(x):
        return intermediate(jnp.sin(x * param(3, "w")), "y").sum()

    if kind == "jvp":
        g = jax.custom_jvp(f)
        g.defjvp(lambda p, t: (g(*p), 5.0 * t[0].sum()))
    else:
        g = jax.custom_vjp(f)
        g.defvjp(lambda x: (g(x), x), lambda x, ct: (5.0 * ct * jnp.ones_like(x),))
    model = purify(lambda x: g(x))
    close(model.intermediates({"w": W}, X), {"y": jnp.sin(W * X)})
    close(jax.grad(model, 1)({"w": W}, X), 5.0 * jnp.ones(3))
    close(jax.jacrev(model.intermediates)({"w": W}, X)["y"]["w"], jnp.diag(jnp.cos(W * X) * X))
    inner = purify(lambda x: jax.grad(f)(x))
    close(inner.intermediates({"w": W}, X), {"y": jnp.sin(W * X)})
    again = purify(lambda x: jax.grad(jax.checkpoint(f))(x))
    close(again.intermediates({"w": W}, X), {"y": jnp.sin(W * X)})


@pytest.mark.parametrize("where", ["cond", "while_loop"])
def test_intermediates_in_branches_and_while_loops_have_no_value(where):
    f = lambda x: intermediate(x + param(3, "w"), "y")
    if where == "cond":
        model = purify(lambda x: jax.jit(lambda x: lax.cond(x[0] > 0, f, lambda x: x, x))(x))
    else:
        model = purify(lambda x: lax.while_loop(lambda c: c[0] < 1, f, x))
    close(model({"w": W}, X), X + W)
    with pytest.raises(purify.MarkerError, match=rf"intermediate\('y'\).*is inside {where}, so"):
        model.intermediates({"w": W}, X)
