"""`nnx.functional`: a function over Refs as a pure function, with the state in and out."""

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
    """A function that reads and writes Refs, as a pure function of their values.

    For solvers, samplers and any library that wants a function of arrays: the state goes in and
    comes out, and nothing of the caller's changes.

    Args:
      fn: a function that uses the modules and Refs of `trees` by closure; or a module or a bound
        method of one, which then is one of the trees.
      *trees: the modules and Refs whose values are the state. The paths are those of the tree, or,
        where there are several, of the tuple of them.

    Returns:
      `(pure, state)`: `pure(state, *args, **kwargs)` gives `(out, new_state)`, where `out` is what
      `fn(*args, **kwargs)` returns. `state` is a Partition of the values that the Refs of the trees
      have now; plain arrays are constants. `nnx.update(tree, new_state)` writes one back.

    Raises:
      TraceLevelError: `fn` writes a Ref that is in none of the trees.
      StructureError: `fn` returns a module or a Ref; it can return their values.

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
    # Plain arrays are read where they are, so they are constants.
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
                        f"was added, removed or replaced. The state has values only; make the "
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
                f"Give its module to nnx.functional, too: nnx.functional(fn, model, other)."
            )
    if opened.holds_identity(out):
        raise StructureError(
            f"{name} returns a module or a Ref, which a pure function cannot. Return the values: "
            f"nnx.get_partition(model), or model['params']."
        )
