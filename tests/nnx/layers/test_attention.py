"""MultiHeadAttention against flax.nnx, and decoding against the full causal pass."""

import functools

import flax.nnx as fnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nnx
from nnx.layers.attention import MultiHeadAttention
from nnx.layers.attention_functions import dot_product_attention
from nnx.layers.masks import (
    combine_masks,
    make_causal_mask,
    make_padding_mask,
)
from nnx.layers.positions import RotaryEmbedding
from tests.nnx.layers.test_layers import draw, from_flax
from tests.nnx.layers.test_linear_general import close, compare, drawn, same_arguments

init = {"kernel_init": drawn, "bias_init": drawn}


LAYERS = [
    {},
    {"qkv_features": 16, "out_features": 5, "use_bias": False},
    {"num_kv_heads": 2, "normalize_qk": True, "qkv_features": 16},
    {"dtype": jnp.bfloat16, "normalize_qk": True},
    {
        "precision": "highest",
        "out_kernel_init": nnx.initializers.ones,
        "out_bias_init": nnx.initializers.ones,
        "dropout_rate": 0.5,
        "deterministic": True,
    },
]


def run(layer, *inputs, **call):
    """Call the layer in one program, which compiles faster than operation by operation."""
    return nnx.jit(lambda m, *x: m(*x, **call))(layer, *inputs)


@pytest.mark.parametrize("options", LAYERS)
def test_layer(options):
    theirs = fnx.MultiHeadAttention(4, 8, decode=False, rngs=fnx.Rngs(0), **options, **init)
    ours = MultiHeadAttention.init(1)(4, 8, **options, **init)
    half = jnp.bfloat16 in options.values()
    mask = make_causal_mask(jnp.ones((2, 5)))
    compare(ours, theirs, draw(2, 5, 8), mask=mask, tolerance=1.5e-2 if half else 2e-5)
    x = draw(2, 5, 8)
    close(run(ours, x, is_causal=True), run(ours, x, mask=mask), 1e-2 if half else 1e-5)


def test_the_arguments_are_those_of_flax():
    # Where flax raises an error, dropout is on, as in nnx.Dropout.
    same_arguments(
        fnx.MultiHeadAttention,
        MultiHeadAttention,
        added=["rotary", "in_v_features", "v_features", "local_window_size", "sow_weights"],
        other=["deterministic"],
    )
    ours, dropout = MultiHeadAttention.init(0)(2, 8), nnx.Dropout(0.5)
    assert ours.deterministic is dropout.deterministic is False


def test_cross_attention_with_a_mask():
    theirs = fnx.MultiHeadAttention(
        2, 8, in_kv_features=6, num_kv_heads=1, decode=False, rngs=fnx.Rngs(0), **init
    )
    ours = MultiHeadAttention.init(1)(2, 8, in_kv_features=6, num_kv_heads=1, **init)
    q, k = draw(2, 5, 8), draw(2, 7, 6)
    mask = make_padding_mask(jnp.array([3, 7]), 7)
    v = draw(2, 7, 6) ** 2
    compare(ours, theirs, q, k, v, mask=jnp.broadcast_to(mask, (2, 1, 5, 7)))
    # No query saw the padding, and a mask may have fewer axes.
    masked = nnx.jit(lambda m, q, k: m(q, k, mask=mask))
    close(masked(ours, q, k), masked(ours, q, k.at[0, 3:].set(100.0)))
    full = run(ours, q, k)
    close(run(ours, q, k, mask=jnp.ones(7)), full)
    close(run(ours, q[0], k[0]), full[0])
    close(run(ours, q[:, None], k[:, None])[:, 0], full)


