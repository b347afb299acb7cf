"""The markers: named equations in the program that JAX traces.

A marker binds our own primitive, so it is part of the program and not of the Python code. JAX may
cache the program, batch it, differentiate it or run it twice: the program still says which value
belongs there.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from nnx.purify.errors import MarkerError
from refx.frame import Frame
from refx.text import a_kind
from refx.trace import trace_ref

__all__ = ["fixed", "intermediate", "param", "prefix", "trivialize"]

T = TypeVar("T")


class Spec(NamedTuple):
    """The declaration of a name: a pytree of shapes and dtypes. It is hashable, so a program can hold it."""

    treedef: Any
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[Any, ...]

    def tree(self) -> Any:
        """The pytree of `jax.ShapeDtypeStruct`."""
        leaves = map(jax.ShapeDtypeStruct, self.shapes, self.dtypes)
        return jax.tree.unflatten(self.treedef, list(leaves))

    def avals(self) -> list[Any]:
        """The types of the leaves, as JAX traces them."""
        return list(map(ShapedArray, self.shapes, self.dtypes))

    def __str__(self) -> str:
        leaves = [
            f"{dtype}[{','.join(map(str, shape))}]"
            for shape, dtype in zip(self.shapes, self.dtypes, strict=True)
        ]
        return str(jax.tree.unflatten(self.treedef, leaves)).replace("'", "")

    @property
    def size(self) -> int:
        """The number of elements in all leaves."""
        return sum(map(math.prod, self.shapes))


# Distinguishes two calls of a marker from one call that a transformation has copied.
_tokens = itertools.count()

source_p = Primitive("purify_source")
source_p.multiple_results = True


def _zeros(*, spec: Spec, **_: Any) -> list[jax.Array]:
    # Outside `purify`, a marker is an array of zeros.
    return [jnp.zeros(s, d) for s, d in zip(spec.shapes, spec.dtypes, strict=True)]


@source_p.def_abstract_eval
def _source_types(*, spec: Spec, **_: Any) -> list[Any]:
    return spec.avals()


source_p.def_impl(_zeros)
mlir.register_lowering(source_p, mlir.lower_fun(_zeros, multiple_results=True))


def trivialize(primitive: Primitive) -> Primitive:
    """Make a primitive act as the identity, so that it only marks a place in a program.

    Use it for your own markers, and for code that looks for them in programs as `purify` does.

    Args:
      primitive: a `jax.extend.core.Primitive` with one result or, if its `multiple_results` is
        True, with as many results as arguments. Its parameters may be any hashable values.

    Returns:
      The primitive, which can be evaluated, traced, compiled, batched, differentiated and transposed.

    >>> import jax
    >>> from jax.extend.core import Primitive
    >>> from nnx.purify import trivialize
    >>> mark_p = trivialize(Primitive("mark"))
    >>> f = lambda x: mark_p.bind(x, name="here") ** 2
    >>> float(jax.grad(f)(3.0))
    6.0
    >>> [e.params["name"] for e in jax.make_jaxpr(f)(3.0).eqns if e.primitive is mark_p]
    ['here']
    """
    several = primitive.multiple_results

    def same(*values: Any, **_: Any) -> Any:
        return list(values) if several else values[0]

    def batch(values: Any, axes: Any, **params: Any) -> Any:
        return primitive.bind(*values, **params), list(axes) if several else axes[0]

    def push(primals: Any, tangents: Any, **params: Any) -> Any:
        return primitive.bind(*primals, **params), list(tangents) if several else tangents[0]

    def pull(cotangents: Any, *values: Any, **_: Any) -> Any:
        return list(cotangents) if several else [cotangents]

    primitive.def_impl(same)
    primitive.def_abstract_eval(same)
    mlir.register_lowering(primitive, mlir.lower_fun(same, multiple_results=several))
    batching.primitive_batchers[primitive] = batch
    ad.primitive_jvps[primitive] = push
    ad.primitive_transposes[primitive] = pull
    return primitive


sink_p = Primitive("purify_sink")
sink_p.multiple_results = True
trivialize(sink_p)


def _batch_sink(values: Any, axes: Any, **params: Any) -> Any:
    # In the report, the axis of lanes comes first.
    moved = [
        v if axis is None else jnp.moveaxis(v, axis, 0)
        for v, axis in zip(values, axes, strict=True)
    ]
    return sink_p.bind(*moved, **params), [None if axis is None else 0 for axis in axes]


batching.primitive_batchers[sink_p] = _batch_sink


def param(shape: Any = (), name: str | None = None, dtype: Any = None) -> Any:
    """A parameter: an array that the purified function takes from its dictionary of parameters.

    Args:
      shape: an int or a tuple of ints; a `jax.ShapeDtypeStruct` or an array, whose shape and dtype
        count; or a pytree of these, such as a module's `model["params"]`.
      name: the key in the dictionary. The default is `param_0`, `param_1`, ... in the order of the program.
      dtype: a floating or complex dtype for shapes without one. The default is JAX's default float.

    Returns:
      The value. It has that shape under `vmap` and in loops, too: every lane and every step sees
      the same parameter. In a function that is not purified, zeros.

    Raises:
      MarkerError: the shape is something else, or the dtype has no gradient.

    >>> import jax.numpy as jnp
    >>> from nnx.purify import param, purify
    >>> @purify
    ... def line():
    ...     return param((), "slope") * jnp.arange(3.0) + param((), "offset")
    >>> line({"slope": 2.0, "offset": 1.0}).tolist()
    [1.0, 3.0, 5.0]
    """
    _check_name("param", name)
    spec = as_spec(shape, dtype, "param", name)
    for path, d in zip(_paths(spec), spec.dtypes, strict=True):
        if not jnp.issubdtype(d, jnp.inexact):
            raise MarkerError(
                f"param({_quoted(name)}){path} was declared with dtype {d}, which has no gradient. "
                f"Use a floating or complex dtype, or `fixed` for data."
            )
    return _source("param", spec, name)


def fixed(shape: Any = (), name: str | None = None, dtype: Any = None) -> Any:
    """An input that is not a parameter: data that changes between calls and is passed by keyword.

    Args:
      shape: as for `param`, with any dtype.
      name: the keyword.
      dtype: the dtype for shapes without one. The default is JAX's default float.

    Returns:
      The value. In a function that is not purified, zeros.

    Raises:
      MarkerError: the name is missing, or the shape cannot be read.

    >>> from nnx.purify import fixed, param, purify
    >>> @purify
    ... def scaled():
    ...     return param((), "scale") * fixed(2, "x")
    >>> scaled({"scale": 2.0}, x=[1.0, 2.0]).tolist()
    [2.0, 4.0]
    """
    if name is None:
        raise MarkerError(
            "A fixed value needs a name, because it is passed by keyword: fixed(3, 'x')."
        )
    return _source("fixed", as_spec(shape, dtype, "fixed", name), name)


def intermediate(value: T, name: str) -> T:
    """Mark a value for `.intermediates` to report, and return the value unchanged.

    Args:
      value: a pytree of arrays.
      name: the key in the report. It may equal the name of a parameter.

    Inside `scan` and `vmap` the report is stacked along a leading axis of steps or lanes. Inside
    `while_loop` and `cond` there is no single value to report. That is an error only when
    `.intermediates` is called.

    >>> from nnx.purify import intermediate, param, purify
    >>> @purify
    ... def f():
    ...     return intermediate(param((), "x") ** 2, "square") + 1
    >>> {k: float(v) for k, v in f.intermediates({"x": 3.0}).items()}
    {'square': 9.0}
    """
    _check_name("intermediate", name)
    if not isinstance(name, str):
        raise MarkerError("An intermediate needs a name: intermediate(value, 'field').")
    leaves, treedef = jax.tree.flatten(value)
    for leaf in leaves:
        if not isinstance(leaf, jax.Array | np.ndarray | np.generic | bool | int | float | complex):
            raise MarkerError(
                f"intermediate({_quoted(name)}) takes a pytree of arrays, but it holds "
                f"{leaf!r}, {a_kind(type(leaf))}."
            )
    out = sink_p.bind(*leaves, name=name, token=next(_tokens), treedef=treedef)
    return jax.tree.unflatten(treedef, out)


def isolated(name: str) -> Callable[[Callable[..., T]], Callable[..., T]]:
    """A body that sees the Refs of surrounding modules as constants. JAX traces it at every call.

    This is called where the trace begins, so that it notices any program in between that JAX caches.
    """
    entry = trace_ref()

    def decorate(body: Callable[..., T]) -> Callable[..., T]:
        def run(*args: Any) -> T:
            frame = Frame(name, constants=True, entry=entry)
            with frame:
                try:
                    return body(*args)
                finally:
                    frame.close()

        return run

    return decorate


# Transformations put their own names around the body's name. Our name is between the marks.
_PREFIX, _END = "purify_prefix:", ";"


def prefix(name: str, f: Callable[..., T]) -> Callable[..., T]:
    """Put `name` and a dot before the names of a function's markers, so that a part can be used again.

    Args:
      name: the prefix.
      f: a function. Its result may hold arrays and anything else.

    The prefix is part of the program, so it also reaches markers in a function that `jax.jit` has
    compiled. Prefixes nest.

    >>> import jax.numpy as jnp
    >>> from nnx.purify import param, prefix, purify
    >>> def dense(x, features):
    ...     return x @ param((x.shape[-1], features), "w") + param(features, "b")
    >>> @purify
    ... def net():
    ...     hidden = jnp.tanh(prefix("hidden", dense)(jnp.ones(4), 8))
    ...     return prefix("out", dense)(hidden, 1)
    >>> list(net.shapes())
    ['hidden.b', 'hidden.w', 'out.b', 'out.w']
    """
    _check_name("prefix", name)

    def prefixed(*args: Any, **kwargs: Any) -> T:
        others: list[Any] = []

        @isolated(f"nnx.purify.prefix({name!r})")
        def body() -> list[Any]:
            leaves, treedef = jax.tree.flatten(f(*args, **kwargs))
            others[:] = [treedef, [None if isinstance(x, jax.Array) else x for x in leaves]]
            return [x for x in leaves if isinstance(x, jax.Array)]

        # Only a jitted call has a name and survives every transformation of JAX.
        body.__name__ = _PREFIX + name + _END
        arrays = iter(jax.jit(body)())
        treedef, leaves = others
        return jax.tree.unflatten(treedef, [next(arrays) if x is None else x for x in leaves])

    return prefixed


def prefix_of(name: str) -> str:
    """The prefix, with its dot, that a jitted function of this name stands for."""
    _, found, rest = name.partition(_PREFIX)
    return f"{rest.rpartition(_END)[0]}." if found else ""


def _source(kind: str, spec: Spec, name: str | None) -> Any:
    out = source_p.bind(kind=kind, name=name, token=next(_tokens), spec=spec)
    return jax.tree.unflatten(spec.treedef, out)


def _check_name(kind: str, name: Any) -> None:
    if name is not None and (not isinstance(name, str) or not name):
        raise MarkerError(f"The name of a {kind} must be a non-empty string, not {name!r}.")


def _quoted(name: str | None) -> str:
    return "" if name is None else repr(name)


def _is_shape(x: Any) -> bool:
    if isinstance(x, bool):
        return False
    if isinstance(x, int | np.integer):
        return True
    return type(x) in (tuple, list) and all(
        isinstance(n, int | np.integer) and not isinstance(n, bool) for n in x
    )


def as_spec(shape: Any, dtype: Any, kind: str, name: str | None) -> Spec:
    """Read the shapes that were given to a marker."""
    default = jax.dtypes.canonicalize_dtype(float if dtype is None else dtype)
    leaves, treedef = jax.tree.flatten(shape, is_leaf=_is_shape)
    shapes, dtypes = [], []
    for leaf in leaves:
        if _is_shape(leaf):
            sizes = leaf if isinstance(leaf, tuple | list) else (leaf,)
            shapes.append(tuple(int(n) for n in sizes))
            dtypes.append(default)
        elif hasattr(leaf, "shape") and hasattr(leaf, "dtype"):
            shapes.append(tuple(leaf.shape))
            dtypes.append(jax.dtypes.canonicalize_dtype(leaf.dtype, allow_extended_dtype=True))
        else:
            raise MarkerError(
                f"{kind}({_quoted(name)}) takes a shape (an int or a tuple of ints), a "
                f"jax.ShapeDtypeStruct, an array, or a pytree of those, not {leaf!r}."
            )
        if any(n < 0 for n in shapes[-1]):
            raise MarkerError(f"{kind}({_quoted(name)}) has a negative size: {shapes[-1]}.")
    return Spec(treedef, tuple(shapes), tuple(dtypes))


def _paths(spec: Spec) -> list[str]:
    tree = jax.tree.unflatten(spec.treedef, range(len(spec.shapes)))
    return [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0]]
