"""The ahead-of-time stages of `nnx.jit` and `nnx.jit_filter`: traced, lowered, compiled, as on `jax.jit`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax

from nnx.transforms.layout import Layout
from refx import StructureError

__all__: list[str] = []

# For a type checker they are stages of JAX, which `jax.export` requires.
if TYPE_CHECKING:
    _Traced, _Lowered, _Compiled = jax.stages.Traced, jax.stages.Lowered, jax.stages.Compiled
else:
    _Traced = _Lowered = _Compiled = object


class _Stage:
    """A stage of JAX, with all its attributes, for a function of modules.

    `finished` calls the compiled program with the user's arguments. `exported` returns the trace for
    `jax.export` to write.
    """

    def __init__(
        self,
        stage: Any,
        name: str,
        finished: Callable[[Any, Any, Any], Any],
        exported: Callable[[Any], Any] | None = None,
    ):
        self._stage = stage
        self._name = name
        self._finished = finished
        self._exported = exported

    def _next(self, cls: Any, stage: Any) -> Any:
        return cls(stage, self._name, self._finished)

    def __getattr__(self, attribute: str) -> Any:
        return getattr(self._stage, attribute)

    def __repr__(self) -> str:
        return f"<{type(self).__name__.lower()} {self._name}>"


class Traced(_Stage, _Traced):
    """A traced function. It has `.jaxpr` and `.lower()`."""

    def lower(self, **options: Any) -> Lowered:
        """Lower to the compiler's language."""
        if "_private_parameters" in options and self._exported is not None:
            # The caller is `jax.export`, which also reads the rest of the trace.
            self._stage = self._exported(self._stage.out_info.spec)
            return self._stage.lower(**options)
        return self._next(Lowered, self._stage.lower(**options))


class Lowered(_Stage, _Lowered):
    """A lowered function. It has `.as_text()`, `.cost_analysis()` and `.compile()`."""

    def compile(self, *args: Any, **options: Any) -> Compiled:
        """Compile it. The result takes the arguments of the function."""
        return self._next(Compiled, self._stage.compile(*args, **options))


class Compiled(_Stage, _Compiled):
    """A compiled function, for modules of the structure and shapes that it was compiled for.

    It has `.cost_analysis()`, `.memory_analysis()` and `.as_text()`.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._finished(self._stage, args, kwargs)


def other_structure(name: str, was: Layout, new: Layout) -> StructureError:
    """The error for a call of a compiled function that does not match what it was compiled for."""
    how = "arguments of another structure than it was compiled for"
    if new is was:
        how = "other static values than it was compiled for"
    elif new.dagdef is not was.dagdef:
        how = f"{how}: {new.dagdef!r} for {was.dagdef!r}"
    return StructureError(
        f"The compiled {name} was called with {how}. A compiled function does not compile again: call "
        f".lower(...).compile() with these arguments, or call the function itself."
    )
