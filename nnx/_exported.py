"""Exported programs whose arguments or results are modules can be written to files.

`jax.export` writes the structure of arguments and results, and asks each class of pytrees how its part
is written. That of a module is written as `nnx.save` writes it: names and numbers, and never code.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator

import jax
import jax.export
import numpy as np

from refx import DagDef, Node
from refx.build import build
from refx.dagdef import intern
from refx.node import on_subclass
from refx.pytree import unflatten
from refx.snapshot import snapshot

__all__: list[str] = []


class _OneName(str):
    """A name that every class of modules is written under.

    JAX finds a class by the name alone, and in a notebook two classes have one. The structure says
    itself which class it is of, so the name need not. What JAX knows already is not equal to it.
    """

    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        return self is other

    def __ne__(self, other: object) -> bool:
        return self is not other

    def __hash__(self) -> int:
        return id(self)


def _to_bytes(dagdef: DagDef) -> bytes:
    encode = importlib.import_module("nnx.serialize.encode").encode
    errors = importlib.import_module("nnx.serialize.errors")
    values = [np.zeros(()) for _ in dagdef.paths]
    tree, _ = build(dagdef, values, values[len(dagdef.ref_paths) :])
    frozen = [i for i, node in enumerate(dagdef.nodes) if node.frozen]
    try:
        written = {"structure": encode(tree).structure, "frozen": frozen}
    except errors.SaveError as error:
        raise errors.SaveError(
            f"{str(error).partition(', or save the values alone')[0].rstrip('.')}. Or give the exported "
            f"program the values in place of the module: dagdef, values = nnx.split(model), then "
            f"jax.export.export(jax.jit(lambda values, x: nnx.merge(dagdef, values)(x)))(values, x)."
        ) from error
    return json.dumps(written, separators=(",", ":")).encode()


def _from_bytes(data: bytes) -> DagDef:
    # They are loaded when a program is read or written first, so that an import of nnx is quick.
    importlib.import_module("nnx.serialize")
    decode = importlib.import_module("nnx.serialize.decode")
    grammar = importlib.import_module("nnx.serialize.grammar")
    errors = importlib.import_module("nnx.serialize.errors")

    def read() -> DagDef:
        written = grammar.parse(data)
        structure, frozen = written["structure"], set(written["frozen"])
        names = grammar.check(structure).arrays
        tree = decode.decode(structure, names, lambda name, code: np.zeros(()))
        dagdef = snapshot(tree).dagdef
        nodes = [n._replace(frozen=i in frozen) for i, n in enumerate(dagdef.nodes)]
        return intern(dagdef.root, tuple(nodes))

    try:
        return decode.guarded(read)
    except errors.LoadError as error:
        raise errors.LoadError(
            f"A module in an exported program cannot be read: {error}."
        ) from error


def _register(cls: type[Node]) -> None:
    jax.export.register_pytree_node_serialization(
        cls,
        serialized_name=_OneName(_NAME),
        serialize_auxdata=_to_bytes,
        deserialize_auxdata=_from_bytes,
    )


_NAME = "nnx.Module"
# This one is found when a program is read, whatever the class.
jax.export.register_pytree_node_serialization(
    Node,
    serialized_name=_NAME,
    serialize_auxdata=_to_bytes,
    deserialize_auxdata=_from_bytes,
    from_children=lambda aux_data, children: unflatten(aux_data, children),
)
jax.export.register_pytree_node_serialization(
    DagDef,
    serialized_name="nnx.DagDef",
    serialize_auxdata=_to_bytes,
    deserialize_auxdata=_from_bytes,
)
on_subclass.append(_register)


def _subclasses(cls: type) -> Iterator[type]:
    for sub in type.__subclasses__(cls):
        yield sub
        yield from _subclasses(sub)


for _cls in dict.fromkeys(_subclasses(Node)):
    _register(_cls)
