"""Weights from other libraries: after the move both models agree on real inputs."""

import sys

import flax.linen as nn
import flax.nnx as fnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.datasets import load_digits

import nnx
from nnx.bridge import BridgeError, from_flax, to_flax

DIGITS = (load_digits().images[:8, ..., None] / 16).astype(np.float32)


class Ours(nnx.Module):
    def __init__(self):
        self.conv = nnx.Conv(1, 4, (3, 3))
        self.norms = [nnx.BatchNorm(4, momentum=0.5), nnx.BatchNorm(4, momentum=0.5)]
        self.drop = nnx.Dropout(0.5)
        self.head = nnx.Linear(4, 10)

    def __call__(self, x):
        x = self.norms[1](nnx.relu(self.norms[0](self.conv(x))))
        return self.head(self.drop(x.mean((1, 2))))


class Theirs(fnx.Module):
    def __init__(self, rngs):
        self.conv = fnx.Conv(1, 4, (3, 3), rngs=rngs)
        self.norms = fnx.List([fnx.BatchNorm(4, momentum=0.5, rngs=rngs) for _ in range(2)])
        self.drop = fnx.Dropout(0.5, rngs=rngs)
        self.head = fnx.Linear(4, 10, rngs=rngs)

    __call__ = Ours.__call__


def trained(seed=0):
    """A flax model whose batch statistics have changed."""
    theirs = Theirs(fnx.Rngs(seed))
    theirs.train()
    theirs(DIGITS)
    theirs.eval()
    return theirs


def close(a, b, tolerance=1e-5):
    np.testing.assert_allclose(np.asarray(a, np.float64), np.asarray(b, np.float64),
                               rtol=tolerance, atol=tolerance)  # fmt: skip


@pytest.mark.parametrize("what", [lambda m: m, fnx.state], ids=["module", "state"])
def test_from_flax(what):
    theirs, ours = trained(), Ours.init(5)().eval()
    assert from_flax(what(theirs), ours) is ours
    close(ours(DIGITS), theirs(DIGITS))
    assert not jnp.allclose(ours.norms[0].mean, 0)


def test_to_flax():
    ours, theirs = Ours.init(5)(), trained()
    ours.norms[0].mean = jnp.full(4, 0.25)
    ours.eval()
    state = to_flax(ours, fnx.state(theirs))
    assert isinstance(state, fnx.State) and not jnp.allclose(theirs(DIGITS), ours(DIGITS))
    assert to_flax(ours, theirs) is theirs
    close(theirs(DIGITS), ours(DIGITS))
    other = trained(1)
    fnx.update(other, state)
    close(other(DIGITS), ours(DIGITS))
    # The buffers are not shared, so donation of one side does not delete the other.
    assert theirs.head.kernel[...] is not ours.head.kernel


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(4, (3, 3), name="conv")(x)
        for i in range(2):
            x = nn.BatchNorm(use_running_average=not train, momentum=0.5, name=f"norm{i}")(x)
            x = nn.relu(x) if i == 0 else x
        init = nn.with_partitioning(nn.initializers.lecun_normal(), ("in", "out"))
        return nn.Dense(10, kernel_init=init, name="head")(x.mean((1, 2)))


class OursAsLinen(nnx.Module):
    def __init__(self):
        self.conv, self.head = nnx.Conv(1, 4, (3, 3)), nnx.Linear(4, 10)
        self.norm0, self.norm1 = nnx.BatchNorm(4), nnx.BatchNorm(4)

    def __call__(self, x):
        x = self.norm1(nnx.relu(self.norm0(self.conv(x))))
        return self.head(x.mean((1, 2)))


def test_linen_variables_both_ways():
    variables = Linen().init(jax.random.key(0), DIGITS)
    _, changed = Linen().apply(variables, DIGITS, train=True, mutable=["batch_stats"])
    variables = {**variables, **changed}
    ours = from_flax(variables, OursAsLinen.init(1)().eval())
    close(ours(DIGITS), Linen().apply(variables, DIGITS))
    other = OursAsLinen.init(2)().eval()
    moved = to_flax(other, variables)
    close(Linen().apply(moved, DIGITS), other(DIGITS))
    # The parameters alone, for a model without statistics.
    linear = nnx.Linear.init(3)(4, 10)
    from_flax(jax.tree.map(np.asarray, dict(nn.meta.unbox(variables)["params"]["head"])), linear)
    close(linear.kernel, ours.head.kernel)


