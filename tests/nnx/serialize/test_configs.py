"""Frozen dataclasses, such as configs, in attributes of modules."""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nnx


@dataclasses.dataclass(frozen=True)
class Rope:
    base: float = 1e4
    scaling: tuple = (1.0, 2)


@dataclasses.dataclass(frozen=True)
class Config:
    features: int
    rope: Rope = Rope()
    dtype: object = jnp.bfloat16
    act: object = jax.nn.gelu
    names: dict = dataclasses.field(default_factory=dict, hash=False)
    heads: int = dataclasses.field(init=False, default=0)

    def __post_init__(self):
        if self.features % 2:
            raise ValueError("odd")
        object.__setattr__(self, "heads", self.features // 2)

    @functools.cached_property
    def size(self):
        return self.features**2


@dataclasses.dataclass(frozen=True, slots=True)
class Slotted:
    x: int = 1


class Inherits(Config):
    pass


class Model(nnx.Module):
    def __init__(self, config):
        self.config = config
        self.head = nnx.Linear(2, 2)


@pytest.mark.parametrize("suffix", ["npz", "safetensors"])
@pytest.mark.parametrize(
    "config",
    [Config(4, Rope(1e6), names={"a": 1}), Slotted(3), Inherits(2), (Rope(), {"x": Slotted()})],
    ids=lambda x: type(x).__name__,
)
def test_a_config_comes_back(tmp_path, suffix, config):
    path = tmp_path / f"m.{suffix}"
    if isinstance(config, Config):
        assert config.size == config.features**2
    nnx.save(path, Model.init(0)(config))
    back = nnx.load(path)
    assert back.config == config and type(back.config) is type(config)
    if isinstance(config, Config):
        assert back.config.heads == config.heads and back.config.size == config.size
        assert back.config.dtype is jnp.bfloat16 and back.config.act is jax.nn.gelu
    assert back.head(jnp.ones(2)).shape == (2,)


def test_the_same_program_runs_a_loaded_model(tmp_path):
    nnx.save(tmp_path / "m.npz", Model.init(0)(Rope()))
    traces = []

    @nnx.jit
    def call(model, x):
        traces.append(model.config.base)
        return model.head(x) * model.config.base

    model = nnx.load(tmp_path / "m.npz")
    np.testing.assert_allclose(call(model, jnp.ones(2)), model.head(jnp.ones(2)) * 1e4)
    call(nnx.load(tmp_path / "m.npz"), jnp.ones(2))
    assert traces == [1e4]


@dataclasses.dataclass
class Thawed:
    x: int = 1


def local_config():
    @dataclasses.dataclass(frozen=True)
    class Local:
        x: int = 1

    return Local()


def with_more():
    config = Rope()
    object.__setattr__(config, "more", 1)
    return config


@pytest.mark.parametrize(
    "make, message",
    [
        (Thawed, "a Thawed, which nnx.save does not know. Register"),
        (
            local_config,
            "Local, a dataclass that no other program could find by its name. Define it at",
        ),
        (with_more, "a Rope, a dataclass that holds 'more', which is not one of its fields"),
        (
            lambda: Rope(scaling=object()),
            "'config.scaling' is an object, which nnx.save does not know",
        ),
    ],
)
def test_what_would_not_come_back_is_refused(tmp_path, make, message):
    with pytest.raises(nnx.SaveError, match=message):
        nnx.save(tmp_path / "m.npz", Model.init(0)(make()))
    assert not list(tmp_path.iterdir())


@dataclasses.dataclass(frozen=True)
class Changing:
    x: int = 1


def test_a_class_that_changed_or_is_not_here(tmp_path, monkeypatch):
    path = tmp_path / "m.npz"
    nnx.save(path, Model.init(0)(Changing()))
    more = dataclasses.make_dataclass(
        "Changing", [("x", int, 1), ("y", int, 2)], frozen=True, namespace={"__module__": __name__}
    )
    with monkeypatch.context() as patch:
        patch.setitem(globals(), "Changing", more)
        with pytest.raises(
            nnx.LoadError, match=r"has changed .* were \['x'\] and are now \['x', 'y'\]"
        ):
            nnx.load(path)
    for other in (dataclasses.make_dataclass("Changing", [("x", int)]), types.SimpleNamespace(), 3):
        with monkeypatch.context() as patch:
            patch.setitem(globals(), "Changing", other)
            with pytest.raises(nnx.LoadError, match="Changing', a class that is not registered"):
                nnx.load(path)
    model = Model.init(1)(Changing())
    nnx.load_state(path, into=model)
    np.testing.assert_array_equal(model.head.kernel, nnx.load(path).head.kernel)


def test_nothing_of_a_config_runs_when_it_is_loaded(tmp_path, monkeypatch):
    path = tmp_path / "m.npz"
    nnx.save(path, Model.init(0)(Config(4)))

    def refuse(*args, **kwargs):
        raise AssertionError("loading called the class")

    for name in ("__init__", "__post_init__"):
        monkeypatch.setattr(Config, name, refuse)
    monkeypatch.setattr(Config, "__new__", refuse)
    assert nnx.load(path).config.features == 4
