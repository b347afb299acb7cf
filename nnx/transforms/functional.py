"""`nnx.functional`: turn a function that uses Refs into a pure one, with the state in and out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from nnx.transforms.callables import function_name, unbound
from refx import DagDef, Partition, StructureError, TraceLevelError, merge, opened, split
from refx.dag import refs
from refx.describe import describe
from refx.frame import Frame, StandIn

__all__ = ["functional"]


def functional(
    fn: Callable[..., Any], *trees: Any
) -> tuple[Callable[..., tuple[Any, Partition]], Partition]:
    """Turn a function that reads and writes Refs into a pure function of their values.

    Use it for solvers, samplers and any library that wants a function of arrays. The state goes in and
    comes out, and the caller's modules do not change.

    Args:
      fn: a function that closes over the modules and Refs in `trees`; or a module or a bound method of
        a module, and then the module is one of the trees.
      *trees: the modules and Refs whose values are the state. The paths are those of the tree, or
        those of the tuple of trees, if there are several.

    Returns:
      `(pure, state)`. `pure(state, *args, **kwargs)` returns `(out, new_state)`, where `out` is the
      result of `fn(*args, **kwargs)`. `state` is a Partition of the current values of the Refs in the
      trees; plain arrays are constants. `nnx.update(tree, new_state)` writes a state back.

    Raises:
      TraceLevelError: `fn` writes a Ref that is not in any of the trees.
      StructureError: `fn` changes the structure of a tree, or returns a module or a Ref. It may return
        their values.

    >>> import jax, jax.numpy as jnp, nnx
    >>> norm = nnx.BatchNorm(2)
    >>> pure, state = nnx.functional(lambda x: norm(x).sum(), norm)
    >>> x = jnp.array([[1.0, 2.0], [3.0, 4.0]])
    >>> out, new_state = jax.jit(pure)(state, x)
    >>> bool((new_state["mean"] > 0).all()), bool((norm.mean == 0).all())
    (True, True)
    >>> nnx.update(norm, new_state)
    """
    inner, bound = unbound(fn)
    trees = tuple({id(tree): tree for tree in (*bound, *trees)}.values())
    root = trees[0] if len(trees) == 1 else trees
    name = f"nnx.functional({function_name(fn)})"
    dagdef, values = split(root)
    cells = list(refs(root).values())
    # The function reads plain arrays from the original modules, so they are constants.
    constants = {path: values[path] for path in dagdef.leaf_paths}

    def pure(state: Partition, *args: Any, **kwargs: Any) -> tuple[Any, Partition]:
        frame = Frame(name)
        with frame:
            try:
                copies = merge(dagdef, state, constants)
                stand_ins = list(refs(copies).values())
                pairs = zip(cells, stand_ins, strict=True)
                frame.stand_ins.update((ref, StandIn(ref, inner)) for ref, inner in pairs)
                first = copies if len(trees) == 1 else copies[0]
                out = inner(*((first,) if bound else ()), *args, **kwargs)
                _check(name, frame, out)
                after, new = split(copies)
                if after is not dagdef:
                    raise StructureError(
                        f"{name} changed the structure of a module: an attribute, a list or a Ref "
                        f"was added, removed or replaced. The state holds only values: make the "
                        f"change before nnx.functional."
                    )
                return out, _of_refs(new, dagdef)
            finally:
                frame.close()

    return pure, _of_refs(values, dagdef)


def _of_refs(values: Partition, dagdef: DagDef) -> Partition:
    return Partition({path: values[path] for path in dagdef.ref_paths})


def _check(name: str, frame: Frame, out: Any) -> None:
    for met in frame.met():
        if met.was_written(frame):
            raise TraceLevelError(
                f"{describe(met.ref, met.owner)} was written in {name}, but it is not part of the state. "
                f"Pass its module to nnx.functional too: nnx.functional(fn, model, other)."
            )
    if opened.holds_identity(out):
        raise StructureError(
            f"{name} returns a module or a Ref, but a pure function cannot. Return the values: "
            f"nnx.get_partition(model), or model['params']."
        )
