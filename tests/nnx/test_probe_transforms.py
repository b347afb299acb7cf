"""Capture, patch and output_grad in every transformation that a model may use inside, against plain JAX."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nnx
from nnx import ProbeError

X = jnp.asarray(np.random.default_rng(0).normal(size=(3, 2)), jnp.float32)
P = jax.sharding.PartitionSpec


def mesh():
    return jax.make_mesh((1,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))


def lanes(f, x, d):
    return jax.vmap(lambda x, d: both(f(x) + d))(x, d)


def both(y):
    return y, y


def steps(f, x, d):
    return jax.lax.scan(lambda h, d: both(f(h) + d), x, d)


def grad_by_hand(f, x, d):
    def loss(x):
        y = f(x) + d
        return (y**2).sum(), y

    return jax.grad(loss, has_aux=True)(x)


# By name: what a model does with a layer, and the same in plain JAX with a function, where `d` is
# added to each output of it; that returns what the model returns, and the outputs.
INSIDE = {
    "plain": (lambda m, x: m(x), lambda f, x, d: both(f(x) + d)),
    "jit": (lambda m, x: nnx.jit(lambda m, x: m(x))(m, x), lambda f, x, d: both(f(x) + d)),
    "jit in jit": (
        lambda m, x: nnx.jit(lambda m, x: nnx.jit(lambda x: m(x))(x))(m, x),
        lambda f, x, d: both(f(x) + d),
    ),
    "remat": (lambda m, x: nnx.remat(m)(x), lambda f, x, d: both(f(x) + d)),
    "grad": (
        lambda m, x: nnx.grad(lambda m, x: (m(x) ** 2).sum(), argnums=1)(m, x),
        grad_by_hand,
    ),
    "vjp": (
        lambda m, x: nnx.vjp(lambda x: (m(x) ** 2).sum(), x)[1](1.0)[0],
        grad_by_hand,
    ),
    "jacrev": (lambda m, x: nnx.jacrev(lambda x: (m(x) ** 2).sum())(x), grad_by_hand),
    "jvp": (
        lambda m, x: nnx.jvp(lambda x: m(x), (x,), (x,))[0],
        lambda f, x, d: both(f(x) + d),
    ),
    "grad_filter": (
        lambda m, x: nnx.grad_filter(lambda x, m: (m(x) ** 2).sum())(x, m),
        grad_by_hand,
    ),
    "jit_filter": (lambda m, x: nnx.jit_filter(lambda m, x: m(x))(m, x), lambda f, x, d: both(f(x) + d)),
    "vmap, shared": (lambda m, x: nnx.vmap(lambda m, x: m(x), in_axes=(None, 0))(m, x), lanes),
    "vmap, closed over": (lambda m, x: nnx.vmap(lambda x: m(x))(x), lanes),
    "vmap of jit": (lambda m, x: nnx.vmap(nnx.jit(lambda m, x: m(x)), (None, 0))(m, x), lanes),
    "map": (lambda m, x: nnx.map(m, x), lanes),
    "map in batches": (lambda m, x: nnx.map(m, x, batch_size=2), lanes),
    "scan": (lambda m, x: nnx.scan(lambda h, _: (m(h), None), x, None, length=4)[0], steps),
    "scan, as the carry": (
        lambda m, x: nnx.scan(lambda c, _: ((c[0], c[0](c[1])), None), (m, x), None, length=4)[0][1],
        steps,
    ),
    "scan of remat": (
        lambda m, x: nnx.scan(lambda h, _: (nnx.remat(m)(h), None), x, None, length=4)[0],
        steps,
    ),
    "fori_loop": (lambda m, x: nnx.fori_loop(0, 4, lambda i, h: m(h), x), steps),
    "cond": (
        lambda m, x: nnx.cond(x.sum() < 100, lambda m, x: m(x), lambda m, x: 3 * m(x), m, x),
        lambda f, x, d: both(f(x) + d),
    ),
    "switch": (
        lambda m, x: nnx.switch(1, [lambda x: x, lambda x: m(x)], x),
        lambda f, x, d: both(f(x) + d),
    ),
    "checkify": (lambda m, x: nnx.checkify(m)(x)[1], lambda f, x, d: both(f(x) + d)),
    "shard_map": (
        lambda m, x: nnx.shard_map(
            lambda x: m(x), mesh=mesh(), in_specs=(P("d"),), out_specs=P("d")
        )(x),
        lambda f, x, d: (f(x) + d[0], (f(x) + d[0])[None]),
    ),
    "vmap of scan": (
        lambda m, x: nnx.vmap(lambda x: nnx.scan(lambda h, _: (m(h), None), x, None, length=4)[0])(x),
        lambda f, x, d: jax.vmap(lambda x, d: steps(f, x, d))(x, d),
    ),
}  # fmt: skip
SHAPES = {"vmap of scan": (3, 4, 2), "shard_map": (1, 3, 2)}
SHAPES |= {name: (4, 3, 2) for name, (_, hand) in INSIDE.items() if hand is steps}


class Host(nnx.Module):
    def __init__(self, inside):
        self.layer, self.inside = nnx.Linear(2, 2), inside

    def __call__(self, x):
        return jnp.tanh(self.inside(self.layer, x))


@pytest.fixture(params=INSIDE)
def case(request):
    inside, hand = INSIDE[request.param]
    model = Host.init(0)(inside)
    kernel, bias = model.layer.kernel, model.layer.bias
    return model, lambda x: x @ kernel + bias, hand, jnp.zeros(SHAPES.get(request.param, (3, 2)))


def close(a, b):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_capture(case):
    model, layer, hand, zeros = case
    y, outs = hand(layer, X, zeros)
    for _ in range(2):
        got, captured = nnx.capture(model, "layer")(X)
        close(got, jnp.tanh(y))
        value = captured["layer"]
        close(value, outs)
    close(nnx.jit(lambda m, x: nnx.capture(m, nnx.Linear)(x))(model, X)[1]["layer"], outs)
    close(model(X), got)


def test_patch(case):
    model, layer, hand, zeros = case
    v = jnp.array([0.5, -1.0])
    expected = jnp.tanh(hand(lambda x: layer(x) * v + 0.1, X, zeros)[0])
    run = nnx.patch(model, {"layer": lambda y: y * v + 0.1})
    close(run(X), expected)
    close(
        nnx.jit(lambda m, x: nnx.patch(m, {"layer": lambda y: y * v + 0.1})(x))(model, X), expected
    )
    # Gradients reach the arrays that the patch closes over.
    got = jax.grad(lambda v: nnx.patch(model, {"layer": lambda y: y * v})(X).sum())(v)
    close(got, jax.grad(lambda v: jnp.tanh(hand(lambda x: layer(x) * v, X, zeros)[0]).sum())(v))
    close(model(X), jnp.tanh(hand(layer, X, zeros)[0]))


def test_output_grad(case):
    model, layer, hand, zeros = case
    grads = nnx.output_grad(lambda m, x: (m(x) ** 2).sum(), "layer")(model, X)
    expected = jax.grad(lambda d: (jnp.tanh(hand(layer, X, d)[0]) ** 2).sum())(zeros)
    close(grads["layer"], expected)


def test_a_while_loop_gives_the_last_step_and_has_no_gradient():
    model = Host.init(0)(
        lambda m, x: nnx.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, m(c[1])), (0, x))[1]
    )
    f = model.layer
    y, captured = nnx.capture(model, "layer")(X)
    close(captured["layer"], f(f(f(X))))
    close(nnx.patch(model, {"layer": lambda y: -y})(X), jnp.tanh(-f(-f(-f(X)))))
    with pytest.raises(ProbeError, match="'layer' is computed in nnx.while_loop.* Use nnx.scan"):
        nnx.output_grad(lambda m, x: m(x).sum(), "layer")(model, X)
    bounds = Host.init(0)(lambda m, x: nnx.fori_loop(0, jnp.array(3), lambda i, h: m(h), x))
    close(nnx.capture(bounds, "layer")(X)[1]["layer"], f(f(f(X))))


def custom(m, x):
    rule = nnx.custom_vjp(lambda m, x: m(x))
    rule.defvjp(lambda m, x: (rule(m, x), x), lambda x, g: (None, 10 * g))
    return rule(m, x)


def custom_jvp(m, x):
    rule = nnx.custom_jvp(lambda m, x: m(x))
    rule.defjvp(lambda primals, tangents: (rule(*primals), 10 * tangents[1]))
    return rule(m, x)


@pytest.mark.parametrize("inside", [custom, custom_jvp])
def test_functions_with_rules_are_patched_but_their_outputs_are_fixed(inside):
    model = Host.init(0)(inside)
    patched = nnx.patch(model, {"layer": lambda y: y + 1})
    close(patched(X), jnp.tanh(model.layer(X) + 1))
    close(
        jax.grad(lambda x: patched(x).sum())(X),
        10 * (1 - jnp.tanh(model.layer(X) + 1) ** 2),
    )
    with pytest.raises(
        ProbeError, match=r"'layer' cannot be seen in nnx.custom_..p\(.*Do not select"
    ):
        nnx.capture(model)(X)


def test_abstract_evaluation_inside_a_model():
    def inside(m, x):
        shape = nnx.eval_shape(lambda m, x: m(x), m, x)
        jaxpr = nnx.make_jaxpr(lambda m, x: m(x))(m, x)
        assert jaxpr.out_avals[0].shape == shape.shape == (3, 1)
        return x

    model = Host.init(0)(inside)
    y = nnx.patch(model, {"layer": lambda y: y[:, :1]})(X)
    close(y, jnp.tanh(X))
    model.inside = lambda m, x: nnx.eval_shape(m, x) and m(x)
    assert nnx.capture(model, "layer")(X)[1]["layer"].shape == (3, 2)


# ---- one program for a probe


def counted(calls):
    @nnx.jit
    def inner(layer, x):
        calls.append(1)
        return layer(x)

    return inner


def test_an_inner_function_compiles_once_for_a_probe():
    calls = []
    model = Host.init(0)(counted(calls))
    model(X)
    assert len(calls) == 1
    for _ in range(3):
        nnx.capture(model, "layer")(X)
    assert len(calls) == 2
    for i in range(3):
        # Another array in the patch is another input, another number another program.
        close(
            nnx.patch(model, {"layer": lambda y, v=jnp.full(2, float(i)): y + v})(X),
            jnp.tanh(model.layer(X) + i),
        )
    assert len(calls) == 3
    for i in range(3):
        close(nnx.patch(model, {"layer": lambda y: y * i})(X), jnp.tanh(model.layer(X) * i))
    assert len(calls) == 6
    for _ in range(3):
        nnx.output_grad(lambda m, x: m(x).sum(), "layer")(model, X)
    assert len(calls) <= 8
    model(X)
    assert len(calls) <= 8


def test_what_is_compiled_is_found_whatever_the_patch_is_made_of():
    calls = []
    model = Host.init(0)(counted(calls))
    with nnx.scope(1):
        coder = nnx.Linear(2, 2)
    for i in range(3):
        got = nnx.patch(model, {"layer": coder})(X)
        close(got, jnp.tanh(coder(model.layer(X))))
        coder.bias = coder.bias + 1.0
    assert len(calls) == 1

    def scaled(by, y):
        return by * y

    for i in range(3):
        got = nnx.patch(model, {"layer": functools.partial(scaled, jnp.array(float(i)))})(X)
        close(got, jnp.tanh(i * model.layer(X)))
    assert len(calls) == 2


# ---- stacks


class Block(nnx.Module):
    def __init__(self):
        self.linear, self.drop = nnx.Linear(2, 2), nnx.Dropout(0.5, deterministic=True)

    def __call__(self, x):
        return self.drop(jnp.tanh(self.linear(x)))


def blocks(stack, x, patch=lambda i, h: h):
    seen = []
    for i, (kernel, bias) in enumerate(
        zip(stack.layers.linear.kernel, stack.layers.linear.bias, strict=True)
    ):
        h = patch(i, x @ kernel + bias)
        seen.append(h)
        x = jnp.tanh(h)
    return x, jnp.stack(seen)


@pytest.mark.parametrize("remat", [False, True])
def test_one_layer_of_a_stack_by_its_number(remat):
    stack = nnx.Stack.init(0)(Block, 4, remat=remat)
    y, seen = blocks(stack, X)
    _, captured = nnx.capture(stack, ("layers.2.linear", "layers.0.linear", "layers.3"))(X)
    assert [".".join(path) for path in captured] == [
        "layers.3",
        "layers.0.linear",
        "layers.2.linear",
    ]
    close(captured["layers.2.linear"], seen[2])
    close(captured["layers.0.linear"], seen[0])
    close(captured["layers.3"], y)
    _, captured = nnx.capture(stack, ("layers.linear", "layers.1.linear"))(X)
    close(captured["layers.linear"], seen)
    close(captured["layers.1.linear"], seen[1])
    got = nnx.patch(stack, {"layers.2.linear": lambda h: 2 * h})(X)
    close(got, blocks(stack, X, lambda i, h: 2 * h if i == 2 else h)[0])
    # A layer without Refs belongs to the stack like its neighbours.
    got = nnx.patch(stack, {"layers.1.drop": lambda h: h * 0})(X)
    close(got, _zeroed(stack, 1))
    grads = nnx.output_grad(lambda m, x: m(x).sum(), "layers.1.linear")(stack, X)
    by_hand = jax.grad(lambda d: blocks(stack, X, lambda i, h: h + d if i == 1 else h)[0].sum())(
        jnp.zeros((3, 2))
    )
    close(grads["layers.1.linear"], by_hand)


def _zeroed(stack, n):
    x = X
    for i, (kernel, bias) in enumerate(
        zip(stack.layers.linear.kernel, stack.layers.linear.bias, strict=True)
    ):
        x = jnp.tanh(x @ kernel + bias) * (i != n)
    return x


def test_a_stack_in_other_loops_and_stacks_in_stacks():
    stack = nnx.Stack.init(0)(Block, 4)
    xs = jnp.stack([X, 2 * X])

    class Outer(nnx.Module):
        def __init__(self):
            self.stack = stack

        def __call__(self, xs):
            return nnx.vmap(lambda x: self.stack(x))(xs)

    got = nnx.patch(Outer(), {"stack.layers.2.linear": lambda h: 2 * h})(xs)
    each = [blocks(stack, x, lambda i, h: 2 * h if i == 2 else h)[0] for x in xs]
    close(got, jnp.stack(each))
    _, captured = nnx.capture(Outer(), "stack.layers.2.linear")(xs)
    close(captured["stack.layers.2.linear"], jnp.stack([blocks(stack, x)[1][2] for x in xs]))
    nested = nnx.Stack.init(0)(lambda: nnx.Stack(Block, 3), 2)
    _, captured = nnx.capture(nested, ("layers.layers.linear", "layers.1.layers.2.linear"))(X)
    assert captured["layers.layers.linear"].shape == (2, 3, 3, 2)
    close(captured["layers.1.layers.2.linear"], captured["layers.layers.linear"][1, 2])
    y = nnx.patch(nested, {"layers.1.layers.2.linear": lambda h: h * 0})(X)
    close(y, jnp.zeros_like(y))


def test_lanes_of_modules_by_number():
    lanes_of = nnx.vmap(lambda key: nnx.Linear.init(key)(2, 2))(
        jax.random.split(jax.random.key(0), 3)
    )

    class Ensemble(nnx.Module):
        def __init__(self):
            self.members = lanes_of

        def __call__(self, x):
            return nnx.vmap(lambda m, x: m(x), in_axes=(0, None))(self.members, x)

    y = nnx.patch(Ensemble(), {"members.1": lambda h: h * 0})(X)
    expected = jnp.stack([X @ k + b for k, b in zip(lanes_of.kernel, lanes_of.bias)])
    close(y, expected.at[1].set(0))
    close(nnx.capture(Ensemble(), "members.2")(X)[1]["members.2"], expected[2])


def test_mistakes_with_numbers():
    stack = nnx.Stack.init(0)(Block, 4)
    with pytest.raises(
        ProbeError, match="'layers.linear' .* nnx.capture in layer 9: the stack has 4"
    ):
        nnx.capture(stack, "layers.9.linear")(X)
    with pytest.raises(ProbeError, match=r"returned float32\[3,1\] instead of float32\[3,2\]"):
        nnx.patch(stack, {"layers.1.linear": lambda h: h[:, :1]})(X)
    model = nnx.Sequential(stack)
    with pytest.raises(ProbeError, match="'layers.0' cannot be taken .* layer 3 .* 0 loops around"):
        nnx.capture(model, "layers.0.3")(X)
    with pytest.raises(
        ProbeError, match="'layers.0' cannot be patched in layer 3 .* 0 loops around"
    ):
        nnx.patch(model, {"layers.0.3": lambda h: h})(X)
