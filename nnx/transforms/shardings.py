"""The shardings of `nnx.jit`, said by argument, by prefix, or by filter."""

from __future__ import annotations

from typing import Any

import jax

from nnx.transforms.axes import AxisError, along_output, assign
from nnx.transforms.call import Call
from nnx.transforms.layout import Layout
from nnx.transforms.result import Packed

__all__: list[str] = []


class Shardings:
    """What was said of shardings, and what it means for the flat lists of one layout."""

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
        call.layout.shardings = assign(
            call,
            args,
            kwargs,
            inputs,
            name=self._name,
            keyword=None,
            ambient=lambda path, ref: None,
        )

    def options(self, layout: Layout, out: Packed) -> dict[str, Any]:
        """The arguments of `jax.jit`; what is written keeps the sharding it came with."""
        specs = layout.shardings
        if out.spec.graph is not None and self._outputs is not None:
            raise AxisError(
                f"{self._name} returns new modules or Refs, for which out_shardings cannot be "
                f"said. Use jax.lax.with_sharding_constraint inside, or return arrays."
            )
        leaves = jax.tree.leaves(out.out)
        outputs = [None] * len(leaves)
        if out.spec.graph is None:
            outputs = along_output(out.out, self._outputs, self._name)
        # None is a leaf here, so the tree of shardings is made from the output's own structure.
        packed = Packed(
            out.spec,
            jax.tree.unflatten(jax.tree.structure(out.out), outputs),
            [specs.values.refs[i] for i in out.spec.written],
        )
        inputs = layout.divided(specs.values)
        return {"in_shardings": inputs, "out_shardings": packed}
