"""`purify`: a function with the markers as its attributes."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar, overload

from nnx.purify import distributions, errors, markers

if TYPE_CHECKING:
    from nnx.purify.pure import Purified

__all__ = ["purify"]

T = TypeVar("T")


class Purify:
    """Turn a function with markers into a pure function of a dictionary of parameters.

    Args:
      f: a function. Its positional arguments become arguments of the result.
      ravel: whether the parameters are one flat array instead of a dictionary.
      jit: whether to compile the result. It is compiled again when something that it read has
        changed. Changes that cannot be seen are ignored, as under `jax.jit`.

    Returns:
      A `Purified`. Call it as `model(params, *args, **fixed)`; all of `jax.*` applies to it. Its
      methods take the function's arguments, if any, last:

      - `shapes()`, `zeros()`, `normal(key)`: the parameters as `jax.ShapeDtypeStruct`, zero, or
        standard normal. Like every dictionary here, they are ordered by name;
      - `fixed_shapes()`: the values that must be passed by keyword;
      - `intermediates(params, **fixed)`: the marked values by name;
      - `ravel(params)`, `unravel(flat)`: convert between the dictionary and one flat array, sorted by name.

    The function is traced as by `jax.jit`, including its side effects. It is traced again only when
    something that it read has changed (see "When the function is traced" in the guide). Markers
    work inside `jit`, `vmap`, `grad`, `scan`, `cond`, `while_loop`, `remat`, `shard_map`, custom
    rules, and functions called from there. A parameter in a loop or under `vmap` is one parameter.
    If a function has a custom rule, the rule gives the derivatives by its arguments, and its body
    gives those by its parameters. A marker in a rule can only use a parameter that the function
    itself has.

    Each name is declared once. Two marker calls with the same name are an error, also if JAX
    answers the second call of a jitted function from its cache. Functions with a custom rule are an
    exception: JAX calls them and their rules any number of times, so all their calls share their
    parameters.

    You may make and use modules inside the function. Modules from outside are constants, like
    everything that a function closes over. An eager call traces such a function each time. But
    where JAX would keep the program, reading a module from outside is a `refx.ClosureError`: in
    `jax.jit(model)`, with `jit=True`, and in a `jax.jit` or `lax.scan` inside the function. To
    learn a module's parameters, make the module `m` inside and turn them into one parameter:
    `m["params"] = param(m["params"], "m")`.

    Raises (when called):
      MissingNameError, UnexpectedNameError, DuplicateNameError: a name has no value, a value has an
      unknown name, or a name is declared twice. refx.ClosureError: a module from outside is read
      where JAX would keep its values in a program. refx.ShapeError, refx.DtypeError: a value has
      another shape, or a dtype that would lose information. MarkerError: a marker is inside
      something that cannot pass its value on; for `.intermediates`, also inside `cond` or
      `while_loop`.

    >>> import jax, jax.numpy as jnp
    >>> from nnx.purify import purify
    >>> @purify
    ... def model():
    ...     w = purify.param(3, "w")
    ...     y = purify.intermediate(w * purify.fixed(3, "x"), "y")
    ...     return y.sum()
    >>> params = model.normal(jax.random.key(0))
    >>> grads = jax.grad(model)(params, x=jnp.array([1.0, 2.0, 3.0]))
    >>> grads["w"].tolist()
    [1.0, 2.0, 3.0]
    """

    param = staticmethod(markers.param)
    fixed = staticmethod(markers.fixed)
    intermediate = staticmethod(markers.intermediate)
    prefix = staticmethod(markers.prefix)
    trivialize = staticmethod(markers.trivialize)
    zeros_like = staticmethod(distributions.zeros_like)
    normal_like = staticmethod(distributions.normal_like)
    normal = staticmethod(distributions.normal)
    log_normal = staticmethod(distributions.log_normal)
    uniform = staticmethod(distributions.uniform)
    normal_variable = staticmethod(distributions.normal_variable)
    log_normal_variable = staticmethod(distributions.log_normal_variable)
    uniform_variable = staticmethod(distributions.uniform_variable)
    if TYPE_CHECKING:
        Purified = Purified
    else:
        # Loaded with the first function that is purified, so that an import of nnx is quick.
        Purified = property(lambda self: importlib.import_module("nnx.purify.pure").Purified)
    PurifyError = errors.PurifyError
    MissingNameError = errors.MissingNameError
    UnexpectedNameError = errors.UnexpectedNameError
    DuplicateNameError = errors.DuplicateNameError
    MarkerError = errors.MarkerError

    @overload
    def __call__(
        self, f: Callable[..., T], *, ravel: bool = False, jit: bool = False
    ) -> Purified[T]: ...

    @overload
    def __call__(
        self, f: None = None, *, ravel: bool = False, jit: bool = False
    ) -> Callable[[Callable[..., T]], Purified[T]]: ...

    def __call__(
        self, f: Callable[..., Any] | None = None, *, ravel: bool = False, jit: bool = False
    ) -> Any:
        if f is None:
            return functools.partial(self, ravel=ravel, jit=jit)
        if not callable(f):
            raise TypeError(f"purify takes a function, not {f!r}.")
        return self.Purified(f, ravel=ravel, jit=jit)

    def __repr__(self) -> str:
        return "nnx.purify"

    # Keep the attributes of the module `nnx.purify`, which this function hides.
    purify: Purify


purify = Purify()
Purify.purify = purify
purify.__doc__ = Purify.__doc__