def test_initial_values_names_and_metadata():
    layer = MultiHeadAttention.init(0)(
        4,
        8,
        16,
        num_kv_heads=2,
        normalize_qk=True,
        kernel_metadata={"axes": "k"},
        out_kernel_metadata={"axes": "o"},
        bias_metadata={"axes": "b"},
        query_ln_scale_metadata={"axes": "q"},
    )
    shapes = {".".join(p): v.value.shape for p, v in nnx.refs(layer).items()}
    assert shapes == {
        "query.kernel": (8, 4, 4), "query.bias": (4, 4),
        "key.kernel": (8, 2, 4), "key.bias": (2, 4),
        "value.kernel": (8, 2, 4), "value.bias": (2, 4),
        "out.kernel": (4, 4, 8), "out.bias": (8,),
        "query_ln.scale": (4,), "key_ln.scale": (4,),
    }  # fmt: skip
    axes = {".".join(p): v.metadata.get("axes") for p, v in nnx.refs(layer).items()}
    assert axes["key.kernel"] == "k" and axes["out.kernel"] == "o" and axes["out.bias"] == "b"
    assert axes["query_ln.scale"] == "q" and axes["key_ln.scale"] is None


def test_another_attention_function_and_product():
    calls = []

    def uniform(query, key, value, *, mask, **options):
        calls.append((mask, sorted(options)))
        return jnp.broadcast_to(value.mean(-3, keepdims=True), query.shape)

    def product(*args, **options):
        calls.append("product")
        return jax.lax.dot_general(*args, **options)

    layer = MultiHeadAttention.init(0)(
        2, 8, attention_fn=uniform, qkv_dot_general=product, out_dot_general_cls=lambda: product
    )
    x = draw(2, 5, 8)
    y = layer(x)
    close(y, jnp.broadcast_to(layer.out(layer.value(x).mean(-3, keepdims=True)), y.shape))
    assert calls.count("product") == 6
    assert (
        None,
        [
            "broadcast_dropout",
            "deterministic",
            "dropout_rate",
            "dropout_rng",
            "dtype",
            "is_causal",
            "precision",
        ],
    ) in calls


def test_dropout_draws_from_the_stream_and_heeds_flags():
    layer = MultiHeadAttention.init(0)(2, 8, dropout_rate=0.5, broadcast_dropout=False, **init)
    x = draw(2, 5, 8)
    with pytest.raises(nnx.MissingStreamError, match="'dropout'"):
        layer(x)
    full = run(layer, x, deterministic=True)
    step = nnx.jit(lambda m, x: m(x))
    with nnx.scope(deterministic=True):
        close(step(layer, x), full)
    close(step(layer.eval(), x), full)
    layer.train()
    with pytest.raises(nnx.MissingStreamError, match="'dropout'"):
        step(layer, x)
    with nnx.scope({"dropout": 0}):
        a, b = step(layer, x), step(layer, x)
    assert not jnp.allclose(a, b) and not jnp.allclose(a, full)
    key = jax.random.key(1)
    options = {"dropout_rng": key, "dropout_rate": 0.5, "broadcast_dropout": False}

    def by_hand(m, x):
        q, k, v = m.query(x), m.key(x), m.value(x)
        return m.out(fnx.dot_product_attention(q, k, v, **options))

    close(run(layer, x, rng=key), nnx.jit(by_hand)(layer, x))


DECODERS = [
    {},
    {"num_kv_heads": 2, "normalize_qk": True},
    {"num_kv_heads": 1, "rotary": True},
    {
        "rotary": True,
        "attention_fn": lambda *a, mask, **k: jnp.sin(dot_product_attention(*a, mask=mask, **k)),
    },
]


def decoder(options, seed=0, **more):
    options = {**options, **more}
    if options.get("rotary"):
        options["rotary"] = RotaryEmbedding(4, rotary_features=2)
    return MultiHeadAttention.init(seed)(4, 8, 16, **options, **init)


@pytest.mark.parametrize("options", DECODERS)
def test_decoding_a_token_at_a_time_is_the_causal_pass(options):
    layer = decoder(options)
    x = draw(2, 7, 8)
    full = run(layer, x, is_causal=True)
    layer.init_cache((2, 9, 8))
    assert set(layer["cache"]) == {("cached_key",), ("cached_value",), ("cache_index",)}
    step = nnx.jit(lambda m, x: m(x, decode=True))
    for i in range(7):
        close(step(layer, x[:, i : i + 1]), full[:, i : i + 1])
    assert int(layer.cache_index) == 7 and (layer.cached_key[:, 7:] == 0).all()
    # A prompt at once, then a token at a time, in one program.
    layer.init_cache((2, 9, 8))
    close(run(layer, x[:, :4], decode=True), full[:, :4])
    tokens = jnp.moveaxis(x[:, 4:, None], 1, 0)
    _, rest = nnx.scan(lambda _, x: (None, layer(x, decode=True)), None, tokens)
    close(jnp.moveaxis(rest, 0, 1)[:, :, 0], full[:, 4:])
    assert int(layer.cache_index) == 7


