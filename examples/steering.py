"""Find where a small GPT keeps a habit, and turn the habit on by hand.

The model of `char_gpt.py` is trained on text that is half in capitals, so it continues in the case of the
prompt. Where is that in the network? Take pairs of prompts, one in small letters and the same in capitals.
Copy the output of one block at one position from the run in capitals to the other run (`nnx.capture`,
`nnx.patch`). If the model then writes in capitals, the habit passes through there. The mean difference of a
block's outputs is a direction. Adding it while the model writes makes it write in capitals after a prompt in
small letters. Among the blocks and strengths that work, the best is the one whose text, read in small
letters, surprises the model least. The model never changes.

Patching the last position should restore nothing in the embedding, and more than 90 % in the last block.
With the direction, more than 90 % of the letters should be capitals, and without it, less than 10 %. This
takes two minutes on two cores.
"""

from __future__ import annotations

import argparse
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from char_gpt import GPT, evaluate, read_text, sample, train_step
from tqdm import tqdm

import nnx

matplotlib.use("Agg")
import matplotlib.pyplot as plt

PROMPTS = [
    "a value of ",
    "the name is ",
    "this object ",
    "all modules ",
    "when a list ",
    "it returns a ",
]
LENGTH, SHOWN = 12, 1


class Text:
    """Characters and their numbers."""

    def __init__(self, text: str):
        self.characters = sorted(set(text + text.upper()))
        self.codes = {c: i for i, c in enumerate(self.characters)}
        self.small = np.array([c.islower() for c in self.characters])
        self.capital = np.array([c.isupper() for c in self.characters])

    def encode(self, *texts: str) -> np.ndarray:
        return np.array([[self.codes[c] for c in text] for text in texts], np.int32)

    def decode(self, tokens) -> str:
        return "".join(self.characters[token] for token in tokens)


def capitals(logits, text: Text):
    """The log-probability that the next letter is a capital, minus that of a small letter."""
    logits = jax.nn.log_softmax(logits[:, -1])
    return jnp.log(jnp.exp(logits) @ text.capital) - jnp.log(jnp.exp(logits) @ text.small)


def trace(model: GPT, small, large, text: Text, layers: int) -> np.ndarray:
    """How much of the preference for capitals a single output restores, by block and position."""
    places = ["embed", *(f"blocks.layers.{i}" for i in range(layers))]
    run = nnx.jit(lambda model, tokens: nnx.capture(model, tuple(places))(tokens))
    logits, _ = run(model, small)
    low = capitals(logits, text)
    logits, wanted = run(model, large)
    high = capitals(logits, text)

    @functools.partial(nnx.jit, static_argnames="name")
    def patched(model, name, outputs):
        def at(position):
            def put(output):
                return output.at[:, position].set(outputs[:, position])

            return capitals(nnx.patch(model, {name: put})(small), text)

        return nnx.vmap(at)(jnp.arange(small.shape[1]))

    restored = [(patched(model, name, wanted[name]) - low) / (high - low) for name in places]
    return np.asarray(restored).mean(-1)


def directions(model: GPT, small, large) -> jax.Array:
    """The mean difference of the output at the last position, for each block."""
    _, low = nnx.capture(model, "blocks.layers")(small)
    _, high = nnx.capture(model, "blocks.layers")(large)
    return (high["blocks.layers"] - low["blocks.layers"])[:, :, -1].mean(1)


def write(model: GPT, prompt, length: int, layer: int, push: jax.Array):
    """The text that the model writes after the prompt, with `push` added to the output of one block."""
    steered = nnx.patch(sample, {f"blocks.layers.{layer}": lambda output: output + push})
    with nnx.scope(jax.random.key(2)):
        tokens, _ = steered(model, prompt, length, 0.5)
    return np.asarray(tokens[:, prompt.shape[1] :])


def share(tokens: np.ndarray, text: Text) -> float:
    """The share of capitals among the letters."""
    large, small = text.capital[tokens].sum(), text.small[tokens].sum()
    return float(large / max(large + small, 1))


def surprise(model: GPT, prompt: np.ndarray, tokens: np.ndarray, text: Text) -> float:
    """The perplexity of the written text, in small letters, for the unchanged model."""
    read = text.encode(*(text.decode(row).lower() for row in tokens))
    windows = np.concatenate([prompt, read], axis=1)
    return float(np.exp(evaluate(model, windows)[:, prompt.shape[1] - 1 :].mean()))


