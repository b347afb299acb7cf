"""Writes errors.md: the most common mistakes with their error messages, made by running them.

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
    """A program that raises, and what to do about it. `before` runs first, in another process."""

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
`jax.grad` knows nothing about `calls`. Pass the Ref, or the module that has it, as an argument to the
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
To plain `jax`, a module is a pytree of values. So the `norm` inside is a copy, and its new statistics
would be lost. Use `nnx.vmap`. If nothing should be written, call
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
Dropout needs a key, and so do the constructors of most layers. Open a scope around the call, or around
the whole training loop:

```py
with nnx.scope(jax.random.key(0)):
    model(x)
```

For evaluation, call `model.eval()`: then dropout draws nothing. [Randomness](randomness.md) has more.
""",
    ),
    Mistake(
        "A shape that does not fit",
        """\
layer = nnx.Linear.init(0)(3, 8)
nnx.jit(layer)(x)
""",
        """\
The message names the layer and both shapes. In a large model, look for the last line of the traceback
that is in your code: there the layer is called.
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
Attributes other than arrays, modules, lists and dicts are part of the compiled program's cache key,
so they must be hashable. Here, use `frozenset({0, 3})` or `(0, 3)`.
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
A partition is written by path, and the model must have each of its paths. Pick those that fit:

```py
fitting = {path: value for path, value in norm["params"].items() if path in nnx.refs(model)}
nnx.update(model, fitting)
```

For the same reason, gradients taken with another `wrt` than the optimizer's raise an
`OptimizerError`.
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
`donate=True` lets the step reuse the memory of the values that it overwrites, so the arrays in `best`
are gone. Copy what you want to keep: `best = jax.tree.map(jnp.copy, model["params"])`.
""",
    ),
    Mistake(
        "jax.jit instead of nnx.jit",
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
Write `@nnx.jit`. Plain `jax.jit` cannot write the new weights back, so without this error the model
would silently not learn.
""",
    ),
    Mistake(
        "A class that is not imported before loading",
        """\
model = nnx.load("model.npz")
""",
        """\
A file holds the names of classes but no code, and loading never imports anything. Import your modules
first. If a class may move, give it a permanent name: `@nnx.saveable(name="my_project.Classifier")`.
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
Every step of a loop has the same shapes, so a carried value cannot grow. To collect values, return
them as the second output of the body, which `nnx.scan` stacks. Or give the Ref its final size, and
write with `.at[i].set(...)`.
""",
    ),
]


def run(mistake: Mistake) -> BaseException:
    """Run a mistake in an empty folder, then its advice; return the error that the mistake raised."""
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

These are the ten most common mistakes. `docs/make_errors.py` ran each program below, and the text after
it is the end of the traceback. All programs begin with

```py
{SETUP}```

Errors about Refs, modules and transformations derive from `nnx.RefError`. A layer raises a
`ValueError` or a `TypeError` for an argument with the wrong shape or type. A function that raises
leaves every module as it was.
"""
    ]
    for number, (mistake, error) in enumerate(zip(MISTAKES, errors, strict=True), 1):
        parts.append(f"## {number}. {mistake.title}\n")
        if mistake.before:
            parts.append(f"One program:\n\n```py\n{mistake.before}```\n\nAnother program:\n")
        parts.append(f"```py\n{mistake.code}```\n")
        parts.append(f"```text\n{message(error)}\n```\n")
        parts.append(mistake.advice)
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page([run(mistake) for mistake in MISTAKES]))