def test_names_that_linen_makes_itself():
    class Auto(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.Dense(5)(x))
            return nn.Dense(3)(x)

    x = DIGITS.reshape(8, 64)
    variables = Auto().init(jax.random.key(0), x)
    make = nnx.Sequential.init(0)
    with nnx.scope(0):
        ours, other = (make(nnx.Linear(64, 5), nnx.relu, nnx.Linear(5, 3)) for _ in range(2))
    names = {"Dense_0": "layers.0", "Dense_1": "layers.2"}
    close(from_flax(variables, ours, names)(x), Auto().apply(variables, x))
    close(Auto().apply(to_flax(other, variables, names), x), other(x))
    rules = [(r"Dense_0\.(.*)", r"layers.0.\1")]
    with pytest.raises(BridgeError, match=r"Dense_1.kernel \(no regex matches it\)"):
        from_flax(variables, ours, rules)
    with pytest.raises(BridgeError, match="missing in our model:\n    Dense_1.kernel"):
        to_flax(ours, variables, rules)
    dropped = {"params": {**variables["params"], "Dense_2": {"kernel": np.ones((3, 3))}}}
    from_flax(dropped, ours, {**names, "Dense_2": None})
    assert (
        to_flax(ours, dropped, {**names, "Dense_2": None})["params"]["Dense_2"]["kernel"] == 1
    ).all()


def test_sharing_moves_by_any_path():
    class Tied(nnx.Module):
        def __init__(self):
            self.z = nnx.Linear(2, 2)
            self.a = self.z

    class FlaxTied(fnx.Module):
        def __init__(self, rngs):
            self.z = fnx.Linear(2, 2, rngs=rngs)
            self.a = self.z

    theirs, ours = FlaxTied(fnx.Rngs(0)), Tied.init(1)()
    from_flax(theirs, ours)
    close(ours.a.kernel, theirs.z.kernel[...])
    close(to_flax(Tied.init(2)(), theirs).a.bias[...], ours.z.bias)


def unchanged(model, call, error, match):
    before = nnx.get_partition(model)
    with pytest.raises(error, match=match):
        call()
    after = nnx.get_partition(model)
    assert all(after[path] is value for path, value in before.items())


def test_the_error_lists_everything():
    theirs, ours = trained(), Ours.init(0)()
    ours.head = nnx.Linear.init(0)(4, 9)
    ours.more = nnx.Linear.init(0)(2, 2, use_bias=False)
    ours.norms.pop()
    unchanged(
        ours,
        lambda: from_flax(theirs, ours),
        BridgeError,
        r"(?s)do not fit the Ours, and nothing was changed.*another shape or dtype:.*"
        r"head.kernel has shape \(4, 9\), but head.kernel gives \(4, 10\).*"
        r"missing in the flax model:\n    more.kernel\n.*"
        r"unexpected in the flax model:\n    norms.1.bias\n",
    )
    with pytest.raises(BridgeError) as raised:
        to_flax(ours, theirs)
    assert "head.kernel is float32[4, 10] in the flax model, but float32[4, 9]" in str(raised.value)
    assert "is missing in our model:\n    norms.1.bias" in str(raised.value)
    assert "is unexpected in our model:\n    more.kernel" in str(raised.value)


def test_dtypes_are_ours_and_kinds_do_not_change():
    ours = nnx.Linear.init(0)(2, 1, param_dtype=jnp.bfloat16)
    variables = {"kernel": np.ones((2, 1)), "bias": np.zeros(1, np.float16)}
    from_flax(variables, ours)
    assert ours.kernel.dtype == ours.bias.dtype == jnp.bfloat16
    unchanged(
        ours,
        lambda: from_flax({**variables, "bias": np.zeros(1, int)}, ours),
        BridgeError,
        "bias has dtype bfloat16, but bias has int64",
    )


def test_without_flax_the_error_says_what_to_install(monkeypatch):
    theirs = trained()
    monkeypatch.setitem(sys.modules, "flax", None)
    with pytest.raises(ImportError, match="pip install flax"):
        from_flax(theirs, Ours.init(0)())


def test_weight_and_spectral_norm_move_by_path():
    import flax.nnx as fnx

    rngs = fnx.Rngs(0)
    theirs = fnx.WeightNorm(fnx.Linear(3, 4, rngs=rngs), rngs=rngs)
    ours = nnx.WeightNorm(nnx.Linear.init(1)(3, 4))
    x = jnp.ones((2, 3))
    nnx.bridge.from_flax(theirs, ours)
    assert jnp.allclose(ours(x), theirs(x), atol=1e-5)
