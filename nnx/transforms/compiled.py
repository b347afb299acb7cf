"""Compiled functions: find or make the program of a call, run it, and start again if necessary."""

from __future__ import annotations

from typing import Any, Generic, ParamSpec, TypeVar

from nnx._ambient import ambient
from nnx.transforms.boundary import close_call
from nnx.transforms.call import Call
from nnx.transforms.closure import Closure
from nnx.transforms.donation import explain_deleted, explain_donation
from nnx.transforms.layout import Plans
from nnx.transforms.result import Spec
from nnx.transforms.stages import Lowered, Traced, other_structure
from nnx.transforms.tracebacks import shortened
from refx.frame import local
from refx.trace import without_jit

__all__: list[str] = []

P = ParamSpec("P")
R = TypeVar("R")


class Compiled(Generic[P, R]):
    """A function that is compiled once for each structure of a call and its closure.

    Each layout is traced before it is compiled, because only a trace tells what the function closes over
    and which Refs it writes. JAX keeps the trace, so this costs nothing.
    """

    # The method of an active probe that handles the calls.
    _kind = ""
    _name: str
    _closure: Closure
    _plans: Plans

    def _open(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], abstract: bool | None = None
    ) -> Call:
        """Take the arguments of a call apart. `abstract` is as for `open_call`."""
        raise NotImplementedError

    def _trace(self, call: Call) -> Any:
        """Trace for a layout, and set `layout.traced` if the call met nothing new."""
        raise NotImplementedError

    def _program(self, call: Call) -> tuple[Any, tuple[Any, ...], tuple[Any, ...]]:
        """The program of a call, its static arguments and its inputs."""
        raise NotImplementedError

    def _exportable(
        self, call: Call, spec: Spec, bound: tuple[Any, ...], args: Any, kwargs: Any
    ) -> Any:
        """The trace of a call for `jax.export`; see `exportable`."""
        raise NotImplementedError

    _close = staticmethod(close_call)

    def _prepared(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], abstract: bool | None = None
    ) -> tuple[Call, Any]:
        """Open a call and trace its layout, so that its closure is known. Also returns a new trace."""
        outer = ambient.call
        while True:
            call = self._open(args, kwargs, abstract)
            if not call.layout.traced and self._closure.meet(call.layout):
                call = self._open(args, kwargs, abstract)
            traced = None
            ambient.call = call
            try:
                if not call.layout.traced:
                    traced = self._trace(call)
            except Exception:
                if not call.found:
                    raise
            finally:
                ambient.call = outer
            if not call.found:
                return call, traced
            if _starts_again(call):
                self._plans.drop(call.layout)
                return call, None
            self._closure.add(call, self._name)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        if ambient.probe is not None:
            return getattr(ambient.probe, self._kind)(self, args, kwargs)
        outer = ambient.call
        abstract: bool | None = None
        try:
            while True:
                call = self._open(args, kwargs, abstract)
                # Under `jax.disable_jit()`, the body may run without a program and see numbers.
                if not call.layout.traced and not without_jit():
                    call = self._prepared(args, kwargs, abstract)[0]
                packed: Any = None
                # If JAX traces the function for new shapes, the trace needs to know its call.
                ambient.call = call
                try:
                    program, statics, inputs = self._program(call)
                    packed = program(*statics, *inputs)
                except Exception as error:
                    # A missing root may be the cause.
                    if type(error) is TypeError and abstract is None:
                        # The program may take an array where there is now a ShapeDtypeStruct.
                        ambient.call = outer
                        abstract = False
                        if self._open(args, kwargs, abstract).layout is not call.layout:
                            continue
                    if not call.found or _starts_again(call):
                        explain_donation(error, self._name, call)
                        explain_deleted(error, self._name, call)
                        raise
                finally:
                    ambient.call = outer
                if call.found:
                    # For new shapes, the function may have taken another path through its code.
                    self._plans.drop(call.layout)
                    if not _starts_again(call):
                        self._closure.add(call, self._name)
                        continue
                    call.found.clear()
                return self._close(call, packed)
        except Exception as error:
            raise shortened(error)  # noqa: B904 — it is the same one

    def trace(self, *args: P.args, **kwargs: P.kwargs) -> Traced:
        """Trace for these arguments, like `jax.jit(f).trace`. The result has `.jaxpr` and `.lower()`."""
        return self._stages((), args, kwargs)

    def lower(self, *args: P.args, **kwargs: P.kwargs) -> Lowered:
        """Lower for these arguments, like `jax.jit(f).lower`. It has `.compile()` and `.as_text()`."""
        return self.trace(*args, **kwargs).lower()

    def _stages(
        self, bound: tuple[Any, ...], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Traced:
        call, traced = self._prepared(bound + args, kwargs, True)
        program, statics, inputs = self._program(call)
        if traced is None:
            outer, ambient.call = ambient.call, call
            try:
                traced = program.trace(*statics, *inputs)
            finally:
                ambient.call = outer

        # Keep the layout, not the call, which holds the caller's values.
        was = call.layout

        def finished(compiled: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            now = self._open(bound + args, kwargs)
            _, others, inputs = self._program(now)
            if others != statics:
                raise other_structure(self._name, was, now.layout)
            return self._close(now, compiled(*inputs))

        def exported(spec: Spec) -> Any:
            return self._exportable(call, spec, bound, args, kwargs)

        return Traced(traced, self._name, finished, exported)


def _starts_again(call: Call) -> bool:
    """Whether the body around this call met the same Refs, and so starts again anyway.

    This function only has to know its roots by then. If it started again here, and in every body in
    between, each level would double the number of traces.
    """
    frame = local.frame
    return (
        frame is not None
        and frame.lifts
        and any(s.ref is ref for s in frame.met() for ref, _ in call.found)
    )
