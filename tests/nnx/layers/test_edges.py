"""Statistics of empty batches, under masks, over lanes; widths and options from PyTorch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

import nnx
from nnx import bridge
from tests.nnx.layers import reference as ref
from tests.nnx.layers.tape import Var


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


LANES = draw(4, 5, 3) + 3 * np.arange(4, dtype=np.float32)[:, None, None]
KEPT = np.random.default_rng(1).random((4, 5, 1)) < 0.5
KEPT[0], KEPT[1] = False, True


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("how", ["vmap", "shard_map"])
def test_a_mask_over_lanes_counts_elements_and_not_lanes(how, fast):
    norm = nnx.BatchNorm(3, axis_name="lanes", use_fast_variance=fast, momentum=0.5)

    def call(m, x, kept):
        return m(x, mask=kept)

    if how == "vmap":
        run = nnx.vmap(call, in_axes=(None, 0, 0), axis_name="lanes")
    else:
        spec = jax.sharding.PartitionSpec("lanes")
        mesh = jax.make_mesh((4,), ("lanes",), axis_types=(AxisType.Auto,))
        specs = (jax.sharding.PartitionSpec(), spec, spec)
        run = nnx.jit(nnx.shard_map(call, mesh=mesh, in_specs=specs, out_specs=spec))
    y = run(norm, LANES, KEPT)
    seen = LANES[KEPT[..., 0]].astype(np.float64)
    np.testing.assert_allclose(norm.mean, 0.5 * seen.mean(0), rtol=1e-5)
    np.testing.assert_allclose(norm.var, 0.5 + 0.5 * seen.var(0), rtol=1e-5)
    expected = (LANES - seen.mean(0)) / np.sqrt(seen.var(0) + 1e-5)
    np.testing.assert_allclose(y, expected, atol=1e-5)


@pytest.mark.parametrize("offset", [0.0, 1e3, 1e4])
def test_lanes_with_an_offset(offset):
    x = LANES + np.float32(offset)
    norm = nnx.BatchNorm(3, axis_name="lanes")
    y = nnx.vmap(norm, in_axes=0, axis_name="lanes")(x)
    exact = x.reshape(-1, 3).astype(np.float64)
    expected = (x - exact.mean(0)) / np.sqrt(exact.var(0) + 1e-5)
    np.testing.assert_allclose(y, expected, atol=2e-6)


@pytest.mark.parametrize("training", ["eager", "jit", "scan"])
def test_nothing_to_normalize_by_leaves_the_averages(training):
    norm = nnx.BatchNorm(3)
    norm(draw(8, 3) + 2)
    before = norm["batch_stats"]
    hidden = {"mask": jnp.zeros((4, 1), bool)}
    for x, options in [(jnp.zeros((0, 3)), {}), (draw(4, 3), hidden)]:
        if training == "scan":
            y = nnx.scan(lambda _, x: (None, norm(x, **options)), None, x[None])[1][0]
        else:
            run = nnx.jit if training == "jit" else lambda f: f
            y = run(lambda m, x: m(x, **options))(norm, x)
        assert all((norm["batch_stats"][path] == before[path]).all() for path in before)
        np.testing.assert_allclose(y, norm(x, use_running_average=True), atol=1e-6)
    grads = nnx.grad(lambda m: m(draw(4, 3), **hidden).sum())(norm)
    assert all(jnp.isfinite(g).all() for g in grads.values())


def test_a_channel_of_which_nothing_is_seen_keeps_its_averages():
    norm = nnx.BatchNorm(2, momentum=0.5)
    norm(jnp.array([[1.0, jnp.nan], [3.0, 5.0]]), mask=jnp.array([[True, False]]))
    assert norm.mean.tolist() == [1.0, 0.0] and norm.var.tolist() == [1.0, 1.0]


def test_every_norm_is_finite_where_all_is_hidden():
    x, mask = draw(2, 3, 4), jnp.zeros((2, 1, 1), bool).at[0].set(True)
    for norm in (nnx.LayerNorm(4), nnx.RMSNorm(4), nnx.GroupNorm(4, 2), nnx.InstanceNorm(4)):
        grads, y = nnx.grad(lambda m: (m(x, mask=mask).sum(), m(x, mask=mask)), has_aux=True)(norm)
        np.testing.assert_allclose(y[1], x[1], atol=1e-5)
        assert all(jnp.isfinite(g).all() for g in grads.values())


def test_the_running_variance_of_pytorch():
    x = draw(7, 2, 3).astype(np.float64)
    for correction in (0, 1):
        norm = nnx.BatchNorm(3, momentum=0.9, correction=correction)
        norm(jnp.asarray(x, jnp.float32))
        expected = 0.9 + 0.1 * x.var((0, 1), ddof=correction)
        np.testing.assert_allclose(norm.var, expected, rtol=1e-6)
    # One value has no variance of this kind.
    norm = nnx.BatchNorm(3, correction=1)
    norm(draw(1, 3))
    assert norm.var.tolist() == [1, 1, 1] and (norm.mean != 0).all()
    masked = nnx.BatchNorm(3, correction=1, momentum=0.0)
    masked(x[0].astype(np.float32), mask=np.array([[True], [True]]))
    np.testing.assert_allclose(masked.var, x[0].var(0, ddof=1), rtol=1e-5)


def test_statistics_of_float64_parameters_are_in_float64():
    with jax.enable_x64(True):
        norm = nnx.BatchNorm(3, param_dtype=jnp.float64)
        x = draw(7, 3).astype(np.float64)
        norm(x)
        np.testing.assert_allclose(norm.mean, 0.01 * x.mean(0), rtol=1e-14)


@pytest.mark.parametrize("decode", [False, True])
def test_attention_with_other_widths_for_values(decode):
    with nnx.scope(0):
        layer = nnx.MultiHeadAttention(2, 4, 8, 5, in_kv_features=3, in_v_features=7, v_features=6)
    assert layer.value.kernel.shape == (7, 2, 3) and layer.out.kernel.shape == (2, 3, 5)
    q, k, v = draw(2, 4, 4), draw(2, 4, 3, seed=1), draw(2, 4, 7, seed=2)
    p = {".".join(path): Var(cell.value) for path, cell in nnx.refs(layer).items()}
    heads = [
        ref.einsum("...a,ahd->...hd", x, p[f"{name}.kernel"]) + p[f"{name}.bias"]
        for name, x in (("query", Var(q)), ("key", Var(k)), ("value", Var(v)))
    ]
    y = ref.attention(*heads, causal=True)
    expected = ref.einsum("...hd,hdo->...o", y, p["out.kernel"]) + p["out.bias"]
    if decode:
        layer.init_cache((2, 6, 4))
        found = [
            layer(q[:, i : i + 1], k[:, i : i + 1], v[:, i : i + 1], decode=True) for i in range(4)
        ]
        found = jnp.concatenate(found, axis=1)
    else:
        found = layer(q, k, v, is_causal=True)
    np.testing.assert_allclose(found, expected.value, atol=2e-6)


def test_widths_that_do_not_fit_are_an_error():
    with nnx.scope(0):
        with pytest.raises(ValueError, match="cannot divide v_features=5 among num_heads=2"):
            nnx.MultiHeadAttention(2, 4, v_features=5)
        layer = nnx.MultiHeadAttention(2, 4, in_v_features=3)
    with pytest.raises(ValueError, match=r"values of shape \(\*batch, length, 3\)"):
        layer(draw(2, 4, 4))


def test_the_widths_of_pytorch_come_through_the_bridge():
    layer = nnx.MultiHeadAttention.init(0)(2, 4, in_kv_features=3, in_v_features=5)
    state = {
        "q_proj_weight": draw(4, 4),
        "k_proj_weight": draw(4, 3),
        "v_proj_weight": draw(4, 5),
        "in_proj_bias": draw(12),
        "out_proj.weight": draw(4, 4),
        "out_proj.bias": draw(4),
    }
    names = {"out_proj.weight": "out.weight", "out_proj.bias": "out.bias"}
    bridge.from_state_dict({names.get(name, name): a for name, a in state.items()}, layer)
    np.testing.assert_array_equal(layer.value.kernel.reshape(5, 4), state["v_proj_weight"].T)


def test_a_norm_of_two_axes_comes_through_the_bridge():
    norm = nnx.LayerNorm(6, reduction_axes=(-2, -1), feature_axes=(-2, -1), epsilon=1e-5)
    weight, bias, x = draw(2, 3), draw(2, 3, seed=1), draw(5, 2, 3, seed=2)
    bridge.from_state_dict({"weight": weight, "bias": bias}, norm)
    y = (x - x.mean((1, 2), keepdims=True)) / np.sqrt(x.var((1, 2), keepdims=True) + 1e-5)
    np.testing.assert_allclose(norm(x), y * weight + bias, atol=1e-5)


def test_rotary_angles_far_along_keep_their_digits():
    x = draw(4, 1, 2)
    for positions in ([0, 131071, 2**22, -5], [0.5, 1000.25, -0.75, 4096.125]):
        exact = ref.rotary(Var(x), positions, 10000.0, 2, False).value
        for found in (nnx.apply_rotary(x, jnp.array(positions)),
                      jax.jit(nnx.apply_rotary)(x, jnp.array(positions))):  # fmt: skip
            np.testing.assert_allclose(found, exact, atol=1e-6)
    slope = jax.grad(lambda p: nnx.apply_rotary(jnp.array([[[1.0, 0.0]]]), p[None])[0, 0, 1])(2.5)
    np.testing.assert_allclose(slope, np.cos(2.5), rtol=1e-6)
