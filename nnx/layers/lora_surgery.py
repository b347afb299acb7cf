"""Putting low-rank adapters into a model, and adding them to its kernels."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from typing import Any, TypeVar

import jax

from nnx.layers._common import Dtype, Initializer, zeros
from nnx.layers._matrices import matrix_of
from nnx.layers.conv import Conv
from nnx.layers.embedding import Embed
from nnx.layers.linear import Linear
from nnx.layers.linear_general import Einsum, LinearGeneral
from nnx.layers.lora import LoRALinear, LoRALinearGeneral, beside, default_a_initializer
from nnx.layers.lora_layers import LoRAConv, LoRAEinsum, LoRAEmbed
from nnx.layers.weight_norm import SpectralNorm, WeightNorm
from nnx.module import Module
from nnx.scope import scope
from nnx.surgery import modules, replace, selector
from refx import Filter, Ref, get_ref, opened, refs

__all__ = ["apply_lora", "merge_lora"]

M = TypeVar("M", bound=Module)
L = TypeVar("L", bound=Module)
Path = tuple[str, ...]

_ADAPTED: dict[type[Module], type[Module]] = {
    Linear: LoRALinear,
    LinearGeneral: LoRALinearGeneral,
    Einsum: LoRAEinsum,
    Conv: LoRAConv,
    Embed: LoRAEmbed,
}
_PLAIN = {adapted: plain for plain, adapted in _ADAPTED.items()}


def apply_lora(
    model: M,
    rank: int,
    filter: Filter = (Linear, LinearGeneral),
    alpha: float | None = None,
    *,
    dtype: Dtype = None,
    param_dtype: Dtype = None,
    a_initializer: Initializer = default_a_initializer,
    b_initializer: Initializer = zeros,
    lora_param_type: Hashable = "lora",
    rngs: Any = None,
) -> M:
    """Put low-rank adapters beside layers of a model, in place: by default, its linear layers.

    `Linear`, `LinearGeneral`, `Einsum`, `Conv` and `Embed` can have an adapter. Each selected layer is
    replaced by a `LoRALinear`, `LoRALinearGeneral`, `LoRAEinsum`, `LoRAConv` or `LoRAEmbed` with the
    same Refs. A layer that the model holds at several paths gets a single adapter. Stacked layers, as in
    `nnx.Stack`, get stacked adapters. At first the model computes the same as before, because `lora_b`
    is zero.

    Args:
      model: the model.
      rank: the rank of the adapters.
      filter: which of these layers to select: a class, a filter of paths such as
        `nnx.PathContains("query")`, a predicate `(path, module) -> bool`, a tuple of these, or `...` for
        all. By default, every `Linear` and `LinearGeneral`. Other layers, subclasses of these, and layers
        that already have an adapter are never selected.
      alpha: if set, the adapters' products are multiplied by `alpha / rank`.
      dtype, param_dtype: dtypes of the adapters; by default, those of the layer.
      a_initializer, b_initializer, lora_param_type: as for the layers, such as `LoRALinear`.
      rngs: a key or a seed for the initial values, as for `nnx.scope`; by default, keys come
        from the stream `"params"` of the scope.

    Returns:
      The model.

    Raises:
      MissingStreamError: `rngs` is missing, and no scope has the stream.
      ValueError: no layer is selected (the message lists the possible ones); the shape of a kernel does
        not match the settings of its layer, for example after stacking along another axis than the first;
        or the model is itself such a layer.

    >>> import jax, jax.numpy as jnp, nnx
    >>> with nnx.scope(jax.random.key(0)):
    ...     model = nnx.Sequential(nnx.Linear(3, 8), nnx.relu, nnx.Linear(8, 2))
    >>> model = nnx.apply_lora(model, 4, nnx.PathContains("0"), rngs=jax.random.key(1))
    >>> list(model["lora"])
    [('layers', '0', 'lora', 'lora_a'), ('layers', '0', 'lora', 'lora_b')]

    Adapt the projections of queries and values in an attention:

    >>> attention = nnx.MultiHeadAttention.init(jax.random.key(0))(num_heads=4, in_features=16)
    >>> which = nnx.PathContains("query"), nnx.PathContains("value")
    >>> nnx.apply_lora(attention, 2, which, rngs=jax.random.key(1))["lora"]
    Partition({
      'query.lora.lora_a': float32[16,2],
      'query.lora.lora_b': float32[2,16],
      'value.lora.lora_a': float32[16,2],
      'value.lora.lora_b': float32[2,16],
    })
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
    found = modules(model)
    layers = {path: node for path, node in found.items() if type(node) in _ADAPTED}
    selects = selector(filter)
    selected = {path: node for path, node in layers.items() if selects(path, node)}
    if not selected:
        adapted = [path for path, node in found.items() if type(node) in _PLAIN]
        already = f", and {_listed(adapted)} with an adapter already" if adapted else ""
        raise ValueError(
            f"apply_lora selects no layer of {type(model).__name__} with the filter {filter!r}. "
            f"Its {_kinds(layers)} layers are: {_listed(layers)}{already}. Pass a filter of these "
            f"paths, such as PathContains, or a class, or a predicate (path, module) -> bool, but not "
            f"a collection."
        )
    if () in selected:
        name, weight = type(model).__name__, "embedding" if isinstance(model, Embed) else "kernel"
        raise ValueError(
            f"apply_lora replaces layers inside a model, so {'an' if name[0] in 'AEIOU' else 'a'} {name} "
            f"alone cannot be the model. Put it in a module, or make an nnx.LoRA{name} and tie its {weight}."
        )

    def adapted_one(path: Path, layer: Any) -> Module:
        try:
            lora = beside(
                layer,
                rank,
                dtype=layer.dtype if dtype is None else dtype,
                param_dtype=layer.param_dtype if param_dtype is None else param_dtype,
                a_initializer=a_initializer,
                b_initializer=b_initializer,
                lora_param_type=lora_param_type,
                alpha=alpha,
            )
        except ValueError as error:
            error.add_note(f"This happened in apply_lora, for the layer {'.'.join(path)!r}.")
            raise
        return _made_of(_ADAPTED[type(layer)], {**layer.__getstate__(), "lora": lora})

    paths = {id(layer): path for path, layer in selected.items()}
    return replace(
        model,
        lambda path, layer: path in selected,
        lambda layer: adapted_one(paths[id(layer)], layer),
    )


