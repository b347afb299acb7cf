"""Compiled programs read like the model: their names, their inputs, their operations."""

import logging
import re

import cloudpickle
import jax
import jax.numpy as jnp
import pytest

import nnx
from tests.models import Dense


class Block(nnx.Module):
    def __init__(self, size: int = 4):
        self.norm = nnx.LayerNorm(size)
        self.attention = nnx.Linear(size, size)

    def __call__(self, x):
        return x + self.attention(self.norm(x))


class Net(nnx.Module):
    def __init__(self):
        self.blocks = [Block(), Block()]
        self.parts = {"head": nnx.Linear(4, 2)}

    def __call__(self, x):
        for block in self.blocks:
            x = block(x)
        return self.parts["head"](x)

    def encode(self, x):
        return self.blocks[0].attention(x)


X = jnp.ones((3, 4))


def loss(model, x):
    return (model(x) ** 2).mean()


def train_step(model, batch, *, rate=0.1):
    grads = nnx.grad(loss)(model, batch["x"])
    model["params"] = jax.tree.map(lambda w, g: w - rate * g, model["params"], grads)


def operations(fn, *args, jit=nnx.jit):
    """The names of the matrix products of a compiled program."""
    text = jit(fn).lower(*args).compile().as_text()
    names = re.findall(r'op_name="([^"]*)"', text)
    return sorted({name for name in names if name.endswith("dot_general")})


@pytest.fixture(scope="module")
def net():
    return Net.init(0)()


@pytest.fixture(scope="module")
def lowered(net):
    return nnx.jit(train_step).lower(net, {"x": X}, rate=0.5)


def test_a_program_has_the_name_of_the_function(net, lowered):
    assert "module @jit_train_step" in lowered.as_text()
    assert "module @jit_encode" in nnx.jit(net.encode).lower(X).as_text()
    assert "module @jit_Net" in nnx.jit(net).lower(X).as_text()


def test_inputs_have_the_names_of_arguments_and_refs(lowered):
    text = lowered.as_text(debug_info=True)
    inputs = re.findall(r'%arg\d+: tensor<[^>]*>[^%]*? loc\("([^"]*)"\)', text)
    assert inputs[:2] == ["model.blocks[0].norm.scale", "model.blocks[0].norm.bias"]
    assert inputs[-3:] == ["model.parts.head.bias", "batch['x']", "rate"]


def test_operations_have_the_path_of_their_layer_forward_and_backward(lowered):
    text = lowered.compile().as_text()
    for name in (
        "jit(train_step)/jvp(blocks.0)/attention/dot_general",
        "jit(train_step)/transpose(jvp(blocks.0))/attention/dot_general",
        "jit(train_step)/jvp(parts.head)/dot_general",
    ):
        assert f'op_name="{name}"' in text
    assert "jvp(blocks.1)/norm/" in text


def test_every_way_to_call_a_layer_has_its_path(net):
    (encode,) = operations(lambda net, x: net.encode(x), net, X)
    assert encode == "jit(<lambda>)/blocks.0.attention/dot_general"
    (closure,) = operations(lambda x: net.encode(x), X)
    assert closure == encode
    plain = operations(lambda net, x: net(x), net, X, jit=jax.jit)
    assert plain[0] == "jit(<lambda>)/blocks.0/attention/dot_general"
    (applied,) = operations(lambda net, x: net.blocks[1].apply(rngs=0)(x), net, X)
    assert applied == "jit(<lambda>)/blocks.1/attention/dot_general"


def test_paths_in_loops_branches_and_remat(net):
    body = "jit(<lambda>)/while/body/closed_call/"
    found = operations(
        lambda net, x: nnx.scan(lambda c, _: (net.encode(c), None), x, None, 3), net, X
    )
    assert found == [f"{body}blocks.0.attention/dot_general"]
    found = operations(lambda net, x: nnx.remat(net.blocks[0])(x), net, X)
    assert found == ["jit(<lambda>)/checkpoint/blocks.0/attention/dot_general"]
    found = operations(lambda net, x: nnx.vmap(net.blocks[1])(x), net, X)
    assert found == ["jit(<lambda>)/vmap(blocks.1)/attention/dot_general"]
    found = operations(lambda net, x: nnx.cond(x.sum() > 0, net.encode, jnp.sin, x), net, X)
    assert [name.rpartition("/cond/")[2] for name in found] == [
        "branch_1_fun/blocks.0.attention/dot_general"
    ]
    stack = nnx.Stack.init(0)(Block, 3, remat=True)
    found = operations(lambda stack, x: nnx.grad(lambda s: loss(s, x))(stack), stack, X)
    assert all(name.endswith("/attention/dot_general") for name in found)
    assert any("transpose(" in name and "/checkpoint/" in name for name in found)


