"""Lets exported programs whose arguments or results are modules be written to files.

`jax.export` writes the structure of arguments and results, and asks each pytree class how to write its
part. The structure of a module is written as `nnx.save` writes it: names and numbers, never code.
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
    """A single name for all module classes in exported files.

    JAX finds a class only by its name, but in a notebook two classes may have the same name. The written
    structure itself says which class it has, so the name need not. Names that JAX already knows do not
    equal this one.
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
            f"{str(error).partition(' Or save only the values')[0].rstrip('.')}. Or pass the values to "
            f"the exported program instead of the module: dagdef, values = nnx.split(model), then "
            f"jax.export.export(jax.jit(lambda values, x: nnx.merge(dagdef, values)(x)))(values, x)."
        ) from error
    return json.dumps(written, separators=(",", ":")).encode()


def _from_bytes(data: bytes) -> DagDef:
    # Imported when the first program is read or written, so that `import nnx` is quick.
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
# When a program is read, JAX finds this class by name, whatever class was written.
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
