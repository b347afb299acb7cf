"""Transposed convolutions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import auto_axes

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
from nnx.layers._out_sharding import OutSharding, explain_sharding, wanted_sharding
from nnx.layers._sharding import gathered, merged, unmerged
from nnx.layers.conv import Padding, Sizes, checked_padding, each_axis
from nnx.module import Module

__all__ = ["ConvTranspose"]


class ConvTranspose(Module):
    """A transposed convolution over any number of spatial axes, with the channels last.

    Each element of the input adds a multiple of the kernel to the output, at `strides` times its
    position. So strides make the output larger.

    Args:
      in_features: channels of the input.
      out_features: channels of the output.
      kernel_size: size of the kernel along each spatial axis, `(4, 4)` for images; an int is one
        axis, not a square.
      strides: one number for all axes, or one for each.
      padding: `"SAME"`: the output is `strides` times the size of the input; `"VALID"`: the full
        output; `"CIRCULAR"`: the size of `"SAME"`, wrapped around; `"CAUSAL"` (one axis only): the
        size of `"SAME"`, and no output depends on later inputs. Or a number of zeros around the dilated
        input: an int for all sides, or for each axis an int or a pair (before, after).
      kernel_dilation: one number for all axes, or one for each.
      use_bias: whether to add a bias; if not, `bias` is None.
      mask: an array of the kernel's shape, multiplied with the kernel.
      transpose_kernel: flip the kernel's spatial axes and swap its channel axes: with `"VALID"`
        padding it is the transpose of `Conv` with the same kernel.
      dtype, param_dtype, precision, kernel_init, bias_init, promote_dtype, preferred_element_type,
        kernel_metadata, bias_metadata: as for `Linear`.

    Attributes: `kernel` of shape `(*kernel_size, in_features, out_features)`, with
    `transpose_kernel` `(*kernel_size, out_features, in_features)`, and `bias` of shape
    `(out_features,)`, in the collection `"params"`.

    Raises:
      ValueError: the sizes or the padding do not fit the kernel; the mask has the wrong shape.

    >>> import jax, jax.numpy as jnp, nnx
    >>> up = nnx.ConvTranspose.init(jax.random.key(0))(3, 8, (4, 4), strides=2)
    >>> up(jnp.ones((2, 14, 14, 3))).shape
    (2, 28, 28, 8)
    """

    kernel: jax.Array = param()
    bias: jax.Array | None = param()

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: int | Sequence[int],
        strides: Sizes = None,
        *,
        padding: Padding = "SAME",
        kernel_dilation: Sizes = None,
        use_bias: bool = True,
        mask: jax.Array | None = None,
        dtype: Dtype = None,
        param_dtype: Dtype = jnp.float32,
        precision: Any = None,
        kernel_init: Initializer = default_kernel_init,
        bias_init: Initializer = zeros,
        transpose_kernel: bool = False,
        promote_dtype: Callable[..., Any] = promote_dtype,
        preferred_element_type: Dtype = None,
        kernel_metadata: Metadata = {},  # noqa: B006 — never changed
        bias_metadata: Metadata = {},  # noqa: B006
    ):
        size = (kernel_size,) if isinstance(kernel_size, int) else tuple(kernel_size)
        channels = (out_features, in_features) if transpose_kernel else (in_features, out_features)
        shape = (*size, *channels)
        if mask is not None and tuple(mask.shape) != shape:
            raise ValueError(
                f"The mask of ConvTranspose must have the shape of the kernel, {shape}, but has "
                f"{tuple(mask.shape)}."
            )
        self.in_features = in_features
        self.out_features = out_features
        self.kernel_size = size
        self.kernel_shape = shape
        layer, axes = "ConvTranspose", len(size)
        self.strides = each_axis(layer, "strides", strides, axes)
        self.kernel_dilation = each_axis(layer, "kernel_dilation", kernel_dilation, axes)
        modes = ("SAME", "VALID", "CIRCULAR", "CAUSAL")
        self.padding = checked_padding(layer, padding, axes, modes)
        self.use_bias = use_bias
        self.mask = mask
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.precision = precision
        self.transpose_kernel = transpose_kernel
        self.promote_dtype = promote_dtype
        self.preferred_element_type = preferred_element_type
        self.kernel = new_ref(kernel_init, shape, param_dtype, kernel_metadata)  # pyright: ignore
        self.bias = (  # pyright: ignore[reportAttributeAccessIssue]
            new_ref(bias_init, (out_features,), param_dtype, bias_metadata) if use_bias else None
        )

    def __call__(self, x: jax.Array, out_sharding: OutSharding = None) -> jax.Array:
        """Apply the layer to an input of shape `(*batch, *spatial, in_features)`.

        There may be any number of batch axes, or none.

        Args:
          x: the input.
          out_sharding: how to shard the output, as for `Linear`. JAX needs it if the channels or the
            kernel are sharded along an Explicit axis.

        Raises:
          ValueError: too few axes, an empty spatial axis, or the wrong number of channels; the message
            has both shapes.
        """
        x = as_array(self, x)
        axes = len(self.kernel_size)
        if x.ndim < axes + 1 or x.shape[-1] != self.in_features:
            expected = f"(..., {', '.join('*' * axes)}, {self.in_features})"
            raise shape_error(self, "an input", expected, x.shape)
        if 0 in x.shape[-axes - 1 : -1]:
            expected = f"(*batch, *spatial, {self.in_features}) with no empty spatial axis"
            raise shape_error(self, "an input", expected, x.shape)
        batch = x.shape[: x.ndim - axes - 1]
        wanted = wanted_sharding(self, out_sharding, (0,) * x.ndim, x, self.kernel)
        lead, flat = wanted.batch(x, len(batch)), wanted.merged(len(batch))
        x = merged(x, len(batch))
        kernel, bias = self.kernel, self.bias
        padding: Any = self.padding
        if padding == "CIRCULAR":
            padding = "VALID"
        elif padding == "CAUSAL":
            reach = (self.kernel_size[0] - 1) * self.kernel_dilation[0]
            padding = ((reach, self.strides[0] - 1),)
        try:
            if self.mask is not None:
                # The mask must not change the dtype of the activations.
                kernel = kernel * self.mask.astype(kernel.dtype)
            x, kernel, bias = self.promote_dtype((x, kernel, bias), dtype=self.dtype)
            if self.padding == "CIRCULAR":
                x = gathered(x, range(1, x.ndim - 1))

            def transposed(x: jax.Array, kernel: jax.Array) -> jax.Array:
                y = jax.lax.conv_transpose(
                    x,
                    kernel,
                    self.strides,
                    padding,
                    rhs_dilation=self.kernel_dilation,
                    transpose_kernel=self.transpose_kernel,
                    precision=self.precision,
                    preferred_element_type=self.preferred_element_type,
                )
                return self._wrapped(y, x.shape[1:-1]) if self.padding == "CIRCULAR" else y

            if flat.explicit is not None:
                # jax.lax.conv_transpose has no out_sharding.
                placed: Any = auto_axes(transposed, out_sharding=flat.explicit)
                y = placed(x, kernel)
            else:
                y = transposed(x, kernel)
            if bias is not None:
                y = add_bias(y, bias)
        except (TypeError, ValueError):
            check_parameters(self, kernel=self.kernel_shape, bias=(self.out_features,))
            raise
        except Exception as error:
            explain_sharding(self, error, x=x, kernel=kernel)
            raise
        return wanted.constrained(unmerged(y, batch, lead))

    def _wrapped(self, y: jax.Array, sizes: tuple[int, ...]) -> jax.Array:
        """Add up elements that are a whole period apart, so that the middle of `y` stays in place."""
        for axis, (size, stride) in enumerate(zip(sizes, self.strides, strict=True), start=1):
            period = size * stride
            # The padding with which `y` has whole periods before and after the middle one.
            missing = -(y.shape[axis] - period) % (2 * period)
            less, more = missing // 2, missing - missing // 2
            pads = [(0, 0)] * y.ndim
            # If it is odd, a transposed kernel has the longer half at the end.
            pads[axis] = (less, more) if self.transpose_kernel else (more, less)
            y = jnp.pad(y, pads)
            y = y.reshape(*y.shape[:axis], -1, period, *y.shape[axis + 1 :]).sum(axis)
        return y
