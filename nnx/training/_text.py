"""An optax transformation as text. Optax does not keep names, but its functions have names."""

from __future__ import annotations

from typing import Any

__all__: list[str] = []

_MOST = 8


def transformation_text(tx: Any) -> str:
    """The optax functions that made a transformation: `scale_by_adam, scale`."""
    parts: list[str] = []
    _add(getattr(tx, "update", None), parts)
    return ", ".join([*parts[:_MOST], *(["…"] if len(parts) > _MOST else [])])


def _add(update: Any, parts: list[str]) -> None:
    name = getattr(update, "__qualname__", type(update).__name__).partition(".<locals>")[0]
    cells = [cell.cell_contents for cell in getattr(update, "__closure__", None) or ()]
    inner: list[Any] = []
    if name == "chain":
        inner = next((list(x) for x in cells if isinstance(x, tuple | list)), [])
    elif name == "with_extra_args_support":
        inner = [x.update for x in cells if hasattr(x, "update")]
    if not inner:
        parts.append(name)
    for fn in inner:
        _add(fn, parts)
