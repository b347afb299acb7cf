"""`Jit`, the result of `nnx.jit`: it finds or makes the program of a call, runs it, and writes back."""

from __future__ import annotations

import copy
import functools
import operator
import sys
import types
import weakref
from collections.abc import Callable
from typing import (
    TYPE_CHECKING,
    Any,
    Concatenate,
    ParamSpec,
    Protocol,
    Self,
    TypeVar,
    overload,
)

import jax

from nnx._ambient import ambient
from nnx.transforms.boundary import run
from nnx.transforms.call import Call, Values, open_call
from nnx.transforms.callables import function_name
from nnx.transforms.closure import Closure
from nnx.transforms.compiled import Compiled
from nnx.transforms.donation import selected
from nnx.transforms.explain import Explanation, explain, note
from nnx.transforms.exported import check_pure, exportable
from nnx.transforms.homes import at_home, settle
from nnx.transforms.layout import Layout, Plans
from nnx.transforms.naming import inputs_of, named
from nnx.transforms.result import NewValues, Packed, Spec
from nnx.transforms.shardings import Shardings
from nnx.transforms.simple import eval_shape
from nnx.transforms.stages import Lowered, Traced
from nnx.transforms.statics import Statics
from refx import Filter

__all__: list[str] = []

P = ParamSpec("P")
Q = ParamSpec("Q")
R = TypeVar("R")
T = TypeVar("T")
R_co = TypeVar("R_co", covariant=True)


class JittedMethod(Protocol[P, Q, R_co]):
    """The type of a jitted method on a module: the call is bound, but the stages are not."""

    def __call__(self, *args: Q.args, **kwargs: Q.kwargs) -> R_co: ...
    def trace(self, *args: P.args, **kwargs: P.kwargs) -> Traced: ...
    def lower(self, *args: P.args, **kwargs: P.kwargs) -> Lowered: ...
    def explain(self, *args: P.args, **kwargs: P.kwargs) -> Explanation: ...


