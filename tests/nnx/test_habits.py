"""Messages for users who write the code of another library, and hooks that they know from there."""

import jax
import jax.numpy as jnp
import optax
import pytest

import nnx
from nnx._hints import MODULE


class Net(nnx.Module):
    def __init__(self):
        self.linear = nnx.Linear(2, 2)
        self.drop = nnx.Dropout(0.5)

    def __call__(self, x):
        return self.drop(self.linear(x))


class Plain(nnx.Module):
    def __init__(self):
        self.w = jnp.ones(3)

    def __call__(self, x):
        return (x * self.w).sum()


class Forward(nnx.Module):
    def forward(self, x):
        return x


NET = Net.init(0)()


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (
            lambda: NET(jnp.ones((1, 2))),
            "A key of the random stream 'dropout' was requested by a Dropout, but no scope with keys is "
            "active. Call the model with model.apply(rngs=jax.random.key(0))(x), or after model.eval()",
        ),
        (
            lambda: nnx.Linear(2, 3),
            "but no scope with keys is active. Make the module with Cls.init(jax.random.key(0))(...)",
        ),
        (
            lambda: nnx.Linear(2, 3, rngs=0),
            "Linear does not take rngs: its keys come from the scope",
        ),
        (
            lambda: Net.init(0)(jnp.ones(2)),
            "but it was given data, float32[2]. Pass data to the call: model = Net.init(key)(...)",
        ),
        (
            lambda: nnx.Linear.init(0)(2, 3, dtype="bfloat"),
            "Linear got dtype='bfloat', which is not a JAX dtype. Did you mean 'bfloat16'?",
        ),
        (
            lambda: nnx.Optimizer(NET, optax.sgd(0.1)).update(NET["params"], NET),
            "optimizer.update(model, grads), but got a Partition and a Net.",
        ),
        (lambda: Forward()(3), "it has a method named forward, but no __call__. Rename it"),
        (
            lambda: nnx.jit(Forward())(3),
            "it has a method named forward, but no __call__. Rename it",
        ),
        (
            lambda: nnx.grad(lambda m: m(1.0))(Plain()),
            "Its arrays are plain attributes, which filters do not select and training does not change. "
            "Declare them in the class: `w: jax.Array = nnx.param()`.",
        ),
    ],
)
def test_a_mistake_is_explained(call, text):
    with pytest.raises(Exception) as info:
        call()
    assert text in str(info.value)


@pytest.mark.parametrize("name", MODULE)
def test_attributes_of_other_libraries_lead_to_ours(name):
    model = Plain()
    if hasattr(Plain, name):
        pytest.fail(f"{name} is an attribute, and needs no hint")
    with pytest.raises(
        AttributeError, match=f"^'Plain' object has no attribute '{name}': "
    ) as info:
        getattr(model, name)
    assert MODULE[name] in str(info.value) and (info.value.name, info.value.obj) == (name, model)


def test_other_attributes_are_missing_as_ever():
    model = Plain()
    with pytest.raises(AttributeError, match=r"^'Plain' object has no attribute 'ww'$"):
        model.ww  # noqa: B018
    assert not hasattr(model, "ww") and getattr(model, "ww", 3) == 3


def test_a_property_that_raises_raises_its_own_error():
    class Own(nnx.Module):
        @property
        def size(self):
            return self.missing.shape

    with pytest.raises(AttributeError, match="has no attribute 'missing'"):
        Own().size  # noqa: B018
    with pytest.raises(nnx.UnsetFieldError):

        class Unset(nnx.Module):
            w: jax.Array = nnx.param()

        Unset().w  # noqa: B018


def test_a_class_may_have_an_argument_that_is_called_rngs():
    class Own(nnx.Module):
        def __init__(self, rngs):
            self.rngs = rngs

    assert Own(rngs=3).rngs == 3


def test_dir_shows_what_is_a_users():
    names = dir(Plain())
    assert {"w", "apply", "train", "eval", "__call__"} <= set(names)
    assert not [name for name in names if name.startswith("_") and name != "__call__"]


class Checked(nnx.Module):
    w: jax.Array = nnx.param(converter=jnp.asarray)

    def __init__(self, w):
        self.w = w

    def __check_init__(self):
        if self.w.ndim != 1:
            raise ValueError("one axis")


class Subclass(Checked):
    def __init__(self, w):
        super().__init__([0.0])
        self.w = w

    def __check_init__(self):
        if self.w.shape[0] > 3:
            raise ValueError("short")


@nnx.dataclass
class Data(nnx.Module):
    size: int = 1

    def __check_init__(self):
        if self.size < 0:
            raise ValueError("no size")


def test_check_init_runs_after_the_last_init_and_cannot_be_forgotten():
    assert Subclass([1.0]).w.shape == (1,)
    with pytest.raises(ValueError, match="one axis"):
        Subclass(nnx.Ref(jnp.ones(()), "params"))
    with pytest.raises(ValueError, match="short"):
        Subclass([1.0] * 4)
    assert Data(2).size == 2
    with pytest.raises(ValueError, match="no size"):
        Data(-1)

    @nnx.dataclass
    class Larger(Data):
        more: int = 2

    assert (Larger(3, 4).size, Larger(3, 4).more) == (3, 4)
    with pytest.raises(ValueError, match="no size"):
        Larger(-1)

    @nnx.dataclass
    class OwnInit(Data):
        def __init__(self):
            self.size = 5

        def __check_init__(self):
            self.size += 1

    assert OwnInit().size == 6


def test_a_converter_sees_each_value_and_no_ref():
    model = Checked([1, 2])
    model.w = [3, 4]
    assert isinstance(model.w, jax.Array) and model.w.tolist() == [3, 4]
    other = Checked([5])
    other.w = nnx.get_ref(model, "w")
    model.w = [6]
    assert other.w.tolist() == [6]


def test_a_float_that_changes_at_each_step_is_warned_of_once():
    class Model(nnx.Module):
        def __init__(self):
            self.rate = 0.1
            self.w = nnx.Ref(jnp.ones(3))

    @nnx.jit
    def step(model):
        model.w.value *= model.rate

    model = Model()
    with pytest.warns(UserWarning, match="only because the value of model.rate changed") as seen:
        for i in range(8):
            model.rate = 0.5**i + 0.01
            step(model)
    assert len(seen) == 1
    assert "A float is part of the program. Make it an array or a Ref" in str(seen[0].message)


def test_data_in_place_of_a_size_that_has_a_default():
    class Net(nnx.Module):
        def __init__(self, size=4):
            self.linear = nnx.Linear(size, size)

    with pytest.raises(TypeError) as raised:
        Net.init(0)(jnp.ones((3, 4)))
    assert raised.value.__notes__[-1] == (
        "Net.init(key)(...) makes a Net and takes the arguments of its constructor, but it was given data, "
        "float32[3,4]. Pass data to the call: model = Net.init(key)(...), then model(x)."
    )
    with pytest.raises(TypeError) as raised:
        Net.init(0)("4")
    assert not getattr(raised.value, "__notes__", [])
