"""The ahead-of-time stages of `nnx.jit`: traced, lowered, compiled, as on `jax.jit`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from nnx.transforms.boundary import close_call
from nnx.transforms.call import Call
from nnx.transforms.layout import Layout
from refx import StructureError

__all__: list[str] = []


class _Stage:
    """A stage of JAX, with everything that it has, for a function of modules."""

    def __init__(
        self,
        stage: Any,
        name: str,
        layout: Layout,
        open_: Callable[[Any, Any], Call],
        inputs: Callable[[Call], tuple[Any, ...]],
        exported: Callable[[Any], Any] | None = None,
    ):
        self._stage = stage
        self._name = name
        self._layout = layout
        self._open = open_
        self._inputs = inputs
        self._exported = exported

    def _next(self, cls: type, stage: Any) -> Any:
        return cls(stage, self._name, self._layout, self._open, self._inputs)

    def __getattr__(self, attribute: str) -> Any:
        return getattr(self._stage, attribute)

    def __repr__(self) -> str:
        return f"<{type(self).__name__.lower()} {self._name}>"


class Traced(_Stage):
    """A traced function: `.jaxpr`, `.lower()`."""

    def lower(self, **options: Any) -> Lowered:
        """Lower to the compiler's language."""
        if "_private_parameters" in options and self._exported is not None:
            # That is `jax.export`, which also reads the rest of the trace.
            self._stage = self._exported(self._stage.out_info.spec)
            return self._stage.lower(**options)
        return self._next(Lowered, self._stage.lower(**options))


class Lowered(_Stage):
    """A lowered function: `.as_text()`, `.cost_analysis()`, `.compile()`."""

    def compile(self, *args: Any, **options: Any) -> Compiled:
        """Compile; the result is called like the function."""
        return self._next(Compiled, self._stage.compile(*args, **options))


class Compiled(_Stage):
    """A compiled function, for modules of the structure and shapes that it was compiled for.

    It has `.cost_analysis()`, `.memory_analysis()` and `.as_text()`.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call = self._open(args, kwargs)
        if call.layout is not self._layout:
            raise StructureError(
                f"The compiled {self._name} was called with arguments of another structure than it "
                f"was compiled for: {call.layout.dagdef!r} for {self._layout.dagdef!r}. A compiled "
                f"function does not compile again; call .lower(...).compile() for these, or nnx.jit."
            )
        return close_call(call, self._stage(*self._inputs(call)))