class Jit(Compiled[P, R]):
    """The result of `nnx.jit`. Call it like the function; it compiles once for each structure."""

    _kind = "jit"

    def __init__(
        self,
        fn: Callable[P, R],
        statics: tuple[Any, Any],
        donate: Filter,
        shardings: tuple[Any, Any],
        options: dict[str, Any],
        bound: int = 0,
    ):
        # `bound`: how many of the first arguments do not count in argument numbers.
        self._fn = fn
        self._name = f"nnx.jit({function_name(fn)})"
        self._closure = Closure(self._fn)
        self._plans = Plans()
        # Programs of layouts that need their own. If they were on the layout, which is an argument of
        # its program, they would keep this function and its closure alive for ever.
        self._programs: dict[Layout, Any] = {}
        # Versions of this function by the probes that were active in a call.
        self._probed: dict[Any, Jit] = {}
        # How often the function was traced for a program; and why this Jit exists, if a probe made it.
        self._traces = 0
        self.reason: str | None = None
        # The last program; and the number whose changes alone caused the last programs, with their count.
        self._last_program: Any = None
        self._number_changes = "", 0
        self._static = Statics(self._name, self._fn, *statics, bound=bound)
        self._donate = donate
        self._options = options
        self._shardings = Shardings(self._name, *shardings, bound=bound)
        # Whether values may be on several devices, so that written values go back to their places. None
        # before the first call, because finding out starts the devices.
        self._spread: bool | None = None
        # Always the same function, because JAX looks up traces by it.
        self._pure = self._named_run()
        self._compiled = self._compile(options)
        # If the function is itself a Jit, its attributes must not replace ours.
        functools.update_wrapper(self, fn, updated=())

    def _name_and_close_over(self, name: str, closure: Closure) -> None:
        """Use `name` in messages, and `closure` to find what is closed over."""
        self._name, self._closure = name, closure

    def _forget(self, *, only_roots: bool) -> None:
        """Forget what the search found, so that it is not kept alive. The programs stay."""
        self._closure.forget(only_roots=only_roots)

    _given: tuple[Any, ...]
    __qualname__: str

    if not TYPE_CHECKING:

        def __new__(cls, *given):
            jitted = super().__new__(cls)
            jitted._given = given  # for copies and pickles
            return jitted

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        fn = copy.deepcopy(self._given[0], memo)
        # Like a function, it is its own copy, unless it wraps an object such as a functools.partial.
        return self if fn is self._given[0] else Jit(fn, *self._given[1:])

    def __reduce__(self) -> Any:
        if self.__module__ != "__main__":
            try:
                # The global name of a decorated function refers to this Jit.
                if operator.attrgetter(self.__qualname__)(sys.modules[self.__module__]) is self:
                    return self.__qualname__
            except (AttributeError, KeyError):
                pass
        # For a method, the last item is 1.
        return (jitted_method, self._given[:5]) if len(self._given) > 5 else (Jit, self._given)

    def _named_run(self) -> Callable[..., Packed]:
        def pure(layout: Layout, donated: list[Any], values: Values) -> Packed:
            return self._run(layout, donated, values)

        return named(pure, self._fn, labels=_labels)

    def _run(self, layout: Layout, donated: list[Any], values: Values) -> Packed:
        call: Call = ambient.call
        if donated:
            values = values.copied()
            for i, value in zip(layout.donated, donated, strict=True):
                values.refs[i] = value

        said = self._shardings.of_output(layout)

        def finish(packed: Packed, outline: NewValues) -> Packed:
            packed = packed if said is None else said(packed, outline)
            # A donated buffer is gone, so its value must be an output even if it was not written.
            written = packed.values()
            for i, value in zip(layout.donated, donated, strict=True):
                written.setdefault(i, value)
            order = tuple(sorted(written))
            return Packed(Spec(order, packed.spec.graph), packed.out, [written[i] for i in order])

        fn = self._static.restore(self._fn, layout.statics)
        after = finish if donated or said is not None else None
        packed = run(fn, self._name, call, values, layout=layout, finish=after)
        if layout.traced:
            note(self, layout, call)
        return packed

    def _open(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], abstract: bool | None = None
    ) -> Call:
        statics = None
        if self._static.active:
            args, kwargs, statics = self._static.take(args, kwargs)
        call = open_call(args, kwargs, self._closure, self._plans, statics, abstract=abstract)
        if self._spread is None:
            self._spread = jax.local_device_count() > 1 or jax.process_count() > 1
        if self._spread:
            call.layout = at_home(call)
        if self._shardings.active and not call.layout.traced:
            self._shardings.learn(call, args, kwargs)
        return call

    def _trace(self, call: Call) -> Any:
        """Find out what the function closes over and which Refs it writes, and prepare for that.

        Returns:
          The result of `jax.jit(f).trace`, if it is that of the program.
        """
        layout = call.layout
        traced = self._compiled.trace(layout, [], call.values)
        if call.found:
            return None
        if len(self._programs) > len(self._plans.layouts):
            known = set(self._plans.every())
            self._programs = {k: v for k, v in self._programs.items() if k in known}
        if self._donate is not None and self._donate is not False:
            layout.donated = selected(self._donate, call, traced.out_info.spec.written)
        if self._shardings.active:
            options = self._options | self._shardings.options(layout, traced.out_info)
            self._programs[layout] = self._compile(options)
        layout.written = frozenset(traced.out_info.spec.written)
        if call.loose:
            settle(call)
        layout.traced = True
        self._closure.traced()
        if layout.donated:
            return None
        note(self, layout, call)
        return None if self._shardings.active else traced

    def _compile(self, options: dict[str, Any]) -> Any:
        return jax.jit(self._pure, static_argnums=0, donate_argnums=1, **options)

    def _program(self, call: Call) -> tuple[Any, tuple[Any, ...], tuple[Any, ...]]:
        layout = call.layout
        if call.loose:
            settle(call)
        program = self._programs.get(layout, self._compiled) if self._programs else self._compiled
        inputs = layout.divided(call.values) if layout.donated else ([], call.values)
        return program, (layout,), inputs

    def _exportable(
        self, call: Call, spec: Spec, bound: tuple[Any, ...], args: Any, kwargs: Any
    ) -> Any:
        fn = self._fn
        if self._static.active:
            args, kwargs, statics = self._static.take(bound + args, kwargs)
            args, fn = args[len(bound) :], self._static.restore(fn, statics)
        check_pure(self._name, call, spec)
        return exportable(fn, self._name, call, len(bound), args, kwargs)

    def explain(self, *args: P.args, **kwargs: P.kwargs) -> Explanation:
        """Explain whether a call with these arguments is already compiled, and if not, what is new.

        This does not call, trace or compile the function.

        >>> import jax.numpy as jnp, nnx
        >>> step = nnx.jit(lambda scale, x: scale.value * x)
        >>> scale = nnx.Ref(jnp.array(2.0))
        >>> _ = step(scale, jnp.ones((32, 8)))
        >>> print(step.explain(scale, jnp.ones((31, 8))))
        nnx.jit(<lambda>) compiles program number 2:
          x: float32[32,8] → float32[31,8]
        """
        call = self._open(args, kwargs, True)
        if not call.layout.traced and self._closure.meet(call.layout):
            call = self._open(args, kwargs, True)
        return explain(self, call)

    def eval_shape(self, *args: P.args, **kwargs: P.kwargs) -> Any:
        """The abstract output for these arguments; see `nnx.eval_shape`."""
        return eval_shape(self._fn, *args, **kwargs)

    @overload
    def __get__(self, instance: None, owner: Any = None) -> Self: ...
    @overload
    def __get__(
        self: Jit[Concatenate[T, Q], R], instance: T, owner: Any = None
    ) -> JittedMethod[Concatenate[T, Q], Q, R]: ...
    def __get__(self, instance: Any, owner: Any = None) -> Any:
        return self if instance is None else types.MethodType(self, instance)

    def __repr__(self) -> str:
        count = sum(layout.traced for layout in self._plans.every())
        return f"<{self._name}, traced for {count} structure{'' if count == 1 else 's'}>"


# Bound methods that were jitted. Two modules of one class get the same Jit, so that they have the same
# structure and share compiled programs.
_methods: weakref.WeakValueDictionary[Any, Jit] = weakref.WeakValueDictionary()


def jitted_method(fn: Callable[..., Any], *given: Any) -> Jit:
    key = (fn, *given[:-1], tuple(sorted(given[-1].items())))
    try:
        known = _methods.get(key)
    except TypeError:
        return Jit(fn, *given, 1)  # pyright: ignore
    return known or _methods.setdefault(key, Jit(fn, *given, 1))  # pyright: ignore


def _labels(call: Call) -> tuple[Any, ...]:
    return ("layout", *call.layout.divided(inputs_of(call)))
