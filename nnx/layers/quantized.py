"""Linear layers whose kernel is stored in 8 bits."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.sharding import PartitionSpec

from nnx.fields import param, ref
from nnx.layers._common import (
    Dtype,
    Initializer,
    as_array,
    default_kernel_init,
    new_ref,
    promote_dtype,
    shape_error,
    zeros,
)
from nnx.layers._numerics import add_bias, wide
from nnx.layers._out_sharding import OutSharding, wanted_sharding
from nnx.layers.linear import Linear
from nnx.layers.linear_general import LinearGeneral
from nnx.module import Module
from refx import Ref, get_ref
from refx.text import a_kind

__all__ = ["QuantizedLinear"]

Sizes = int | Sequence[int]
_FLOATS = ("float8_e4m3fn", "float8_e5m2", "float8_e4m3", "float8_e3m4", "float8_e4m3b11fnuz")


class QuantizedLinear(Module):
    """A linear layer whose kernel is stored in int8 or float8, with a scale for each output.

    The kernel is 4 times smaller than in float32, and 2 times smaller than in bfloat16.
    `QuantizedLinear.of` makes it from a trained layer, and
    `nnx.replace(model, nnx.Linear, nnx.QuantizedLinear.of)` replaces all linear layers of a model. The
    kernel is not trained: it is in the collection `"quantized"`. Gradients flow through it to the input
    and the bias.

    In int8, each element is off by at most 1/254 of the largest one for the same output; in
    float8_e4m3fn, by at most 1/16 of itself, or 1/2 ** 18 of the largest one. The output of a layer with
    some hundred inputs and normal weights is off by about 1 % (int8) or 3 % (float8_e4m3fn).

    Args:
      in_features: size of the last axis of the input; or sizes of the axes to sum over.
      out_features: size of the last axis of the output; or sizes of the new axes.
      axis: the axes of the input to sum over.
      use_bias: whether to add a bias.
      quantized_dtype: dtype of the stored kernel: int8, or one of the float8 types.
      dtype: dtype of the computation; by default, the dtype that the input and `param_dtype` promote to.
      param_dtype: dtype of the bias, and of the kernel before quantization.
      precision: as for `Linear`.
      kernel_init, bias_init: initializers; the kernel is drawn, and then quantized.
      promote_dtype: a function for the casts.

    Attributes: `quantized` of shape `(*in_features, *out_features)`, and `scale`, float32, of shape
    `out_features`, in the collection `"quantized"`; `bias` of shape `out_features` or None, in
    `"params"`; and `kernel`, the array that the first two represent.

    Raises:
      ValueError: `quantized_dtype` is another dtype.

    >>> import jax, jax.numpy as jnp, nnx
    >>> with nnx.scope(jax.random.key(0)):
    ...     model = nnx.Sequential(nnx.Linear(256, 256), nnx.relu, nnx.Linear(256, 10))
    >>> x = jax.random.normal(jax.random.key(1), (4, 256))
    >>> y = model(x)
    >>> model = nnx.replace(model, nnx.Linear, nnx.QuantizedLinear.of)
    >>> model[0].quantized.dtype, model[0].scale.shape
    (dtype('int8'), (256,))
    >>> bool(jnp.linalg.norm(model(x) - y) < 0.02 * jnp.linalg.norm(y))
    True
    """

    quantized: jax.Array = ref("quantized")
    scale: jax.Array = ref("quantized")
    bias: jax.Array | None = param()

    def __init__(
        self,
        in_features: Sizes,
        out_features: Sizes,
        *,
        axis: Sizes = -1,
        use_bias: bool = True,
        quantized_dtype: Dtype = jnp.int8,
        dtype: Dtype = None,
        param_dtype: Dtype = jnp.float32,
        precision: Any = None,
        kernel_init: Initializer = default_kernel_init,
        bias_init: Initializer = zeros,
        promote_dtype: Callable[..., Any] = promote_dtype,
    ):
        self._set_sizes(in_features, out_features, axis)
        flat = math.prod(self.in_features), math.prod(self.out_features)
        drawn = new_ref(kernel_init, flat, param_dtype, {}).value
        self._store(Ref(drawn.reshape(*self.in_features, *self.out_features)), quantized_dtype)
        self.bias = (  # pyright: ignore[reportAttributeAccessIssue]
            new_ref(bias_init, self.out_features, param_dtype, {}) if use_bias else None
        )
        self.use_bias = use_bias
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.precision = precision
        self.promote_dtype = promote_dtype

    @classmethod
    def of(cls, layer: Any, quantized_dtype: Dtype = jnp.int8) -> QuantizedLinear:
        """The quantized form of a layer, with its bias; a quantized layer is returned unchanged.

        For another dtype, pass `functools.partial(nnx.QuantizedLinear.of,
        quantized_dtype=jnp.float8_e4m3fn)` to `nnx.replace`. Select `(nnx.Linear, nnx.LinearGeneral)` to
        include the layers of attentions. Layers of a `Stack` may be stacked.

        Args:
          layer: a `Linear`, or a `LinearGeneral` without batch axes.
          quantized_dtype: int8, or one of the float8 types.

        Raises:
          TypeError: any other layer, such as one with an adapter (call `nnx.merge_lora` first).
          ValueError: the layer has batch axes, its kernel has the wrong shape or is not finite, or the
            dtype is not supported.

        >>> import functools, jax.numpy as jnp, nnx
        >>> small = nnx.QuantizedLinear.of(nnx.Linear.init(0)(8, 4), jnp.float8_e4m3fn)
        >>> small.quantized.dtype, small(jnp.ones((2, 8))).dtype
        (dtype(float8_e4m3fn), dtype('float32'))
        """
        if isinstance(layer, QuantizedLinear):
            return layer
        if type(layer) not in (Linear, LinearGeneral):
            raise TypeError(
                f"QuantizedLinear.of takes a Linear or a LinearGeneral, but got "
                f"{a_kind(type(layer))}. For a layer with an adapter, call nnx.merge_lora first. In "
                f"nnx.replace, do not select other layers."
            )
        plain = layer.dot_general in (None, jax.lax.dot_general)
        if not plain or getattr(layer, "dot_general_cls", None) or layer.preferred_element_type:
            raise ValueError(
                f"This {type(layer).__name__} has its own dot_general or preferred_element_type, which "
                f"QuantizedLinear does not support. In nnx.replace, do not select this layer."
            )
        if getattr(layer, "batch_axis", None):
            raise ValueError(
                f"QuantizedLinear has no batch axes, but the LinearGeneral has {layer.batch_axis}. "
                f"In nnx.replace, do not select this layer."
            )
        made = cls.__new__(cls)
        made._set_sizes(layer.in_features, layer.out_features, getattr(layer, "axis", -1))
        shape, sizes = layer.kernel.shape, (*made.in_features, *made.out_features)
        if len(shape) < len(sizes) or shape[len(shape) - len(sizes) :] != sizes:
            raise ValueError(
                f"The kernel of {type(layer).__name__} has the shape {shape}, but the layer was "
                f"made for the shape {sizes}. Stack along the first axis, as nnx.Stack does."
            )
        made._store(get_ref(layer, "kernel"), quantized_dtype)
        # Tied, so that a shared bias stays shared.
        made.bias = get_ref(layer, "bias") if layer.bias is not None else None  # pyright: ignore
        made.use_bias = layer.bias is not None
        made.dtype = layer.dtype
        made.param_dtype = layer.kernel.dtype
        made.precision = layer.precision
        made.promote_dtype = layer.promote_dtype
        return made

    def _set_sizes(self, inputs: Sizes, outputs: Sizes, axis: Sizes) -> None:
        self.in_features = (inputs,) if isinstance(inputs, int) else tuple(inputs)
        self.out_features = (outputs,) if isinstance(outputs, int) else tuple(outputs)
        self.axis = (axis,) if isinstance(axis, int) else tuple(axis)
        if len(self.in_features) != len(self.axis):
            raise ValueError(
                f"QuantizedLinear needs a size for each axis, but got in_features {self.in_features} "
                f"for the axes {self.axis}."
            )

    def _summed(self, ndim: int) -> tuple[int, ...]:
        """The axes to sum over, of a kernel with `ndim` axes, stacked or not."""
        first = ndim - len(self.in_features) - len(self.out_features)
        return tuple(range(first, first + len(self.in_features)))

    def _store(self, kernel: Ref[Any], dtype: Dtype) -> None:
        """Set `quantized` and `scale`, placed on the same devices as the kernel."""
        dtype, value = jnp.dtype(dtype), kernel.value
        if dtype != jnp.int8 and dtype.name not in _FLOATS:
            raise ValueError(
                f"QuantizedLinear stores its kernel in int8 or in 8-bit floating point "
                f"({', '.join(_FLOATS[:2])}, ...), but got {dtype.name}."
            )
        summed = self._summed(value.ndim)
        if isinstance(value, jax.ShapeDtypeStruct):
            outputs = tuple(n for i, n in enumerate(value.shape) if i not in summed)
            stored: Any = jax.ShapeDtypeStruct(value.shape, dtype)
            scale: Any = jax.ShapeDtypeStruct(outputs, jnp.float32)
        else:
            finite = isinstance(value, Tracer) or jnp.isfinite(value).all()
            if not finite:
                raise ValueError(
                    "QuantizedLinear cannot store a kernel that is not finite: it has nan or infinite "
                    "elements."
                )
            stored, scale = _quantized(value, summed, dtype)
        metadata = dict(kernel.metadata)
        self.quantized = Ref(stored, "quantized", **metadata)  # pyright: ignore
        if isinstance(spec := metadata.get("sharding"), tuple | PartitionSpec):
            axes = (*spec, *(None,) * (value.ndim - len(spec)))
            metadata["sharding"] = tuple(x for i, x in enumerate(axes) if i not in summed)
        self.scale = Ref(scale, "quantized", **metadata)  # pyright: ignore
        self.quantized_dtype = dtype

    @property
    def kernel(self) -> jax.Array:
        """The array that the stored kernel represents, in `param_dtype`."""
        scale = jnp.expand_dims(self.scale, self._summed(self.quantized.ndim))
        return (self.quantized.astype(jnp.float32) * scale).astype(self.param_dtype)

    def __call__(self, x: jax.Array, out_sharding: OutSharding = None) -> jax.Array:
        """Apply the layer to an input with sizes `in_features` along `axis`.

        Args:
          x: the input.
          out_sharding: how to shard the output, as for `Linear`.

        Raises:
          ValueError: the input has the wrong sizes; the message has its shape. Or `out_sharding` does
            not fit.
        """
        x = as_array(self, x)
        axes = sorted(axis + x.ndim if axis < 0 else axis for axis in self.axis)
        fits = len(set(axes)) == len(axes) and all(0 <= axis < x.ndim for axis in axes)
        if not fits or tuple(x.shape[axis] for axis in axes) != self.in_features:
            expected = f"(..., {self.in_features[0]})"
            if self.axis != (-1,):
                expected = f"with sizes {self.in_features} along the axes {self.axis}"
            raise shape_error(self, "an input", expected, x.shape)
        # This stands for the kernel, so that the casts are those of `Linear`.
        like = jnp.zeros((), self.param_dtype)
        x, bias, _ = self.promote_dtype((x, self.bias, like), dtype=self.dtype)
        shape = (*(n for i, n in enumerate(x.shape) if i not in axes), *self.out_features)
        wanted = wanted_sharding(self, out_sharding, shape, x, self.quantized)
        # Every 8-bit value is exact in every dtype that networks compute in.
        y = jax.lax.dot_general(
            x,
            self.quantized.astype(x.dtype),
            ((axes, self._summed(self.quantized.ndim)), ((), ())),
            precision=self.precision,
            preferred_element_type=wide(x.dtype),
            **wanted.options,
        )
        y = (y * self.scale).astype(x.dtype)
        return wanted.constrained(y if bias is None else add_bias(y, bias))


def _quantized(kernel: jax.Array, axes: tuple[int, ...], dtype: Any) -> tuple[jax.Array, jax.Array]:
    """The kernel in 8 bits, and its scale, which is constant along these axes."""
    full = kernel.astype(jnp.float32)
    largest = jnp.max(jnp.abs(full), axis=axes)
    # A nan stays, so that the result is nan too.
    largest = jnp.where(largest == 0, 1.0, largest)
    top = 127.0 if dtype == jnp.int8 else float(jnp.finfo(dtype).max)
    # Divide by the largest value, because the scale itself may be too small to divide by.
    steps = full / jnp.expand_dims(largest, axes) * top
    if dtype == jnp.int8:
        steps = jnp.round(steps)
    return steps.astype(dtype), largest / top
