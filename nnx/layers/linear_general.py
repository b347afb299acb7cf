"""Dense layers over any axes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from nnx.fields import param, static
from nnx.layers._common import (
    Dtype,
    Initializer,
    Metadata,
    as_array,
    check_parameters,
    default_kernel_init,
    new_ref,
    ones,
    promote_dtype,
    shape_error,
    zeros,
)
from nnx.layers._numerics import add_bias, is_half, wide
from nnx.layers._out_sharding import OutSharding, explain_sharding, wanted_sharding
from nnx.layers._sharding import fitted
from nnx.module import Module

__all__ = ["Einsum", "LinearGeneral"]


class LinearGeneral(Module):
    """A dense layer from some axes of the input to new last axes of the output.

    `LinearGeneral((2, 3), (4, 5), axis=(-2, -1))` is `Linear(6, 20)` on the last two axes, flattened,
    with the result in two axes again.

    Args:
      in_features: sizes of the input along the axes `axis`, in the order of the axes in the input.
      out_features: sizes of the new axes, which come last in the output.
      axis: the axes of the input to sum over. Their order does not matter.
      batch_axis: a mapping from leading axes 0, 1, ... of the input to their sizes. Each index along
        them has its own weights.
      use_bias: whether to add a bias; if not, `bias` is None.
      dtype, param_dtype, precision, promote_dtype, preferred_element_type, kernel_metadata,
        bias_metadata: as for `Linear`.
      kernel_init, bias_init: initializers, called with a key, the shape of the parameter flattened
        to `(inputs, outputs)` or `(outputs,)`, and a dtype.
      dot_general: a function to use instead of `jax.lax.dot_general`.
      dot_general_cls: returns such a function; called without arguments at every call of the layer.

    Attributes: `kernel` of shape `(*batch sizes, *in_features, *out_features)` and `bias` of shape
    `(*batch sizes, *out_features)`, both in the collection `"params"`. The attributes
    `in_features`, `out_features` and `axis` are tuples.

    Raises:
      ValueError: the numbers of axes and sizes differ; or the batch axes are not the leading ones.
      MissingStreamError: made outside a scope with a `"params"` stream.

    >>> import jax, jax.numpy as jnp, nnx
    >>> layer = nnx.LinearGeneral.init(jax.random.key(0))((2, 3), (4, 5), axis=(1, -1))
    >>> layer.kernel.shape, layer(jnp.ones((16, 2, 3))).shape
    ((2, 3, 4, 5), (16, 4, 5))
    """

    kernel: jax.Array = param()
    bias: jax.Array | None = param()
    in_features: tuple[int, ...] = static()
    out_features: tuple[int, ...] = static()
    axis: tuple[int, ...] = static()

    def __init__(
        self,
        in_features: int | Sequence[int],
        out_features: int | Sequence[int],
        *,
        axis: int | Sequence[int] = -1,
        batch_axis: Mapping[int, int] = {},
        use_bias: bool = True,
        dtype: Dtype = None,
        param_dtype: Dtype = jnp.float32,
        kernel_init: Initializer = default_kernel_init,
        bias_init: Initializer = zeros,
        precision: Any = None,
        promote_dtype: Callable[..., Any] = promote_dtype,
        dot_general: Callable[..., jax.Array] | None = None,
        dot_general_cls: Callable[[], Callable[..., jax.Array]] | None = None,
        preferred_element_type: Dtype = None,
        kernel_metadata: Metadata = {},  # noqa: B006
        bias_metadata: Metadata = {},  # noqa: B006
    ):
        inputs, outputs, axes = _tuple(in_features), _tuple(out_features), _tuple(axis)
        if len(inputs) != len(axes):
            raise ValueError(
                f"{type(self).__name__} needs a size for each axis, but got in_features {inputs} for the "
                f"axes {axes}."
            )
        if sorted(batch_axis) != list(range(len(batch_axis))):
            raise ValueError(
                f"The batch axes of {type(self).__name__} must be the leading ones, 0, 1, ..., but "
                f"batch_axis has {tuple(batch_axis)}."
            )
        batch = tuple(batch_axis[i] for i in range(len(batch_axis)))
        # Initializers treat the last two axes as fan-in and fan-out.
        flat = (math.prod(batch) * math.prod(inputs), math.prod(outputs))
        self.kernel = new_ref(  # pyright: ignore[reportAttributeAccessIssue]
            _flattened(kernel_init, flat), (*batch, *inputs, *outputs), param_dtype, kernel_metadata
        )
        flat = (math.prod(batch) * math.prod(outputs),)
        self.bias = (  # pyright: ignore[reportAttributeAccessIssue]
            new_ref(_flattened(bias_init, flat), (*batch, *outputs), param_dtype, bias_metadata)
            if use_bias
            else None
        )
        self.in_features = inputs
        self.out_features = outputs
        self.axis = axes
        self.batch_axis = dict(batch_axis)
        self.use_bias = use_bias
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.precision = precision
        self.promote_dtype = promote_dtype
        self.dot_general = dot_general
        self.dot_general_cls = dot_general_cls
        self.preferred_element_type = preferred_element_type

    def __call__(self, x: jax.Array, out_sharding: OutSharding = None) -> jax.Array:
        """Apply the layer; the output has the batch axes, the other axes and `out_features`.

        Args:
          x: the input.
          out_sharding: how to shard the output, as for `Linear`.

        Raises:
          ValueError: an axis is missing or has the wrong size; the message has both shapes. Or
            `out_sharding` is missing or does not fit.
        """
        x = as_array(self, x)
        shape = tuple(x.shape)
        axes = self._summed_axes(shape)
        batch = tuple(range(len(self.batch_axis)))
        x, kernel, bias = self.promote_dtype((x, self.kernel, self.bias), dtype=self.dtype)
        dot_general = self.dot_general or jax.lax.dot_general
        if self.dot_general_cls is not None:
            dot_general = self.dot_general_cls()
        rows = (size for i, size in enumerate(shape) if i not in axes)
        wanted = wanted_sharding(self, out_sharding, (*rows, *self.out_features), x, kernel)
        options: dict[str, Any] = {"precision": self.precision, **wanted.options}
        if self.preferred_element_type is not None:
            options["preferred_element_type"] = self.preferred_element_type
        kernel_axes = tuple(range(len(batch), len(batch) + len(axes)))
        try:
            y = dot_general(x, kernel, ((axes, kernel_axes), (batch, batch)), **options)
            if bias is None:
                return wanted.constrained(y)
            others = (1,) * (len(shape) - len(batch) - len(axes))
            bias = bias.reshape(*shape[: len(batch)], *others, *self.out_features)
            return wanted.constrained(add_bias(y, bias))
        except (TypeError, ValueError):
            lead, out = shape[: len(batch)], self.out_features
            check_parameters(self, kernel=(*lead, *self.in_features, *out), bias=(*lead, *out))
            raise
        except Exception as error:
            explain_sharding(self, error, x=x, kernel=kernel)
            raise

    def _summed_axes(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The axes to sum over, counted from the front, in order; raises if the input does not have them."""
        axes = sorted(a + len(shape) if a < 0 else a for a in self.axis)
        wanted = [*zip(axes, self.in_features, strict=True), *self.batch_axis.items()]
        fits = len({a for a, _ in wanted}) == len(wanted)
        if fits and all(0 <= a < len(shape) and shape[a] == size for a, size in wanted):
            return tuple(axes)
        batch = f" and batch axes of size {self.batch_axis}" if self.batch_axis else ""
        raise ValueError(
            f"{type(self).__name__} expects an input with sizes {self.in_features} along the axes "
            f"{self.axis}{batch}, but got one of shape {shape}."
        )


