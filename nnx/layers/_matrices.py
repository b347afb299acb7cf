"""Views the weight of a layer as a matrix, from its inputs to its outputs."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax

from nnx.layers.conv import Conv
from nnx.layers.embedding import Embed
from nnx.layers.linear import Linear
from nnx.layers.linear_general import Einsum, LinearGeneral

__all__ = ["Matrix", "matrix_of"]


class Matrix(NamedTuple):
    """The roles of a weight's axes, as a matrix or as one matrix for each index of a batch."""

    name: str
    shape: tuple[int, ...]
    batch: tuple[int, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]

    def sizes(self, axes: tuple[int, ...]) -> tuple[int, ...]:
        """The sizes of these axes."""
        return tuple(self.shape[axis] for axis in axes)

    def weight(self, matrix: jax.Array) -> jax.Array:
        """Turn a matrix `(*stack, *batch, in, out)` back into an array with the axes of the weight."""
        order = (*self.batch, *self.inputs, *self.outputs)
        stacked = matrix.ndim - len(self.batch) - 2
        x = matrix.reshape(*matrix.shape[:stacked], *self.sizes(order))
        back = sorted(range(len(order)), key=order.__getitem__)
        return x.transpose(*range(stacked), *(stacked + axis for axis in back))


def matrix_of(layer: Any) -> Matrix:
    """View the weight of a layer as a matrix.

    Raises:
      ValueError: the equation of an Einsum does not use its kernel as a matrix.
    """
    if isinstance(layer, Einsum):
        return _of_einsum(layer)
    if isinstance(layer, Embed):
        return _blocks("embedding", (), (layer.num_embeddings,), (layer.features,))
    if isinstance(layer, Conv):
        *window, outputs = layer.kernel_shape
        return _blocks("kernel", (), tuple(window), (outputs,))
    if isinstance(layer, LinearGeneral):
        batch = tuple(layer.batch_axis[i] for i in range(len(layer.batch_axis)))
        return _blocks("kernel", batch, layer.in_features, layer.out_features)
    assert isinstance(layer, Linear)
    return _blocks("kernel", (), (layer.in_features,), (layer.out_features,))


def _blocks(
    name: str, batch: tuple[int, ...], inputs: tuple[int, ...], outputs: tuple[int, ...]
) -> Matrix:
    """A weight whose axes come in this order."""
    first, last = len(batch), len(batch) + len(inputs)
    axes = tuple(range(last + len(outputs)))
    return Matrix(name, (*batch, *inputs, *outputs), axes[:first], axes[first:last], axes[last:])


def _of_einsum(layer: Einsum) -> Matrix:
    left, right, result = layer._parse(layer.einsum_str)
    apart = set(right) - set(left) - set(result)
    if "..." in right or len(set(right)) < len(right) or apart:
        raise ValueError(
            f"The kernel of Einsum {layer.einsum_str!r} is not a matrix: it has "
            f"{'an ellipsis' if '...' in right else 'an axis summed alone' if apart else 'a diagonal'}. "
            f"A low-rank adapter needs a kernel whose axes differ, each one from the input or the output."
        )
    batch, inputs, outputs = (
        tuple(i for i, label in enumerate(right) if (label in left, label in result) == where)
        for where in ((True, True), (True, False), (False, True))
    )
    return Matrix("kernel", layer.kernel_shape, batch, inputs, outputs)
