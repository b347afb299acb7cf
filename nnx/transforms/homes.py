"""A compiled step leaves each value where it is: a written value goes back where the old one was.

XLA may place an output elsewhere than the input that it replaces, and then the next call would compile
again. So where a process has several devices, the layout of a call includes the places of its inputs.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec

from nnx.sharding.placing import place
from nnx.sharding.putting import move
from nnx.sharding.rules import canonical
from nnx.transforms.call import Call
from nnx.transforms.layout import Layout
from refx.buffers import CONCRETE

__all__: list[str] = []

# How many sets of places are remembered for one structure.
_MOST = 32


def at_home(call: Call) -> Layout:
    """The layout of a call for the current places of its values."""
    layout = call.layout
    places = [v.sharding if type(v) in CONCRETE else None for v in call.values.refs]
    # Outputs of one program share their sharding objects, so this compares identities.
    for known, moved, loose in layout.elsewhere:
        if known == places:
            call.loose = loose
            return moved
    homes = tuple(
        canonical(s) if type(s) is NamedSharding and s.mesh.size > 1 else None for s in places
    )
    loose: tuple[int, ...] = ()
    if not any(homes):
        moved = layout
    else:
        if jax.process_count() == 1:
            loose = tuple(
                i for i, v in enumerate(call.values.refs) if not homes[i] and _is_loose(v)
            )
        whole = NamedSharding(next(filter(None, homes)).mesh, PartitionSpec())
        homes = tuple(whole if i in loose else home for i, home in enumerate(homes))
        same = (x for _, x, _ in layout.elsewhere if x.homes == homes)
        moved = next(same, None) or layout.moved(homes)
    if len(layout.elsewhere) >= _MOST:
        layout.elsewhere.clear()
    layout.elsewhere.append((places, moved, loose))
    call.loose = loose
    return moved


def _is_loose(value: Any) -> bool:
    """Whether a value has no chosen place, like a counter that was made outside a mesh."""
    number = type(value) in (np.ndarray, bool, int, float, complex)
    return number or (type(value) in CONCRETE and not value.committed)


def settle(call: Call) -> None:
    """Move the values without a chosen place that the program writes to where it will return them.

    The program returns them on all devices of the others. If they came in on one device, the next call
    would need another program.
    """
    layout, homes = call.layout, call.layout.homes
    assert homes is not None
    for i in call.loose:
        if i in layout.written and not _is_said(layout, i):
            call.values.refs[i] = move(call.values.refs[i], homes[i])
    call.loose = ()


def kept(
    layout: Layout, written: tuple[int, ...], values: list[Any], placed: set[int]
) -> list[Any]:
    """The written values, each in the place of the value that it replaces.

    `placed` has the numbers of the values that the body put elsewhere on purpose.
    """
    homes = layout.homes
    if homes is None:
        return values
    return [
        value if i in placed or _is_said(layout, i) else _home(homes[i], value)
        for i, value in zip(written, values, strict=True)
    ]


def _is_said(layout: Layout, i: int) -> bool:
    """Whether the `in_shardings` of a compiled function say where a Ref is."""
    return layout.shardings is not None and layout.shardings.values.refs[i] is not None


def _home(home: NamedSharding | None, value: Any) -> Any:
    if home is None or not isinstance(value, Tracer) or len(home.spec) > value.ndim:
        return value
    try:
        home.shard_shape(value.shape)
    except ValueError:
        # It has a new shape, which cannot be divided in this way.
        return value
    return place(value, home)
