"""Five well-known architectures, each in about twenty lines and trained on a small task.

A residual network, a vision transformer and a mixture of experts classify the 8 × 8 digits of scikit-learn.
A U-Net removes noise from them. An encoder with a decoder writes sequences backwards. On held-out data, the
residual network should get 95 % of the digits right, and the two transformers 90 %. The U-Net should leave
less than a third of the noise. 95 % of the sequences should be right in all twelve symbols. This takes about
a minute on two cores.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tqdm import tqdm

import nnx

matplotlib.use("Agg")
import matplotlib.pyplot as plt


class Residual(nnx.Module):
    """Two convolutions beside a shortcut (He et al. 2015, https://arxiv.org/abs/1512.03385)."""

    def __init__(self, channels: int, out_channels: int, strides: int):
        options = {"padding": 1, "use_bias": False}
        self.convs = [
            nnx.Conv(channels, out_channels, (3, 3), strides, **options),
            nnx.Conv(out_channels, out_channels, (3, 3), **options),
        ]
        self.norms = [nnx.BatchNorm(out_channels) for _ in range(2)]
        self.shortcut = nnx.Identity()
        if (channels, 1) != (out_channels, strides):
            self.shortcut = nnx.Conv(channels, out_channels, (1, 1), strides, use_bias=False)

    def __call__(self, x):
        h = nnx.relu(self.norms[0](self.convs[0](x)))
        return nnx.relu(self.norms[1](self.convs[1](h)) + self.shortcut(x))


class ResNet(nnx.Module):
    def __init__(self, channels: int = 24, classes: int = 10):
        self.stem = nnx.Conv(1, channels, (3, 3))
        self.blocks = nnx.Sequential(
            Residual(channels, channels, 1),
            Residual(channels, 2 * channels, 2),
            Residual(2 * channels, 2 * channels, 1),
        )
        self.head = nnx.Linear(2 * channels, classes)

    def __call__(self, x):
        return self.head(self.blocks(nnx.relu(self.stem(x))).mean((1, 2)))


class Layer(nnx.Module):
    """A layer of an encoder: attention and a perceptron, each on normalized inputs and added to them."""

    def __init__(self, features: int, heads: int, mlp=None):
        self.norms = [nnx.LayerNorm(features) for _ in range(2)]
        self.attention = nnx.MultiHeadAttention(heads, features)
        self.mlp = mlp or nnx.MLP(features, 2 * features, activation=nnx.gelu)

    def __call__(self, x):
        x = x + self.attention(self.norms[0](x))
        return x + self.mlp(self.norms[1](x))


class ViT(nnx.Module):
    """Patches of an image as tokens (Dosovitskiy et al. 2020, https://arxiv.org/abs/2010.11929)."""

    first: jax.Array = nnx.param()
    positions: jax.Array = nnx.param()

    def __init__(self, size: int = 8, patch: int = 2, features: int = 48, classes: int = 10):
        self.patches = nnx.Conv(1, features, (patch, patch), patch, padding="VALID")
        draw = nnx.initializers.normal(0.02)
        count = (size // patch) ** 2 + 1
        self.first = draw(self.make_rng("params"), (features,), jnp.float32)
        self.positions = draw(self.make_rng("params"), (count, features), jnp.float32)
        self.layers = nnx.Stack(lambda: Layer(features, 4), 2)
        self.norm, self.head = nnx.LayerNorm(features), nnx.Linear(features, classes)

    def __call__(self, x):
        tokens = self.patches(x).reshape(len(x), -1, self.first.size)
        first = jnp.broadcast_to(self.first, (len(x), 1, self.first.size))
        x = self.layers(jnp.concatenate([first, tokens], axis=1) + self.positions)
        return self.head(self.norm(x)[:, 0])


class Experts(nnx.Module):
    """Perceptrons, one for each token (Fedus et al. 2021, https://arxiv.org/abs/2101.03961).

    `room` is how many tokens an expert takes, as a multiple of its share. Further tokens skip it.
    """

    def __init__(self, features: int, experts: int, room: float = 1.5):
        self.router = nnx.Linear(features, experts, use_bias=False)
        self.experts = nnx.vmap(lambda: nnx.MLP(features, 2 * features), axis_size=experts)()
        self.room = room

    def __call__(self, x):
        tokens = x.reshape(-1, x.shape[-1])
        chances = jax.nn.softmax(self.router(tokens))
        chosen = jax.nn.one_hot(chances.argmax(-1), chances.shape[-1])
        # The place of each token at its expert, one-hot; zeros if the expert has no room left.
        count = int(self.room * len(tokens) / chances.shape[-1])
        place = jax.nn.one_hot((jnp.cumsum(chosen, 0) * chosen).sum(-1) - 1, count)
        sent = jnp.einsum("te,tp->tep", chosen, place)
        inputs = jnp.einsum("tep,tf->epf", sent, tokens)
        outputs = nnx.vmap(lambda expert, x: expert(x))(self.experts, inputs)
        # Small if all experts have the same share.
        balance = chances.shape[-1] * (chosen.mean(0) * chances.mean(0)).sum()
        nnx.sow(self, "balance", balance)
        y = jnp.einsum("tep,epf->tf", sent, outputs) * chances.max(-1, keepdims=True)
        return y.reshape(x.shape)


class MoE(ViT):
    """The same transformer with experts instead of the perceptron."""

    def __init__(self, features: int = 48, experts: int = 4):
        super().__init__(features=features)
        self.layers = nnx.Stack(lambda: Layer(features, 4, Experts(features, experts)), 2)


class UNet(nnx.Module):
    """Down and up again, with skip connections (Ronneberger et al. 2015,
    https://arxiv.org/abs/1505.04597).
    """

    def __init__(self, channels=(16, 32, 64)):
        pairs = list(itertools.pairwise(channels))
        self.stem = self.double(1, channels[0])
        self.down = [self.double(a, b) for a, b in pairs]
        self.up = [nnx.ConvTranspose(b, a, (2, 2), 2) for a, b in pairs]
        self.join = [self.double(2 * a, a) for a, _ in pairs]
        self.head = nnx.Conv(channels[0], 1, (1, 1))

    @staticmethod
    def double(a: int, b: int):
        norms = [nnx.GroupNorm(b, num_groups=4) for _ in range(2)]
        convs = nnx.Conv(a, b, (3, 3)), nnx.Conv(b, b, (3, 3))
        return nnx.Sequential(convs[0], norms[0], nnx.silu, convs[1], norms[1], nnx.silu)

    def __call__(self, x):
        levels = [self.stem(x)]
        for down in self.down:
            levels.append(down(nnx.max_pool(levels[-1], (2, 2), (2, 2))))
        h = levels.pop()
        for up, join in zip(reversed(self.up), reversed(self.join), strict=True):
            h = join(jnp.concatenate([levels.pop(), up(h)], axis=-1))
        return self.head(h)


class DecoderLayer(nnx.Module):
    """Attention to the output so far, then to the input, then a perceptron."""

    def __init__(self, features: int, heads: int):
        self.norms = [nnx.LayerNorm(features) for _ in range(3)]
        self.own, self.cross = (nnx.MultiHeadAttention(heads, features) for _ in range(2))
        self.mlp = nnx.MLP(features, 2 * features, activation=nnx.gelu)

    def __call__(self, x, read):
        x = x + self.own(self.norms[0](x), is_causal=True)
        x = x + self.cross(self.norms[1](x), read, decode=False)
        return x + self.mlp(self.norms[2](x))


class Seq2Seq(nnx.Module):
    """The original transformer (Vaswani et al. 2017, https://arxiv.org/abs/1706.03762).

    It normalizes before each part, not after it. Its decoder starts with the symbol 0.
    """

    def __init__(self, symbols: int, features: int = 48, heads: int = 4, layers: int = 1):
        self.embed = nnx.Embed(symbols, features)
        self.encoder = nnx.Stack(lambda: Layer(features, heads), layers)
        self.decoder = nnx.Stack(lambda: DecoderLayer(features, heads), layers)
        self.norms = [nnx.LayerNorm(features) for _ in range(2)]
        self.features = features

    def encode(self, tokens):
        positions = nnx.sinusoidal_positions(tokens.shape[1], self.features)
        return self.norms[0](self.encoder(self.embed(tokens) * self.features**0.5 + positions))

    def decode(self, tokens, read, start=0):
        """Logits for the token after each token. The first token is at position `start`."""
        positions = nnx.sinusoidal_positions(64, self.features)[start + jnp.arange(tokens.shape[1])]
        x = self.decoder(self.embed(tokens) * self.features**0.5 + positions, read)
        return self.embed.attend(self.norms[1](x))

    def __call__(self, tokens, targets):
        written = jnp.pad(targets[:, :-1], ((0, 0), (1, 0)))
        return self.decode(written, self.encode(tokens))


@nnx.jit(static_argnames="length")
def translate(model, tokens, length: int):
    """The most likely symbol at each step. The decoder's self-attention has a cache."""
    model, read = nnx.clone(model), model.encode(tokens)
    shape = (len(tokens), length, model.features)
    nnx.vmap(lambda layer: layer.own.init_cache(shape))(model.decoder.layers)

    def step(token, i):
        token = model.decode(token, read, i)[:, -1:].argmax(-1)
        return token, token[:, 0]

    with nnx.scope(decode=True):
        start = jnp.zeros((len(tokens), 1), int)
        return nnx.scan(step, start, jnp.arange(length))[1].T


def classify(model, batch):
    logits, sown = nnx.capture(model, None)(batch["x"])
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean()
    return loss + 0.01 * sum(
        x.mean() for x in sown.values()
    )  # the balance of experts, if there are any


def denoise(model, batch):
    return jnp.mean((model(batch["noisy"]) - batch["x"]) ** 2)


def write_backwards(model, batch):
    logits = model(batch["tokens"], batch["tokens"][:, ::-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["tokens"][:, ::-1]).mean()


def fit(name: str, model, loss_fn, batches, steps: int, rate: float):
    schedule = optax.warmup_cosine_decay_schedule(0, rate, steps // 10 + 1, steps)
    optimizer = nnx.Optimizer(
        model, optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))
    )

    @nnx.jit
    def train_step(model, optimizer, batch):
        loss, grads = nnx.value_and_grad(loss_fn)(model, batch)
        optimizer.update(model, grads)
        return loss

    model.train()
    losses = [train_step(model, optimizer, next(batches)) for _ in tqdm(range(steps), desc=name)]
    model.eval()
    return np.array(losses)


def main(steps: int, out: Path) -> dict[str, float]:
    data = load_digits()
    images = (data.images[..., None] / 16).astype(np.float32)
    x, x_test, y, y_test = train_test_split(images, data.target, test_size=0.2, random_state=0)
    rng = np.random.default_rng(0)
    symbols, length = 12, 12

    def digits():
        while True:
            i = rng.integers(len(x), size=64)
            yield {"x": x[i], "y": y[i]}

    def noisy():
        for batch in digits():
            noise = 0.5 * rng.normal(size=batch["x"].shape).astype(np.float32)
            yield batch | {"noisy": batch["x"] + noise}

    def sequences():
        while True:
            yield {"tokens": rng.integers(1, symbols, (64, length))}

    curves, results = {}, {}
    for kind in (ResNet, ViT, MoE):
        model = kind.init(0)()
        name = kind.__name__
        count = steps if kind is ResNet else 3 * steps // 2
        curves[name] = fit(name, model, classify, digits(), count, 3e-3)
        right = nnx.jit(lambda m, x: m(x).argmax(-1))(model, x_test) == y_test
        results[name] = float(right.mean())
    unet = UNet.init(0)()
    curves["UNet"] = fit("UNet", unet, denoise, noisy(), steps, 3e-3)
    dirty = x_test + 0.5 * rng.normal(size=x_test.shape).astype(np.float32)
    clean = nnx.jit(lambda m, x: m(x))(unet, dirty)
    results["UNet"] = float(np.mean((clean - x_test) ** 2) / np.mean((dirty - x_test) ** 2))
    model = Seq2Seq.init(0)(symbols)
    curves["Seq2Seq"] = fit("Seq2Seq", model, write_backwards, sequences(), 2 * steps, 5e-3)
    tokens = next(sequences())["tokens"]
    right = (translate(model, tokens, length) == tokens[:, ::-1]).all(1)
    results["Seq2Seq"] = float(right.mean())
    plot(curves, results, x_test, dirty, clean, out)
    print(
        f"digits right: ResNet {results['ResNet']:.1%} (should be at least 95 %), ViT {results['ViT']:.1%}, "
        f"MoE {results['MoE']:.1%} (should be at least 90 %); noise left by the U-Net: "
        f"{results['UNet']:.0%} (should be less than a third); sequences written backwards correctly: "
        f"{results['Seq2Seq']:.0%} (should be at least 95 %); plot in {out}"
    )
    return results


def plot(curves, results, images, dirty, clean, out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    figure, axes = plt.subplots(1, 2, figsize=(11, 4), constrained_layout=True)
    for name, losses in curves.items():
        kind = "noise left" if name == "UNet" else "right"
        label = f"{name}: {results[name]:.0%} {kind}"
        axes[0].plot(np.linspace(0, 1, len(losses)), losses, lw=1, label=label)
    axes[0].set(yscale="log", xlabel="part of the training", ylabel="loss of a batch")
    axes[0].grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    gap = [(0, 0), (1, 1), (1, 1)]
    rows = [np.hstack(np.pad(x[:12, :, :, 0], gap)) for x in (images, dirty, clean)]
    axes[1].imshow(np.vstack(rows), cmap="gray_r", vmin=0, vmax=1)
    axes[1].set_yticks([5, 15, 25], ["digits", "with noise", "U-Net"])
    axes[1].set(xticks=[], title="held-out digits")
    figure.savefig(out, dpi=120)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that it runs")
    parser.add_argument("--out", type=Path, default=Path("out/architectures.png"))
    arguments = parser.parse_args()
    main(4 if arguments.quick else arguments.steps, arguments.out)