class Einsum(Module):
    """An einsum with a learned kernel, plus a bias: `einsum(einsum_str, x, kernel) + bias`.

    Args:
      einsum_str: an equation with two operands, the input and the kernel, and with `->`, such as
        `"nta,hab->nthb"`. An ellipsis may stand for axes of the input.
      kernel_shape: shape of the kernel.
      bias_shape: sizes of the output axes that come from the kernel, in the order of the output;
        None for no bias.
      dtype, param_dtype, precision, kernel_init, bias_init, promote_dtype, preferred_element_type,
        kernel_metadata, bias_metadata: as for `Linear`.
      einsum_op: a function to use instead of `jax.numpy.einsum`.

    Attributes: `kernel` of shape `kernel_shape` and `bias` of shape `bias_shape` or None, both in the
    collection `"params"`.

    Raises:
      ValueError: the equation does not have this form; or the kernel has the wrong number of axes.
      MissingStreamError: made outside a scope with a `"params"` stream.

    >>> import jax, jax.numpy as jnp, nnx
    >>> layer = nnx.Einsum.init(jax.random.key(0))("nta,hab->nthb", (8, 2, 4), (8, 4))
    >>> layer(jnp.ones((16, 11, 2))).shape
    (16, 11, 8, 4)
    """

    kernel: jax.Array = param()
    bias: jax.Array | None = param()
    kernel_shape: tuple[int, ...] = static()
    bias_shape: tuple[int, ...] | None = static()

    def __init__(
        self,
        einsum_str: str,
        kernel_shape: Sequence[int],
        bias_shape: Sequence[int] | None = None,
        *,
        dtype: Dtype = None,
        param_dtype: Dtype = jnp.float32,
        precision: Any = None,
        kernel_init: Initializer = default_kernel_init,
        bias_init: Initializer = zeros,
        promote_dtype: Callable[..., Any] = promote_dtype,
        einsum_op: Callable[..., jax.Array] = jnp.einsum,
        preferred_element_type: Dtype = None,
        kernel_metadata: Metadata = {},  # noqa: B006 — never changed
        bias_metadata: Metadata = {},  # noqa: B006
    ):
        self.einsum_str = einsum_str.replace(" ", "")
        self.kernel_shape = tuple(kernel_shape)
        self.bias_shape = None if bias_shape is None else tuple(bias_shape)
        self._parse(self.einsum_str)
        self.kernel = new_ref(  # pyright: ignore[reportAttributeAccessIssue]
            kernel_init, self.kernel_shape, param_dtype, kernel_metadata
        )
        self.bias = (  # pyright: ignore[reportAttributeAccessIssue]
            None
            if self.bias_shape is None
            else new_ref(bias_init, self.bias_shape, param_dtype, bias_metadata)
        )
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.precision = precision
        self.promote_dtype = promote_dtype
        self.einsum_op = einsum_op
        self.preferred_element_type = preferred_element_type

    def __call__(
        self, x: jax.Array, einsum_str: str | None = None, out_sharding: OutSharding = None
    ) -> jax.Array:
        """Apply the layer.

        Args:
          x: the first operand.
          einsum_str: an equation to use instead of the layer's own.
          out_sharding: how to shard the output, as for `Linear`.

        Raises:
          ValueError: the input or the bias does not fit the equation; `out_sharding` is missing or
            does not fit.
        """
        equation = self.einsum_str if einsum_str is None else einsum_str.replace(" ", "")
        left, right, result = self._parse(equation)
        x = as_array(self, x)
        self._check_input(x, equation, left, right)
        shape = jnp.shape(x)
        x, kernel, bias = self.promote_dtype((x, self.kernel, self.bias), dtype=self.dtype)
        # Axes of an ellipsis are aligned on the right, so they are counted from the right.
        hidden = len(self.kernel_shape) - len(right.replace("...", ""))
        rest = max(hidden, len(shape) - len(left.replace("...", "")))
        labels = _labels(result, rest)
        wanted = wanted_sharding(self, out_sharding, (0,) * len(labels), x, kernel)
        options: dict[str, Any] = {"precision": self.precision, **wanted.options}
        if self.preferred_element_type is not None:
            options["preferred_element_type"] = self.preferred_element_type
        dtype = x.dtype
        narrow = is_half(dtype) and not options.get("preferred_element_type")
        if narrow and _sums_alone(left, right, result):
            x, kernel = x.astype(wide(dtype)), kernel.astype(wide(dtype))
        try:
            y = self.einsum_op(equation, x, kernel, **options)
            y = y.astype(dtype) if narrow else y
        except (TypeError, ValueError):
            check_parameters(self, kernel=self.kernel_shape)
            raise
        except Exception as error:
            explain_sharding(self, error, x=x, kernel=kernel)
            raise
        if bias is None:
            return wanted.constrained(y)
        sizes = dict(zip(_labels(right, hidden), self.kernel_shape, strict=True))
        along = [sizes.get(label, 1) for label in labels]
        if math.prod(along) != bias.size:
            raise ValueError(
                f"The bias of Einsum {equation!r} must have the output axes that come from the "
                f"kernel, with sizes {tuple(n for n in along if n != 1)}, but bias_shape is "
                f"{self.bias_shape}."
            )
        return wanted.constrained(add_bias(y, fitted(bias, along, y)))

    def _parse(self, equation: str) -> tuple[str, str, str]:
        operands, arrow, result = equation.partition("->")
        if not arrow or operands.count(",") != 1:
            raise ValueError(
                f"The equation of Einsum needs two operands, the input and the kernel, and an "
                f"arrow, as in 'ab,bc->ac', but got {equation!r}."
            )
        left, right = operands.split(",")
        letters = len(right.replace("...", ""))
        if letters > len(self.kernel_shape) or (
            "..." not in right and letters != len(self.kernel_shape)
        ):
            raise ValueError(
                f"The kernel of Einsum has the axes {right!r} in {equation!r}, but kernel_shape is "
                f"{self.kernel_shape}."
            )
        return left, right, result

    def _check_input(self, x: Any, equation: str, left: str, right: str) -> None:
        shape, letters = jnp.shape(x), len(left.replace("...", ""))
        fits = len(shape) >= letters if "..." in left else len(shape) == letters
        hidden = len(self.kernel_shape) - len(right.replace("...", ""))
        sizes = dict(zip(_labels(right, hidden), self.kernel_shape, strict=True))
        labels = _labels(left, len(shape) - letters) if fits else []
        # Numbers label the axes of an ellipsis, whose sizes may broadcast.
        if fits and all(
            isinstance(label, int) or sizes.get(label, size) == size
            for label, size in zip(labels, shape, strict=True)
        ):
            return
        parts = left.partition("...")
        named = [str(sizes.get(c, c)) for c in parts[0]]
        named += [part for part in [parts[1]] if part] + [str(sizes.get(c, c)) for c in parts[2]]
        expected = f"({', '.join(named)}) for {equation!r}"
        raise shape_error(self, "an input", expected, shape)


def _tuple(x: int | Sequence[int]) -> tuple[int, ...]:
    return (x,) if isinstance(x, int) else tuple(x)


def _flattened(init: Initializer, flat: tuple[int, ...]) -> Initializer:
    if init in (zeros, ones):
        return init
    return lambda key, shape, dtype: init(key, flat, dtype).reshape(shape)


def _sums_alone(left: str, right: str, result: str) -> bool:
    """Whether an operand, or its gradient, has a sum that is not part of a product."""
    apart = (set(left) ^ set(right)) - set(result) - {"."}
    return bool(apart) or "..." in right or any(s.count(c) > 1 for s in (left, right) for c in s)


def _labels(subscripts: str, hidden: int) -> list[Any]:
    """The labels of the axes, with the numbers -hidden, ..., -1 for an ellipsis."""
    before, dots, after = subscripts.partition("...")
    return [*before, *(range(-hidden, 0) if dots else ()), *after]
