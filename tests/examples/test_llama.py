"""Llama: against NumPy in float64, Hugging Face's names in both directions, decoding, training."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import save_file

import nnx
from tests.examples import example, softmax

llama = example("llama")


def llama_config(model_type, **changes):
    config = dict(
        model_type=model_type,
        vocab_size=19,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=6,
        rms_norm_eps=1e-5,
        rope_theta=500.0,
        tie_word_embeddings=model_type == "qwen3",
        torch_dtype="float32",
        hidden_act="silu",
    )
    return config | changes


def llama_state(c, seed=0):
    """Random weights with the names and shapes of a Hugging Face file."""
    size, inner = c["hidden_size"], c["intermediate_size"]
    heads, kv, head = c["num_attention_heads"], c["num_key_value_heads"], c["head_dim"]
    shapes = {"model.embed_tokens.weight": (c["vocab_size"], size)}
    for i in range(c["num_hidden_layers"]):
        layer = {
            "input_layernorm": (size,),
            "mlp.down_proj": (size, inner),
            "mlp.gate_proj": (inner, size),
            "mlp.up_proj": (inner, size),
            "post_attention_layernorm": (size,),
            "self_attn.k_proj": (kv * head, size),
            "self_attn.o_proj": (size, heads * head),
            "self_attn.q_proj": (heads * head, size),
            "self_attn.v_proj": (kv * head, size),
        }
        if c["model_type"] == "qwen3":
            layer |= {"self_attn.k_norm": (head,), "self_attn.q_norm": (head,)}
        shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
    shapes["model.norm.weight"] = (size,)
    if not c["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (c["vocab_size"], size)
    rng = np.random.default_rng(seed)
    return {
        name: (rng.normal(size=s) * 0.4 + (len(s) == 1)).astype(np.float32)
        for name, s in shapes.items()
    }


def llama_logits(c, state, tokens):
    """The model of the papers, for one sequence, in float64."""
    w = {name: x.astype(np.float64) for name, x in state.items()}
    heads, kv, head = c["num_attention_heads"], c["num_key_value_heads"], c["head_dim"]
    count = len(tokens)

    def norm(x, name):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + c["rms_norm_eps"]) * w[name + ".weight"]

    def rotate(x):
        y = np.empty_like(x)
        half = head // 2
        for p in range(count):
            for i in range(half):
                angle = p * c["rope_theta"] ** (-2 * i / head)
                a, b = x[p, :, i], x[p, :, i + half]
                y[p, :, i] = a * math.cos(angle) - b * math.sin(angle)
                y[p, :, i + half] = b * math.cos(angle) + a * math.sin(angle)
        return y

    distance = np.arange(count)[:, None] - np.arange(count)
    sees = (distance >= 0) & (distance < (c.get("sliding_window") or count))
    x = w["model.embed_tokens.weight"][tokens]
    for i in range(c["num_hidden_layers"]):
        at = f"model.layers.{i}."
        h = norm(x, at + "input_layernorm")
        q, k, v = (
            (h @ w[f"{at}self_attn.{n}_proj.weight"].T).reshape(count, -1, head) for n in "qkv"
        )
        if c["model_type"] == "qwen3":
            q, k = norm(q, at + "self_attn.q_norm"), norm(k, at + "self_attn.k_norm")
        q, k = rotate(q), rotate(k)
        out = []
        for n in range(heads):
            scores = q[:, n] @ k[:, n // (heads // kv)].T / math.sqrt(head)
            out.append(softmax(np.where(sees, scores, -np.inf)) @ v[:, n // (heads // kv)])
        x = x + np.stack(out, 1).reshape(count, -1) @ w[at + "self_attn.o_proj.weight"].T
        h = norm(x, at + "post_attention_layernorm")
        gate = h @ w[at + "mlp.gate_proj.weight"].T
        gate = gate / (1 + np.exp(-gate))
        x = x + (gate * (h @ w[at + "mlp.up_proj.weight"].T)) @ w[at + "mlp.down_proj.weight"].T
    head = "model.embed_tokens" if c["tie_word_embeddings"] else "lm_head"
    return norm(x, "model.norm") @ w[head + ".weight"].T


def write(folder, config, state, shards=1):
    (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save_file(state, folder / "model.safetensors")
        return
    index = {}
    for i in range(shards):
        part = dict(list(state.items())[i::shards])
        name = f"model-{i}.safetensors"
        save_file(part, folder / name)
        index |= dict.fromkeys(part, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))


@pytest.mark.parametrize(
    "config, shards",
    [
        (llama_config("llama"), 1),
        (llama_config("llama", tie_word_embeddings=True, rope_theta=None, rope_parameters={"rope_theta": 500.0, "rope_type": "default"}), 2),
        (llama_config("mistral", sliding_window=3), 1),
        (llama_config("qwen3", use_sliding_window=False, sliding_window=2), 3),
    ],
    ids=["llama", "llama-tied", "mistral", "qwen3"],
)  # fmt: skip
def test_a_checkpoint_with_hugging_face_names(tmp_path, config, shards):
    state, tokens = llama_state(config), np.arange(9) * 5 % 19
    write(tmp_path, config, state, shards)
    model = llama.load(tmp_path)
    config["rope_theta"] = 500.0
    expected = llama_logits(
        {**config, "sliding_window": model.config.sliding_window}, state, tokens
    )
    logits = nnx.jit(lambda m, x: m(x))(model, tokens[None])[0]
    np.testing.assert_allclose(logits, expected, atol=2e-4 * np.abs(expected).max())
    # The same by the cache, some at a time.
    model.init_cache(1, 9)
    with nnx.scope(decode=True):
        parts = [model(tokens[None, a:b])[0] for a, b in ((0, 4), (4, 5), (5, 9))]
    np.testing.assert_allclose(np.concatenate(parts), logits, atol=1e-4)
    # And out again, with and without the names of the file at hand.
    names = llama.names_of(model.config)
    for back in (
        nnx.bridge.to_state_dict(model, names, like=state),
        nnx.bridge.to_state_dict(model, names),
    ):
        # By default, the one table is there under both of its names.
        extra = {"lm_head.weight"} if config["tie_word_embeddings"] else set()
        assert set(back) - set(state) <= extra
        for name, array in state.items():
            np.testing.assert_array_equal(back[name], array, err_msg=name)
    layers = nnx.clone(model)
    layers.layers = layers.layers.unstack()
    again = nnx.bridge.from_state_dict(state, layers, names)
    np.testing.assert_array_equal(again.layers[1].up.kernel, model.layers[1].up.kernel)
    back = nnx.bridge.to_state_dict(again, names)
    assert all(np.array_equal(back[name], x) for name, x in state.items())


def test_the_dtype_of_a_checkpoint_and_an_unsupported_model(tmp_path):
    config = llama_config("qwen3", dtype="bfloat16")
    write(tmp_path, config, llama_state(config))
    model = llama.load(tmp_path, remat=False)
    assert {x.dtype for x in model["params"].values()} == {jnp.dtype("bfloat16")}
    model.init_cache(1, 4)
    assert model["cache"]["layers.layers.attention.cached_key"].dtype == jnp.bfloat16
    for change in ({"model_type": "gpt2"}, {"rope_scaling": {"type": "llama3"}}):
        (tmp_path / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(SystemExit, match="This example does not support"):
            llama.load(tmp_path)


@pytest.fixture(scope="module")
def pair():
    config = llama.LlamaConfig(19, 16, 24, 2, 4, 2, dtype="float32")
    model = llama.Llama.init(0)(config)
    # A draft that guesses some right and some wrong: the same model with some noise.
    draft = nnx.clone(model, copy=True)
    keys = iter(jax.random.split(jax.random.key(1), 100))
    draft["params"] = jax.tree.map(
        lambda w: w + 0.1 * w.std() * jax.random.normal(next(keys), w.shape), draft["params"]
    )
    return model, draft


@pytest.mark.parametrize("guesses", [1, 3])
def test_speculative_decoding_equals_greedy_decoding(pair, guesses):
    model, draft = pair
    prompt = jnp.array([[3, 1, 4]])
    tokens = prompt
    forward = nnx.jit(lambda m, x: m(x))
    for _ in range(12):
        padded = jnp.pad(tokens, ((0, 0), (0, 15 - tokens.shape[1])))
        logits = forward(model, padded)[:, tokens.shape[1] - 1]
        tokens = jnp.concatenate([tokens, logits.argmax(-1)[:, None]], axis=1)
    expected = tokens[:, 3:]
    model.init_cache(1, 20)
    np.testing.assert_array_equal(llama.generate(model, prompt, 12), expected)
    found, passes = llama.speculate(model, draft, prompt, 12, guesses)
    np.testing.assert_array_equal(found, expected)
    perfect, least = llama.speculate(model, model, prompt, 12, guesses)
    np.testing.assert_array_equal(perfect, expected)
    # One pass for the prompt; each further one confirms all guesses, and gives one more token.
    assert least == 1 + math.ceil(11 / (guesses + 1)) and least <= passes <= 12


def test_a_second_call_continues_and_a_full_cache_goes_on(pair):
    model, _ = pair
    prompt = jnp.array([[3, 1, 4]])
    model.init_cache(1, 32)
    whole = llama.generate(model, prompt, 12)
    model.init_cache(1, 32)
    first = llama.generate(model, prompt, 6)
    second = llama.generate(model, first[:, -1:], 6)
    np.testing.assert_array_equal(jnp.concatenate([first, second], axis=1), whole)
    model.init_cache(1, 5)
    with nnx.scope(0):
        tokens = llama.generate(model, prompt, 12, 1.0)
        again = llama.generate(model, tokens[:, -1:], 12, 1.0)
    assert int(model["cache"]["layers.layers.attention.cache_index"][0]) == 3 + 12 + 1 + 12
    assert again.shape == (1, 12) and all(
        bool(jnp.isfinite(x).all()) for x in model["cache"].values()
    )


def test_training_in_bfloat16_with_master_weights():
    config = llama.LlamaConfig(19, 16, 24, 2, 4, 2)
    model = llama.Llama.init(0)(config)
    optimizer = nnx.Optimizer(model, nnx.training.master_weights(optax.adam(1e-2)))
    windows = np.arange(4 * 9).reshape(4, 9) % 19
    losses = [float(llama.train_step(model, optimizer, windows)) for _ in range(15)]
    assert losses[-1] < 0.7 * losses[0]
    assert {x.dtype for x in model["params"].values()} == {jnp.dtype("bfloat16")}
    masters = [x for path, x in optimizer["opt_state"].items() if "master" in path]
    assert len(masters) == len(model["params"]) and {x.dtype for x in masters} == {jnp.dtype("f4")}
