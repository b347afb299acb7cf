"""`nnx.training.master_weights`: parameters in half precision, trained as if they were not."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

__all__ = ["master_weights"]


class MasterState(NamedTuple):
    """The state of `master_weights`: the wide parameters, and the state of what trains them."""

    master: Any
    inner: Any


def master_weights(
    tx: optax.GradientTransformation, dtype: Any = jnp.float32
) -> optax.GradientTransformationExtraArgs:
    """Train half-precision parameters by a copy in float32 (Micikevicius et al. 2018,
    https://arxiv.org/abs/1710.03740).

    A step of less than half a unit in the last place, 0.4 % of a bfloat16 number, would be lost. So the
    steps are added up in the copy, which is in the state of the optimizer, and the model has the
    copy rounded. Gradients, moments and weight decay are in the wide dtype too. A parameter that was
    assigned since the last step, as by `nnx.load_state`, is taken into the copy.

    Args:
      tx: an optax transformation, for the copy.
      dtype: dtype of the copy. Parameters that are no narrower floating-point numbers are their own.

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
        # In the wide dtype, so that the sum with the parameter rounds once, to what the copy rounds to.
        steps = jax.tree.map(lambda new, param: new - param.astype(new.dtype), moved, params)
        return steps, MasterState(moved, new)

    return optax.GradientTransformationExtraArgs(init, update)  # pyright: ignore[reportArgumentType]