def merge_lora(model: M) -> M:
    """Add the adapter of every layer that has one, such as a `LoRALinear`, to its kernel.

    This happens in place: the Ref of the kernel (in an `Embed`, the embedding) gets the value
    `kernel + scale * lora_a @ lora_b`, in its dtype. The layer is replaced by one without an adapter,
    such as a `Linear`, with the same Refs. The model computes the same as before, up to rounding.

    Returns:
      The model.

    Raises:
      ValueError: the model has no such layer; a kernel is tied to another place, which would
        change too; or `nnx.WeightNorm` or `nnx.SpectralNorm` normalizes a kernel, and would then
        normalize the sum.

    >>> import jax, jax.numpy as jnp, nnx
    >>> with nnx.scope(jax.random.key(0)):
    ...     model = nnx.Sequential(nnx.LoRALinear(3, 4, lora_rank=2))
    >>> nnx.merge_lora(model)["params"]
    Partition({
      'layers.0.kernel': float32[3,4],
      'layers.0.bias': float32[4],
    })
    """
    found = modules(model)
    layers = {path: layer for path, layer in found.items() if type(layer) in _PLAIN and path}
    if not layers:
        raise ValueError(
            f"merge_lora found no layer with an adapter, such as a LoRALinear, in "
            f"{type(model).__name__}. If the layer is itself the model, it cannot be replaced: put it "
            f"in a module."
        )
    kernels: list[tuple[Ref[Any], jax.Array]] = []
    for path, layer in layers.items():
        matrix = matrix_of(layer)
        kernel = get_ref(layer, matrix.name)
        _check_merge(found, path, layer, kernel, matrix.name)
        lora = layer.lora  # pyright: ignore[reportAttributeAccessIssue]
        product = matrix.weight(lora.lora_a @ lora.lora_b * lora.scale)
        kernels.append((kernel, (kernel.value + product).astype(kernel.value.dtype)))
    replace(model, lambda path, layer: path in layers, _without_adapter)
    for kernel, value in kernels:
        kernel.value = value
    return model


def _without_adapter(layer: Any) -> Module:
    kept = {name: value for name, value in layer.__getstate__().items() if name != "lora"}
    return _made_of(_PLAIN[type(layer)], kept)


def _check_merge(
    found: dict[Path, Any], path: Path, layer: Any, kernel: Ref[Any], name: str
) -> None:
    """Raise if adding the product to this kernel would have other effects."""
    for other, holder in found.items():
        if holder is not layer and any(x is kernel for x in _direct(holder)):
            raise ValueError(
                f"The {name} of {'.'.join(path)!r} is tied to {'.'.join(other)!r}, which would "
                f"change too. Untie it first: layer.{name} = nnx.Ref(layer.{name}, 'params')."
            )
        if isinstance(holder, WeightNorm | SpectralNorm) and any(
            cell is kernel
            and (isinstance(holder, SpectralNorm) or holder.variable_filter(at, cell))
            for at, cell in refs(holder.layer_instance).items()
        ):
            raise ValueError(
                f"The {name} of {'.'.join(path)!r} is normalized by {type(holder).__name__}, but "
                f"the product of its adapter is not, so the two cannot be added. Keep the adapter."
            )


def _direct(module: Any) -> list[Any]:
    """The objects that a module holds itself, also in lists and tuples, but not in other modules."""
    held = list(module.__getstate__().values())
    return opened.leaves(held)


def _kinds(layers: Mapping[Path, Any]) -> str:
    """The names of the linear classes, and of the other classes among these layers."""
    linear = [Linear, LinearGeneral]
    others = [kind for kind in _ADAPTED if kind not in linear]
    there = {type(layer) for layer in layers.values()}
    names = [kind.__name__ for kind in linear + [kind for kind in others if kind in there]]
    return f"{', '.join(names[:-1])} and {names[-1]}"


def _listed(paths: Iterable[Path]) -> str:
    return ", ".join(".".join(path) or "the model itself" for path in paths) or "none"


def _made_of(cls: type[L], attributes: Mapping[str, Any]) -> L:
    """A layer with these attributes, including Refs, made without drawing or allocating anything."""
    layer = cls.__new__(cls)
    for name, value in attributes.items():
        setattr(layer, name, value)
    return layer
