"""Layers that call another layer with normalized weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.nn import initializers

from nnx.layers._common import Dtype, Initializer, evaluates, ones, promote_dtype
from nnx.layers._numerics import result_dtype, wide
from nnx.layers._sharding import as_placed, fitted, gathered, merged
from nnx.layers._stand_in import call_with
from nnx.module import Module
from nnx.scope import make_rng
from refx import All, Filter, PathContains, Ref, refs, to_predicate

__all__ = ["SpectralNorm", "WeightNorm"]

Path = tuple[str, ...]

_HOW = "with normalized weights"


class WeightNorm(Module):
    """Weight normalization (Salimans and Kingma 2016, https://arxiv.org/abs/1602.07868).

    It calls a layer with normalized weights, times a learned scale: their norm over all axes except
    the feature axes is 1. The layer's own parameters stay as they are, and their gradients flow through
    the normalization.

    Args:
      layer_instance: the layer, any module that can be called.
      feature_axes: the axes along which each position has its own norm; None means one norm for the
        whole array.
      use_scale: whether to multiply by a learned scale.
      scale_init: initializer of the scale.
      epsilon: added to the square of the norm.
      dtype: dtype of the normalized weights; by default, the dtype that weight and scale promote to. They
        are computed in at least float32.
      param_dtype: dtype of the scale.
      variable_filter: which parameters of the layer to normalize.
      promote_dtype: a function for the cast, called with `(weight,), dtype=`.

    Attributes: `layer_instance`, and `scales`: nested dicts with the layer's names, which hold the
    Refs of the scales in the collection `"params"`, or None.

    Raises:
      ValueError: the filter selects no parameter of the layer.

    >>> import jax, jax.numpy as jnp, nnx
    >>> with nnx.scope(jax.random.key(0)):
    ...     layer = nnx.WeightNorm(nnx.Linear(8, 4))
    >>> layer(jnp.ones((5, 8))).shape, layer["params"]["scales.kernel"].shape
    ((5, 4), (4,))
    """

    def __init__(
        self,
        layer_instance: Module,
        *,
        feature_axes: int | tuple[int, ...] | None = -1,
        use_scale: bool = True,
        scale_init: Initializer = ones,
        epsilon: float = 1e-12,
        dtype: Dtype = None,
        param_dtype: Dtype = jnp.float32,
        variable_filter: Filter = PathContains("kernel"),  # noqa: B008 — never changed
        promote_dtype: Callable[..., Any] = promote_dtype,
    ):
        self.layer_instance = layer_instance
        if feature_axes is None or isinstance(feature_axes, int):
            self.feature_axes = () if feature_axes is None else (feature_axes,)
        else:
            self.feature_axes = tuple(feature_axes)
        self.use_scale = use_scale
        self.scale_init = scale_init
        self.epsilon = epsilon
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.variable_filter = to_predicate(variable_filter)
        self.promote_dtype = promote_dtype
        selected = self._selected()
        if not selected:
            raise ValueError(
                f"The variable_filter of WeightNorm selects no parameter of "
                f"{type(layer_instance).__name__}, which has "
                f"{_listed(path for path, _ in _parameters(layer_instance))}."
            )
        self.scales: dict[str, Any] | None = None
        if use_scale:
            self.scales = {}
            for path, weight in selected.items():
                shape = tuple(weight.shape[axis] for axis in self._features(path, weight))
                key = None if scale_init is ones else make_rng("params")
                _put(self.scales, path, Ref(scale_init(key, shape, param_dtype), "params"))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the layer with these arguments and normalized weights.

        The layer keeps what it writes to Refs, such as batch statistics.

        Raises:
          ValueError: a parameter was added to the layer after it was wrapped.
        """
        weights = {path: self._normalized(path, w) for path, w in self._selected().items()}
        return call_with(self.layer_instance, weights, _HOW, args, kwargs)

    def _selected(self) -> dict[Path, jax.Array]:
        selects = All("params", self.variable_filter)
        found = refs(self.layer_instance).items()
        return {path: cell.value for path, cell in found if selects(path, cell)}

    def _features(self, path: Path, weight: jax.Array) -> tuple[int, ...]:
        if any(not -weight.ndim <= axis < weight.ndim for axis in self.feature_axes):
            raise ValueError(
                f"WeightNorm has the feature_axes {self.feature_axes}, but the parameter "
                f"{'.'.join(path)!r} has the shape {tuple(weight.shape)}. Choose axes that it has, "
                f"or use variable_filter to select parameters that have them."
            )
        return tuple(sorted({axis % weight.ndim for axis in self.feature_axes}))

    def _normalized(self, path: Path, weight: jax.Array) -> jax.Array:
        features = self._features(path, weight)
        others = tuple(i for i in range(weight.ndim) if i not in features)
        scale = None if self.scales is None else _get(self, self.scales, path).value
        dtype = result_dtype(self.dtype, weight, scale)
        # Squares of half-precision numbers vanish below 1e-4 and overflow above 255.
        unit = _unit(weight.astype(wide(weight.dtype)), others, self.epsilon)
        if scale is not None:
            shape = [n if i in features else 1 for i, n in enumerate(unit.shape)]
            unit = unit * fitted(scale, shape, unit)
        return self.promote_dtype((unit,), dtype=dtype)[0]


class SpectralNorm(Module):
    """Spectral normalization (Miyato et al. 2018, https://arxiv.org/abs/1802.05957).

    It calls a layer with each weight matrix divided by its largest singular value. A power iteration
    finds that value, and continues from call to call. An array with more axes counts as a matrix: its
    last axis, and all others merged. Vectors and scalars stay as they are.

    Args:
      layer_instance: the layer, any module that can be called.
      n_steps: number of steps of the power iteration in a call.
      epsilon: added to the squares of the norms.
      dtype: dtype of the normalized weights; by default the dtype of the weight. They are computed in
        at least float32.
      param_dtype: dtype of the statistics.
      error_on_non_matrix: whether a parameter with more than two axes is an error.
      update_stats: whether a call keeps the result of the power iteration. These override it, in this
        order: the argument of the call, the opposite of the scope flag `use_running_average`, the scope
        flag `training`. `model.train()` and `model.eval()` set it.

    Attributes: `layer_instance`, and `batch_stats`: nested dicts with the layer's names, which hold `u`
    of shape `(1, n)` and `sigma` of shape `()` for each matrix with n columns. Both are Refs in the
    collection `"batch_stats"`.

    Raises:
      ValueError: `n_steps` is less than 1; or a parameter is not a matrix, with `error_on_non_matrix`.

    >>> import jax, jax.numpy as jnp, nnx
    >>> with nnx.scope(jax.random.key(0)):
    ...     layer = nnx.SpectralNorm(nnx.Linear(4, 5), n_steps=50)
    >>> y = layer(jnp.ones((3, 4)), update_stats=True)
    >>> largest = jnp.linalg.norm(layer.layer_instance.kernel, 2)
    >>> bool(jnp.allclose(layer["batch_stats"]["batch_stats.kernel.sigma"], largest, rtol=1e-4))
    True
    """

    def __init__(
        self,
        layer_instance: Module,
        *,
        n_steps: int = 1,
        epsilon: float = 1e-12,
        dtype: Dtype = None,
        param_dtype: Dtype = jnp.float32,
        error_on_non_matrix: bool = False,
        update_stats: bool = True,
    ):
        if n_steps < 1:
            raise ValueError(f"SpectralNorm needs at least one step, but n_steps is {n_steps}.")
        self.layer_instance = layer_instance
        self.n_steps = n_steps
        self.epsilon = epsilon
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.error_on_non_matrix = error_on_non_matrix
        # train() and eval() set the attribute with this name.
        self.use_running_average = not update_stats
        self.batch_stats: dict[str, Any] = {}
        for path, weight in self._matrices().items():
            shape = (1, weight.shape[-1])
            u = initializers.normal()(make_rng("params"), shape, param_dtype)
            _put(self.batch_stats, (*path, "u"), Ref(u, "batch_stats"))
            sigma = jnp.ones((), param_dtype)
            _put(self.batch_stats, (*path, "sigma"), Ref(sigma, "batch_stats"))

    def __call__(self, x: Any, update_stats: bool | None = None, **kwargs: Any) -> Any:
        """Call the layer as `layer(x, **kwargs)` with normalized weights.

        The layer keeps what it writes to Refs, such as batch statistics.

        Args:
          x: the layer's input.
          update_stats: whether to keep the result of the power iteration.
          **kwargs: passed on to the layer.

        Raises:
          ValueError: a parameter was added to the layer after it was wrapped.
        """
        if update_stats is None:
            update_stats = not evaluates(self, "use_running_average", None)
        weights = {p: self._normalized(p, w, update_stats) for p, w in self._matrices().items()}
        return call_with(self.layer_instance, weights, _HOW, (x,), kwargs)

    def _matrices(self) -> dict[Path, jax.Array]:
        found: dict[Path, jax.Array] = {}
        for path, weight in _parameters(self.layer_instance):
            if weight.ndim > 2 and self.error_on_non_matrix:
                raise ValueError(
                    f"SpectralNorm has error_on_non_matrix=True, and the parameter "
                    f"{'.'.join(path)!r} of {type(self.layer_instance).__name__} has the shape "
                    f"{tuple(weight.shape)}, which is not a matrix."
                )
            if weight.ndim > 1:
                found[path] = weight
        return found

    def _normalized(self, path: Path, weight: jax.Array, update_stats: bool) -> jax.Array:
        u_ref = _get(self, self.batch_stats, (*path, "u"))
        sigma_ref = _get(self, self.batch_stats, (*path, "sigma"))
        wide_weight = weight.astype(wide(weight.dtype))
        matrix = merged(wide_weight, weight.ndim - 1)
        # The vectors are whole on every device, so only the matrix determines the sharding of a product.
        u = v = gathered(u_ref.value.astype(wide(u_ref.value.dtype, weight.dtype)), [0, 1])
        for _ in range(self.n_steps):
            v = gathered(_unit(u @ matrix.T, None, self.epsilon), [1])
            u = gathered(_unit(v @ matrix, None, self.epsilon), [1])
        # The singular vectors count as constants: at the optimum, sigma is stationary in them.
        u, v = jax.lax.stop_gradient(u), jax.lax.stop_gradient(v)
        sigma = (v @ matrix @ u.T)[0, 0]
        if update_stats:
            u_ref.value = as_placed(u.astype(u_ref.value.dtype), u_ref.value)
            sigma_ref.value = jax.lax.stop_gradient(sigma).astype(sigma_ref.value.dtype)
        unit = wide_weight / jnp.where(sigma != 0, sigma, 1)
        # The statistics are in float32, but they must not turn the weights into float32.
        return unit.astype(weight.dtype if self.dtype is None else self.dtype)


def _unit(x: jax.Array, axes: tuple[int, ...] | None, epsilon: float) -> jax.Array:
    return x * jax.lax.rsqrt((x * x).sum(axes, keepdims=True) + epsilon)


def _parameters(layer: Module) -> list[tuple[Path, jax.Array]]:
    return [(p, cell.value) for p, cell in refs(layer).items() if cell.collection == "params"]


def _put(tree: dict[str, Any], path: Path, cell: Ref[Any]) -> None:
    for name in path[:-1]:
        tree = tree.setdefault(name, {})
    tree[path[-1]] = cell


def _get(layer: Module, tree: dict[str, Any], path: Path) -> Ref[Any]:
    at: Any = tree
    for name in path:
        at = at.get(name) if isinstance(at, dict) else None
    if isinstance(at, Ref):
        return at
    raise ValueError(
        f"{type(layer).__name__} has no statistics or scale for {'.'.join(path)!r}: the parameter was "
        f"added to the layer after it was wrapped. Wrap the layer when it is complete."
    )


def _listed(paths: Any) -> str:
    return ", ".join(".".join(path) for path in paths) or "none"
