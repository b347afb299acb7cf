"""Teach a trained network a digit that it has never seen, with few new parameters.

A network learns the 8 × 8 digits of scikit-learn without one class, and is saved. Then it is loaded from
that file, low-rank adapters are put beside its layers, and only they are trained: on the new digit, with
three times as many old ones, so that these are not forgotten. At the end the adapters are merged
into the layers, and the network is what it was, plus one digit.

On the held-out fifth, whichever digit is new, it should recognize at least 90 % of the new digit (0 % before)
and lose less than 2 % of the others. This uses 5 % of the parameters and takes less than half a minute on two
cores. On average over the ten digits, it recognizes 97 %, or 98 % when all parameters are trained on the same
data.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import matplotlib
import numpy as np
import optax
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tqdm import tqdm

import nnx

matplotlib.use("Agg")
import matplotlib.pyplot as plt

CLASSES, BATCH = 10, 32


# The class has this name in the file, whether this program is run or imported.
@nnx.saveable(name="examples.lora.Net")
class Net(nnx.Module):
    """A perceptron with two hidden layers."""

    def __init__(self, hidden: int = 256):
        self.first = nnx.Linear(64, hidden)
        self.second = nnx.Linear(hidden, hidden)
        self.head = nnx.Linear(hidden, CLASSES)
        self.dropout = nnx.Dropout(0.2)

    def __call__(self, x):
        x = self.dropout(nnx.relu(self.first(x)))
        x = self.dropout(nnx.relu(self.second(x)))
        return self.head(x)


class Digits(NamedTuple):
    x: np.ndarray
    x_test: np.ndarray
    y: np.ndarray
    y_test: np.ndarray


@nnx.jit
def train_epoch(model, optimizer, x, y):
    def train_step(_, batch):
        def loss_fn(model):
            x, y = batch
            return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()

        # Take gradients only for the optimizer's Refs: the adapters, or all parameters.
        optimizer.update(model, nnx.grad(loss_fn, wrt=optimizer.wrt)(model))
        return None, None

    nnx.scan(train_step, None, (x, y))


@nnx.jit
def evaluate(model, confusion, x, y):
    confusion.update(logits=model(x), labels=y)


def fit(
    model: Net,
    wrt: str,
    rate: float,
    epochs: int,
    choose: Callable[[], np.ndarray],
    digits: Digits,
    title: str,
) -> list[np.ndarray]:
    """Train the Refs that `wrt` selects on the digits that `choose` selects for each epoch.

    Returns the confusion matrices of the held-out digits, before the first epoch and after each.
    """
    steps = len(choose()) // BATCH
    schedule = optax.cosine_decay_schedule(rate, epochs * steps)
    optimizer = nnx.Optimizer(model, optax.adam(schedule), wrt=wrt)
    history = [confusion_of(model, digits)]
    with tqdm(range(epochs), desc=title) as bar:
        for _ in bar:
            i = choose()[: steps * BATCH].reshape(steps, BATCH)
            train_epoch(model.train(), optimizer, digits.x[i], digits.y[i])
            history.append(confusion_of(model, digits))
    return history


def confusion_of(model: Net, digits: Digits) -> np.ndarray:
    confusion = nnx.metrics.ConfusionMatrix(CLASSES)
    evaluate(model.eval(), confusion, digits.x_test, digits.y_test)
    return np.asarray(confusion.compute())


def accuracies(confusion: np.ndarray, new: int) -> tuple[float, float]:
    """The accuracy for the new digit, and for all others."""
    right, total = confusion.diagonal(), confusion.sum(1)
    old = np.arange(CLASSES) != new
    return right[new] / total[new], right[old].sum() / total[old].sum()


def size(partition: nnx.Partition) -> int:
    return sum(value.size for value in partition.values())


def main(new: int, rank: int, epochs: int, out: Path) -> tuple[float, float]:
    data = load_digits()
    images = (data.images.reshape(-1, 64) / 16).astype(np.float32)
    digits = Digits(
        *train_test_split(images, data.target, test_size=0.2, random_state=0, stratify=data.target)
    )
    rng = np.random.default_rng(0)
    is_old = np.flatnonzero(digits.y != new)
    is_new = np.flatnonzero(digits.y == new)

    def old_digits():
        return rng.permutation(is_old)

    def both():
        return rng.permutation(np.concatenate([is_new, old_digits()[: 3 * len(is_new)]]))

    out.parent.mkdir(parents=True, exist_ok=True)
    file = out.with_suffix(".npz")
    x = digits.x_test
    with nnx.scope(jax.random.key(0)):
        model = Net()
        *_, before = fit(model, "params", 2e-3, epochs, old_digits, digits, f"without {new}")
        nnx.save(file, model)

        model = nnx.load(file)
        logits = [model(x)]
        nnx.apply_lora(model, rank)
        adapted = fit(model, "lora", 1e-2, epochs, both, digits, f"adapters for {new}")
        trained = size(model["lora"])
        logits.append(model(x))
        nnx.merge_lora(model)
        logits.append(model(x))

        whole = nnx.load(file)
        tuned = fit(whole, "params", 2e-3, epochs, both, digits, "all parameters")

    total, after = size(model["params"]), confusion_of(model, digits)
    rows = {
        f"before, from {file}": (total, before),
        f"adapters of rank {rank}, merged": (trained, after),
        "all parameters": (total, tuned[-1]),
    }
    width = max(map(len, rows))
    print(f"{'held-out accuracy':{width}}   of the {new}   of others   parameters trained")
    for name, (count, confusion) in rows.items():
        found, others = accuracies(confusion, new)
        print(f"{name:{width}}  {found:8.1%}  {others:9.1%}   {count:,} ({count / total:.1%})")
    found, others = accuracies(after, new)
    lost = accuracies(before, new)[1] - others
    curves = {f"adapters ({trained:,} parameters)": adapted, f"all ({total:,} parameters)": tuned}
    guesses = np.argmax(logits, -1)[:2]
    plot(new, curves, before, after, digits, guesses, out)
    print(
        f"Merging changed logits by at most {abs(logits[2] - logits[1]).max():.0e}. The adapters find "
        f"{found:.1%} of the {new} (should be at least 90 %) and lose {lost:.1%} of the others "
        f"(should be less than 2 %); plot in {out}"
    )
    return found, others


def plot(new: int, curves, before, after, digits: Digits, guesses, out: Path) -> None:
    figure, axes = plt.subplots(2, 2, figsize=(10, 9), constrained_layout=True)
    for axis, confusion, when in ((axes[0, 0], before, "before"), (axes[0, 1], after, "after")):
        plot_confusion(axis, confusion, new)
        axis.set_title(f"{when}: {accuracies(confusion, new)[0]:.0%} of the {new}")
    for (name, history), style in zip(curves.items(), ("-", "--"), strict=True):
        for column, color in enumerate(("tab:red", "tab:blue")):
            label = f"{f'the {new}' if column == 0 else 'others'}, {name}"
            accuracy = [accuracies(confusion, new)[column] for confusion in history]
            axes[1, 0].plot(accuracy, style, color=color, label=label)
    axes[1, 0].set(xlabel="epoch", ylabel="held-out accuracy")
    axes[1, 0].set_title("with adapters, and with all parameters trained")
    axes[1, 0].grid(alpha=0.3)
    axes[1, 0].legend()
    plot_pictures(axes[1, 1], digits.x_test, *guesses, digits.y_test == new)
    figure.savefig(out, dpi=120)


def plot_confusion(axis, confusion: np.ndarray, new: int) -> None:
    # Logarithmic, so that single mistakes are visible.
    axis.imshow(np.log1p(confusion), cmap="Blues")
    for (row, column), count in np.ndenumerate(confusion):
        if count:
            color = "white" if count > confusion.max() / 4 else "black"
            axis.text(column, row, count, ha="center", va="center", color=color, fontsize=9)
    axis.axhspan(new - 0.5, new + 0.5, fill=False, ec="tab:red", lw=2)
    axis.set(xticks=range(CLASSES), yticks=range(CLASSES), xlabel="prediction", ylabel="digit")


def plot_pictures(axis, x, before, after, chosen) -> None:
    """Pictures of the new digit, and their classes before and after."""
    axis.set(title="recognized as, before → after", xlim=(0, 6), ylim=(4, 0))
    axis.axis("off")
    for place, i in enumerate(np.flatnonzero(chosen)[:24]):
        row, column = divmod(place, 6)
        inset = axis.inset_axes((column + 0.1, row + 0.05, 0.8, 0.7), transform=axis.transData)
        inset.imshow(x[i].reshape(8, 8), cmap="gray_r")
        inset.set(xticks=[], yticks=[])
        inset.set_xlabel(f"{before[i]} → {after[i]}", fontsize=10)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--new", type=int, default=8, help="the digit that is left out at first")
    parser.add_argument("--rank", type=int, default=4, help="rank of the adapters")
    parser.add_argument(
        "--epochs", type=int, default=40, help="epochs of each of the three trainings"
    )
    parser.add_argument("--quick", action="store_true", help="a short run, to see that it works")
    parser.add_argument("--out", type=Path, default=Path("out/lora.png"))
    arguments = parser.parse_args()
    epochs = 3 if arguments.quick else arguments.epochs
    main(arguments.new, arguments.rank, epochs, arguments.out)