def test_decoding_is_that_of_flax():
    theirs = fnx.MultiHeadAttention(2, 8, num_kv_heads=1, decode=True, rngs=fnx.Rngs(0), **init)
    ours = from_flax(MultiHeadAttention.init(1)(2, 8, num_kv_heads=1, decode=True, **init), theirs)
    x = draw(3, 4, 8)
    theirs.init_cache(x.shape)
    ours.init_cache(x.shape)
    step, their_step = nnx.jit(lambda m, x: m(x)), fnx.jit(lambda m, x: m(x))
    for i in range(4):
        close(step(ours, x[:, i : i + 1]), their_step(theirs, x[:, i : i + 1]))
    for name in ("cached_key", "cached_value", "cache_index"):
        assert getattr(ours, name).shape == getattr(theirs, name)[...].shape
        close(getattr(ours, name), getattr(theirs, name)[...])


def test_decoding_with_a_mask_flags_and_other_batches():
    layer = decoder({"rotary": True})
    x = draw(2, 3, 5, 8)
    # The first two tokens of each sequence are padding at the left.
    mask = jnp.arange(5) >= 2
    positions = jnp.maximum(jnp.arange(5) - 2, 0)
    full = run(layer, x[..., 2:, :], is_causal=True)
    layer.init_cache(x.shape)
    decode = nnx.jit(lambda m, x, at: m.apply(decode=True)(x, mask=mask, positions=at))
    prompt = decode(layer, x[..., :4, :], positions[:4])
    close(prompt[..., 2:, :], full[..., :2, :])
    close(decode(layer, x[..., 4:, :], jnp.full((2, 3, 1), 2)), full[..., 2:, :])
    layer.decode = True
    layer.init_cache((5, 8))
    close(run(layer, x[0, 0]), run(layer, x[0, 0], is_causal=True, decode=False))
    assert int(layer.cache_index) == 5


def test_the_dtype_of_the_cache():
    layer = decoder({})
    x = draw(2, 4, 8)
    full = run(layer, x, is_causal=True)
    layer.init_cache(x.shape, jnp.bfloat16)
    y = run(layer, x, decode=True)
    assert layer.cached_key.dtype == jnp.bfloat16 and y.dtype == jnp.float32
    close(y, full, atol=5e-2)
    half = decoder({"dtype": jnp.bfloat16})
    half.init_cache(x.shape)
    assert half.cached_value.dtype == jnp.bfloat16
    assert run(half, x, decode=True).dtype == jnp.bfloat16


def sliding(length):
    """A mask: each position sees itself and the `length - 1` before it."""
    distance = jnp.arange(12)[:, None] - jnp.arange(12)
    return (distance >= 0) & (distance < length)


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("options", [{}, {"num_kv_heads": 1, "rotary": True}])
def test_a_full_cache_is_a_sliding_window(options, compiled):
    layer = decoder(options)
    x = draw(2, 12, 8)
    expected = run(layer, x, mask=sliding(5))
    layer.init_cache((2, 5, 8))
    step = nnx.jit(lambda m, x: m(x, decode=True)) if compiled else lambda m, x: m(x, decode=True)
    close(step(layer, x[:, :3]), expected[:, :3])
    for i in range(3, 12):
        close(step(layer, x[:, i : i + 1]), expected[:, i : i + 1])
    assert int(layer.cache_index) == 12
    before = layer["cache"]
    with pytest.raises(
        ValueError, match=r"room for 5 tokens, but 6 came in one call\. Make a longer"
    ):
        step(layer, x[:, :6])
    jax.tree.map(np.testing.assert_array_equal, layer["cache"], before)
    # After it is emptied, it starts again.
    layer["cache"] = jax.tree.map(jnp.zeros_like, layer["cache"])
    close(step(layer, x[:, :3]), expected[:, :3])


