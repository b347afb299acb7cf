"""The shardings of `nnx.jit`, given by argument, by prefix, or by filter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import PartitionSpec

from nnx.sharding.placing import rules_for
from nnx.sharding.rules import ShardingError, current_mesh, resolve
from nnx.transforms.axes import along_output, assign, of_new
from nnx.transforms.call import Call
from nnx.transforms.layout import Layout
from nnx.transforms.result import NewValues, Packed, Spec
from refx.partition import Path, dotted

__all__: list[str] = []


class Shardings:
    """The `in_shardings` and `out_shardings`, and their meaning for the flat lists of a layout."""

    def __init__(self, name: str, inputs: Any, outputs: Any, *, bound: int):
        self._name = name
        self._bound = bound
        self._inputs = inputs
        self._outputs = outputs
        self.active = inputs is not None or outputs is not None

    def learn(self, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Give every value of a new layout its sharding; None leaves it to JAX."""
        inputs = self._inputs
        if self._bound and type(inputs) in (tuple, list):
            inputs = (*[None] * self._bound, *inputs)
        layout = call.layout
        specs = assign(
            call,
            args,
            kwargs,
            inputs,
            name=self._name,
            keyword=None,
            ambient=lambda path, ref: None,
        )
        paths = layout.dagdef.ref_paths, layout.dagdef.leaf_paths
        for at, values, names in zip(specs.values, call.values, paths):
            for i, (value, path) in enumerate(zip(values, names, strict=True)):
                where = f"{self._name}: the input {dotted(path[1:])!r}"
                at[i] = _said(at[i], value, where)
        layout.shardings = specs

    def of_output(self, layout: Layout) -> Callable[[Packed, NewValues], Packed] | None:
        """A function that notes, while tracing, where the new Refs in the output go."""
        if self._outputs is None:
            return None

        def finish(packed: Packed, outline: NewValues) -> Packed:
            graph = packed.spec.graph
            if graph is None:
                return packed
            refs = [self._of_new(path, ref, ref._value) for path, ref in outline.new]
            arrays = [self._of_new(path, x, x) for path, x in outline.arrays]
            layout.out_shardings = _spread(refs, packed.out[0]) + _spread(arrays, packed.out[1])
            chosen = {n for n, said in zip(graph.new(), refs, strict=True) if said is not None}
            graph = graph._replace(placed=graph.placed | chosen)
            return Packed(Spec(packed.spec.written, graph), packed.out, packed.written)

        return finish

    def _of_new(self, path: Path, cell: Any, value: Any) -> Any:
        # A path that starts in an argument is not in the output.
        if path[0] != "1":
            return None
        where = f"{self._name}: the output {dotted(path[1:])!r}"
        return _said(of_new(path[1:], cell, self._outputs, self._name), value, where)

    def options(self, layout: Layout, out: Packed) -> dict[str, Any]:
        """The arguments of `jax.jit`. A written value keeps the sharding that it came with."""
        specs = layout.shardings
        leaves, treedef = jax.tree.flatten(out.out)
        if out.spec.graph is None:
            outputs = along_output(out.out, self._outputs, self._name)
            where = f"{self._name}: an output"
            outputs = [_said(s, x, where) for s, x in zip(outputs, leaves, strict=True)]
        else:
            outputs = layout.out_shardings or [None] * len(leaves)
        # None is a leaf here, so we build the tree of shardings from the structure of the output.
        packed = Packed(
            out.spec,
            jax.tree.unflatten(treedef, outputs),
            [specs.values.refs[i] for i in out.spec.written],
        )
        inputs = layout.divided(specs.values)
        return {"in_shardings": inputs, "out_shardings": packed}


def _spread(said: list[Any], values: list[Any]) -> list[Any]:
    """Spread the sharding of each value over its arrays."""
    each: list[Any] = []
    for spec, value in zip(said, values, strict=True):
        treedef = jax.tree.structure(value)
        tree = jax.tree.structure(spec) == treedef
        each += treedef.flatten_up_to(spec) if tree else [spec] * treedef.num_leaves
    return each


def _said(spec: Any, value: Any, where: str) -> Any:
    """A sharding for `jax.jit`: resolve a spec in the mesh of `jax.set_mesh`, and check it."""
    names = isinstance(spec, tuple) and all(isinstance(x, str | tuple | None) for x in spec)
    if not (isinstance(spec, PartitionSpec) or names):
        return spec
    mesh = current_mesh()
    if mesh is None:
        if isinstance(spec, PartitionSpec):
            # JAX raises an error about the missing mesh.
            return spec
        raise ShardingError(
            f"{where} has the sharding {spec!r}, which needs a mesh. Make the call inside `with "
            f"jax.set_mesh(mesh):`, or use a NamedSharding."
        )
    rules = rules_for(None)
    return jax.tree.map(
        lambda x: resolve(spec, np.shape(x), mesh, rules, where, strict=True), value
    )
