"""Purify: a plain function with markers becomes a pure function of a dictionary of parameters.

`param`, `fixed` and `intermediate` mark values where they are used; `purify` finds them. All of it is
also reached through `purify` itself: `nnx.purify(f)`, `nnx.purify.param(3, "x")`.

**How it is done.** A marker binds a primitive of its own (`jax.extend.core.Primitive`), so it is an
equation of the program that JAX traces, with its name as a parameter of the equation. `purify` traces
the function with `jax.make_jaxpr`, takes these equations out and makes what they produced inputs of
the program, through every jaxpr inside it.

The other way would be a handler: a stack of dictionaries that markers read while Python runs, as in
Haiku and NumPyro. It is half the code. It was tried: a function that is defined once and is under
`jax.jit`, the body of `lax.scan`, or under `jax.checkpoint`, with one marker in it, called for a
parameter of 2 and then of 3. All three gave 2 both times, and a gradient of 0 after that, with no
error: JAX answers from its cache of traces, and no marker runs. As equations all three are right,
since what JAX keeps has the name in it and not a value. And more comes with it: shapes are in the
trace, a value under `vmap` is never that of one lane, and a copy of a marker that a transformation
makes is told from a second call of it, since every call has a number.

The price is one trace of the function, which is kept for as long as nothing that it read has changed
(`guard`), and nothing after `jax.jit`: the program that remains is the one that a person would have
written, equation by equation.

`jax.ad_checkpoint.checkpoint_name` would spare the primitive. But it has room for a string alone, so
that kind, number and shape would have to be written into it, and policies of `jax.checkpoint` that
save by name would meet our names.
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
