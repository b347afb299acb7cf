"""Purify: turn a plain function with markers into a pure function of a dictionary of parameters.

`param`, `fixed` and `intermediate` mark values where they are used, and `purify` finds them. You
can also reach everything through `purify` itself: `nnx.purify(f)`, `nnx.purify.param(3, "x")`.

**How it works.** Each kind of marker binds its own primitive (`jax.extend.core.Primitive`). So a
marker is an equation in the program that JAX traces, and its name is a parameter of the equation.
`purify` traces the function with `jax.make_jaxpr`. It removes these equations and turns their
results into inputs of the program, through every jaxpr inside it.

The alternative is a handler, as in Haiku and NumPyro: a stack of dictionaries that markers read
while Python runs. It needs half the code, but it gives wrong results. We tried a function with one
marker that is defined once, under `jax.jit`, as the body of `lax.scan`, and under `jax.checkpoint`.
Called with a parameter of 2 and then 3, all three gave 2 both times, and then a gradient of 0,
without an error: JAX answered from its cache of traces, and no marker ran. As equations, all three
are right, because JAX's cache holds the name and not a value. Equations have more advantages.
Shapes are in the trace. A value under `vmap` is never that of one lane. And every call has a
number, so a copy that a transformation makes differs from a second call.

The price is one trace of the function. It is kept as long as nothing that it read has changed
(`guard`). After `jax.jit` there is no further cost: the remaining program is, equation by equation,
the one that a person would have written.

`jax.ad_checkpoint.checkpoint_name` could replace the primitive. But it only holds a string, so
kind, number and shape would have to be encoded in it. And policies of `jax.checkpoint` that save by
name would see our names.
"""

import importlib
from typing import TYPE_CHECKING

from nnx.purify import distributions, errors, markers  # noqa: F401
from nnx.purify.distributions import (
    log_normal,
    log_normal_variable,
    normal,
    normal_like,
    normal_variable,
    uniform,
    uniform_variable,
    zeros_like,
)
from nnx.purify.errors import (
    DuplicateNameError,
    MarkerError,
    MissingNameError,
    PurifyError,
    UnexpectedNameError,
)
from nnx.purify.markers import (
    fixed,
    intermediate,
    param,
    prefix,
    trivialize,
)
from nnx.purify.namespace import purify

if TYPE_CHECKING:
    from nnx.purify.pure import Purified

__all__ = [
    "DuplicateNameError",
    "MarkerError",
    "MissingNameError",
    "Purified",
    "PurifyError",
    "UnexpectedNameError",
    "fixed",
    "intermediate",
    "log_normal",
    "log_normal_variable",
    "normal",
    "normal_like",
    "normal_variable",
    "param",
    "prefix",
    "purify",
    "trivialize",
    "uniform",
    "uniform_variable",
    "zeros_like",
]

if not TYPE_CHECKING:

    def __getattr__(name):
        # Loaded when it is first used, so that an import of nnx is quick.
        if name == "Purified":
            return importlib.import_module("nnx.purify.pure").Purified
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}", name=name)
