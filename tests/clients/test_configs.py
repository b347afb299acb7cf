"""pydantic, OmegaConf, ml_collections, attrs: settings that may change, as attributes of modules."""

import attrs
import jax
import jax.numpy as jnp
import ml_collections
import omegaconf
import pydantic
import pytest

import nnx

X = jnp.ones((3, 2))
SETTINGS = {"scale": 2.0, "sizes": [1, 2], "inner": {"name": "relu"}}


class Pydantic(pydantic.BaseModel):
    scale: float
    sizes: list[int]
    inner: dict[str, str]


@attrs.define
class Attrs:
    scale: float
    sizes: list[int]
    inner: dict[str, str]


CONFIGS = {
    "pydantic": lambda: Pydantic(**SETTINGS),
    "OmegaConf": lambda: omegaconf.OmegaConf.create(SETTINGS),
    "ml_collections": lambda: ml_collections.ConfigDict(SETTINGS),
    "attrs": lambda: Attrs(**SETTINGS),
}


class Net(nnx.Module):
    def __init__(self, config):
        self.config = config
        self.linear = nnx.Linear(2, 2)

    def __call__(self, x):
        return self.linear(x) * self.config.scale * self.config.sizes[0]


@pytest.mark.parametrize("transform", [nnx.jit, jax.jit])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_change_of_a_setting_is_seen(name, transform):
    net = Net.init(0)(CONFIGS[name]())
    seen = []

    def call(net, x):
        seen.append(net.config.scale)
        return net(x)

    step = transform(call)
    plain = net.linear(X)
    for _ in range(2):
        assert jnp.allclose(step(net, X), 2 * plain)
    net.config.scale = 3.0
    assert jnp.allclose(step(net, X), 3 * plain)
    net.config.sizes[0] = 5
    assert jnp.allclose(step(net, X), 15 * plain)
    net.config.scale = 2.0
    net.config.sizes[0] = 1
    assert jnp.allclose(step(net, X), 2 * plain)
    assert seen[:3] == [2.0, 3.0, 3.0] and len(seen) <= 4


@pytest.mark.parametrize("name", CONFIGS)
def test_settings_are_not_values(name):
    net = Net.init(0)(CONFIGS[name]())
    assert list(nnx.get_partition(net)) == [("linear", "kernel"), ("linear", "bias")]
    assert (nnx.grad(lambda net: net(X).sum())(net)["linear.bias"] == 6).all()
    copy = nnx.clone(net)
    assert jnp.array_equal(copy(X), net(X)) and copy.linear is not net.linear
    assert jax.tree.structure(copy) == jax.tree.structure(net)
