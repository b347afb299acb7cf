"""Donation: let the compiled program reuse the buffers of Refs that a step overwrites."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax

from nnx.transforms.call import Call
from refx import DonationError, Filter, FilterError, to_predicate
from refx.buffers import CONCRETE, dead_error, is_dead
from refx.partition import dotted
from refx.selection import check_selection

__all__: list[str] = []


def selected(donate: Filter, call: Call, written: tuple[int, ...]) -> tuple[int, ...]:
    """The numbers of the Refs to donate: those that the filter selects and the function writes."""
    predicate = to_predicate(... if donate is True else donate)
    paths = call.layout.dagdef.ref_paths
    # The first part of a path is the number of the root.
    chosen = {i for i, ref in enumerate(call.refs) if predicate(paths[i][1:], ref)}
    if not chosen:
        if donate == "all":
            raise FilterError(
                "donate='all' selects a collection named 'all', and there is none here. To donate every "
                "Ref that the function writes, use donate=True."
            )
        check_selection(donate, *call.roots)
    return tuple(i for i in written if i in chosen)


def explain_donation(error: Exception, name: str, call: Call) -> None:
    """Raise our own error if JAX failed because a donated Ref shares its buffer."""
    text = str(error)
    if "donate" not in text or not call.layout.donated:
        return
    owner: dict[Any, tuple[int, str]] = {}
    donated = set(call.layout.donated)
    # The donated Refs come first, so that a clash with any other value is found too.
    values, arrays, arguments = call.values
    order = [*donated, *(i for i in range(len(values)) if i not in donated)]
    items = [(_name(call, i), values[i]) for i in order]
    items += [(f"array argument {k}", x) for k, x in enumerate([*arrays, *arguments])]
    for k, (what, value) in enumerate(items):
        for x in jax.tree.leaves(value):
            buffer = _buffer(x)
            if buffer is None:
                continue
            at, first = owner.setdefault(buffer, (k, what))
            if at != k:
                raise DonationError(
                    f"{name} should donate the buffer of {first}, but {what} is the same array. "
                    f"Nothing was changed. Give each its own array, as in x = jnp.copy(x), make "
                    f"the two one Ref with nnx.get_ref, or leave one out of donate=."
                ) from error


def explain_deleted(error: Exception, name: str, call: Call) -> None:
    """Raise our own error if JAX failed because the buffer of a Ref is gone."""
    if "deleted" in str(error) or "donated" in str(error):
        try:
            check_alive(name, call)
        except DonationError as explained:
            raise explained from error


def check_alive(
    name: str, call: Call, refs: Iterable[int] | None = None, leaves: Iterable[int | None] = ()
) -> None:
    """Raise if the buffer of a value is gone. Checks all values of a call, or only these Refs and arrays."""
    everything = refs is None
    values, arrays, arguments = call.values
    for i in range(len(values)) if refs is None else refs:
        if is_dead(values[i]):
            raise dead_error(f"{name} was called with {_name(call, i)}, whose buffer")
    for i in range(len(arrays)) if everything else leaves:
        if i is not None and is_dead(arrays[i]):
            path = dotted(call.layout.dagdef.leaf_paths[i][1:])
            raise dead_error(f"{name} was called with the array {path!r}, whose buffer")
    for i, x in enumerate(arguments if everything else ()):
        if is_dead(x):
            raise dead_error(f"{name} was called with array argument {i}, whose buffer")


def _name(call: Call, i: int) -> str:
    root, *path = call.layout.dagdef.ref_paths[i]
    owner = type(call.roots[int(root)]).__name__
    which = f" of the {owner} number {int(root) + 1} of the call" if len(call.roots) > 1 else ""
    return f"Ref {dotted(path)!r}{which}" if path else "a Ref"


def _buffer(x: Any) -> Any:
    if type(x) not in CONCRETE or x.is_deleted():
        return None
    try:
        return x.unsafe_buffer_pointer()
    except Exception:
        return id(x)