@pytest.mark.parametrize("window", [3, (3, 0), (3, None)])
def test_a_window_is_the_same_by_the_cache_whatever_comes_at_once(window):
    layer = decoder({"rotary": True, "local_window_size": window})
    x = draw(2, 12, 8)
    causal = run(layer, x, is_causal=True)
    close(causal, run(decoder({"rotary": True}), x, mask=sliding(4)))
    for parts in ([4, 4, 4], [1] * 12, [2, 3, 4, 1, 2]):
        # Room for the window and for the tokens of one call.
        layer.init_cache((2, 4 + max(parts) - 1, 8))
        step = nnx.jit(lambda m, x: m(x, decode=True))
        ends = np.cumsum(parts)
        for start, end in zip(ends - parts, ends):
            close(step(layer, x[:, start:end]), causal[:, start:end])


def test_a_window_is_that_of_jax():
    x, z = draw(2, 7, 8), draw(2, 9, 8)
    for window, heads in ((2, 4), ((1, 3), 2), ((2, 0), 1)):
        layer = decoder({"local_window_size": window, "num_kv_heads": heads})
        for kv in (x, z):

            def by_hand(layer, x, kv):
                q, k, v = layer.query(x), layer.key(kv), layer.value(kv)
                return layer.out(jax.nn.dot_product_attention(q, k, v, local_window_size=window))

            close(run(layer, x, kv), nnx.jit(by_hand)(layer, x, kv))


class Scaled(nnx.Module):
    """A user's norm without options."""

    def __init__(self, features):
        self.scale = nnx.Ref(jnp.full(features, 2.0), "params")

    def __call__(self, x):
        return x * self.scale.value


@pytest.mark.parametrize(
    "kind, names, epsilon",
    [
        (True, ["scale"], 1e-6),
        (nnx.RMSNorm, ["scale"], 1e-6),
        (nnx.LayerNorm, ["scale", "bias"], 1e-6),
        (functools.partial(nnx.RMSNorm, epsilon=0.1), ["scale"], 0.1),
        (Scaled, ["scale"], None),
    ],
)
def test_heads_are_normalized_by_any_norm(tmp_path, kind, names, epsilon):
    layer = decoder({"normalize_qk": kind, "num_kv_heads": 2}, param_dtype=jnp.bfloat16)
    assert [path[1] for path in layer["params"] if path[0] == "query_ln"] == names
    if epsilon is not None:
        assert layer.query_ln.scale.dtype == jnp.bfloat16 and layer.query_ln.epsilon == epsilon
    x = draw(2, 5, 8)

    def by_hand(layer, x):
        q, k = layer.query_ln(layer.query(x)), layer.key_ln(layer.key(x))
        return layer.out(dot_product_attention(q, k, layer.value(x)))

    close(run(layer, x), nnx.jit(by_hand)(layer, x))
    nnx.save(tmp_path / "m.npz", layer)
    close(run(nnx.load(tmp_path / "m.npz"), x), run(layer, x))


def test_what_a_partial_norm_says_stays():
    kind = functools.partial(nnx.RMSNorm, param_dtype=jnp.float32, dtype=jnp.float32)
    layer = decoder({"normalize_qk": kind}, param_dtype=jnp.bfloat16, dtype=jnp.bfloat16)
    assert layer.key_ln.scale.dtype == layer.key_ln.dtype == jnp.float32
    assert layer.key.kernel.dtype == jnp.bfloat16


def test_the_metadata_of_the_norms():
    layer = decoder({"normalize_qk": nnx.RMSNorm}, query_ln_scale_metadata={"tag": 1})
    assert nnx.get_ref(layer.query_ln, "scale").metadata == {"tag": 1}


