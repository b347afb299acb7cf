"""Writes errors.md: the commonest mistakes, with the messages that they get, made by running them.

`python docs/make_errors.py` writes the page; `tests/test_docs_tables.py` checks that it is up to date.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any, NamedTuple

PAGE = Path(__file__).parent / "errors.md"
ROOT = PAGE.parent.parent


class Mistake(NamedTuple):
    """A program that raises, and what to do about it. `before` runs in a process of its own."""

    title: str
    code: str
    advice: str
    before: str = ""


SETUP = """\
import jax
import jax.numpy as jnp
import optax

import nnx

x = jnp.ones((4, 2))
"""

MISTAKES = [
    Mistake(
        "A write from another trace",
        """\
calls = nnx.Ref(jnp.array(0), "counters")


def loss(w):
    calls.value += 1
    return (w**2).sum()


jax.grad(loss)(jnp.ones(3))
""",
        """\
`jax.grad` knows nothing of `calls`. Give the Ref, or the module that has it, as an argument to the
`nnx` transformation of the same name, which writes it back:

```py
def loss(w, calls):
    calls.value += 1
    return (w**2).sum()


nnx.grad(loss)(jnp.ones(3), calls)
```
""",
    ),
    Mistake(
        "A write to a read-only copy",
        """\
norm = nnx.BatchNorm(2)
jax.vmap(lambda norm, x: norm(x), in_axes=(None, 0))(norm, jnp.ones((3, 4, 2)))
""",
        """\
To plain `jax` a module is a pytree of values, so the `norm` inside is a copy, and its new statistics
would be lost. Use `nnx.vmap`; or, if nothing should be written, call it with
`norm.apply(use_running_average=True)(x)`.
""",
    ),
    Mistake(
        "A missing random stream",
        """\
model = nnx.Sequential(nnx.Dropout(0.5))
model(x)
""",
        """\
Dropout needs a key, and constructors of layers do, too. Open a scope around the call, or around the
whole training loop:

```py
with nnx.scope(jax.random.key(0)):
    model(x)
```

For evaluation there is nothing to draw: `model.eval()`. More in [Randomness](randomness.md).
""",
    ),
    Mistake(
        "A shape that does not fit",
        """\
layer = nnx.Linear.init(0)(3, 8)
nnx.jit(layer)(x)
""",
        """\
The message has the layer and both shapes. Inside a large model, the last line of the traceback that
is yours says where the layer is called.
""",
    ),
    Mistake(
        "A static attribute that cannot be hashed",
        """\
class Mask(nnx.Module):
    def __init__(self):
        self.hidden = {0, 3}

    def __call__(self, x):
        return x.at[:, jnp.array(sorted(self.hidden))].set(0)


nnx.jit(Mask())(x)
""",
        """\
Attributes that are no arrays, modules, lists or dicts are part of the key of the compiled program,
so they must have a hash. Here `frozenset({0, 3})` or `(0, 3)` does.
""",
    ),
    Mistake(
        "The partition of another model or filter",
        """\
model = nnx.Linear.init(0)(2, 2)
norm = nnx.BatchNorm(2)
model["params"] = norm["params"]
""",
        """\
A partition is written by path, and each of its paths must be there. Pick those that fit:

```py
fitting = {path: value for path, value in norm["params"].items() if path in nnx.refs(model)}
nnx.update(model, fitting)
```

Gradients that were taken with another `wrt` than the optimizer has are an `OptimizerError` for the
same reason.
""",
    ),
    Mistake(
        "A donated buffer",
        """\
@nnx.jit(donate=True)
def step(model, x):
    model.kernel -= 0.1 * model(x).mean()


model = nnx.Linear.init(0)(2, 2)
best = model["params"]
step(model, x)
model["params"] = best
step(model, x)
""",
        """\
`donate=True` lets the step reuse the memory of what it overwrites, so `best` holds arrays that are
gone. Copy what you want to keep: `best = jax.tree.map(jnp.copy, model["params"])`.
""",
    ),
    Mistake(
        "jax.jit in place of nnx.jit",
        """\
@jax.jit
def train_step(model, optimizer, x):
    loss, grads = nnx.value_and_grad(lambda model: (model(x) ** 2).mean())(model)
    optimizer.update(model, grads)
    return loss


model = nnx.Linear.init(0)(2, 2)
train_step(model, nnx.Optimizer(model, optax.sgd(0.1)), x)
""",
        """\
Write `@nnx.jit`. Plain `jax.jit` could not write the new weights back, and the model would not learn,
without a word.
""",
    ),
    Mistake(
        "A class that is not imported when a model is loaded",
        """\
model = nnx.load("model.npz")
""",
        """\
A file holds the names of classes and no code, and loading never imports anything. Import your modules
first. If a class has moved, give it a name that stays: `@nnx.saveable(name="my_project.Classifier")`.
""",
        before="""\
import nnx


class Classifier(nnx.Module):
    def __init__(self):
        self.linear = nnx.Linear(2, 2)


nnx.save("model.npz", Classifier.init(0)())
""",
    ),
    Mistake(
        "A carry that changes",
        """\
history = nnx.Ref(jnp.zeros((0, 2)), "history")


def body(h, x):
    history.value = jnp.concatenate([history.value, h[None]])
    return h + x, None


nnx.scan(body, jnp.zeros(2), x)
""",
        """\
Every step of a loop has the same shapes, so nothing that is carried can grow. Return what should be
collected as the second output of the body, which `nnx.scan` stacks; or make the Ref as large as it
will be, and write with `.at[i].set(...)`.
""",
    ),
]


def run(mistake: Mistake) -> BaseException:
    """Run the program of a mistake in an empty folder, then its advice; give the error it raised."""
    scope: dict[str, Any] = {"__name__": "example"}
    here = os.getcwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            if mistake.before:
                env = {**os.environ, "PYTHONPATH": str(ROOT)}
                subprocess.run([sys.executable, "-c", mistake.before], env=env, check=True)
            exec(compile(SETUP, "example.py", "exec"), scope)
            program = compile(mistake.code, "example.py", "exec")
            try:
                exec(program, scope)
            except Exception as error:
                raised = error
            else:
                raise AssertionError(f"{mistake.title!r} raised nothing.")
            for block in re.findall(r"^```py\n(.*?)^```", mistake.advice, re.M | re.S):
                exec(compile(block, "advice.py", "exec"), scope)
            return raised
        finally:
            os.chdir(here)


def message(error: BaseException) -> str:
    """The last line of the traceback, without the note that JAX adds below it."""
    return "".join(traceback.format_exception_only(type(error)(str(error)))).strip()


def page(errors: list[BaseException]) -> str:
    """The page as Markdown, with the error of each mistake."""
    parts = [
        f"""\
# Errors

The ten commonest mistakes. Each program below was run by `docs/make_errors.py`, and what follows it
is the end of the traceback. All begin with

```py
{SETUP}```

Errors about Refs, modules and transformations derive from `nnx.RefError`; an argument of a layer
with a wrong shape or type is a `ValueError` or a `TypeError`. A function that raises leaves every
module as it was.
"""
    ]
    for number, (mistake, error) in enumerate(zip(MISTAKES, errors, strict=True), 1):
        parts.append(f"## {number}. {mistake.title}\n")
        if mistake.before:
            parts.append(f"One program:\n\n```py\n{mistake.before}```\n\nAnother one:\n")
        parts.append(f"```py\n{mistake.code}```\n")
        parts.append(f"```text\n{message(error)}\n```\n")
        parts.append(mistake.advice)
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page([run(mistake) for mistake in MISTAKES]))
