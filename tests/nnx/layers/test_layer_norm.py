"""Layer, RMS, group and instance normalization against flax.nnx."""

import flax.nnx as fnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nnx
from nnx.layers.layer_norm import GroupNorm, InstanceNorm, LayerNorm, RMSNorm
from tests.nnx.layers.test_layers import draw, from_flax

KINDS = [
    (LayerNorm, fnx.LayerNorm, {}),
    (RMSNorm, fnx.RMSNorm, {}),
    (GroupNorm, fnx.GroupNorm, {"num_groups": 3}),
    (InstanceNorm, fnx.InstanceNorm, {}),
]
NAMES = ["layer", "rms", "group", "instance"]
X = draw(2, 4, 6) * 3 + 1


def cheap(key, shape, dtype=jnp.float32):
    """An initializer that needs no compilation."""
    return jnp.asarray(np.random.default_rng(7).normal(size=shape), dtype)


def compare(ours, theirs, x):
    """Like `check` in the other tests, but with one program for each side, which compiles faster."""
    from_flax(ours, theirs)

    def loss(m, x):
        y = m(x)
        return jnp.sum(jnp.sin(y.astype(jnp.float32))), y

    options = {"argnums": (0, 1), "has_aux": True}
    ours_of = nnx.value_and_grad(loss, wrt=("params", "lora"), **options)
    (_, y), (ga, gx) = nnx.jit(ours_of)(ours, x)
    (_, z), (fa, fx) = fnx.jit(fnx.value_and_grad(loss, **options))(theirs, x)
    assert y.dtype == z.dtype
    atol = 5e-2 if jnp.bfloat16 in (y.dtype, x.dtype) else 2e-5
    pairs = [(y, z), (gx, fx)]
    pairs += [(ga[tuple(map(str, p))], v.get_value()) for p, v in fa.flat_state()]
    for a, b in pairs:
        a, b = (np.asarray(v, np.float32) for v in (a, b))
        np.testing.assert_allclose(a, b, atol=atol, rtol=1e-3)


def both(ours, theirs, features, **options):
    """One layer of each class, with scale and bias that make a difference."""
    theirs = theirs(features, rngs=fnx.Rngs(3), scale_init=cheap, **options)
    return ours.init(0)(features, **options), theirs


@pytest.mark.parametrize("ours, theirs, more", KINDS, ids=NAMES)
def test_values_and_gradients(ours, theirs, more):
    compare(*both(ours, theirs, 6, **more), X)


@pytest.mark.parametrize(
    "options",
    [{"epsilon": 0.1, "use_fast_variance": False}, {"use_scale": False}, {"dtype": jnp.bfloat16}],
)
@pytest.mark.parametrize("ours, theirs, more", KINDS, ids=NAMES)
def test_options(ours, theirs, more, options):
    mine, other = both(ours, theirs, 6, **more, **options)
    from_flax(mine, other)
    y, expected = nnx.jit(lambda x: (mine(x), other(x)))(X)
    assert y.dtype == expected.dtype and (mine.scale is None) == ("use_scale" in options)
    np.testing.assert_allclose(*(a.astype(jnp.float32) for a in (y, expected)), atol=2e-2)


def test_half_precision():
    options = {"param_dtype": jnp.bfloat16, "use_bias": False}
    mine, other = both(LayerNorm, fnx.LayerNorm, 6, **options)
    assert mine.bias is None
    compare(mine, other, X.astype(jnp.bfloat16))


@pytest.mark.parametrize("ours, theirs, more", KINDS, ids=NAMES)
def test_mask(ours, theirs, more):
    mask = jnp.asarray(np.random.default_rng(1).random((2, 4, 6)) < 0.7).at[:, :, ::2].set(True)
    mine, other = both(ours, theirs, 6, **more)
    from_flax(mine, other)
    y, expected = nnx.jit(lambda x: (mine(x, mask=mask), other(x, mask=mask)))(X)
    # flax returns NaN where everything is hidden.
    assert jnp.isfinite(y).all()
    np.testing.assert_allclose(y, jnp.where(jnp.isnan(expected), y, expected), atol=2e-5)
    assert not np.allclose(y, nnx.jit(lambda m: m(X))(mine), atol=1e-2)


def test_group_norm_takes_a_mask_of_positions():
    x, mask = draw(2, 4, 6), jnp.array([True, True, True, False])[None, :, None]
    norm = GroupNorm(6, 3)
    whole = jnp.broadcast_to(mask, x.shape)
    np.testing.assert_allclose(norm(x, mask=mask), norm(x, mask=whole), rtol=1e-6)


AXES = [
    (LayerNorm, fnx.LayerNorm, 24, {"reduction_axes": (-2, -1), "feature_axes": (1, 2)}),
    (LayerNorm, fnx.LayerNorm, 4, {"reduction_axes": (1, 2), "feature_axes": 1}),
    (RMSNorm, fnx.RMSNorm, 6, {"reduction_axes": (1, 2)}),
    (InstanceNorm, fnx.InstanceNorm, 4, {"feature_axes": 1}),
    (GroupNorm, fnx.GroupNorm, 6, {"num_groups": None, "group_size": 2}),
    (GroupNorm, fnx.GroupNorm, 6, {"num_groups": 2, "reduction_axes": (1, 2)}),
]


