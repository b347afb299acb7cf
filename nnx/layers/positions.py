"""Positions of tokens: sinusoids to add, and rotations of queries and keys."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nnx.layers._common import Dtype, as_array, shape_error
from nnx.layers._numerics import wide
from nnx.layers._sharding import gathered
from nnx.module import Module

__all__ = ["RotaryEmbedding", "apply_rotary", "sinusoidal_positions"]


def sinusoidal_positions(
    length: int,
    features: int,
    *,
    base: float = 10000.0,
    interleaved: bool = True,
    dtype: Dtype = jnp.float32,
) -> jax.Array:
    """A table of fixed position encodings (Vaswani et al. 2017, https://arxiv.org/abs/1706.03762).

    Row p has the sines and cosines of `p / base ** (2 i / features)`. Add the table to the embeddings.
    When decoding, add the rows of the new positions, `table[positions]`.

    Args:
      length: number of positions.
      features: size of a row, an even number.
      base: the longest wavelength is nearly `2 π base`.
      interleaved: alternate sines and cosines, as in the paper; otherwise all sines come first.
      dtype: dtype of the table. It is computed in float64.

    Returns:
      An array of shape `(length, features)`.

    Raises:
      ValueError: `features` is odd.

    >>> import nnx
    >>> nnx.sinusoidal_positions(2, 4).round(2).tolist()[0]
    [0.0, 1.0, 0.0, 1.0]
    """
    if features % 2:
        raise ValueError(
            f"sinusoidal_positions pairs each sine with a cosine, so it needs an even number of "
            f"features, but got {features}."
        )
    angles = np.outer(np.arange(length), _frequencies(features, base))
    table = np.stack([np.sin(angles), np.cos(angles)], axis=-1 if interleaved else 1)
    return jnp.asarray(table.reshape(length, features), dtype)


def apply_rotary(
    x: jax.Array,
    positions: jax.Array,
    *,
    base: float = 10000.0,
    rotary_features: int | None = None,
    interleaved: bool = False,
) -> jax.Array:
    """Rotate pairs of features by angles that grow with the position; see `RotaryEmbedding`.

    Args:
      x: queries or keys of shape `(*batch, length, heads, features)`.
      positions: the position of each token, of shape `(length,)`, `(*batch, length)`, or any other shape
        that broadcasts to the latter.
      base, rotary_features, interleaved: as for `RotaryEmbedding`.

    Returns:
      An array of the shape and dtype of `x`. The rotation is computed in at least float32.

    Raises:
      ValueError: `rotary_features` is odd or too large; the positions do not fit.

    >>> import jax.numpy as jnp, nnx
    >>> x = jnp.ones((5, 2, 4))  # 5 tokens, 2 heads
    >>> y = nnx.apply_rotary(x, jnp.arange(5))
    >>> bool(jnp.allclose(jnp.linalg.norm(y, axis=-1), 2.0)), bool((y[0] == x[0]).all())
    (True, True)
    """
    features = x.shape[-1]
    rotated = features if rotary_features is None else rotary_features
    _check_features(rotated, features)
    positions = jnp.asarray(positions)
    _check_positions(x, positions)
    dtype = wide(x.dtype)
    angles = _angles(positions[..., None, None], _frequencies(rotated, base), dtype)
    sin, cos = jnp.sin(angles), jnp.cos(angles)
    # Both features of a pair must be on one device.
    x = gathered(x, [x.ndim - 1])
    part = x[..., :rotated].astype(dtype)
    if interleaved:
        a, b = part[..., 0::2], part[..., 1::2]
    else:
        a, b = jnp.split(part, 2, axis=-1)
    turned = (a * cos - b * sin, a * sin + b * cos)
    if interleaved:
        y = jnp.stack(turned, axis=-1).reshape(part.shape)
    else:
        y = jnp.concatenate(turned, axis=-1)
    y = y.astype(x.dtype)
    return y if rotated == features else jnp.concatenate([y, x[..., rotated:]], axis=-1)


class RotaryEmbedding(Module):
    """Rotary position embedding (Su et al. 2021, RoFormer, https://arxiv.org/abs/2104.09864).

    It rotates feature pair i of a query or key at position p by the angle
    `p / base ** (2 i / rotary_features)`. The product of a query and a key then depends on their
    distance but not on their positions.

    Each feature in the first half of the rotated features is paired with its counterpart in the second
    half, as in the usual Llama and GPT-NeoX checkpoints. With `interleaved`, it is paired with its
    neighbour, as in the paper and in GPT-J. Weights trained with one pairing give wrong results with the
    other, without an error.

    Args:
      features: size of a head.
      base: base of the wavelengths; long-context models use a larger one.
      rotary_features: how many of the first features to rotate; the others stay as they are. By default
        all are rotated.
      interleaved: pair neighbours.

    It has no parameters. `MultiHeadAttention(..., rotary=...)` applies it to queries and keys.

    Raises:
      ValueError: `rotary_features` is odd or more than `features`.

    >>> import jax, jax.numpy as jnp, nnx
    >>> rotary = nnx.RotaryEmbedding(4)
    >>> x = jax.random.normal(jax.random.key(0), (2, 5, 3, 4))
    >>> rotary(x).shape
    (2, 5, 3, 4)
    >>> bool(jnp.allclose(rotary(x)[:, 3:4], rotary(x[:, 3:4], jnp.array([3])), atol=1e-6))
    True
    """

    def __init__(
        self,
        features: int,
        *,
        base: float = 10000.0,
        rotary_features: int | None = None,
        interleaved: bool = False,
    ):
        self.features = features
        self.base = base
        self.rotary_features = features if rotary_features is None else rotary_features
        self.interleaved = interleaved
        _check_features(self.rotary_features, features)

    def __call__(self, x: jax.Array, positions: jax.Array | None = None) -> jax.Array:
        """Rotate `x`; its shape and dtype stay the same.

        Args:
          x: queries or keys of shape `(*batch, length, heads, features)`.
          positions: as for `apply_rotary`; by default 0, 1, ....

        Raises:
          ValueError: the heads have the wrong size, or the positions do not fit.
        """
        x = as_array(self, x)
        if x.ndim < 3 or x.shape[-1] != self.features:
            expected = f"(..., length, heads, {self.features})"
            raise shape_error(self, "queries or keys", expected, x.shape)
        return apply_rotary(
            x,
            jnp.arange(x.shape[-3]) if positions is None else positions,
            base=self.base,
            rotary_features=self.rotary_features,
            interleaved=self.interleaved,
        )


def _frequencies(features: int, base: float) -> np.ndarray:
    return base ** (-np.arange(0, features, 2) / features)


def _angles(positions: jax.Array, frequencies: np.ndarray, dtype: Dtype) -> jax.Array:
    """`positions * frequencies`, minus whole turns.

    A float32 product would be off by 0.004 at position 100,000. So a turn has 2³² steps, and whole
    positions are multiplied as integers, which wrap around after a turn.
    """
    if dtype == jnp.float64:
        return positions * jnp.asarray(frequencies, dtype)
    turns = frequencies / (2 * np.pi)
    steps = np.round(turns * 2.0**32)
    left_over = jnp.asarray(turns - steps / 2.0**32, dtype)
    whole = positions
    if not jnp.issubdtype(positions.dtype, jnp.integer):
        positions = positions.astype(dtype)
        whole = jax.lax.stop_gradient(jnp.floor(positions)).astype(jnp.int32)
    counted = whole.astype(jnp.uint32) * np.mod(steps, 2.0**32).astype(np.uint32)
    signed = jax.lax.bitcast_convert_type(counted, jnp.int32).astype(dtype)
    part = signed * 2.0**-32 + whole.astype(dtype) * left_over
    angles = part * (2 * np.pi)
    if whole is positions:
        return angles
    return angles + (positions - whole.astype(dtype)) * jnp.asarray(frequencies, dtype)


def _check_features(rotated: int, features: int) -> None:
    if rotated % 2 or not 0 < rotated <= features:
        raise ValueError(
            f"A rotary embedding rotates pairs of features, so it needs an even number of them, "
            f"from 2 to all {features}, but got {rotated}. Set rotary_features."
        )


def _check_positions(x: Any, positions: Any) -> None:
    wanted = x.shape[:-2]
    try:
        fits = jnp.broadcast_shapes(positions.shape, wanted) == wanted
    except ValueError:
        fits = False
    if not fits:
        raise ValueError(
            f"The positions of a rotary embedding must broadcast to {wanted}, the (*batch, length) of "
            f"its input of shape {x.shape}, but they have shape {positions.shape}."
        )
