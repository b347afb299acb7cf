"""`purify`, a function that has the markers as attributes."""

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
    """Make a function with markers a pure function of a dictionary of parameters.

    Args:
      f: a function. Its positional arguments, if it has any, are arguments of the result too.
      ravel: whether parameters are one flat array in place of a dictionary.
      jit: whether to compile the result, for as long as nothing that it read has changed. Where that
        cannot be told, what it reads is a constant, as under `jax.jit`.

    Returns:
      A `Purified`, called as `model(params, *args, **fixed)`, to which all of `jax.*` applies. Its
      methods take the function's arguments last, where it has any:

      - `shapes()`, `zeros()`, `normal(key)`: the parameters as `jax.ShapeDtypeStruct`, zero, or
        standard normal, ordered by name like every dictionary here;
      - `fixed_shapes()`: what must be given by keyword;
      - `intermediates(params, **fixed)`: the marked values by name;
      - `ravel(params)`, `unravel(flat)`: between the dictionary and one flat array, sorted by name.

    The function is traced as by `jax.jit`, with its side effects, and again only when something that
    it read has changed (see "When the function is traced" in the guide). Markers may stand inside
    `jit`, `vmap`, `grad`, `scan`, `cond`, `while_loop`, `remat`, `shard_map`, custom rules, and
    functions called from there; a parameter in a loop or under `vmap` is one parameter. A function
    with a custom rule is differentiated by its arguments as the rule says, and by its parameters as
    JAX differentiates its body; a marker in a rule sees a parameter that the function itself has.

    Names are declared once: two calls of a marker with one name are an error, also where JAX answers
    the second call of a jitted function from its cache. A function with a custom rule is excepted,
    since JAX calls it and its rules as often as it needs: all its calls share its parameters.

    Modules may be made or used inside; those of outside are constants, as all that a function closes
    over. That holds for an eager call, which traces such a function each time: where JAX would keep
    the program, in `jax.jit(model)`, with `jit=True`, and in a `jax.jit` or `lax.scan` inside the
    function, reading a module of outside is a `refx.ClosureError`. To learn a module's parameters,
    make them one parameter: `m["params"] = param(m["params"], "m")` for a module `m` made inside.

    Raises (when called):
      MissingNameError, UnexpectedNameError, DuplicateNameError: a name without a value, a value
        without a name, two declarations of a name.
      refx.ClosureError: a module of outside is read where JAX would keep its values in a program.
      refx.ShapeError, refx.DtypeError: a value of another shape, or of a dtype that would lose something.
      MarkerError: a marker inside something that cannot pass its value on, and for `.intermediates`
        one inside `cond` or `while_loop`.

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

    # As the module of that name, which this stands in front of.
    purify: Purify


purify = Purify()
Purify.purify = purify
purify.__doc__ = Purify.__doc__
