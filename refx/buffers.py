"""Arrays whose buffer is gone, because it was donated to a compiled program or deleted."""

from __future__ import annotations

from typing import Any

import jax

from refx.errors import DonationError

__all__: list[str] = []

CONCRETE = frozenset(jax.Array.__subclasses__())
"""The classes of arrays that have a buffer. A tracer is not an instance of any of them."""


def is_dead(value: Any) -> bool:
    """Whether a value is or holds an array whose buffer is gone."""
    if type(value) in CONCRETE:
        return value.is_deleted()
    if isinstance(value, (int, float, str, type(None))):
        return False
    return any(type(x) in CONCRETE and x.is_deleted() for x in jax.tree.leaves(value))


def dead_error(start: str) -> DonationError:
    """The error for an array whose buffer is gone.

    `start` begins the sentence, as in `"Ref 'w' was read, but its buffer"`.
    """
    return DonationError(
        f"{start} is gone: it was donated to a step (donate=) that wrote another Ref with the same "
        f"array, or that failed while it ran. Before a donating step, give each model its own arrays, "
        f"with clone(model, copy=True) or jnp.copy. After a failed step, load the last checkpoint."
    )