@pytest.mark.parametrize("ours, theirs, features, options", AXES)
def test_axes(ours, theirs, features, options):
    mine, other = both(ours, theirs, features, **options)
    from_flax(mine, other)
    np.testing.assert_allclose(*nnx.jit(lambda x: (mine(x), other(x)))(X), atol=1e-5)


def test_group_norm_with_two_batch_axes_is_that_of_each_example():
    x, norm = draw(2, 3, 4, 6), GroupNorm(6, 3, reduction_axes=(-2, -1))
    plain = nnx.jit(lambda x: GroupNorm(6, 3)(x.reshape(6, 4, 6)).reshape(x.shape))
    expected = plain(x)
    np.testing.assert_allclose(nnx.jit(norm)(x), expected, atol=1e-5)
    single = GroupNorm(6, 3, reduction_axes=(0, 1))(x[0, 0])
    np.testing.assert_allclose(single, expected[0, 0], atol=1e-6)


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("ours, theirs, more", KINDS[:1], ids=NAMES[:1])
def test_statistics_over_a_mapped_axis(ours, theirs, more, fast):
    options = {"axis_name": "lanes", "use_fast_variance": fast, **more}
    mine, other = ours(6, **options), theirs(6, rngs=fnx.Rngs(0), **options)
    x = draw(3, 2, 4, 6)
    lanes = nnx.vmap(lambda m, x: m(x), in_axes=(None, 0), axis_name="lanes")
    y, expected = nnx.jit(lambda x: (lanes(mine, x), jax.vmap(other, axis_name="lanes")(x)))(x)
    np.testing.assert_allclose(y, expected, atol=1e-5)
    assert not np.allclose(y, nnx.jit(ours(6, **more))(x), atol=1e-2)


def test_groups_of_a_mapped_axis_reach_the_collective(monkeypatch):
    # jax.vmap has no groups, and other mapped axes need several devices.
    seen = []
    monkeypatch.setattr(
        jax.lax, "pmean", lambda x, *args, **kwargs: seen.append((args, kwargs)) or x
    )
    LayerNorm(3, axis_name="lanes", axis_index_groups=[[0, 1], [2, 3]])(draw(2, 3))
    # The messages for the shift and for the statistics.
    assert seen == [(("lanes",), {"axis_index_groups": [[0, 1], [2, 3]]})] * 2


def test_against_float64():
    x = np.asarray(draw(4, 6), np.float64) + 100
    exact = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    norm = LayerNorm(6, use_fast_variance=False)
    np.testing.assert_allclose(norm(jnp.asarray(x, jnp.float32)), exact, atol=1e-4)


def test_under_jit_and_metadata():
    norm = LayerNorm(6, scale_metadata={"axes": "features"})
    assert nnx.get_ref(norm, "scale").metadata["axes"] == "features"
    x = draw(4, 6)
    np.testing.assert_allclose(nnx.jit(lambda m, x: m(x))(norm, x), norm(x), atol=1e-6)
    z = norm(x + 1j * x[::-1])
    assert z.dtype == jnp.complex64 and jnp.allclose(jnp.mean(jnp.abs(z) ** 2, -1), 1, atol=1e-4)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: LayerNorm(4)(draw(2, 3)), r"LayerNorm .* 4\) along axis -1, but got \(2, 3\)"),
        (
            lambda: LayerNorm(4, feature_axes=(1, 2))(draw(2, 2, 3)),
            r"axes \(1, 2\) together.*2, 3\)",
        ),
        (lambda: RMSNorm(4)(draw(2, 3)), r"RMSNorm expects .*\(2, 3\)"),
        (
            lambda: RMSNorm(3, reduction_axes=2)(draw(2, 3)),
            r"axes \(2,\), but got .* \(2, 3\).* 2 axes",
        ),
        (lambda: GroupNorm(6)(draw(2, 6)), "cannot divide 6 channels into 32 equal groups"),
        (lambda: GroupNorm(6, None, 4), "cannot divide 6 channels into groups of 4"),
        (lambda: GroupNorm(6, 0), "into 0 equal groups"),
        (lambda: GroupNorm(6, 3, 2), "num_groups is 3 and group_size is 2. Set the other"),
        (lambda: GroupNorm(6, None), "num_groups is None and group_size is None"),
        (
            lambda: GroupNorm(6, 3, reduction_axes=(1,))(draw(2, 4, 6)),
            "include the last axis, which has the channels",
        ),
        (lambda: GroupNorm(6, 3)(draw(2, 4)), r"GroupNorm expects .*6\).*\(2, 4\)"),
        (
            lambda: InstanceNorm(2, feature_axes=0)(draw(2, 4)),
            r"first axis .* \(2, 4\) is the batch",
        ),
        (lambda: InstanceNorm(3)(draw(2, 4)), r"InstanceNorm expects .*\(2, 4\)"),
    ],
)
def test_mistakes_raise_errors_that_say_what_is_wrong(make, message):
    with pytest.raises(ValueError, match=message):
        make()
