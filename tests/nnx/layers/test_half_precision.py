"""Sums of half-precision numbers, and which dtypes flow through a network."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nnx

HALVES = [jnp.bfloat16, jnp.float16]
# Half precision can represent it exactly, but stops counting long before.
MANY = 64 * 64


def total(m, x, *args):
    return m(x, *args).astype(jnp.float32).sum()


def ones(*shape):
    return lambda dtype: jnp.full(shape, 2.0**-6, dtype)


BIASED = {
    "Linear": (lambda **o: nnx.Linear(4, 4, **o), ones(64, 64, 4)),
    "LinearGeneral": (lambda **o: nnx.LinearGeneral(4, (2, 2), **o), ones(64, 64, 4)),
    "Einsum": (lambda **o: nnx.Einsum("...a,ab->...b", (4, 4), (4,), **o), ones(64, 64, 4)),
    "Conv": (lambda **o: nnx.Conv(1, 2, (1, 1), **o), ones(4, 32, 32, 1)),
    "ConvTranspose": (lambda **o: nnx.ConvTranspose(1, 2, (1, 1), **o), ones(4, 32, 32, 1)),
    "LayerNorm": (lambda **o: nnx.LayerNorm(4, **o), ones(64, 64, 4)),
    "GroupNorm": (lambda **o: nnx.GroupNorm(4, 2, **o), ones(64, 64, 4)),
    "BatchNorm": (lambda **o: nnx.BatchNorm(4, **o), ones(64, 64, 4)),
    "LoRALinear": (lambda **o: nnx.LoRALinear(4, 4, lora_rank=1, **o), ones(64, 64, 4)),
}


@pytest.mark.parametrize("half", HALVES, ids=lambda d: d.__name__)
@pytest.mark.parametrize("which", ["dtype", "param_dtype"])
@pytest.mark.parametrize("name", BIASED)
def test_the_gradient_of_a_bias_is_the_number_of_its_uses(name, which, half):
    make, x = BIASED[name]
    with nnx.scope(0):
        layer = make(**{which: half})
    grads = nnx.jit(nnx.grad(total))(layer, x(half))
    np.testing.assert_array_equal(grads["bias"], MANY)
    assert grads["bias"].dtype == layer.bias.dtype


@pytest.mark.parametrize("half", HALVES, ids=lambda d: d.__name__)
def test_the_gradient_of_a_table_is_the_number_of_its_uses(half):
    for rows in (10, 1):
        for options in ({"dtype": half}, {"param_dtype": half}):
            embed = nnx.Embed.init(0)(rows, 2, **options)
            grad = nnx.grad(total)(embed, jnp.zeros((4, 250), int))["embedding"]
            assert grad[0].tolist() == [1000, 1000] and not grad[1:].any()
            assert embed(jnp.zeros(3, int)).dtype == half
    # In forward mode and under vmap, too.
    tangent = jax.jvp(lambda e: total(e, jnp.zeros(8, int)), (embed,), (embed,))[1]
    assert float(tangent) == pytest.approx(8 * float(embed.embedding.astype(jnp.float32).sum()))
    assert nnx.vmap(embed, in_axes=0)(jnp.zeros((3, 2), int)).shape == (3, 2, 2)


@pytest.mark.parametrize("half", HALVES, ids=lambda d: d.__name__)
def test_the_gradient_of_a_slope(half):
    grad = nnx.grad(total)(nnx.PReLU(0.25), jnp.full((64, 64), -1.0, half))["negative_slope"]
    assert float(grad) == -MANY


@pytest.mark.parametrize("half", HALVES, ids=lambda d: d.__name__)
def test_pools_add_up_in_float32(half):
    x = jnp.full((1, 64, 64, 1), 100.0, half)
    assert nnx.avg_pool(x, (64, 64)).tolist() == [[[[100.0]]]]
    assert nnx.pool(x / 100, 0.0, jax.lax.add, (64, 64)).tolist() == [[[[MANY]]]]
    # One element is the largest of many windows.
    x = jnp.zeros((1024, 1), half).at[512].set(1)
    grad = jax.grad(lambda x: nnx.max_pool(x, (512,)).astype(jnp.float32).sum())(x)
    assert float(grad[512, 0]) == 512
    grad = jax.grad(lambda x: nnx.avg_pool(x, (513,)).astype(jnp.float32).sum() * 513)(x)
    assert float(grad[512, 0]) == pytest.approx(512, rel=0.01)


@pytest.mark.parametrize(
    "cell", [nnx.LSTMCell, nnx.GRUCell, nnx.SimpleCell], ids=lambda c: c.__name__
)
def test_a_loop_adds_up_its_steps_and_gradients_in_float32(cell):
    """A thousand steps, with the reference in float32."""
    half = jnp.bfloat16
    with nnx.scope(0):
        rnn = nnx.RNN(cell(1, 1, param_dtype=half), return_carry=True)
        like = nnx.RNN(cell(1, 1), return_carry=True)
    for path, ref in nnx.refs(rnn).items():
        # A forget gate that is open, and small steps.
        value = 6.0 if path[-2:] == ("hf", "bias") else 2.0**-6
        ref.value = jnp.full_like(ref.value, value)
    nnx.update(like, jax.tree.map(lambda w: w.astype(jnp.float32), nnx.get_partition(rnn)))
    x = jnp.full((1000, 1), 2.0**-4, half)

    def loss(m, x):
        carry, y = m(x)
        return y.astype(jnp.float32).mean() * 100, (carry, y)

    run = nnx.jit(nnx.grad(loss, has_aux=True))
    grads, (carry, y) = run(rnn, x)
    exact, (last, z) = run(like, x.astype(jnp.float32))
    assert y.dtype == half and all(a.dtype == half for a in jax.tree.leaves(carry))
    for a, b in zip(jax.tree.leaves((carry, y)), jax.tree.leaves((last, z)), strict=True):
        np.testing.assert_allclose(a.astype(jnp.float32), b, rtol=0.03, atol=1e-3)
    for path in grads:
        assert grads[path].dtype == half
        np.testing.assert_allclose(grads[path].astype(jnp.float32), exact[path], rtol=0.05)


def test_weights_near_zero_are_normalized():
    for value in (1e-4, 1e4, 0.0):
        init = {"param_dtype": jnp.float16, "kernel_init": nnx.initializers.constant(value)}
        with nnx.scope(0):
            weight = nnx.WeightNorm(nnx.Linear(2, 1, **init))
            spectral = nnx.SpectralNorm(nnx.Linear(2, 1, **init), n_steps=5)
        expected = 0.0 if value == 0 else 2**0.5
        for layer in (weight, spectral):
            y = layer(jnp.ones((1, 2), jnp.float16))
            np.testing.assert_allclose(y.astype(jnp.float32), expected, rtol=2e-3)
            grads = nnx.grad(lambda m: m(jnp.ones((1, 2), jnp.float16)).sum())(layer)
            assert all(
                jnp.isfinite(g).all() for p, g in grads.items() if value or "kernel" not in p
            )


def everything():
    norm = {"Layer": nnx.LayerNorm, "RMS": nnx.RMSNorm, "Instance": nnx.InstanceNorm}
    layers = {f"{name}Norm": (kind(4), (2, 3, 4)) for name, kind in norm.items()}
    masked = nnx.Conv(4, 4, (1,), mask=np.ones((1, 4, 4)))
    return layers | {
        "Linear": (nnx.Linear(4, 4), (2, 4)),
        "LinearGeneral": (nnx.LinearGeneral(4, (2, 2)), (2, 4)),
        "Einsum": (nnx.Einsum("ab,bc->ac", (4, 4), (4,)), (2, 4)),
        "Conv": (nnx.Conv(4, 4, (3,)), (2, 5, 4)),
        "masked Conv": (masked, (2, 5, 4)),
        "ConvTranspose": (nnx.ConvTranspose(4, 4, (3,), mask=jnp.ones((3, 4, 4))), (2, 5, 4)),
        "Embed": (nnx.Embed(5, 4), None),
        "GroupNorm": (nnx.GroupNorm(4, 2), (2, 3, 4)),
        "BatchNorm": (nnx.BatchNorm(4), (2, 3, 4)),
        "WeightNorm": (nnx.WeightNorm(nnx.Linear(4, 4)), (2, 4)),
        "SpectralNorm": (nnx.SpectralNorm(nnx.Linear(4, 4)), (2, 4)),
        "LoRALinear": (nnx.LoRALinear(4, 4, lora_rank=1), (2, 4)),
        "LoRALinearGeneral": (nnx.LoRALinearGeneral(4, 4, lora_rank=1), (2, 4)),
        "LoRA": (nnx.LoRA(4, 1, 4, base_module=nnx.Linear(4, 4)), (2, 4)),
        "MultiHeadAttention": (nnx.MultiHeadAttention(2, 4, normalize_qk=True), (2, 3, 4)),
        "PReLU": (nnx.PReLU(), (2, 4)),
        "Dropout": (nnx.Dropout(0.5), (2, 4)),
        "LSTMCell": (nnx.RNN(nnx.LSTMCell(4, 4)), (2, 3, 4)),
        "OptimizedLSTMCell": (nnx.RNN(nnx.OptimizedLSTMCell(4, 4)), (2, 3, 4)),
        "GRUCell": (nnx.RNN(nnx.GRUCell(4, 4)), (2, 3, 4)),
        "SimpleCell": (nnx.RNN(nnx.SimpleCell(4, 4)), (2, 3, 4)),
        "Bidirectional": (
            nnx.Bidirectional(nnx.RNN(nnx.GRUCell(4, 4)), nnx.RNN(nnx.GRUCell(4, 4))),
            (2, 3, 4),
        ),
    }


def recipe(model, half):
    """The recipe in docs/migration.md."""
    cast = jax.tree.map(lambda w: w.astype(half), model["params"])
    nnx.update(model, cast, strict=False)
    return model


with nnx.scope(0):
    NAMES = list(everything())


@pytest.mark.parametrize("name", NAMES)
def test_after_the_recipe_everything_computes_in_half_precision(name):
    with nnx.scope(0):
        layer, shape = everything()[name]
        x = jnp.zeros(3, int) if shape is None else jnp.ones(shape, jnp.bfloat16)
        recipe(layer, jnp.bfloat16)
        dtypes = {path: ref.value.dtype for path, ref in nnx.refs(layer).items()}
        y = nnx.jit(lambda m, x: m(x))(layer, x)
    assert y.dtype == jnp.bfloat16
    assert dtypes == {path: ref.value.dtype for path, ref in nnx.refs(layer).items()}


@pytest.mark.parametrize("cell", [nnx.LSTMCell, nnx.OptimizedLSTMCell, nnx.GRUCell, nnx.SimpleCell])
def test_a_step_of_a_cell(cell):
    cell = recipe(cell.init(0)(3, 4), jnp.bfloat16)
    x = jnp.ones((2, 3), jnp.bfloat16)
    first = cell.initialize_carry(x.shape)
    assert all(a.dtype == jnp.bfloat16 for a in jax.tree.leaves((first, cell(first, x))))
    # A carry in float32, used to sum in, does not turn the output into float32.
    wide = jax.tree.map(lambda a: a.astype(jnp.float32), first)
    carry, y = cell(wide, x)
    assert y.dtype == jnp.bfloat16
    assert all(a.dtype == jnp.float32 for a in jax.tree.leaves(carry))


def test_the_table_and_the_cache_follow_the_arrays():
    embed = recipe(nnx.Embed.init(0)(5, 4), jnp.bfloat16)
    assert embed(jnp.arange(3)).dtype == embed.attend(jnp.ones(4)).dtype == jnp.bfloat16
    attention = recipe(nnx.MultiHeadAttention.init(0)(2, 4), jnp.bfloat16)
    attention.init_cache((1, 8, 4))
    assert attention.cached_key.dtype == attention.cached_value.dtype == jnp.bfloat16
    y = attention(jnp.ones((1, 2, 4), jnp.bfloat16), decode=True)
    assert y.dtype == attention.cached_key.dtype == jnp.bfloat16
    attention.init_cache((1, 8, 4), dtype=jnp.float32)
    assert attention.cached_key.dtype == jnp.float32


def test_float16_attention_compiles_and_float64_keeps_its_digits():
    q = jnp.asarray(np.random.default_rng(0).normal(size=(3, 2, 5, 2, 4)), jnp.float16)
    y = jax.jit(nnx.dot_product_attention)(*q)
    expected = nnx.dot_product_attention(*q.astype(jnp.float32))
    np.testing.assert_allclose(y.astype(jnp.float32), expected, atol=2e-3)
    with jax.enable_x64(True):
        from jax.test_util import check_grads

        q = jnp.asarray(np.random.default_rng(0).normal(size=(3, 2, 5, 2, 4)))
        check_grads(nnx.dot_product_attention, tuple(q), order=1, modes=["rev"], rtol=1e-6)
