"""A list of layers and a Stack are two forms of one thing."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nnx


class Block(nnx.Module):
    def __init__(self, rate=0.1):
        self.linear = nnx.Linear(3, 3)
        self.drop = nnx.Dropout(rate, deterministic=True)
        self.count = nnx.Ref(0, "counters")
        self.stream = nnx.Ref(jax.random.key(0), "keys")
        self.shift = jnp.zeros(3)

    def __call__(self, x):
        return self.drop(jnp.tanh(self.linear(x))) + self.shift


class Model(nnx.Module):
    def __init__(self, form):
        self.blocks = form([Block() for _ in range(3)])


FORMS = {"list": list, "Stack": nnx.Stack.of, "Sequential": lambda blocks: nnx.Sequential(*blocks)}


def kernels(model):
    return np.stack([block.linear.kernel for block in model.blocks])


@pytest.fixture
def layers():
    with nnx.scope(0):
        return [Block() for _ in range(3)]


def test_of_and_unstack_are_inverses(layers):
    stack = nnx.Stack.of(layers, remat=True)
    y = x = jnp.ones((2, 3))
    for layer in layers:
        y = layer(y)
    np.testing.assert_allclose(stack(x), y, rtol=1e-6)
    assert stack.remat and len(stack) == 3
    for a, b in zip(layers, stack.unstack(), strict=True):
        assert type(b) is Block and nnx.split(a)[0] is nnx.split(b)[0]
        assert jnp.array_equal(a.linear.kernel, b.linear.kernel)
        assert a.linear is not b.linear


def test_a_layer_is_taken_and_put_back(layers):
    stack = nnx.Stack.of(layers)
    last = stack[-1]
    assert jnp.array_equal(last.linear.kernel, layers[2].linear.kernel)
    last.linear.kernel = jnp.zeros((3, 3))
    assert stack.layers.linear.kernel[2].any()  # a copy
    stack[2] = last
    assert not stack.layers.linear.kernel[2].any() and stack.layers.linear.kernel[1].any()
    part = stack[1:]
    assert len(part) == 2 and part(jnp.ones(3)).shape == (3,)
    assert jnp.array_equal(part.layers.linear.kernel, stack.layers.linear.kernel[1:])
    assert stack["params"]["layers.linear.kernel"].shape == (3, 3, 3)
    written = nnx.jit(lambda s: [b.linear.kernel.sum() for b in s])(stack)
    np.testing.assert_allclose(written, stack.layers.linear.kernel.sum((1, 2)), rtol=1e-5)


def test_what_cannot_be_a_stack_says_why(layers):
    with nnx.scope(0):
        other = Block(0.2)
    for bad, error, text in [
        ([*layers, other], ValueError, "'drop.rate' is 0.1 in layer 0 and 0.2 in layer 3"),
        ([*layers, layers[0]], ValueError, "Layers 0 and 3 share the Ref 'linear.kernel'"),
        (
            [layers[0], nnx.Identity()],
            ValueError,
            "it is a Block in layer 0 and an Identity in layer 1",
        ),
        ([layers[0], 3], TypeError, "layer 1 is an int"),
        ([], ValueError, "at least one layer"),
    ]:
        with pytest.raises(error, match=text):
            nnx.Stack.of(bad)
    wide = nnx.clone(layers[0])
    wide.shift = jnp.zeros(4)
    with pytest.raises(ValueError, match=r"'shift' is float32\[3\] in layer 0 and float32\[4\]"):
        nnx.Stack.of([layers[0], wide])
    stack = nnx.Stack.of(layers)
    with pytest.raises(IndexError, match="has 3 layers, so there is no layer 3"):
        stack[3]
    with pytest.raises(IndexError, match="selects none of the 3 layers"):
        stack[3:]
    with pytest.raises(ValueError, match="in layer 1 of the Stack and 0.2 in the new layer"):
        stack[1] = other


def test_a_sequential_is_a_sequence(layers):
    model = nnx.Sequential(*layers, nnx.relu)
    assert len(model) == 4 and list(model) == model.layers and model[-1] is nnx.relu
    assert type(model[1:3]) is nnx.Sequential and model[1:3][0] is layers[1]
    model[3] = nnx.tanh
    assert model.layers[3] is nnx.tanh and nnx.Sequential()
    assert "layers.0.linear.kernel" in model["params"]
    with pytest.raises(IndexError, match="Sequential has 4 layers"):
        model[4]
    with pytest.raises(TypeError, match="takes callables"):
        model[0] = 3


@pytest.mark.parametrize("ending", ["npz", "safetensors"])
def test_a_file_of_either_goes_into_either(tmp_path, ending):
    for form in FORMS:
        source, path = Model.init(1)(FORMS[form]), os.fspath(tmp_path / f"{form}.{ending}")
        nnx.save(path, nnx.get_partition(source))
        for other in FORMS:
            # Nothing is drawn for a model of shapes.
            for into in (
                nnx.eval_shape(lambda f=other: Model.init(2)(FORMS[f])),
                Model.init(2)(FORMS[other]),
            ):
                report = nnx.load_state(path, into=into)
                assert not report.missing and not report.unexpected
                np.testing.assert_array_equal(kernels(into), kernels(source))


def test_layers_that_a_file_lacks_are_named(tmp_path):
    short, path = Model.init(1)(list), tmp_path / "short.npz"
    del short.blocks[1]
    nnx.save(path, nnx.get_partition(short, "params"))
    into = Model.init(2)(nnx.Stack.of)
    before = kernels(into)
    with pytest.raises(nnx.LoadError, match=r"missing in the file: .*'blocks.2.linear.kernel'"):
        nnx.load_state(path, into=into)
    np.testing.assert_array_equal(kernels(into), before)
    nnx.load_state(path, into=into, strict=False)
    np.testing.assert_array_equal(kernels(into)[:2], kernels(short))
    np.testing.assert_array_equal(kernels(into)[2], before[2])
    with pytest.raises(nnx.LoadError, match="2 layers"):
        nnx.save(path, nnx.get_partition(Model.init(1)(nnx.Stack.of), "params"))
        nnx.load_state(path, into=short)


def test_stacks_of_stacks(tmp_path):
    def nested(form):
        return form([nnx.Sequential(form([nnx.Linear(2, 2) for _ in range(3)])) for _ in range(2)])

    with nnx.scope(0):
        lists = {"a": [[nnx.Linear(2, 2) for _ in range(3)] for _ in range(2)]}
        stack = {"a": nnx.Stack(lambda: nnx.Stack(lambda: nnx.Linear(2, 2), 3), 2)}
    path = tmp_path / "nested.npz"
    nnx.save(path, nnx.get_partition(lists))
    nnx.load_state(path, into=stack)
    wanted = np.stack([[x.kernel for x in row] for row in lists["a"]])
    np.testing.assert_array_equal(stack["a"].layers.layers.kernel, wanted)
    nnx.save(path, nnx.get_partition(stack))
    for row in lists["a"]:
        for x in row:
            x.kernel = jnp.zeros((2, 2))
    nnx.load_state(path, into=lists)
    np.testing.assert_array_equal(np.stack([[x.kernel for x in row] for row in lists["a"]]), wanted)
