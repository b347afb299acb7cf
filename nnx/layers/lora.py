"""Low-rank adapters: small matrices that are trained beside large ones that are not."""

from __future__ import annotations

import math
import types
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.nn import initializers

from nnx.layers._common import Dtype, Initializer, Metadata, promote_dtype, shape_error, zeros
from nnx.layers.linear import Linear
from nnx.module import Module, ref
from nnx.scope import make_rng, scope
from refx import Filter, Node, Ref, get_ref, to_predicate

__all__ = ["LoRA", "LoRALinear", "apply_lora", "merge_lora"]

M = TypeVar("M", bound=Module)
L = TypeVar("L", bound=Module)
Path = tuple[str, ...]

default_a_initializer: Initializer = initializers.he_uniform()


class LoRA(Module):
    """Low-rank adaptation (Hu et al. 2021, https://arxiv.org/abs/2106.09685).

    The product of two narrow matrices, `x @ lora_a @ lora_b`, added to what `base_module` returns.
    Their collection is `"lora"`, so `nnx.grad(loss, wrt="lora")` trains them alone.

    Args:
      in_features: size of the last axis of the input.
      lora_rank: number of columns of `lora_a` and of rows of `lora_b`.
      out_features: size of the last axis of the output.
      base_module: a module to call with the same input, cast to `dtype`; its result is added.
      dtype: dtype of the products; without it, what input and parameters promote to.
      param_dtype: dtype of `lora_a` and `lora_b`.
      a_initializer, b_initializer: initializers; `lora_b` is zero at first, and changes nothing.
      lora_param_type: the collection of the two.
      promote_dtype: a function for the casts, called with `(x, lora_a, lora_b), dtype=`.
      a_metadata, b_metadata: metadata of the Refs.
      alpha: the product is multiplied with `alpha / lora_rank`, with None not at all.

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
            raise ValueError(f"The rank of LoRA must be 1 at least, but is {lora_rank}.")
        if base_module is not None and not callable(base_module):
            raise TypeError(
                f"The base_module of LoRA must be callable, but is a {type(base_module).__name__}."
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

    def __call__(self, x: jax.Array, **kwargs: Any) -> jax.Array:
        """Apply it to an input of shape `(..., in_features)`; `kwargs` go to `base_module`.

        Raises:
          ValueError: the last axis has another size; the message has both shapes.
        """
        if not jnp.ndim(x) or jnp.shape(x)[-1] != self.in_features:
            raise shape_error(self, "an input", f"(..., {self.in_features})", jnp.shape(x))
        x, a, b = self.promote_dtype((x, self.lora_a, self.lora_b), dtype=self.dtype)
        y = x @ a @ b
        if self.scale != 1:
            y = y * self.scale
        return y if self.base_module is None else y + self.base_module(x, **kwargs)


class LoRALinear(Linear):
    """A `Linear` with a low-rank adapter beside it; see `LoRA` and `apply_lora`.

    Args:
      in_features, out_features: as for `Linear`.
      lora_rank: the rank of the adapter.
      lora_dtype, lora_param_dtype, a_initializer, b_initializer, lora_param_type,
        lora_promote_dtype, a_metadata, b_metadata, alpha: as for `LoRA`.
      **kwargs: all other arguments of `Linear`.

    Attributes: `kernel` and `bias` as of `Linear`, and the adapter `lora`, with `lora_a` and
    `lora_b`.

    >>> import jax, jax.numpy as jnp, nnx
    >>> layer = nnx.LoRALinear.init(jax.random.key(0))(3, 4, lora_rank=2)
    >>> list(nnx.grad(lambda m: m(jnp.ones((2, 3))).sum(), wrt="lora")(layer))
    [('lora', 'lora_a'), ('lora', 'lora_b')]
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
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
        super().__init__(in_features, out_features, **kwargs)
        self.lora = LoRA(
            in_features,
            lora_rank,
            out_features,
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

    def __call__(self, x: jax.Array) -> jax.Array:
        """Apply the layer to an input of shape `(..., in_features)`; errors as for `Linear`."""
        return super().__call__(x) + self.lora(x)


def apply_lora(
    model: M,
    rank: int,
    filter: Filter = ...,
    alpha: float | None = None,
    *,
    dtype: Dtype = None,
    param_dtype: Dtype = None,
    a_initializer: Initializer = default_a_initializer,
    b_initializer: Initializer = zeros,
    lora_param_type: Hashable = "lora",
    rngs: Any = None,
) -> M:
    """Put a low-rank adapter beside every `Linear` of a model, in place.

    In the place of each comes a `LoRALinear` with the same Refs of kernel and bias: one with one
    adapter for a layer that the model holds at several paths, in modules, lists, tuples and dicts.
    Layers that are stacked, as in `nnx.Stack`, get stacked adapters. What the model computes stays
    the same at first, as `lora_b` is zero.

    Args:
      model: the model.
      rank: the rank of the adapters.
      filter: which layers: a filter of paths, such as `nnx.PathContains("attention")`, or a
        predicate `(path, module) -> bool`. Subclasses of `Linear` are never taken.
      alpha: the adapters' products are multiplied with `alpha / rank`, with None not at all.
      dtype, param_dtype: of the adapters; without them, those of the layer.
      a_initializer, b_initializer, lora_param_type: as for `LoRA`.
      rngs: a key or a seed for the initial values, as for `nnx.scope`; without it they are drawn
        from the ambient stream `"params"`.

    Returns:
      The model.

    Raises:
      MissingStreamError: there is no `rngs` and no such stream.
      ValueError: no layer is selected (the message lists those that there are), or the model is
        itself a Linear.

    >>> import jax, jax.numpy as jnp, nnx
    >>> with nnx.scope(jax.random.key(0)):
    ...     model = nnx.Sequential(nnx.Linear(3, 8), nnx.relu, nnx.Linear(8, 2))
    >>> model = nnx.apply_lora(model, 4, nnx.PathContains("0"), rngs=jax.random.key(1))
    >>> list(model["lora"])
    [('layers', '0', 'lora', 'lora_a'), ('layers', '0', 'lora', 'lora_b')]
    """
    if rngs is not None:
        with scope(rngs):
            return apply_lora(
                model,
                rank,
                filter,
                alpha,
                dtype=dtype,
                param_dtype=param_dtype,
                a_initializer=a_initializer,
                b_initializer=b_initializer,
                lora_param_type=lora_param_type,
            )
    containers = list(_containers(model))
    linears = {path: node for path, node in containers if type(node) is Linear}
    selects = to_predicate(filter)
    selected = {path: node for path, node in linears.items() if selects(path, node)}
    if not selected:
        there = ", ".join(".".join(path) or "the model itself" for path in linears) or "none"
        raise ValueError(
            f"apply_lora selects no layer of {type(model).__name__} with the filter {filter!r}. "
            f"Its Linear layers are: {there}. A filter selects by these paths, as PathContains "
            f"does, or is a predicate (path, module) -> bool; a collection is none."
        )
    if () in selected:
        raise ValueError(
            "apply_lora puts other layers into a model, so a Linear alone cannot be the model. Put "
            "it into one, or make an nnx.LoRALinear and tie its kernel and bias."
        )

    def beside(linear: Linear) -> LoRALinear:
        stacked = linear.kernel.shape[:-2]
        lora = LoRA(
            linear.in_features,
            rank,
            linear.out_features,
            dtype=linear.dtype if dtype is None else dtype,
            param_dtype=linear.param_dtype if param_dtype is None else param_dtype,
            a_initializer=_stacked(a_initializer, stacked),
            b_initializer=_stacked(b_initializer, stacked),
            lora_param_type=lora_param_type,
            alpha=alpha,
        )
        return _made_of(LoRALinear, {**linear.__getstate__(), "lora": lora})

    # All are made before the first is put in, so that a failure changes nothing.
    _replace(containers, {id(linear): beside(linear) for linear in selected.values()})
    return model


def merge_lora(model: M) -> M:
    """Add the adapter of every `LoRALinear` of a model to its kernel, in place.

    The Ref of the kernel gets `kernel + scale * lora_a @ lora_b`, in its dtype, and a `Linear` with
    the same Refs comes in the place of the layer. What the model computes stays the same, but for
    rounding.

    Returns:
      The model.

    Raises:
      ValueError: the model has no `LoRALinear`; or a kernel is tied to another place, which would
        change, too.

    >>> import jax, jax.numpy as jnp, nnx
    >>> with nnx.scope(jax.random.key(0)):
    ...     model = nnx.Sequential(nnx.LoRALinear(3, 4, lora_rank=2))
    >>> nnx.merge_lora(model)["params"]
    Partition({
      'layers.0.kernel': float32[3,4],
      'layers.0.bias': float32[4],
    })
    """
    containers = list(_containers(model))
    layers = [(path, layer) for path, layer in containers if type(layer) is LoRALinear and path]
    if not layers:
        raise ValueError(
            f"merge_lora found no LoRALinear in {type(model).__name__}. One that is itself the "
            f"model has no place to put a Linear in; put it into a module."
        )
    kernels: list[tuple[Ref[Any], jax.Array]] = []
    plain: dict[int, Module] = {}
    for path, layer in layers:
        kernel = get_ref(layer, "kernel")
        for other, holder in containers:
            if holder is not layer and any(x is kernel for _, x in _children(holder)):
                raise ValueError(
                    f"The kernel of {'.'.join(path)!r} is tied to {'.'.join(other)!r}, which would "
                    f"change, too. Untie it first: layer.kernel = nnx.Ref(layer.kernel, 'params')."
                )
        lora = layer.lora
        product = lora.lora_a @ lora.lora_b * lora.scale
        kernels.append((kernel, (kernel.value + product).astype(kernel.value.dtype)))
        attributes = layer.__getstate__()
        plain[id(layer)] = _made_of(Linear, {k: v for k, v in attributes.items() if k != "lora"})
    for kernel, value in kernels:
        kernel.value = value
    _replace(containers, plain)
    return model


def _stacked(init: Initializer, lead: tuple[int, ...]) -> Initializer:
    """The initializer with leading axes, along which the values are independent."""
    if not lead:
        return init

    def stacked(key: Any, shape: tuple[int, ...], dtype: Dtype) -> jax.Array:
        keys = jax.random.split(key, math.prod(lead))
        drawn = jax.vmap(lambda key: init(key, shape, dtype))(keys)
        return drawn.reshape(*lead, *shape)

    return stacked


def _made_of(cls: type[L], attributes: Mapping[str, Any]) -> L:
    """A layer with these attributes, Refs included, and nothing drawn or allocated."""
    layer = cls.__new__(cls)
    for name, value in attributes.items():
        setattr(layer, name, value)
    return layer


def _containers(root: Any) -> Iterator[tuple[Path, Any]]:
    """The modules, lists and dicts of a tree, each once, with their paths."""
    seen: set[int] = set()
    todo: list[tuple[Path, Any]] = [((), root)]
    while todo:
        path, x = todo.pop()
        if isinstance(x, Node | list | dict):
            if id(x) in seen:
                continue
            seen.add(id(x))
            yield path, x
        todo += [((*path, str(name)), child) for name, child in reversed(_children(x))]


def _children(x: Any) -> list[tuple[Any, Any]]:
    if isinstance(x, Node):
        # Not vars(), since whoever has that dict could change it.
        return list(x.__getstate__().items())
    if isinstance(x, dict):
        return list(x.items())
    if isinstance(x, types.MethodType):
        return [("__self__", x.__self__)]
    return list(enumerate(x)) if isinstance(x, list | tuple) else []


def _replace(containers: list[tuple[Path, Any]], new: Mapping[int, Module]) -> None:
    """Put other modules in the place of some, by their ids, wherever the containers hold them."""

    def replaced(x: Any) -> Any:
        if isinstance(x, tuple):
            parts = [replaced(part) for part in x]
            if any(part is not old for part, old in zip(parts, x, strict=True)):
                return type(x)(*parts) if hasattr(x, "_fields") else tuple(parts)
        if isinstance(x, types.MethodType) and (owner := replaced(x.__self__)) is not x.__self__:
            return getattr(owner, x.__func__.__name__)
        return new.get(id(x), x)

    for _, container in containers:
        for name, child in _children(container):
            if (other := replaced(child)) is not child:
                if isinstance(container, Node):
                    setattr(container, name, other)
                else:
                    container[name] = other
