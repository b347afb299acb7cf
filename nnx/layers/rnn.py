"""Recurrent networks: a cell that runs along a sequence, in one direction or in both."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from nnx.layers._cell import RNNCellBase
from nnx.layers._common import as_array, shape_error
from nnx.layers._numerics import is_half, wide
from nnx.layers._sharding import gathered, placed_as
from nnx.layers._stand_in import call_with
from nnx.module import Module
from nnx.scope import MissingStreamError, make_rng, scope
from nnx.transforms import CARRY, scan
from refx import Filter, refs

__all__ = ["RNN", "Bidirectional", "flip_sequences"]


def _concatenate(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.concatenate([a, b], axis=-1)


class RNN(Module):
    """A recurrent network: a cell that `nnx.scan` runs along a sequence.

    The loop carries the Refs that the cell writes from step to step, and random streams advance. So
    cells with batch statistics or dropout work. The carry keeps its initial dtype. In half precision,
    the cells of this library add up the steps in float32.

    Args:
      cell: an `RNNCellBase`, or any module with its methods.
      time_major: whether the time axis of inputs and outputs is the first; otherwise it is the last
        one before the features.
      return_carry: whether to return the final carry too.
      reverse: whether to go through the sequence backwards.
      keep_order: with `reverse`, whether to return the outputs in the order of the inputs; otherwise
        they are in the order of the computation.
      unroll: number of steps in one iteration of the loop, as for `jax.lax.scan`.
      state_axes: a dict from filter to `nnx.CARRY` or 0, like `axes` of `nnx.scan`. 0 means that the
        Refs have a value for each step, along their leading axis. All others are carried.
      broadcast_rngs: names of random streams that give the same keys in every step, such as
        `"dropout"` for the same mask in every step.

    Attributes: `cell`.

    >>> import jax, jax.numpy as jnp, nnx
    >>> with nnx.scope(jax.random.key(0)):
    ...     rnn = nnx.RNN(nnx.LSTMCell(3, 4), return_carry=True)
    >>> x = jnp.ones((2, 7, 3))
    >>> carry, y = rnn(x, seq_lengths=jnp.array([7, 5]))
    >>> y.shape, bool((carry[1][1] == y[1, 4]).all())
    ((2, 7, 4), True)
    """

    def __init__(
        self,
        cell: RNNCellBase,
        *,
        time_major: bool = False,
        return_carry: bool = False,
        reverse: bool = False,
        keep_order: bool = False,
        unroll: int = 1,
        state_axes: dict[Filter, Any] | None = None,
        broadcast_rngs: str | Sequence[str] = (),
    ):
        if isinstance(cell, type):
            raise TypeError(
                f"RNN takes a cell, but got the class {cell.__name__}. Make one: "
                f"RNN({cell.__name__}(in_features, hidden_features))."
            )
        self.cell = cell
        self.time_major = time_major
        self.return_carry = return_carry
        self.reverse = reverse
        self.keep_order = keep_order
        self.unroll = unroll
        # Store pairs: the keys of a dict attribute become names in paths, and filters are not
        # names.
        self.state_axes = tuple((state_axes or {}).items())
        given = broadcast_rngs
        self.broadcast_rngs = (given,) if isinstance(given, str) else tuple(given)

    def __call__(
        self,
        inputs: jax.Array,
        *,
        initial_carry: Any = None,
        seq_lengths: jax.Array | None = None,
        return_carry: bool | None = None,
        time_major: bool | None = None,
        reverse: bool | None = None,
        keep_order: bool | None = None,
    ) -> Any:
        """Run the cell along the time axis.

        Args:
          inputs: of shape `(*batch, time, *features)`, or `(time, *batch, *features)`.
          initial_carry: the carry before the first step; by default from the cell's `initialize_carry`.
          seq_lengths: integers of shape `(*batch,)`: how many steps of each sequence are valid. The rest
            is padding at the end. The final carry is the one after the last valid step, and
            reversing leaves the padding at the end.
          return_carry, time_major, reverse, keep_order: override the attributes.

        Returns:
          The outputs, with the time axis where the inputs have it; with `return_carry`, the final
          carry and the outputs.

        Raises:
          ValueError: too few axes, or `seq_lengths` has the wrong shape; the message has both shapes.
          CarryError: the cell changes the shape or structure of its carry.
        """
        return_carry = self.return_carry if return_carry is None else return_carry
        time_major = self.time_major if time_major is None else time_major
        reverse = self.reverse if reverse is None else reverse
        keep_order = self.keep_order if keep_order is None else keep_order
        inputs = as_array(self, inputs)
        batch_axes = inputs.ndim - self.cell.num_feature_axes - 1
        if batch_axes < 0:
            expected = "(time, *batch, *features)" if time_major else "(*batch, time, *features)"
            raise shape_error(self, "inputs", expected, inputs.shape)
        time_axis = 0 if time_major else batch_axes
        xs = jnp.moveaxis(inputs, time_axis, 0)
        batch = xs.shape[1 : 1 + batch_axes]
        if seq_lengths is not None and jnp.shape(seq_lengths) != batch:
            raise shape_error(self, "seq_lengths", f"{batch}", jnp.shape(seq_lengths))
        if reverse:
            xs = flip_sequences(xs, seq_lengths, batch_axes, True)
        first = initial_carry
        if first is None:
            first = self.cell.initialize_carry(xs.shape[1:])
        xs = gathered(xs, [0])
        first = jax.tree.map(lambda carry: placed_as(carry, xs, batch_axes, start=1), first)
        carry, ys = self._run(first, xs, seq_lengths if return_carry else None)
        outputs = jax.tree.map(lambda y: jnp.moveaxis(y, 0, time_axis), ys)
        if reverse and keep_order:
            outputs = jax.tree.map(
                lambda y: flip_sequences(y, seq_lengths, batch_axes, time_major), outputs
            )
        return (carry, outputs) if return_carry else outputs

    def _run(self, first: Any, xs: jax.Array, seq_lengths: Any) -> tuple[Any, Any]:
        """The final carry, after the last valid step if there are lengths, and the outputs."""
        keys: dict[str, jax.Array] = {}
        for name in self.broadcast_rngs:
            # If there is no stream, the cell may not need one.
            with contextlib.suppress(MissingStreamError):
                keys[name] = make_rng(name)

        def step(state: Any, sliced: Any) -> Any:
            (carry, last), (cell, t, x) = state, sliced
            with scope(keys) if keys else contextlib.nullcontext():
                if weights:
                    own = {path: w.astype(dtypes[path]) for path, w in weights.items()}
                    new, y = call_with(cell, own, "with parameters in float32", (carry, x), {})
                else:
                    new, y = cell(carry, x)
            # Leave a carry that does not fit unchanged: nnx.scan raises the error.
            if _shapes(new) == _shapes(carry):
                new = jax.tree.map(_as_before, new, carry)
                if seq_lengths is not None:
                    valid = t < jnp.asarray(seq_lengths)
                    last = jax.tree.map(lambda a, b: jnp.where(_along(valid, a), a, b), new, last)
            return (new, last), y

        dtypes: dict[Any, Any] = {}
        weights: dict[Any, jax.Array] = {}
        given = first
        if getattr(self.cell, "sums_in_float32", False):
            # The loop adds up steps and gradients in the dtypes of its carry and its closed-over values.
            first = jax.tree.map(_widened, first)
            for path, cell in refs(self.cell).items():
                if cell.collection == "params" and _is_half(cell.value):
                    dtypes[path], weights[path] = cell.value.dtype, _widened(cell.value)
        times = jnp.arange(xs.shape[0])
        (carry, last), ys = scan(
            step,
            (first, None if seq_lengths is None else first),
            (self.cell, times, xs),
            unroll=self.unroll,
            axes={**dict(self.state_axes), ...: CARRY},
        )
        final = carry if seq_lengths is None else last
        return jax.tree.map(_as_before, final, given), ys


class Bidirectional(Module):
    """Runs two recurrent networks over a sequence, forwards and backwards, and merges their outputs.

    Args:
      forward_rnn, backward_rnn: two `RNN`s, or modules that take the same arguments. Pass the same
        one twice to share its parameters.
      merge_fn: a function of the two outputs; by default it concatenates them along the last axis.
      time_major, return_carry: as for `RNN`; they override the attributes of the two.
      reverse, keep_order: as for `RNN`. With `reverse`, the forward network starts at the end of the
        sequence; with `keep_order`, the outputs are still in the order of the inputs.

    Attributes: `forward_rnn` and `backward_rnn`.

    >>> import jax, jax.numpy as jnp, nnx
    >>> with nnx.scope(jax.random.key(0)):
    ...     both = nnx.Bidirectional(nnx.RNN(nnx.GRUCell(3, 4)), nnx.RNN(nnx.GRUCell(3, 4)))
    >>> both(jnp.ones((2, 7, 3))).shape
    (2, 7, 8)
    """

    def __init__(
        self,
        forward_rnn: Callable[..., Any],
        backward_rnn: Callable[..., Any],
        *,
        merge_fn: Callable[[Any, Any], Any] = _concatenate,
        time_major: bool = False,
        return_carry: bool = False,
        reverse: bool = False,
        keep_order: bool = False,
    ):
        self.forward_rnn = forward_rnn
        self.backward_rnn = backward_rnn
        self.merge_fn = merge_fn
        self.time_major = time_major
        self.return_carry = return_carry
        self.reverse = reverse
        self.keep_order = keep_order

    def __call__(
        self,
        inputs: jax.Array,
        *,
        initial_carry: tuple[Any, Any] | None = None,
        seq_lengths: jax.Array | None = None,
        return_carry: bool | None = None,
        time_major: bool | None = None,
        reverse: bool | None = None,
        keep_order: bool | None = None,
    ) -> Any:
        """Run both; arguments and errors as for a call of `RNN`.

        Args:
          initial_carry: the two carries, first forwards, then backwards.

        Returns:
          The merged outputs, in the order of the inputs unless `reverse` is set without
          `keep_order`; with `return_carry`, the two final carries and the outputs.
        """
        return_carry = self.return_carry if return_carry is None else return_carry
        time_major = self.time_major if time_major is None else time_major
        reverse = self.reverse if reverse is None else reverse
        keep_order = self.keep_order if keep_order is None else keep_order
        options: dict[str, Any] = {
            "seq_lengths": seq_lengths,
            "time_major": time_major,
            "return_carry": True,
        }
        features = getattr(getattr(self.forward_rnn, "cell", None), "num_feature_axes", 1)
        axes = jnp.ndim(inputs) - 1 - features
        if reverse:
            inputs = as_array(self, inputs)
            inputs = flip_sequences(inputs, seq_lengths, axes, time_major)
        ahead, back = (None, None) if initial_carry is None else initial_carry
        ahead, y = self.forward_rnn(inputs, initial_carry=ahead, reverse=False, **options)
        back, z = self.backward_rnn(
            inputs, initial_carry=back, reverse=True, keep_order=True, **options
        )
        outputs = jax.tree.map(self.merge_fn, y, z)
        if reverse and keep_order:
            outputs = jax.tree.map(
                lambda y: flip_sequences(y, seq_lengths, axes, time_major), outputs
            )
        return ((ahead, back), outputs) if return_carry else outputs


def flip_sequences(
    inputs: jax.Array, seq_lengths: jax.Array | None, num_batch_dims: int, time_major: bool
) -> jax.Array:
    """Reverse sequences along the time axis, and leave the padding at the end.

    Args:
      inputs: of shape `(*batch, time, ...)`, or `(time, *batch, ...)` with `time_major`.
      seq_lengths: integers of shape `(*batch,)`: how many steps of each sequence are not padding; by
        default, all. The padding is reversed separately.
      num_batch_dims: number of batch axes.
      time_major: whether the time axis is the first.

    >>> import jax.numpy as jnp, nnx
    >>> x = jnp.array([[1, 0, 0], [2, 3, 0], [4, 5, 6]])
    >>> nnx.flip_sequences(x, jnp.array([1, 2, 3]), 1, False).tolist()
    [[1, 0, 0], [3, 2, 0], [6, 5, 4]]
    """
    time_axis = 0 if time_major else num_batch_dims
    if seq_lengths is None:
        return jnp.flip(inputs, time_axis)
    steps = inputs.shape[time_axis]
    lengths = jnp.expand_dims(jnp.asarray(seq_lengths), time_axis)
    backwards = jnp.arange(steps - 1, -1, -1)
    backwards = backwards.reshape([steps if i == time_axis else 1 for i in range(lengths.ndim)])
    # Modulo the length of the axis, the first indices point into the valid part.
    places = _along((backwards + lengths) % steps, inputs)
    return jnp.take_along_axis(inputs, places, axis=time_axis)


def _along(flags: jax.Array, array: jax.Array) -> jax.Array:
    """`flags` with axes of size 1 at the end, so that they broadcast along the first axes of `array`."""
    return flags.reshape(*flags.shape, *(1,) * (jnp.ndim(array) - flags.ndim))


def _is_half(x: Any) -> bool:
    return is_half(jnp.result_type(x))


def _widened(x: Any) -> Any:
    return jnp.asarray(x, wide(jnp.result_type(x))) if _is_half(x) else x


def _shapes(tree: Any) -> Any:
    return jax.tree.map(jnp.shape, tree), jax.tree.structure(tree)


def _as_before(new: Any, old: Any) -> Any:
    """`new` in the dtype of the old carry, if both are real, because mixed precision may change it."""
    kinds = jnp.result_type(new), jnp.result_type(old)
    if all(jnp.issubdtype(kind, jnp.floating) for kind in kinds):
        return jnp.asarray(new, kinds[1])
    return new