def test_weights_are_captured():
    x, rng = draw(2, 5, 8), jax.random.key(0)
    for options in ({}, {"num_kv_heads": 2, "dropout_rate": 0.5}, {"precision": "highest"}):
        layer = decoder(options)
        silent = run(layer, x, is_causal=True, rng=rng)
        y, captured = nnx.jit(
            lambda m, x: nnx.capture(m, None)(x, is_causal=True, rng=rng, sow_weights=True)
        )(layer, x)
        close(y, silent)
        assert list(captured) == [("attention_weights",)]
        weights = captured["attention_weights"]
        q, k = layer.query(x), layer.key(x)
        close(weights, nnx.dot_product_attention_weights(q, k, is_causal=True))
        assert not nnx.capture(layer, None)(x, rng=rng)[1]
    layer = decoder({"sow_weights": True, "rotary": True})
    layer.init_cache((2, 6, 8))
    _, captured = nnx.capture(layer, None)(x, decode=True)
    weights = captured["attention_weights"]
    assert weights.shape == (2, 4, 5, 6) and (weights[..., 5] == 0).all()
    assert layer(x).shape == x.shape  # without a capture it does nothing
    assert not nnx.capture(layer, None)(x, sow_weights=False)[1]
    stack = nnx.Stack.init(0)(lambda: decoder({"sow_weights": True}), 3)
    _, captured = nnx.capture(stack, None)(x)
    assert captured["layers", "attention_weights"].shape == (3, 2, 4, 5, 5)


def test_a_function_for_attention_stores_weights_where_it_takes_the_module():
    def plain(query, key, value, mask=None, *, dtype=None, **options):
        return dot_product_attention(query, key, value, mask=mask, **options)

    def without(query, key, value, mask, is_causal, dtype, precision, broadcast_dropout,
                dropout_rate, dropout_rng, deterministic):  # fmt: skip
        return query

    x = draw(2, 5, 8)
    layer = decoder({"attention_fn": plain, "sow_weights": True})
    assert nnx.capture(layer, None)(x)[1]["attention_weights"].shape == (2, 4, 5, 5)
    layer = decoder({"attention_fn": without, "sow_weights": True})
    with pytest.raises(ValueError, match="store its weights, because its attention_fn has no"):
        layer(x)
    assert layer(x, sow_weights=False).shape == x.shape


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"normalize_qk": "rms"}, TypeError, "normalize_qk .* must be True, False or a norm class.*'rms'"),
        ({"normalize_qk": nnx.RMSNorm(4)}, TypeError, "a norm class"),
        ({"local_window_size": -1}, ValueError, r"such as 128 or \(127, 0\), but got -1"),
        ({"local_window_size": (1, 2, 3)}, ValueError, r"but got \(1, 2, 3\)"),
        ({"local_window_size": 2.5}, ValueError, "but got 2.5"),
    ],
)  # fmt: skip
def test_bad_norms_and_windows_are_errors(options, error, message):
    with pytest.raises(error, match=message):
        decoder(options)


def test_a_call_that_raises_leaves_the_cache():
    def fails(*args, **options):
        raise RuntimeError("inside")

    layer = decoder({"attention_fn": fails})
    layer.init_cache((2, 4, 8))
    with pytest.raises(RuntimeError, match="inside"):
        layer(draw(2, 1, 8), decode=True)
    assert int(layer.cache_index) == 0 and (layer.cached_key == 0).all()


