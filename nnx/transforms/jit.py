"""`nnx.jit`: a compiled function that writes its updates back."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Iterable
from typing import Any, TypeVar, overload

import jax

from nnx.transforms.boundary import Call, Plan, close_call, open_call, run
from nnx.transforms.closure import Closure
from refx import Node
from refx.trace import local

__all__ = ["jit"]

F = TypeVar("F", bound=Callable[..., Any])


def unbound(fn: Callable[..., Any]) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """A function and the arguments it is bound to: a module or its method takes the module."""
    if isinstance(fn, types.MethodType) and isinstance(fn.__self__, Node):
        return fn.__func__, (fn.__self__,)
    if isinstance(fn, Node):
        return type(fn).__call__, (fn,)  # pyright: ignore[reportAttributeAccessIssue]
    return fn, ()


def function_name(fn: Callable[..., Any]) -> str:
    """How a message calls a function."""
    return getattr(fn, "__qualname__", None) or getattr(fn, "__name__", None) or repr(fn)


class Jit:
    """What `nnx.jit` returns: called like the function, compiled once for each structure."""

    def __init__(
        self,
        fn: Callable[..., Any],
        static_argnums: int | Iterable[int] | None,
        static_argnames: str | Iterable[str] | None,
        options: dict[str, Any],
    ):
        self._fn, self._bound = unbound(fn)
        self._name = f"nnx.jit({function_name(fn)})"
        self._closure = Closure(self._fn)
        self._plans: dict[Any, Plan] = {}
        self._static = _Statics(self._fn, static_argnums, static_argnames, len(self._bound))
        self._compiled = jax.jit(self._run, static_argnums=0, **options)
        functools.update_wrapper(self, fn if not isinstance(fn, Node) else self._fn)

    def _run(self, layout: Any, values: Any, leaves: Any, others: Any) -> Any:
        call: Call = local.call
        fn = self._static.restore(self._fn, layout.statics)
        return run(fn, self._name, call, values, leaves, others, layout=layout)

    def _open(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        if self._bound:
            args = self._bound + args
        statics = None
        if self._static.active:
            args, kwargs, statics = self._static.take(args, kwargs)
        return open_call(args, kwargs, self._closure, self._plans, statics)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        outer = local.call
        while True:
            call = local.call = self._open(args, kwargs)
            layout = call.layout
            packed = None
            try:
                if not layout.traced:
                    # The trace is kept by JAX for the call below. What it closes over is found
                    # here, before anything is compiled.
                    self._compiled.trace(layout, call.values, call.leaves, call.others)
                    layout.traced = True
                if not call.found or _starts_again(call):
                    packed = self._compiled(layout, call.values, call.leaves, call.others)
            except Exception:
                if not call.found:
                    raise
            finally:
                local.call = outer
            if call.found:
                self._closure.add(root for _, root in call.found)
                if packed is None or not _starts_again(call):
                    continue
                call.found.clear()
            return close_call(call, packed)

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        return self if instance is None else types.MethodType(self, instance)

    def __repr__(self) -> str:
        return f"<{self._name}>"


def _starts_again(call: Call) -> bool:
    """Whether the body around this call met the same Refs, so that it starts again anyway.

    Its next pass needs this function to know its roots and nothing more; starting again here, and
    in every body between, would double the traces with each level.
    """
    frame = local.frame
    return frame is not None and frame.lifts and any(ref in frame.found for ref, _ in call.found)


class _Statics:
    """Which arguments are static, and how they are taken out of a call and put back."""

    def __init__(self, fn: Any, nums: Any, names: Any, bound: int):
        nums = (nums,) if isinstance(nums, int) else tuple(nums or ())
        names = (names,) if isinstance(names, str) else tuple(names or ())
        self.active = bool(nums or names)
        if not self.active:
            return
        nums = tuple(n + bound if n >= 0 else n for n in nums)
        try:
            parameters = list(inspect.signature(fn).parameters.values())
        except (TypeError, ValueError):
            parameters = []
        positional = [
            p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
        ]
        # As in jax.jit: what is static by number is static by name too, and the other way round.
        by_num = {n % len(positional) if n < 0 and positional else n for n in nums}
        self.names = set(names) | {positional[n] for n in by_num if n < len(positional)}
        self.nums = by_num | {i for i, name in enumerate(positional) if name in names}

    def take(self, args: Any, kwargs: Any) -> tuple[Any, Any, Any]:
        fixed = {i: a for i, a in enumerate(args) if i in self.nums}
        named = {k: v for k, v in kwargs.items() if k in self.names}
        for where, value in (*fixed.items(), *named.items()):
            _check_static(where, value)
        statics = (len(args), tuple(fixed.items()), tuple(sorted(named.items())))
        rest = tuple(a for i, a in enumerate(args) if i not in self.nums)
        return rest, {k: v for k, v in kwargs.items() if k not in self.names}, statics

    def restore(self, fn: Callable[..., Any], statics: Any) -> Callable[..., Any]:
        if statics is None:
            return fn
        count, fixed, named = statics
        fixed = dict(fixed)

        def with_statics(*args: Any, **kwargs: Any) -> Any:
            rest = iter(args)
            full = [fixed[i] if i in fixed else next(rest) for i in range(count)]
            return fn(*full, **kwargs, **dict(named))

        return with_statics


def _check_static(where: Any, value: Any) -> None:
    from refx import StructureError, UnhashableStaticError
    from refx.node import is_identity

    which = f"argument {where}" if isinstance(where, int) else f"argument {where!r}"
    if any(map(is_identity, jax.tree.leaves(value, is_leaf=is_identity))):
        raise StructureError(
            f"Static {which} of nnx.jit holds a module or a Ref, whose updates would not be seen. "
            f"Pass it as an ordinary argument: its structure is static there by itself."
        )
    try:
        hash(value)
    except TypeError:
        raise UnhashableStaticError(
            f"Static {which} of nnx.jit is a {type(value).__name__}, which cannot be hashed: "
            f"{value!r}. Use a tuple for a list, or make the argument an ordinary one."
        ) from None


@overload
def jit(fn: F, **options: Any) -> F: ...
@overload
def jit(fn: None = None, **options: Any) -> Callable[[F], F]: ...
def jit(
    fn: Any = None,
    *,
    static_argnums: int | Iterable[int] | None = None,
    static_argnames: str | Iterable[str] | None = None,
    **options: Any,
) -> Any:
    """Compile a function that may read and write the Refs it is given or closes over.

    It is `jax.jit` with reference semantics: what the function wrote is in the caller's modules
    when it returns, so a training step needs to return nothing. Only Refs that were written are
    outputs of the compiled program. A change of structure (an attribute set, a layer appended)
    propagates, and the next call compiles for the new structure. If the function raises, nothing
    of the caller's has changed.

    Args:
      fn: the function, a module, or a bound method of one. Refs may be anywhere in its arguments,
        in what it closes over, and in its output.
      static_argnums: numbers of arguments that are hashable constants of the program.
      static_argnames: the same by name.
      **options: `inline`, `keep_unused`, `compiler_options` and so on, as for `jax.jit`.

    Raises:
      UnhashableStaticError: a static attribute or argument cannot be hashed.
      TraceLevelError, ForeignTracerError: see the errors of refx; raised while tracing.

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
            jit, static_argnums=static_argnums, static_argnames=static_argnames, **options
        )
    if not callable(fn):
        raise TypeError(f"nnx.jit takes a function, a module or a method, but got {fn!r}.")
    return Jit(fn, static_argnums, static_argnames, options)