def train(text: Text, training: str, steps: int, batch: int, context: int, **sizes: int) -> GPT:
    both = [np.array([text.codes[c] for c in t], np.int32) for t in (training, training.upper())]
    model = GPT.init(jax.random.key(0))(len(text.characters), **sizes)
    schedule = optax.warmup_cosine_decay_schedule(0, 4e-3, steps // 20 + 1, steps)
    optimizer = nnx.Optimizer(model, optax.adamw(schedule, b2=0.98, weight_decay=0.1))
    rng = np.random.default_rng(0)
    with tqdm(range(steps), desc="steps") as bar:
        for _ in bar:
            starts = rng.integers(min(map(len, both)) - context, size=batch)
            windows = [both[i % 2][s : s + context + 1] for i, s in enumerate(starts)]
            loss = train_step(model, optimizer, np.stack(windows))
            bar.set_postfix(perplexity=f"{np.exp(float(loss)):.2f}")
    return model


def main(steps: int, batch: int, context: int, length: int, out: Path, **sizes: int) -> float:
    training, _ = read_text()
    # Some characters have no capital, or a capital of two characters.
    training = "".join(c for c in training if len(c.upper()) == 1)
    text = Text(training.lower())
    model = train(text, training.lower(), steps, batch, context, **sizes)
    layers = sizes["layers"]

    prompts = [prompt[-LENGTH:].rjust(LENGTH) for prompt in PROMPTS]
    small, large = text.encode(*prompts), text.encode(*(p.upper() for p in prompts))
    restored = trace(model, small, large, text, layers)
    found = directions(model, small, large)

    strengths = np.array([0.0, 0.2, 0.4, 0.6, 0.8, 1.0, 1.5, 2.0])
    texts = [
        [write(model, small, length, layer, s * found[layer]) for s in strengths]
        for layer in range(layers)
    ]
    shares = np.array([[share(tokens, text) for tokens in row] for row in texts])
    surprises = np.array(
        [[surprise(model, small, tokens, text) for tokens in row] for row in texts]
    )
    enough = shares >= min(0.9, shares.max())
    best, strength = np.unravel_index(np.where(enough, surprises, np.inf).argmin(), shares.shape)
    written = {strengths[i]: text.decode(texts[best][i][SHOWN]) for i in (0, strength)}
    for s, sentence in written.items():
        print(f"block {best}, strength {s}: {prompts[SHOWN]}{sentence}")
    plot(restored, prompts, strengths, shares, surprises, written, int(best), out)
    print(
        f"Patching the last position restores {restored[0, -1]:.0%} in the embedding and "
        f"{restored[-1, -1]:.0%} in the last block (should be 0 % and more than 90 %).\n"
        f"Letters in capitals: {shares[best, 0]:.0%} without the direction, {shares[best, strength]:.0%} "
        f"with it in block {best} (should be below 10 % and above 90 %); plot in {out}"
    )
    return float(shares[best, strength])


def plot(restored, prompts, strengths, shares, surprises, written, best: int, out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    figure, axes = plt.subplot_mosaic(
        [["where", "how much", "how well"], ["text"] * 3],
        figsize=(14, 6),
        height_ratios=[3, 1.3],
        constrained_layout=True,
    )
    axis = axes["where"]
    image = axis.imshow(restored, cmap="RdBu_r", vmin=-1, vmax=1, aspect="auto")
    axis.set_yticks(
        range(len(restored)), ["embed", *(f"block {i}" for i in range(len(restored) - 1))]
    )
    axis.set_xticks(range(LENGTH), [f"{i - LENGTH}" for i in range(LENGTH)])
    axis.set(xlabel="position, from the end of the prompt", title="Capitals restored by one output")
    figure.colorbar(image, ax=axis, label="share restored")
    for name, lines in (("how much", shares), ("how well", surprises)):
        axis = axes[name]
        for layer, line in enumerate(lines):
            width = 3 if layer == best else 1.2
            axis.plot(strengths, line, "o-", label=f"block {layer}", lw=width)
        axis.set(xlabel="strength of the direction")
        axis.grid(alpha=0.3)
    axes["how much"].set(
        title="Written after prompts in small letters", ylabel="letters in capitals"
    )
    axes["how well"].set(title="Surprise of the text, in small letters", yscale="log")
    axes["how well"].set(ylabel="perplexity to the model")
    axes["how well"].legend()
    axis = axes["text"]
    axis.axis("off")
    for row, (strength, sentence) in enumerate(written.items()):
        line = (prompts[SHOWN] + sentence).replace("\n", " ")[:100]
        axis.text(
            0, 0.75 - 0.5 * row, f"strength {strength:g}", fontsize=10, color="C7", va="bottom"
        )
        axis.text(0, 0.74 - 0.5 * row, line, family="monospace", fontsize=11, va="top")
    figure.suptitle("Where a small GPT keeps its capitals, and how to make it use them")
    figure.savefig(out, dpi=120)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=350)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--context", type=int, default=96)
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that it runs")
    parser.add_argument("--out", type=Path, default=Path("out/steering.png"))
    arguments = parser.parse_args()
    if arguments.quick:
        main(6, 4, 32, 16, arguments.out, features=16, heads=2, layers=2)
    else:
        sizes = {"features": 96, "heads": 4, "layers": 4}
        main(arguments.steps, arguments.batch, arguments.context, 80, arguments.out, **sizes)
