"""jaxtyping, beartype and typeguard: shapes and types of modules, checked when the program runs."""

import importlib
import sys

import jax
import jax.numpy as jnp
import pytest
import typeguard
from beartype import beartype
from beartype.roar import BeartypeCallHintParamViolation
from jaxtyping import Array, Float, TypeCheckError, install_import_hook, jaxtyped
from typeguard import typechecked

import nnx

X = jnp.ones((4, 2))


def test_beartype_on_a_class_of_modules():
    @beartype
    class Scale(nnx.Module):
        w: jax.Array = nnx.param()
        mean: jax.Array = nnx.ref("batch_stats")
        power: int = nnx.static(default=1)

        def __init__(self, n: int):
            self.w = jnp.ones(n)
            self.mean = jnp.zeros(())

        def double(self, x: jax.Array) -> jax.Array:
            return 2 * x

        def __call__(self, x: jax.Array) -> jax.Array:
            self.mean = self.mean + 1
            return x * self.w

    scale = Scale(2)
    assert list(scale["params"]) == [("w",)] and scale.power == 1
    assert jnp.allclose(nnx.jit(scale)(X), X) and scale.mean == 1
    assert jnp.allclose(nnx.grad(lambda m: m(X).sum())(scale)["w"], 4)
    wrong = X.tolist()
    calls = (scale, scale.__call__, scale.apply(rngs=0), lambda x: nnx.frozen(scale)(x))
    for call in (*calls, lambda x: jax.jit(lambda m: m(x))(nnx.clone(scale))):
        with pytest.raises(BeartypeCallHintParamViolation):
            call(wrong)
    with pytest.raises(BeartypeCallHintParamViolation):
        nnx.jit(lambda m: m(wrong))(scale)
    with pytest.raises(BeartypeCallHintParamViolation):
        scale.double(3)
    with pytest.raises(BeartypeCallHintParamViolation):
        Scale("2")


def test_typeguard_on_a_class_of_modules():
    @typechecked
    class Scale(nnx.Module):
        w: jax.Array = nnx.param()

        def __init__(self, n: int):
            self.w = jnp.ones(n)

        def __call__(self, x: jax.Array) -> jax.Array:
            return x * self.w

    assert jnp.array_equal(nnx.jit(Scale(2))(X), X)
    with pytest.raises(typeguard.TypeCheckError, match='argument "x"'):
        Scale(2)(3)
    with pytest.raises(typeguard.TypeCheckError, match='argument "n"'):
        Scale("2")


def test_a_checked_class_has_subclasses_and_the_names_of_its_layers():
    @beartype
    class Block(nnx.Module):
        def __init__(self, size: int):
            self.linear = nnx.Linear(size, size)

        def __call__(self, x: jax.Array) -> jax.Array:
            return self.linear(x)

    class Double(Block):
        def __call__(self, x):
            return 2 * super().__call__(x)

    @beartype
    class Net(nnx.Module):
        def __init__(self):
            self.blocks = [Block(2), Double(2)]

        def __call__(self, x: jax.Array) -> jax.Array:
            for block in self.blocks:
                x = block(x)
            return x

    net = Net.init(0)()
    program = nnx.jit(lambda m, x: m(x)).lower(net, X).as_text(debug_info=True)
    assert "/blocks.0/linear/" in program and "/blocks.1/linear/" in program
    with pytest.raises(BeartypeCallHintParamViolation):
        net.blocks[1](None)
    assert nnx.capture(net, "blocks.0")(X)[1]["blocks.0"].shape == (4, 2)
    # Any class decorator or patch may set it like this.
    call = Block.__call__
    Block.__call__ = lambda self, x: call(self, x) + 1
    again = nnx.jit(lambda m, x: m(x)).lower(net, X).as_text(debug_info=True)
    assert "/blocks.0/linear/" in again and again != program
    assert jnp.allclose(nnx.jit(net.blocks[0])(X), net.blocks[0].linear(X) + 1)


@pytest.mark.parametrize("order", ["outside", "inside"])
def test_beartype_and_a_dataclass(order):
    class Affine(nnx.Module):
        w: jax.Array = nnx.param()
        power: int = 1

        def __call__(self, x):
            return self.product(x)

        def product(self, x: jax.Array) -> jax.Array:
            return x @ self.w

    make = nnx.dataclass
    Affine = beartype(make(Affine)) if order == "outside" else make(beartype(Affine))
    assert nnx.jit(Affine(jnp.eye(2)))(X).shape == (4, 2)
    with pytest.raises(BeartypeCallHintParamViolation):
        Affine(jnp.eye(2))(None)


def test_jaxtyping_checks_the_shapes_of_a_call():
    class Linear(nnx.Module):
        kernel: Float[Array, "in out"] = nnx.param()

        def __init__(self):
            self.kernel = jnp.ones((2, 3))

        @jaxtyped(typechecker=beartype)
        def __call__(self, x: Float[Array, "n in"]) -> Float[Array, "n out"]:
            return x @ self.kernel

    linear = Linear()
    for call in (linear, nnx.jit(linear), lambda x: jax.jit(lambda m, x: m(x))(linear, x)):
        assert call(X).shape == (4, 3)
        with pytest.raises(TypeCheckError):
            call(X[0])


def test_jaxtyped_on_a_dataclass_checks_what_it_is_made_of():
    @jaxtyped(typechecker=beartype)
    @nnx.dataclass
    class Linear(nnx.Module):
        kernel: Float[Array, "in out"] = nnx.param()
        bias: Float[Array, " out"] = nnx.param()

        def __call__(self, x):
            return x @ self.kernel + self.bias

    assert nnx.jit(Linear(jnp.ones((2, 3)), jnp.ones(3)))(X).shape == (4, 3)
    with pytest.raises(TypeCheckError):
        Linear(jnp.ones((2, 3)), jnp.ones(2))


def test_the_import_hook(tmp_path, monkeypatch):
    (tmp_path / "hooked_model.py").write_text(
        "import jax.numpy as jnp, nnx\n"
        "from jaxtyping import Array, Float\n"
        "class Model(nnx.Module):\n"
        "    w: Float[Array, 'a b'] = nnx.param()\n"
        "    def __init__(self):\n"
        "        self.w = jnp.ones((2, 3))\n"
        "    def __call__(self, x: Float[Array, 'n a']) -> Float[Array, 'n b']:\n"
        "        return x @ self.w\n"
        "@nnx.jit\n"
        "def step(model: Model, x: Float[Array, 'n a']) -> Float[Array, 'n b']:\n"
        "    return model(x)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with install_import_hook("hooked_model", "beartype.beartype"):
        hooked = importlib.import_module("hooked_model")
    try:
        assert hooked.step(hooked.Model(), X).shape == (4, 3)
        with pytest.raises(TypeCheckError):
            hooked.step(hooked.Model(), X[0])
    finally:
        del sys.modules["hooked_model"]
