"""Random streams at a boundary: find the Refs of a call that count the keys of a stream."""

from __future__ import annotations

from nnx.rng import RngStream
from refx.dagdef import DagDef, NodeDef, ref_numbers

__all__: list[str] = []


def counts(dagdef: DagDef) -> tuple[int, ...]:
    """The numbers of the Refs that count the keys drawn from a stream."""
    refs = ref_numbers(dagdef)
    number = {n: i for i, n in enumerate(refs)}
    found = [
        dict(zip(node.names, node.children, strict=True))["count"]
        for node in dagdef.nodes
        if type(node) is NodeDef and issubclass(node.kind, RngStream)
    ]
    return tuple(sorted({number[n] for n in found if n in number}))
