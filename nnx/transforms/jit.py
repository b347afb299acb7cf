"""`nnx.jit`: a compiled function that writes its updates back."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterable
from typing import (
    Any,
    ParamSpec,
    TypeVar,
    overload,
)

import jax

from nnx.transforms.callables import check_plain, function_name, unbound
from nnx.transforms.explain import Explanation
from nnx.transforms.jitted import Jit, jitted_method
from nnx.transforms.stages import Traced
from refx import Filter

__all__ = ["jit"]

P = ParamSpec("P")
Q = ParamSpec("Q")
R = TypeVar("R")
T = TypeVar("T")
R_co = TypeVar("R_co", covariant=True)


class BoundJit:
    """A jitted method or module, bound to its module.

    It is a pytree, like a bound method of a module. So when a module holds one as an attribute, a copy
    of the module gets its own.
    """

    def __init__(self, jitted: Jit, module: Any):
        self._jit = jitted
        self._module = module
        functools.update_wrapper(self, jitted, updated=())
        self.__wrapped__ = types.MethodType(jitted._fn, module)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._jit(self._module, *args, **kwargs)

    def trace(self, *args: Any, **kwargs: Any) -> Traced:
        """As `Jit.trace`."""
        return self._jit._stages((self._module,), args, kwargs)

    def lower(self, *args: Any, **kwargs: Any) -> Any:
        """As `Jit.lower`."""
        return self.trace(*args, **kwargs).lower()

    def explain(self, *args: Any, **kwargs: Any) -> Explanation:
        """As `Jit.explain`."""
        return self._jit.explain(self._module, *args, **kwargs)

    def eval_shape(self, *args: Any, **kwargs: Any) -> Any:
        """As `Jit.eval_shape`."""
        return self._jit.eval_shape(self._module, *args, **kwargs)

    def __repr__(self) -> str:
        return repr(self._jit)


jax.tree_util.register_pytree_with_keys(
    BoundJit,
    lambda bound: (((jax.tree_util.GetAttrKey("__self__"), bound._module),), bound._jit),
    lambda jitted, children: BoundJit(jitted, *children),
    lambda bound: ((bound._module,), bound._jit),
)


@overload
def jit(
    fn: Callable[P, R],
    *,
    static_argnums: int | Iterable[int] | None = None,
    static_argnames: str | Iterable[str] | None = None,
    donate: Filter = None,
    in_shardings: Any = None,
    out_shardings: Any = None,
    **options: Any,
) -> Jit[P, R]: ...
@overload
def jit(
    fn: None = None,
    *,
    static_argnums: int | Iterable[int] | None = None,
    static_argnames: str | Iterable[str] | None = None,
    donate: Filter = None,
    in_shardings: Any = None,
    out_shardings: Any = None,
    **options: Any,
) -> Callable[[Callable[P, R]], Jit[P, R]]: ...
def jit(
    fn: Any = None,
    *,
    static_argnums: int | Iterable[int] | None = None,
    static_argnames: str | Iterable[str] | None = None,
    donate: Filter = None,
    in_shardings: Any = None,
    out_shardings: Any = None,
    **options: Any,
) -> Any:
    """Compile a function that may read and write the Refs in its arguments and closure.

    It is `jax.jit` with reference semantics: when the function returns, its writes are in the caller's
    modules, so a training step need not return anything. Only the Refs that it wrote are outputs of
    the compiled program. A change of structure (an attribute set, a layer appended) propagates, and
    the next call compiles for the new structure. If the function raises, the caller's modules are
    unchanged.

    Static attributes and arguments are part of the program. They are compared by type and content, so
    the next call notices a change such as `model.cfg.lr = 0.1` and compiles a new program. Keep a value
    that changes often in a Ref.

    Args:
      fn: the function, a module, or a bound method of a module. Refs may be anywhere in its arguments,
        its closure and its output.
      static_argnums: the positions of arguments that are hashable constants of the program.
      static_argnames: the same, by name.
      donate: a filter, or True for every Ref. The program reuses the buffers of the selected Refs
        that the function writes, and so needs no memory for the new values. Any other reference to
        such an array, as in a clone that shares it, is dead afterwards.
      in_shardings: a sharding, or a tuple with one for each argument, or a pytree prefix of that;
        for a module or a Ref it may be a dict from filter to sharding. Written values keep it.
      out_shardings: the same for the output, which must not hold new Refs.
      **options: `inline`, `keep_unused`, `compiler_options` and so on, as for `jax.jit`.

    Returns:
      A function like `fn`, with `.trace`, `.lower` and `.eval_shape` as on `jax.jit`.

    Raises:
      UnhashableStaticError: a static attribute or argument cannot be hashed.
      DonationError: a donated Ref shares its buffer with another Ref, or the function uses a Ref
        whose buffer was donated before.
      TraceLevelError, ForeignTracerError: raised while tracing; see the errors of refx.

    >>> import jax, jax.numpy as jnp, nnx
    >>> @nnx.jit
    ... def increment(counter, by):
    ...     counter.value += by
    >>> counter = nnx.Ref(jnp.array(1), "counters")
    >>> increment(counter, 2)
    >>> int(counter.value)
    3
    """
    if fn is None:
        return functools.partial(
            jit,
            static_argnums=static_argnums,
            static_argnames=static_argnames,
            donate=donate,
            in_shardings=in_shardings,
            out_shardings=out_shardings,
            **options,
        )
    if wrong := [name for name in ("donate_argnums", "donate_argnames") if name in options]:
        raise TypeError(
            f"nnx.jit has no {wrong[0]}. It donates the buffers of Refs that the function overwrites: "
            f"select them with a filter, as in donate='params' or donate=True. "
            f"nnx.jit_filter has {wrong[0]}, for plain arrays too."
        )
    statics, shardings = (static_argnums, static_argnames), (in_shardings, out_shardings)
    fn, bound = unbound(fn)
    check_plain(fn, function_name(fn))
    if bound:
        return BoundJit(jitted_method(fn, statics, donate, shardings, options), *bound)
    return Jit(fn, statics, donate, shardings, options)
