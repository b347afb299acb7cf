"""Convolutions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from nnx.fields import param
from nnx.layers._common import (
    Dtype,
    Initializer,
    Metadata,
    as_array,
    check_parameters,
    default_kernel_init,
    new_ref,
    promote_dtype,
    shape_error,
    zeros,
)
from nnx.layers._numerics import add_bias
from nnx.layers._out_sharding import (
    ANYWHERE,
    OutSharding,
    Wanted,
    explain_sharding,
    wanted_sharding,
)
from nnx.layers._sharding import gathered, merged, unmerged
from nnx.module import Module

__all__ = ["Conv"]

Sizes = int | Sequence[int] | None
Padding = str | int | Sequence[int | tuple[int, int]]


class Conv(Module):
    """A convolution over any number of spatial axes, with the channels last.

    `kernel_size` determines the number of spatial axes: for images, write `(3, 3)`. An int, as in
    `Conv(3, 8, 3)`, means one axis, so images `(batch, height, width, channels)` count as batches of
    rows, and only the width is convolved.

    Args:
      in_features: channels of the input.
      out_features: channels of the output.
      kernel_size: size of the kernel along each spatial axis; an int is one axis, not a square.
      strides: one number for all axes, or one for each.
      padding: `"SAME"`, `"VALID"`, `"CIRCULAR"`, `"REFLECT"`, `"CAUSAL"` (one axis only), an int
        for all sides, or for each axis an int or a pair (before, after).
      input_dilation, kernel_dilation: one number for all axes, or one for each.
      feature_group_count: number of groups into which the channels are divided.
      use_bias: whether to add a bias; if not, `bias` is None.
      mask: an array of the kernel's shape, multiplied with the kernel.
      dtype, param_dtype, precision, kernel_init, bias_init, promote_dtype, preferred_element_type,
        kernel_metadata, bias_metadata: as for `Linear`.
      conv_general_dilated: a function to use instead of `jax.lax.conv_general_dilated`.

    Attributes: `kernel` of shape `(*kernel_size, in_features // feature_group_count,
    out_features)` and `bias` of shape `(out_features,)`, in the collection `"params"`.

    Raises:
      ValueError: the channels cannot be divided into this many groups; the mask has the wrong shape.

    >>> import jax, jax.numpy as jnp, nnx
    >>> conv = nnx.Conv.init(jax.random.key(0))(3, 8, (3, 3))
    >>> conv(jnp.ones((2, 28, 28, 3))).shape
    (2, 28, 28, 8)
    """

    kernel: jax.Array = param()
    bias: jax.Array | None = param()

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: int | Sequence[int],
        strides: Sizes = 1,
        *,
        padding: Padding = "SAME",
        input_dilation: Sizes = 1,
        kernel_dilation: Sizes = 1,
        feature_group_count: int = 1,
        use_bias: bool = True,
        mask: jax.Array | None = None,
        dtype: Dtype = None,
        param_dtype: Dtype = jnp.float32,
        precision: Any = None,
        kernel_init: Initializer = default_kernel_init,
        bias_init: Initializer = zeros,
        conv_general_dilated: Callable[..., jax.Array] = jax.lax.conv_general_dilated,
        promote_dtype: Callable[..., Any] = promote_dtype,
        preferred_element_type: Dtype = None,
        kernel_metadata: Metadata = {},  # noqa: B006 — never changed
        bias_metadata: Metadata = {},  # noqa: B006
    ):
        size = (kernel_size,) if isinstance(kernel_size, int) else tuple(kernel_size)
        if in_features % feature_group_count or out_features % feature_group_count:
            raise ValueError(
                f"Conv cannot divide {in_features} input and {out_features} output channels into "
                f"{feature_group_count} groups. Both must be multiples of feature_group_count."
            )
        shape = (*size, in_features // feature_group_count, out_features)
        if mask is not None and tuple(mask.shape) != shape:
            raise ValueError(
                f"The mask of Conv must have the shape of the kernel, {shape}, but has "
                f"{tuple(mask.shape)}."
            )
        self.kernel = new_ref(kernel_init, shape, param_dtype, kernel_metadata)  # pyright: ignore
        self.bias = (  # pyright: ignore[reportAttributeAccessIssue]
            new_ref(bias_init, (out_features,), param_dtype, bias_metadata) if use_bias else None
        )
        self.in_features = in_features
        self.out_features = out_features
        self.kernel_size = size
        self.kernel_shape = shape
        axes = len(size)
        self.strides = each_axis("Conv", "strides", strides, axes)
        self.padding = checked_padding("Conv", padding, axes, ("SAME", "VALID", *_PAD_MODES))
        self.input_dilation = each_axis("Conv", "input_dilation", input_dilation, axes)
        self.kernel_dilation = each_axis("Conv", "kernel_dilation", kernel_dilation, axes)
        self.feature_group_count = feature_group_count
        self.use_bias = use_bias
        self.mask = mask
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.precision = precision
        self.conv_general_dilated = conv_general_dilated
        self.promote_dtype = promote_dtype
        self.preferred_element_type = preferred_element_type

    def __call__(self, x: jax.Array, out_sharding: OutSharding = None) -> jax.Array:
        """Apply the layer to an input of shape `(*batch, *spatial, in_features)`.

        There may be any number of batch axes, or none.

        Args:
          x: the input.
          out_sharding: how to shard the output, as for `Linear`. JAX needs it if the channels or the
            kernel are sharded along an Explicit axis.

        Raises:
          ValueError: too few axes, or the wrong number of channels; an empty spatial axis has nothing to
            pad with. The message has both shapes.
        """
        x = self._checked(x)
        kernel, bias = self.kernel, self.bias
        try:
            if self.mask is not None:
                # The mask must not change the dtype of the activations.
                kernel = kernel * self.mask.astype(kernel.dtype)
            x, kernel, bias = self.promote_dtype((x, kernel, bias), dtype=self.dtype)
            wanted = wanted_sharding(self, out_sharding, (0,) * x.ndim, x, kernel)
            y = self._convolved(x, kernel, wanted)
            return wanted.constrained(y if bias is None else add_bias(y, bias))
        except (TypeError, ValueError):
            check_parameters(self, kernel=self.kernel_shape, bias=(self.out_features,))
            raise
        except Exception as error:
            explain_sharding(self, error, x=x, kernel=kernel)
            raise

    def _checked(self, x: Any) -> jax.Array:
        """The input as an array; raises if its shape does not fit."""
        x = as_array(self, x)
        axes = len(self.kernel_size)
        if x.ndim < axes + 1 or x.shape[-1] != self.in_features:
            expected = f"(..., {', '.join('*' * axes)}, {self.in_features})"
            raise shape_error(self, "an input", expected, x.shape)
        if self.padding in ("CIRCULAR", "REFLECT") and 0 in x.shape[-axes - 1 : -1]:
            expected = f"(*batch, *spatial, {self.in_features}) with no empty spatial axis to pad"
            raise shape_error(self, "an input", expected, x.shape)
        return x

    def _convolved(self, x: jax.Array, kernel: jax.Array, wanted: Wanted = ANYWHERE) -> jax.Array:
        """The input convolved with a kernel, whose output channels may differ from the layer's."""
        axes = len(self.kernel_size)
        batch = x.shape[: x.ndim - axes - 1]
        lead, flat = wanted.batch(x, len(batch)), wanted.merged(len(batch))
        x = merged(x, len(batch))
        padding = self.padding
        if isinstance(padding, str) and padding in _PAD_MODES:
            x, padding = self._padded(x, padding), "VALID"
        options: dict[str, Any] = dict(flat.options)
        if self.preferred_element_type is not None:
            options["preferred_element_type"] = self.preferred_element_type
        spatial = "DHW"[-axes:] if axes <= 3 else "".join(map(chr, range(97, 97 + axes)))
        y = self.conv_general_dilated(
            x,
            kernel,
            self.strides,
            padding,
            lhs_dilation=self.input_dilation,
            rhs_dilation=self.kernel_dilation,
            dimension_numbers=(f"N{spatial}C", f"{spatial}IO", f"N{spatial}C"),
            feature_group_count=self.feature_group_count,
            precision=self.precision,
            **options,
        )
        return unmerged(y, batch, lead)

    def _padded(self, x: jax.Array, mode: str) -> jax.Array:
        # Each padded axis must be whole on a device, because its padding comes from the other end.
        x = gathered(x, range(1, x.ndim - 1))
        reach = [(k - 1) * d for k, d in zip(self.kernel_size, self.kernel_dilation, strict=True)]
        if mode == "CAUSAL":
            return jnp.pad(x, [(0, 0), (reach[0], 0), (0, 0)])
        pads = [(0, 0), *((r // 2, (r + 1) // 2) for r in reach), (0, 0)]
        return jnp.pad(x, pads, mode=_PAD_MODES[mode])  # pyright: ignore[reportArgumentType]


_PAD_MODES = {"CIRCULAR": "wrap", "REFLECT": "reflect", "CAUSAL": "constant"}


def each_axis(layer: str, name: str, sizes: Sizes, axes: int) -> tuple[int, ...]:
    """A size for each spatial axis."""
    if sizes is None or isinstance(sizes, int):
        return (sizes or 1,) * axes
    if len(sizes) != axes:
        raise ValueError(
            f"{layer} has a kernel of {axes} spatial axes, but got {len(sizes)} sizes for {name}: "
            f"{tuple(sizes)}."
        )
    return tuple(sizes)


def checked_padding(
    layer: str, padding: Padding, axes: int, modes: tuple[str, ...]
) -> str | tuple[tuple[int, int], ...]:
    """A padding mode, or a pair for each spatial axis."""
    if isinstance(padding, str):
        if padding == "CAUSAL" and axes != 1:
            raise ValueError(
                f"CAUSAL padding is for one spatial axis, but the kernel of {layer} has {axes}."
            )
        if padding not in modes:
            raise ValueError(
                f"{layer} has no padding {padding!r}. Use {', '.join(map(repr, modes))}, an int, "
                f"or for each axis an int or a pair."
            )
        return padding
    if isinstance(padding, int):
        return ((padding, padding),) * axes
    if len(padding) != axes:
        raise ValueError(
            f"{layer} has a kernel of {axes} spatial axes, but got {len(padding)} paddings: "
            f"{tuple(padding)}."
        )
    return tuple((p, p) if isinstance(p, int) else (p[0], p[1]) for p in padding)