def test_rotary_turns_queries_and_keys():
    rotary = RotaryEmbedding(4, interleaved=True)
    layer = MultiHeadAttention.init(0)(2, 8, num_kv_heads=1, rotary=rotary, **init)
    q, k = draw(2, 5, 8), draw(2, 3, 8)
    at, key_at = jnp.array([4, 1, 0, 9, 2]), jnp.array([[0, 5, 6], [2, 3, 4]])

    def expected(q, k, at, key_at):
        turned = rotary(layer.query(q), at), rotary(layer.key(k), key_at)
        return layer.out(dot_product_attention(*turned, layer.value(k)))

    @nnx.jit
    def results(layer, q, k):
        return (
            (layer(q, k, positions=at, key_positions=key_at), expected(q, k, at, key_at)),
            (layer(q, k, positions=at), expected(q, k, at, jnp.arange(3))),
            (layer(q, positions=at), expected(q, q, at, at)),
            (layer(q), layer(q, positions=jnp.arange(5) + 7)),
        )

    pairs = results(layer, q, k)
    for a, b in pairs:
        close(a, b, atol=1e-4)
    assert not jnp.allclose(pairs[2][0], pairs[3][0], atol=1e-3)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: MultiHeadAttention(3, 8), "cannot divide qkv_features=8 among num_heads=3"),
        (
            lambda: MultiHeadAttention(4, 8, num_kv_heads=3),
            "num_heads=4 query heads among num_kv_heads=3",
        ),
        (
            lambda: MultiHeadAttention(4, 8, dropout_rate=1.5),
            "a probability, from 0 to 1, but got 1.5",
        ),
        (
            lambda: MultiHeadAttention(4, 8, rotary=RotaryEmbedding(4)),
            r"have size 2 .* RotaryEmbedding\(4\)",
        ),
        (
            lambda: MultiHeadAttention(4, 8)(jnp.ones((2, 5, 6))),
            r"MultiHeadAttention expects queries of shape \(\*batch, length, 8\), but got \(2, 5, 6\)",
        ),
        (lambda: MultiHeadAttention(4, 8)(jnp.ones(8)), r"but got \(8,\)"),
        (
            lambda: MultiHeadAttention(4, 8, in_kv_features=6)(jnp.ones((2, 5, 8))),
            r"keys of shape \(\*batch, length, 6\), but got \(2, 5, 8\)",
        ),
        (
            lambda: MultiHeadAttention(4, 8)(jnp.ones((2, 5, 8)), inputs_v=jnp.ones((2, 5, 8))),
            "inputs_v without inputs_k",
        ),
        (
            lambda: MultiHeadAttention(4, 8)(jnp.ones((2, 5, 8)), jnp.ones((3, 5, 8))),
            r"same batch, .* \(2, 5, 8\), \(3, 5, 8\)",
        ),
        (
            lambda: MultiHeadAttention(4, 8)(jnp.ones((2, 5, 8)), mask=jnp.ones((2, 5, 5))),
            r"broadcasts to \(2, 4, 5, 5\), .* one of shape \(2, 5, 5\)",
        ),
        (
            lambda: MultiHeadAttention(4, 8)(jnp.ones((2, 5, 8)), positions=jnp.arange(5)),
            r"no rotary embedding .* rotary=RotaryEmbedding\(2\)",
        ),
        (
            lambda: MultiHeadAttention(4, 8)(jnp.ones((2, 5, 8)), decode=True),
            r"no cache to decode with. Call init_cache\(\(\*batch, length, 8\)\)",
        ),
        (
            lambda: MultiHeadAttention(4, 8).init_cache((2, 5)),
            r"a cache for an input of shape \(\*batch, length, 8\), but got \(2, 5\)",
        ),
        (
            lambda: cached()(jnp.ones((3, 1, 8)), decode=True),
            r"shape \(2, 5\), .* queries of shape \(3, 1\) .* init_cache for another batch",
        ),
        (
            lambda: cached()(jnp.ones((2, 1, 8)), jnp.ones((2, 4, 8)), decode=True),
            r"keys of shape \(2, 4\)\. .*decode=False for cross attention",
        ),
        (
            lambda: cached()(jnp.ones((2, 1, 8)), mask=jnp.ones((1, 3)), decode=True),
            r"broadcasts to \(2, 4, 1, 5\)",
        ),
        (
            lambda: dot_product_attention(*jnp.ones((3, 5, 4))),
            r"shapes \(5, 4\), \(5, 4\) and \(5, 4\)",
        ),
        (
            lambda: dot_product_attention(jnp.ones((5, 4, 2)), *jnp.ones((2, 5, 3, 2))),
            "multiple of the number of key heads",
        ),
        (
            lambda: dot_product_attention(*jnp.ones((3, 5, 4, 2)), dropout_rate=0.1),
            "needs a key. Pass dropout_rng",
        ),
        (
            lambda: combine_masks(jnp.ones((1, 1)), jnp.ones(1)),
            r"same number of axes, .* \(1, 1\), \(1,\)",
        ),
    ],
)
def test_mistakes_raise_errors_that_say_what_is_wrong(make, message):
    with nnx.scope(0), pytest.raises(ValueError, match=message):
        make()


def cached():
    layer = MultiHeadAttention(4, 8)
    layer.init_cache((2, 5, 8))
    return layer
