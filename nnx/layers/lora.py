"""Low-rank adapters: small matrices, trained beside large frozen ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from typing import Any

import jax
import jax.numpy as jnp
from jax.nn import initializers
from jax.sharding import NamedSharding, PartitionSpec

from nnx.fields import ref
from nnx.layers._common import Dtype, Initializer, Metadata, promote_dtype, shape_error, zeros
from nnx.layers._matrices import matrix_of
from nnx.layers._numerics import is_half
from nnx.layers._out_sharding import OutSharding, explain_sharding, wanted_sharding
from nnx.layers._sharding import merged_spec, placed_as, placement
from nnx.layers.linear import Linear
from nnx.layers.linear_general import LinearGeneral
from nnx.module import Module
from nnx.scope import make_rng
from refx import Ref
from refx.text import a_kind

__all__ = ["LoRA", "LoRALinear", "LoRALinearGeneral"]

default_a_initializer: Initializer = initializers.he_uniform()


class LoRA(Module):
    """Low-rank adaptation (Hu et al. 2021, https://arxiv.org/abs/2106.09685).

    It adds the product of two narrow matrices, `x @ lora_a @ lora_b`, to the output of `base_module`.
    Their collection is `"lora"`, so `wrt="lora"` trains only them.

    Args:
      in_features: size of the last axis of the input.
      lora_rank: number of columns of `lora_a` and of rows of `lora_b`.
      out_features: size of the last axis of the output.
      base_module: a module to call with the same input, cast to `dtype` if that is set. Its result is
        added. If the result has half precision, the sum has its dtype.
      dtype: dtype of the products; by default, the dtype that input and parameters promote to.
      param_dtype: dtype of `lora_a` and `lora_b`.
      a_initializer, b_initializer: initializers. By default `lora_b` starts at zero, so the adapter
        changes nothing at first.
      lora_param_type: the collection of the two matrices.
      promote_dtype: a function for the casts, called with `(x, lora_a, lora_b), dtype=`.
      a_metadata, b_metadata: metadata of the Refs.
      alpha: if set, the product is multiplied by `alpha / lora_rank`.

    Attributes: `lora_a` of shape `(in_features, lora_rank)`, `lora_b` of shape `(lora_rank,
    out_features)`, `base_module`, and `scale`.

    Raises:
      ValueError: the rank is less than 1.
      TypeError: `base_module` cannot be called.

    >>> import jax, jax.numpy as jnp, nnx
    >>> lora = nnx.LoRA.init(jax.random.key(0))(3, 2, 4)
    >>> lora(jnp.ones((16, 3))).shape, list(lora["lora"])
    ((16, 4), [('lora_a',), ('lora_b',)])
    """

    lora_a: jax.Array = ref("lora")
    lora_b: jax.Array = ref("lora")

    def __init__(
        self,
        in_features: int,
        lora_rank: int,
        out_features: int,
        *,
        base_module: Module | None = None,
        dtype: Dtype = None,
        param_dtype: Dtype = jnp.float32,
        a_initializer: Initializer = default_a_initializer,
        b_initializer: Initializer = zeros,
        lora_param_type: Hashable = "lora",
        promote_dtype: Callable[..., Any] = promote_dtype,
        a_metadata: Metadata = {},  # noqa: B006 — never changed
        b_metadata: Metadata = {},  # noqa: B006
        alpha: float | None = None,
    ):
        if lora_rank < 1:
            raise ValueError(f"The rank of LoRA must be at least 1, but is {lora_rank}.")
        if base_module is not None and not callable(base_module):
            raise TypeError(
                f"The base_module of LoRA must be callable, but is {a_kind(type(base_module))}."
            )

        def new(init: Initializer, shape: tuple[int, int], metadata: Metadata) -> Any:
            key = None if init is zeros else make_rng("params")
            return Ref(init(key, shape, param_dtype), lora_param_type, **metadata)

        self.lora_a = new(a_initializer, (in_features, lora_rank), a_metadata)
        self.lora_b = new(b_initializer, (lora_rank, out_features), b_metadata)
        self.in_features = in_features
        self.out_features = out_features
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.lora_param_type = lora_param_type
        self.base_module = base_module
        self.promote_dtype = promote_dtype
        self.scale = 1.0 if alpha is None else alpha / lora_rank

    def __call__(
        self, x: jax.Array, *, out_sharding: OutSharding = None, **kwargs: Any
    ) -> jax.Array:
        """Apply the adapter to an input of shape `(..., in_features)`.

        Args:
          x: the input.
          out_sharding: how to shard the output, as for `Linear`; `base_module` gets it too.
          **kwargs: arguments for `base_module`.

        Raises:
          ValueError: the last axis has the wrong size; the message has both shapes. Or `out_sharding`
            is missing or does not fit.
        """
        if not jnp.ndim(x) or jnp.shape(x)[-1] != self.in_features:
            raise shape_error(self, "an input", f"(..., {self.in_features})", jnp.shape(x))
        given = x
        x, a, b = self.promoted(x)
        if out_sharding is None:
            try:
                y = x @ a @ b
            except Exception as error:
                explain_sharding(self, error, x=x, lora_a=a, lora_b=b)
                raise
        else:
            wanted = wanted_sharding(self, out_sharding, (*x.shape[:-1], b.shape[-1]), x, a)
            kwargs["out_sharding"] = out_sharding
            narrow = jnp.matmul(x, a, **wanted.without_last(x.ndim).options)
            y = wanted.constrained(jnp.matmul(narrow, b, **wanted.options))
        y = self.scaled(y)
        if self.base_module is None:
            return y
        # The dtype of the adapter must not change the dtype of the result.
        return added(self.base_module(given if self.dtype is None else x, **kwargs), y)

    def promoted(self, *inputs: jax.Array) -> tuple[jax.Array, ...]:
        """The inputs, `lora_a` and `lora_b`, in the dtype of the products."""
        return self.promote_dtype((*inputs, self.lora_a, self.lora_b), dtype=self.dtype)

    def scaled(self, product: jax.Array) -> jax.Array:
        """A product with both matrices, scaled by `alpha / lora_rank`."""
        return product if self.scale == 1 else product * self.scale


class WithAdapter(Module):
    """The first base class of the layers with an adapter; the class of the plain layer is the second."""

    def __init__(
        self,
        *args: Any,
        lora_rank: int,
        lora_dtype: Dtype = None,
        lora_param_dtype: Dtype = jnp.float32,
        a_initializer: Initializer = default_a_initializer,
        b_initializer: Initializer = zeros,
        lora_param_type: Hashable = "lora",
        lora_promote_dtype: Callable[..., Any] = promote_dtype,
        a_metadata: Metadata = {},  # noqa: B006 — never changed
        b_metadata: Metadata = {},  # noqa: B006
        alpha: float | None = None,
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        layer: Any = self
        self.lora = beside(
            layer,
            lora_rank,
            dtype=lora_dtype,
            param_dtype=lora_param_dtype,
            a_initializer=a_initializer,
            b_initializer=b_initializer,
            lora_param_type=lora_param_type,
            promote_dtype=lora_promote_dtype,
            a_metadata=a_metadata,
            b_metadata=b_metadata,
            alpha=alpha,
        )


class LoRALinear(WithAdapter, Linear):
    """A `Linear` with a low-rank adapter beside it; see `LoRA` and `apply_lora`.

    Args:
      in_features, out_features: as for `Linear`.
      lora_rank: the rank of the adapter.
      lora_dtype, lora_param_dtype, a_initializer, b_initializer, lora_param_type,
        lora_promote_dtype, a_metadata, b_metadata, alpha: as for `LoRA`.
      **kwargs: all other arguments of `Linear`.

    Attributes: `kernel` and `bias` as for `Linear`, and the adapter `lora`, with `lora_a` and
    `lora_b`.

    >>> import jax, jax.numpy as jnp, nnx
    >>> layer = nnx.LoRALinear.init(jax.random.key(0))(3, 4, lora_rank=2)
    >>> list(nnx.grad(lambda m: m(jnp.ones((2, 3))).sum(), wrt="lora")(layer))
    [('lora', 'lora_a'), ('lora', 'lora_b')]
    """

    def __call__(self, x: jax.Array, out_sharding: OutSharding = None) -> jax.Array:
        """Apply the layer to an input of shape `(..., in_features)`, like a `Linear`."""
        y = super().__call__(x, out_sharding)
        return added(y, self.lora(x, out_sharding=placement(y)))


class LoRALinearGeneral(WithAdapter, LinearGeneral):
    """A `LinearGeneral` with a low-rank adapter beside it; see `LoRA` and `apply_lora`.

    To the adapter, the axes that are summed over are one axis, and so are the new axes. With
    batch axes, each index along them has its own adapter.

    Args:
      in_features, out_features: as for `LinearGeneral`.
      lora_rank: the rank of the adapter.
      lora_dtype, lora_param_dtype, a_initializer, b_initializer, lora_param_type,
        lora_promote_dtype, a_metadata, b_metadata, alpha: as for `LoRA`.
      **kwargs: all other arguments of `LinearGeneral`.

    Attributes: `kernel` and `bias` as for `LinearGeneral`, and the adapter `lora`, with `lora_a` of
    shape `(*batch sizes, inputs, lora_rank)` and `lora_b` of shape `(*batch sizes, lora_rank,
    outputs)`, where inputs and outputs are the products of `in_features` and of `out_features`.

    >>> import jax, jax.numpy as jnp, nnx
    >>> layer = nnx.LoRALinearGeneral.init(jax.random.key(0))(8, (2, 4), lora_rank=3)
    >>> layer(jnp.ones((5, 8))).shape, layer.lora.lora_b.shape
    ((5, 2, 4), (3, 8))
    """

    def __call__(self, x: jax.Array, out_sharding: OutSharding = None) -> jax.Array:
        """Apply the layer, like a `LinearGeneral`."""
        y = super().__call__(x, out_sharding)
        axes = self._summed_axes(jnp.shape(x))
        others = [axis for axis in range(jnp.ndim(x)) if axis not in axes]
        x = jnp.transpose(x, (*others, *axes))
        n = len(self.batch_axis)
        batch, rows = x.shape[:n], x.shape[n : len(others)]
        if batch:
            # A product of stacked matrices needs exactly one axis of rows.
            rows = (math.prod(rows),)
        flat = x.reshape(*batch, *rows, self.lora.in_features)
        where = placement(y)
        if where is None:
            return added(y, self.lora(flat).reshape(y.shape))
        # After the output axes are merged into one, it is sharded like the first of them.
        spec: Any = where.spec
        first = y.ndim - len(self.out_features)
        lead = [*spec[:n], merged_spec(spec[n:first], first - n)[0]] if batch else spec[:first]
        out = merged_spec(spec[first:], y.ndim - first)
        one = NamedSharding(where.mesh, PartitionSpec(*lead, *out))
        return added(y, jnp.reshape(self.lora(flat, out_sharding=one), y.shape, out_sharding=where))


def added(y: jax.Array, low_rank: jax.Array) -> jax.Array:
    """Their sum, in the dtype of `y`, so that a float32 adapter keeps a network in half precision."""
    total = y + placed_as(low_rank, y, y.ndim)
    return total.astype(y.dtype) if is_half(y.dtype) else total


def beside(layer: Any, rank: int, **options: Any) -> LoRA:
    """An adapter that fits a layer, with the layer's leading axes and the options of `LoRA`.

    Raises:
      ValueError: the weight's shape does not match the layer's settings, or it is not a matrix.
    """
    matrix = matrix_of(layer)
    inputs, outputs = matrix.sizes(matrix.inputs), matrix.sizes(matrix.outputs)
    shape = tuple(getattr(layer, matrix.name).shape)
    stacked = len(shape) - len(matrix.shape)
    if stacked < 0 or shape[stacked:] != matrix.shape:
        raise ValueError(
            f"For a low-rank adapter, the {matrix.name} of {a_kind(type(layer))} from {inputs} to "
            f"{outputs} features must have the shape {matrix.shape}, perhaps with axes of a stack before "
            f"it, but it has the shape {shape}. Stack along the first axis, as nnx.Stack does."
        )
    if getattr(layer, "mask", None) is not None:
        raise ValueError(
            f"{a_kind(type(layer), start=True)} with a mask cannot have a low-rank adapter, because the "
            f"mask would not apply to it. Leave the layer out with a filter, or multiply its kernel by "
            f"the mask once."
        )
    if matrix.name == "embedding" and options["a_initializer"] is default_a_initializer:
        # A call looks up one row and does not sum over all rows, so fan-in does not count.
        options["a_initializer"] = initializers.normal(rank**-0.5)
    lead = (*shape[:stacked], *matrix.sizes(matrix.batch))
    for name in ("a_initializer", "b_initializer"):
        options[name] = _independent(options[name], lead)
    return LoRA(math.prod(inputs), rank, math.prod(outputs), **options)


def _independent(init: Initializer, lead: tuple[int, ...]) -> Initializer:
    """The initializer for an array with leading axes, along which the values are independent."""
    if not lead:
        return init

    def stacked(key: Any, shape: tuple[int, ...], dtype: Dtype) -> jax.Array:
        keys = jax.random.split(key, math.prod(lead))
        drawn = jax.vmap(lambda key: init(key, shape, dtype))(keys)
        return drawn.reshape(*lead, *shape)

    return stacked
