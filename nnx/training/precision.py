"""`nnx.training.master_weights`: train parameters in half precision through a float32 copy."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

__all__ = ["master_weights"]


class MasterState(NamedTuple):
    """The state of `master_weights`: the wide parameters, and the state of the inner transformation."""

    master: Any
    inner: Any


def master_weights(
    tx: optax.GradientTransformation, dtype: Any = jnp.float32
) -> optax.GradientTransformationExtraArgs:
    """Train half-precision parameters through a float32 copy (Micikevicius et al. 2018,
    https://arxiv.org/abs/1710.03740).

    Half precision rounds small steps away: a step of less than half a unit in the last place, 0.4 %
    of a bfloat16 number, would be lost. So the steps are added to a copy in the optimizer's state,
    and the model holds the rounded copy. Gradients, moments and weight decay use the wide dtype
    too. If a parameter was assigned since the last step, for example by `nnx.load_state`, the copy
    takes the new value.

    Args:
      tx: an optax transformation, for the copy.
      dtype: the dtype of the copy. Only narrower floating-point parameters get a copy.

    >>> import jax.numpy as jnp, nnx, optax
    >>> model = nnx.Linear.init(0)(2, 1, param_dtype=jnp.bfloat16)
    >>> optimizer = nnx.Optimizer(model, nnx.training.master_weights(optax.adam(1e-3)))
    >>> optimizer.update(model, nnx.grad(lambda m: m(jnp.ones(2)).sum())(model))
    >>> str(model.bias.dtype), str(optimizer.opt_state.master["bias"].dtype)
    ('bfloat16', 'float32')
    """
    inner = optax.with_extra_args_support(tx)

    def widened(x: Any) -> Any:
        floats = jnp.issubdtype(jnp.result_type(x), jnp.floating)
        wider = floats and jnp.promote_types(jnp.result_type(x), dtype) == jnp.dtype(dtype)
        return jnp.asarray(x, dtype) if wider else jnp.asarray(x)

    def init(params: Any) -> MasterState:
        master = jax.tree.map(widened, params)
        return MasterState(master, inner.init(master))

    def update(grads: Any, state: MasterState, params: Any = None, **extra: Any) -> Any:
        if params is None:
            raise ValueError(
                "nnx.training.master_weights needs the parameters: tx.update(grads, state, params)."
            )

        def current(master: Any, param: Any) -> Any:
            return jnp.where(
                master.astype(param.dtype) == param, master, param.astype(master.dtype)
            )

        master = jax.tree.map(current, state.master, params)
        grads = jax.tree.map(widened, grads)
        updates, new = inner.update(grads, state.inner, master, **extra)
        moved = optax.apply_updates(master, updates)
        # Keep the update in the wide dtype: added to the parameter it rounds once, to the rounded
        # copy.
        steps = jax.tree.map(lambda new, param: new - param.astype(new.dtype), moved, params)
        return steps, MasterState(moved, new)

    return optax.GradientTransformationExtraArgs(init, update)  # pyright: ignore[reportArgumentType]