def test_paths_in_captured_and_patched_modules(net):
    expected = operations(lambda m, x: m(x), net, X)
    double = {"blocks.*": lambda out: 2 * out, "parts.head": lambda out: out}
    calls = (
        lambda m, x: nnx.capture(m, ...)(x),
        lambda m, x: nnx.capture(m, ("blocks.1", "blocks.*.attention"))(x),
        lambda m, x: nnx.patch(m, double)(x),
        lambda m, x: nnx.capture(m, "parts.*")(x),
    )
    for call in calls:
        assert operations(call, net, X) == expected
    forward = operations(lambda m, x: nnx.grad(loss)(m, x), net, X)
    captured = lambda m, x: nnx.grad(lambda m, x: (nnx.capture(m, ...)(x)[0] ** 2).mean())(m, x)
    assert operations(captured, net, X) == forward
    norm = (
        jax.jit(lambda m, x: nnx.capture(m, "blocks.0")(x)).lower(net, X).as_text(debug_info=True)
    )
    assert "/blocks.0/norm/" in norm and "/blocks.0/add" in norm


def test_a_shared_layer_has_the_path_that_was_taken():
    class Pair(nnx.Module):
        def __init__(self):
            self.a = self.b = nnx.Linear(4, 4)
            self.outer = nnx.Sequential(self.a)

        def __call__(self, x):
            return self.outer(self.b(x))

    found = operations(lambda pair, x: pair(x), Pair.init(0)(), X)
    assert found == [
        "jit(<lambda>)/a/dot_general",
        "jit(<lambda>)/outer/layers.0/dot_general",
    ]


def test_a_call_of_the_base_class_is_the_same_layer():
    class Louder(Block):
        def __call__(self, x):
            return 2 * super().__call__(x)

    class Holder(nnx.Module):
        def __init__(self):
            self.block = Louder()

        def __call__(self, x):
            return self.block(x)

    found = operations(lambda h, x: h(x), Holder.init(0)(), X)
    assert found == ["jit(<lambda>)/block/attention/dot_general"]


def test_the_class_keeps_the_function_of_the_user():
    def call(self, x):
        return x

    class Own(nnx.Module):
        __call__ = call

    assert Own.__call__ is call and Own().__call__.__func__ is call
    copied = cloudpickle.loads(cloudpickle.dumps(Own))
    assert copied()(3) == 3


def test_names_make_no_new_trace():
    traces = []

    @nnx.jit
    def run(block, x):
        traces.append(1)
        return block(x)

    net = Net.init(0)()
    for block in net.blocks:
        run(block, X)
    assert len(traces) == 1


def test_what_jax_logs_and_raises(net, caplog):
    step = nnx.jit(train_step)
    model = nnx.clone(net)
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        step(model, {"x": X})
        nnx.jit_filter(loss)(model, X)
    assert "Compiling jit(train_step)" in caplog.text
    assert "Compiling jit(loss)" in caplog.text

    @nnx.jit
    def branch(model, x):
        return x if model.parts["head"].bias.sum() > 0 else -x

    with pytest.raises(jax.errors.TracerBoolConversionError) as info:
        branch(net, X)
    assert "tracing the function branch at " in str(info.value)
    assert "the value of the argument model.parts.head.bias." in str(info.value)


def test_incompatible_devices():
    model = jax.device_put(Dense(), jax.devices()[0])
    with pytest.raises(ValueError, match="Received incompatible devices") as info:
        nnx.jit(lambda model, x: model(x))(model, jax.device_put(X[:, :2], jax.devices()[1]))
    assert "argument model.w of <lambda>" in str(info.value)
    assert "argument x of <lambda>" in str(info.value)
