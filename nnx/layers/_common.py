"""Code that the layers share: dtype promotion, initial values, and the names of argument types."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.nn import initializers

from nnx.module import Module
from nnx.scope import MissingFlagError, get_flag, make_rng
from nnx.sharding.placing import drawn_in_place
from refx import Ref

Dtype = Any
Initializer = Callable[..., jax.Array]
Metadata = Mapping[str, Any]

default_kernel_init: Initializer = initializers.lecun_normal()
zeros: Initializer = initializers.zeros
ones: Initializer = initializers.ones


def promote_dtype(arrays: Sequence[Any], *, dtype: Dtype = None) -> tuple[Any, ...]:
    """Cast arrays to `dtype`, by default to the floating dtype that all of them promote to.

    None stays None.
    """
    if dtype is None:
        dtype = jnp.result_type(*(x for x in arrays if x is not None))
        if not jnp.issubdtype(dtype, jnp.inexact):
            dtype = jnp.promote_types(dtype, jnp.float32)
    return tuple(None if x is None else jnp.asarray(x, dtype) for x in arrays)


def new_ref(
    init: Initializer, shape: tuple[int, ...], dtype: Dtype, metadata: Metadata
) -> Ref[jax.Array]:
    """A parameter with its initial value; constants take no key from the stream."""
    key = None if init in (zeros, ones) else make_rng("params")
    # JAX draws in the dtype, and some small dtypes cannot hold the intermediate values.
    small = jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits < 16
    drawn_in = jnp.float32 if small else dtype
    value = drawn_in_place(init, key, shape, drawn_in, metadata.get("sharding"))
    if value is None:
        value = init(key, shape, drawn_in)
    return Ref(value.astype(dtype) if small else value, "params", **metadata)


def shape_error(layer: Module, what: str, expected: str, got: Any) -> ValueError:
    """The error for an input that does not fit a layer."""
    return ValueError(
        f"{type(layer).__name__} expects {what} of shape {expected}, but got {tuple(got)}."
    )


def check_parameters(layer: Module, **expected: tuple[int, ...]) -> None:
    """Raise if a parameter no longer has the shape with which the layer was made.

    Layers call this after a failed call, because JAX's own error does not say which array is wrong.
    """
    for name, shape in expected.items():
        got = getattr(layer, name)
        if got is not None and jnp.shape(got) != shape:
            raise ValueError(
                f"The {name} of {type(layer).__name__} has the shape {jnp.shape(got)}, but the "
                f"layer was made for the shape {shape}. Assign an array of that shape, or make "
                f"a new layer with other sizes."
            )


def as_array(layer: Module, x: Any) -> jax.Array:
    """The input of a layer as an array; it may be a number or a list of numbers.

    Raises:
      TypeError: it is anything else.
    """
    if hasattr(x, "dtype") and hasattr(x, "shape"):
        return x
    try:
        return jnp.asarray(x)
    except (TypeError, ValueError):
        raise TypeError(
            f"{type(layer).__name__} takes an array, but got an object of type "
            f"{type(x).__name__!r}."
        ) from None


def evaluates(layer: Module, flag: str, given: bool | None) -> bool:
    """The value of a flag that is True in evaluation: `deterministic` or `use_running_average`.

    It is the first of these that is not None: the argument of the call, the scope flag of that
    name, the opposite of the scope flag `training`, the attribute of the layer.

    Raises:
      MissingFlagError: all are None.
    """
    if given is not None:
        return given
    ambient = get_flag(flag, None)
    if ambient is not None:
        return ambient
    training = get_flag("training", None)
    if training is not None:
        return not training
    own = getattr(layer, flag)
    if own is not None:
        return own
    name = type(layer).__name__
    raise MissingFlagError(
        f"{name} does not know whether this is training: its attribute {flag!r} is None, and no "
        f"call or scope sets it. Call model.train() or model.eval(), or use nnx.scope(training=...) "
        f"or model.apply(training=...), or make it with {name}(..., {flag}=False)."
    )
