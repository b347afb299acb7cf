"""Fill in a photograph from a tenth of its pixels with a Gaussian process.

The brightness of the flower, a photograph that ships with scikit-learn, is modelled as a log-normal field:
the exponential of a Gaussian process. Its power spectrum (size, length scale, slope) and the noise level are
learned too. The model is a plain function with markers. `nnx.purify` turns it into a pure function of one
flat array of white noise, and a Gaussian approximation of the posterior is fitted. The error at the hidden
pixels should be smaller than with linear interpolation. This takes well under two minutes on two cores.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from scipy.interpolate import griddata
from sklearn.datasets import load_sample_image
from tqdm import tqdm

from nnx.purify import fixed, intermediate, log_normal_variable, normal_variable, param, purify

matplotlib.use("Agg")
import matplotlib.pyplot as plt

PAD = 16


def field(shape: tuple[int, int]) -> jax.Array:
    """A Gaussian process on a grid, with its own hyperparameters, from its power spectrum."""
    size = log_normal_variable("size", mean=1.0, sigma=0.5)
    length = log_normal_variable("length", mean=15.0, sigma=10.0)
    slope = log_normal_variable("slope", mean=3.0, sigma=0.2)
    # The Fourier transform is periodic but the picture is not, so the grid is wider than the picture.
    wide = (shape[0] + PAD, shape[1] + PAD)
    k = jnp.hypot(jnp.fft.fftfreq(wide[0])[:, None], jnp.fft.fftfreq(wide[1])[None])
    power = (1 + (2 * jnp.pi * k * length) ** 2) ** (-slope / 2)
    power = intermediate(size**2 * power / power.sum(), "power")
    noise = jnp.fft.fft2(jnp.sqrt(power) * param(wide, "white_noise"))
    return (noise.real - noise.imag)[: shape[0], : shape[1]]


def make_model(shape: tuple[int, int], seen: int):
    """The log-density of the data, as a function of white noise."""

    @purify(ravel=True)
    def log_likelihood():
        log_brightness = normal_variable("level", mean=-1.0, sigma=1.0) + field(shape)
        brightness = intermediate(jnp.exp(log_brightness), "brightness")
        sigma = log_normal_variable("sigma", mean=0.01, sigma=0.005)
        where = fixed(jax.ShapeDtypeStruct((seen,), jnp.int32), "where")
        residual = (fixed(seen, "data") - brightness.ravel()[where]) / sigma
        return -0.5 * jnp.sum(residual**2) - seen * jnp.log(sigma)

    return log_likelihood


class Posterior(NamedTuple):
    """An independent normal distribution for each number of the white noise."""

    mean: jax.Array
    log_std: jax.Array

    def sample(self, key, count: int):
        # Each sample comes with its mirror image, which removes most of the noise from the gradient.
        noise = jax.random.normal(key, (count // 2, *self.mean.shape))
        return self.mean + jnp.exp(self.log_std) * jnp.concatenate([noise, -noise])

    def divergence(self):
        """The divergence from the standard normal prior."""
        variance = jnp.exp(2 * self.log_std)
        return 0.5 * jnp.sum(self.mean**2 + variance - 1 - 2 * self.log_std)


def fit(model, data, where, steps: int) -> tuple[Posterior, list[float]]:
    def loss(posterior: Posterior, key):
        samples = posterior.sample(key, 4)
        likelihood = jax.vmap(lambda x: model(x, where=where, data=data))(samples)
        return (posterior.divergence() - likelihood.mean()) / len(data)

    zeros = model.zeros()
    posterior = Posterior(zeros, jnp.full_like(zeros, -2.0))
    tx = optax.adam(optax.cosine_decay_schedule(0.05, steps))

    @jax.jit
    def step(posterior, state, key):
        value, grads = jax.value_and_grad(loss)(posterior, key)
        updates, state = tx.update(grads, state)
        return optax.apply_updates(posterior, updates), state, value

    state, history = tx.init(posterior), []
    with tqdm(jax.random.split(jax.random.key(1), steps), desc="steps") as bar:
        for i, key in enumerate(bar):
            posterior, state, value = step(posterior, state, key)
            history.append(value)
            if i % 50 == 0:
                bar.set_postfix(loss=f"{value:.3f}")
    return posterior, [float(v) for v in history]


def main(steps: int, fraction: float, out: Path) -> tuple[float, float]:
    picture = load_sample_image("flower.jpg").mean(-1) / 255
    # Average over 4 × 4 pixels, which leaves 106 × 160.
    h, w = (n // 4 for n in picture.shape)
    picture = picture[: 4 * h, : 4 * w].reshape(h, 4, w, 4).mean((1, 3)).astype(np.float32)
    order = np.random.default_rng(0).permutation(picture.size)
    where, hidden = np.split(order, [int(fraction * picture.size)])
    data = picture.ravel()[where]

    model = make_model(picture.shape, len(where))
    posterior, history = fit(model, jnp.asarray(data), jnp.asarray(where), steps)
    samples = posterior.sample(jax.random.key(2), 64)
    report = jax.jit(lambda x: model.intermediates(x, where=where, data=data))
    drawn = jax.device_get(jax.lax.map(report, samples))

    mean = drawn["brightness"].mean(0)
    places = np.stack(np.unravel_index(np.arange(picture.size), picture.shape), -1)
    baselines = {
        "the mean": np.full(picture.shape, data.mean()),
        "nearest": griddata(places[where], data, places, "nearest").reshape(picture.shape),
        "linear": griddata(places[where], data, places, "linear").reshape(picture.shape),
    }
    # Linear interpolation has no answer outside the hull of the seen pixels.
    gaps = np.isnan(baselines["linear"])
    baselines["linear"][gaps] = baselines["nearest"][gaps]
    errors = {
        name: float(np.sqrt(np.mean((guess - picture).ravel()[hidden] ** 2)))
        for name, guess in {**baselines, "ours": mean}.items()
    }
    deviation = np.abs(mean - picture).ravel()[hidden]
    spread = np.sqrt(drawn["brightness"].var(0) + np.mean(drawn["sigma"]) ** 2).ravel()[hidden]
    inside = float(np.mean(deviation < 1.645 * spread))
    plot(picture, where, drawn, baselines["linear"], errors, history, out)
    learned = ", ".join(f"{k} {drawn[k].mean():.3g}" for k in ("size", "length", "slope", "sigma"))
    print(f"learned: {learned}; {inside:.0%} of the hidden pixels are inside the 90 % interval")
    print(
        f"error at hidden pixels: {errors['ours']:.4f} (a full run should be below linear interpolation, "
        f"{errors['linear']:.4f}; nearest {errors['nearest']:.4f}, the mean "
        f"{errors['the mean']:.4f}); plot in {out}"
    )
    return errors["ours"], errors["linear"]


def plot(picture, where, drawn, linear, errors, history, out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    figure, axes = plt.subplots(2, 3, figsize=(12, 6.2), constrained_layout=True)
    shown = np.full(picture.size, np.nan, np.float32)
    shown[where] = picture.ravel()[where]
    brightness = drawn["brightness"]
    pictures = [
        (picture, "the photograph"),
        (
            shown.reshape(picture.shape),
            f"what is seen: {len(where) / picture.size:.0%} of the pixels",
        ),
        (brightness.mean(0), f"posterior mean, error {errors['ours']:.3f}"),
        (linear, f"linear interpolation, error {errors['linear']:.3f}"),
    ]
    for axis, (values, title) in zip(axes.flat, pictures, strict=False):
        axis.imshow(values, cmap="gray", vmin=0, vmax=picture.max())
        axis.set_title(title)
    axes[0, 1].set_facecolor("midnightblue")
    spread = axes[1, 1].imshow(brightness.std(0), cmap="magma", vmin=0)
    axes[1, 1].set_title("posterior standard deviation")
    scale = figure.colorbar(
        spread, cax=axes[1, 1].inset_axes((0.04, 0.1, 0.4, 0.05)), orientation="horizontal"
    )
    scale.ax.tick_params(colors="white", labelsize=8)
    for axis in axes.flat[:5]:
        axis.set(xticks=[], yticks=[])
    plot_spectra(axes[1, 2], picture, drawn["power"])
    inset = axes[1, 2].inset_axes((0.66, 0.6, 0.32, 0.3))
    inset.plot(history, lw=0.7)
    inset.set_title("loss", fontsize=8)
    inset.set_ylim(min(history), np.percentile(history, 92))
    inset.tick_params(labelsize=7)
    figure.savefig(out, dpi=120)


def plot_spectra(axis, picture, power) -> None:
    """The power spectrum that the model has learned, and that of the whole photograph."""
    window = np.hanning(picture.shape[0])[:, None] * np.hanning(picture.shape[1])
    whole = np.log(picture) - np.average(np.log(picture), weights=window)
    whole = np.abs(np.fft.fft2(whole * window)) ** 2 / np.sum(window**2)
    k, average = by_frequency(whole)
    axis.plot(k, average, ".", ms=4, color="gray", label="the whole photograph")
    learned = np.stack([by_frequency(p * p.size)[1] for p in power])
    k = by_frequency(power[0])[0]
    axis.fill_between(k, *np.percentile(learned, [5, 95], axis=0), alpha=0.3)
    axis.plot(k, np.median(learned, 0), label="learned")
    axis.set(xscale="log", yscale="log", xlabel="frequency (cycles per pixel)")
    axis.set_title("power spectrum of the logarithm")
    axis.grid(alpha=0.3)
    axis.legend(loc="lower left")


def by_frequency(power: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The average of a two-dimensional spectrum over all directions."""
    rows, columns = (np.fft.fftfreq(n) for n in power.shape)
    radius = np.hypot(rows[:, None], columns).ravel()
    edges = np.geomspace(1 / max(power.shape), 0.5, 25)
    bins = np.digitize(radius, edges)
    counts = np.bincount(bins, minlength=26)[1:25]
    sums = np.bincount(bins, power.ravel(), 26)[1:25]
    some = counts > 0
    return np.sqrt(edges[1:] * edges[:-1])[some], sums[some] / counts[some]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument(
        "--fraction", type=float, default=0.1, help="share of the pixels that are seen"
    )
    parser.add_argument("--quick", action="store_true", help="a short run, to see that it works")
    parser.add_argument("--out", type=Path, default=Path("gaussian_process.png"))
    arguments = parser.parse_args()
    main(100 if arguments.quick else arguments.steps, arguments.fraction, arguments.out)
