"""Filtered transformations: value semantics, and a choice leaf by leaf.

Modules go in and fresh modules come out; nothing of the caller's changes. `filter_fn` and
`filter_tree` say of each leaf, one finer than of each argument, whether it is traced
(`jit_filter`) or differentiated (`grad_filter`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nnx.transforms.axes import assign
from nnx.transforms.boundary import Outline, Packed, fresh_output, reachable, run, write_back
from nnx.transforms.call import Call, Plans, open_call
from nnx.transforms.closure import Closure
from nnx.transforms.jit import function_name, unbound
from nnx.transforms.targets import DifferentiationError
from refx import TraceLevelError, UnhashableStaticError, clone
from refx.node import is_identity
from refx.static import Static
from refx.trace import local

__all__ = ["grad_filter", "is_array", "is_inexact_array", "jit_filter", "value_and_grad_filter"]


def is_array(x: Any) -> bool:
    """Whether `x` is a JAX or a NumPy array.

    >>> import jax.numpy as jnp, nnx
    >>> nnx.is_array(jnp.ones(2)), nnx.is_array(1.0)
    (True, False)
    """
    return isinstance(x, jax.Array | np.ndarray)


def is_inexact_array(x: Any) -> bool:
    """Whether `x` is an array of floating-point or complex numbers.

    >>> import jax.numpy as jnp, nnx
    >>> nnx.is_inexact_array(jnp.ones(2)), nnx.is_inexact_array(jnp.arange(2))
    (True, False)
    """
    return is_array(x) and jnp.issubdtype(x.dtype, jnp.inexact)


def jit_filter(
    fn: Callable[..., Any] | None = None,
    *,
    filter_fn: Callable[[Any], bool] | None = None,
    filter_tree: Any = None,
    **options: Any,
) -> Callable[..., Any]:
    """Compile a function with value semantics; leaf by leaf, what is not traced is static.

    A module that the function is given is a copy inside, which may be written and returned. What
    is returned is fresh: also a module that came in. Closed-over Refs are inputs and may not be
    written. The ambient scope's streams advance.

    Args:
      fn: the function, a module, or a bound method of one.
      filter_fn: a function from leaf to bool: whether it is traced. Without it, arrays are, and
        what Refs hold; numbers, strings and callables in the arguments are static.
      filter_tree: a pytree prefix of the positional arguments with bools, which decides instead.
        For a module it may be a dict from filter to bool.
      **options: as for `jax.jit`.

    Raises:
      UnhashableStaticError: a leaf that is to be static cannot be hashed, such as an array.
      TraceLevelError: the function writes a Ref that it closes over.

    >>> import jax.numpy as jnp, nnx
    >>> @nnx.jit_filter
    ... def bump(counter, by, mode):
    ...     counter.value += by if mode == "up" else -by
    ...     return counter
    >>> counter = nnx.Ref(jnp.array(1))
    >>> int(bump(counter, jnp.array(2), "up").value), int(counter.value)
    (3, 1)
    """
    if fn is None:
        return functools.partial(
            jit_filter, filter_fn=filter_fn, filter_tree=filter_tree, **options
        )
    return _JitFilter(fn, filter_fn, filter_tree, options)


class _JitFilter:
    def __init__(self, fn: Any, filter_fn: Any, filter_tree: Any, options: dict[str, Any]):
        self._fn, self._bound = unbound(fn)
        self._name = f"nnx.jit_filter({function_name(fn)})"
        self._filter_fn = filter_fn
        self._filter_tree = filter_tree
        self._closure = Closure(self._fn)
        self._plans = Plans()
        self._options = options
        # This function for the probes that were active where it was called.
        self.probed: dict[Any, _JitFilter] = {}
        self._compiled = jax.jit(self._run, static_argnums=(0, 1), **options)
        functools.update_wrapper(self, self._fn, updated=())

    def _run(self, layout: Any, static: Any, dynamic: Any) -> Packed:
        call: Call = local.call
        treedef, fixed = static
        todo = iter(dynamic)
        flat = [next(todo) if x is None else x.value for x in fixed]
        values, leaves, others = jax.tree.unflatten(treedef, flat)
        return run(
            self._fn,
            self._name,
            call,
            values,
            leaves,
            others,
            layout=layout,
            finish=functools.partial(self._check_closed, layout),
        )

    def _check_closed(self, layout: Any, packed: Packed, outline: Outline) -> Packed:
        closed = self._numbers(layout, len(layout.form.where), layout.closed)
        for i in packed.spec.written:
            if i in closed:
                raise TraceLevelError(
                    f"{layout.name_of(i)} was written inside {self._name}, which closes over it. A "
                    f"filtered transformation has value semantics: pass the module as an argument "
                    f"and return it, or use nnx.jit, whose updates propagate."
                )
        return packed

    @staticmethod
    def _numbers(layout: Any, start: int, count: int) -> set[int]:
        """The positions of the Refs that hang on some of the roots."""
        reach = reachable(layout.dagdef, range(start, start + count))
        refs = [n for n, node in enumerate(layout.dagdef.nodes) if not hasattr(node, "children")]
        return {i for i, n in enumerate(refs) if n in reach}

    def _masked(self, call: Call, args: Any, kwargs: Any) -> tuple[list[Any], Any, list[bool]]:
        lists = (call.values, call.leaves, call.others)
        flat, treedef = jax.tree.flatten(lists)
        if self._filter_tree is not None:
            tree = self._filter_tree
            if not isinstance(tree, tuple | list):
                tree = (tree,) * len(args)
            tree = (*[True] * len(self._bound), *tree) if self._bound else tree
            specs = assign(
                call,
                args,
                kwargs,
                tree,
                name=self._name,
                keyword=True,
                ambient=lambda path, ref: True,
            )
            mask = [
                bool(spec)
                for at, items in zip(specs[:3], lists, strict=True)
                for spec, x in zip(at, items, strict=True)
                for _ in jax.tree.leaves(x)
            ]
            return flat, treedef, mask
        layout = call.layout
        given = self._numbers(layout, 0, len(layout.form.where))
        mask = []
        for kind, items in enumerate(lists):
            for i, x in enumerate(items):
                for leaf in jax.tree.leaves(x):
                    if kind == 0 and (self._filter_fn is None or i not in given):
                        mask.append(True)
                    else:
                        mask.append(bool((self._filter_fn or is_array)(leaf)))
        return flat, treedef, mask

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if local.probe is not None:
            return local.probe.jit_filter(self, args, kwargs)
        args = self._bound + args
        outer = local.call
        while True:
            call = open_call(args, kwargs, self._closure, self._plans, any_leaf=True)
            if not call.layout.traced and self._closure.meet(call.layout):
                call = open_call(args, kwargs, self._closure, self._plans, any_leaf=True)
            flat, treedef, mask = self._masked(call, args, kwargs)
            fixed = tuple(
                None if m else self._static(leaf) for m, leaf in zip(mask, flat, strict=True)
            )
            dynamic = [leaf for m, leaf in zip(mask, flat, strict=True) if m]
            local.call = call
            try:
                if not call.layout.traced:
                    self._compiled.trace(call.layout, (treedef, fixed), dynamic)
                    call.layout.traced = not call.found
                packed = (
                    None if call.found else self._compiled(call.layout, (treedef, fixed), dynamic)
                )
            except Exception:
                if not call.found:
                    raise
                packed = None
            finally:
                local.call = outer
            if call.found:
                self._closure.add(call, self._name)
                continue
            assert packed is not None
            self._advance_streams(call, packed)
            return fresh_output(call, packed, call.values, call.leaves)

    def _advance_streams(self, call: Call, packed: Packed) -> None:
        if call.layout.has_scope:
            scope = self._numbers(call.layout, len(call.roots) - 1, 1)
            pairs = zip(packed.spec.written, packed.written, strict=True)
            new = {i: value for i, value in pairs if i in scope}
            write_back([call.refs[i] for i in new], new.values())

    def _static(self, leaf: Any) -> Static:
        try:
            hash(leaf)
        except TypeError:
            kind = f"{leaf.dtype}{list(leaf.shape)}" if is_array(leaf) else type(leaf).__name__
            raise UnhashableStaticError(
                f"A leaf of {self._name} that filter_fn or filter_tree makes static is of type "
                f"{kind} and cannot be hashed. Have it traced, or pass a hashable value, such as a "
                f"tuple for an array."
            ) from None
        return Static(leaf)

    def __repr__(self) -> str:
        return f"<{self._name}>"


def value_and_grad_filter(
    fn: Callable[..., Any] | None = None,
    *,
    filter_fn: Callable[[Any], bool] = is_inexact_array,
    filter_tree: Any = None,
    has_aux: bool = False,
) -> Callable[..., Any]:
    """The value of a function and its gradient with respect to leaves of its first argument.

    Args:
      fn: a function that returns a scalar. Modules that it is given are copies inside.
      filter_fn: a function from leaf to bool: whether it is differentiated.
      filter_tree: a pytree prefix of the first argument with bools, which decides instead.
      has_aux: `fn` returns `(scalar, aux)`.

    Returns:
      A function that returns `(value, gradient)`, or `((value, aux), gradient)`. The gradient is
      like the first argument, with None for each leaf that is held constant. The gradient of a
      shared Ref is the sum over its uses, once.

    Raises:
      DifferentiationError: no leaf is selected, or the function returns no scalar.

    >>> import jax.numpy as jnp, nnx
    >>> value, grads = nnx.value_and_grad_filter(lambda p: p["w"] ** 2)({"w": jnp.array(3.0), "n": 1})
    >>> float(value), float(grads["w"]), grads["n"]
    (9.0, 6.0, None)
    """
    if fn is None:
        return functools.partial(
            value_and_grad_filter, filter_fn=filter_fn, filter_tree=filter_tree, has_aux=has_aux
        )
    inner, bound = unbound(fn)
    name = f"nnx.grad_filter({function_name(fn)})"

    @functools.wraps(inner)
    def value_and_gradient(*args: Any, **kwargs: Any) -> Any:
        args = bound + args
        if local.probe is not None:
            options = filter_fn, filter_tree, has_aux
            return local.probe.gradient_filter(inner, args, kwargs, *options)
        if not args:
            raise DifferentiationError(f"{name} differentiates its first argument, and got none.")
        leaves, treedef = jax.tree.flatten(args[0])
        if filter_tree is None:
            mask = [bool(filter_fn(leaf)) for leaf in leaves]
        else:
            mask = _broadcast(filter_tree, args[0], name)
        if not any(mask):
            raise DifferentiationError(
                f"{name} has nothing to differentiate: no leaf of its first argument is selected, "
                f"of {len(leaves)}."
            )

        def loss(chosen: list[Any]) -> Any:
            todo = iter(chosen)
            flat = [next(todo) if m else x for m, x in zip(mask, leaves, strict=True)]
            first = jax.tree.unflatten(treedef, flat)
            out = inner(*_copies((first, *args[1:])), **_copies(kwargs))
            return _checked(name, out, has_aux)

        (value, aux), grads = jax.value_and_grad(loss, has_aux=True)(
            [x for m, x in zip(mask, leaves, strict=True) if m]
        )
        todo = iter(grads)
        gradient = jax.tree.unflatten(treedef, [next(todo) if m else None for m in mask])
        return ((value, aux) if has_aux else value), gradient

    return value_and_gradient


def grad_filter(
    fn: Callable[..., Any] | None = None,
    *,
    filter_fn: Callable[[Any], bool] = is_inexact_array,
    filter_tree: Any = None,
    has_aux: bool = False,
) -> Callable[..., Any]:
    """The gradient alone; everything else as for `value_and_grad_filter`.

    >>> import jax.numpy as jnp, nnx
    >>> frozen = {"a": False, "b": True}
    >>> loss = lambda p: p["a"] * p["b"]
    >>> nnx.grad_filter(loss, filter_tree=frozen)({"a": jnp.array(2.0), "b": jnp.array(3.0)})
    {'a': None, 'b': Array(2., dtype=float32, weak_type=True)}
    """
    if fn is None:
        return functools.partial(
            grad_filter, filter_fn=filter_fn, filter_tree=filter_tree, has_aux=has_aux
        )
    both = value_and_grad_filter(fn, filter_fn=filter_fn, filter_tree=filter_tree, has_aux=has_aux)

    @functools.wraps(both)
    def gradient(*args: Any, **kwargs: Any) -> Any:
        value, grads = both(*args, **kwargs)
        return (grads, value[1]) if has_aux else grads

    return gradient


def _copies(tree: Any) -> Any:
    """The tree with copies of its modules, so that writes stay inside; sharing is kept."""
    flat, treedef = jax.tree.flatten(tree, is_leaf=is_identity)
    cells = clone([x for x in flat if is_identity(x)])
    todo = iter(cells)
    return jax.tree.unflatten(treedef, [next(todo) if is_identity(x) else x for x in flat])


def _checked(name: str, out: Any, has_aux: bool) -> tuple[Any, Any]:
    if has_aux and (not isinstance(out, tuple) or len(out) != 2):
        raise DifferentiationError(
            f"With has_aux=True, the function of {name} must return (scalar, aux), but it "
            f"returned {type(out).__name__}."
        )
    loss: Any = out[0] if has_aux else out
    aux = out[1] if has_aux else None
    shape = getattr(loss, "shape", None)
    if shape != ():
        what = repr(loss) if shape is None else f"an array of shape {shape}"
        raise DifferentiationError(
            f"The function of {name} must return a scalar, but it returned {what}."
        )
    return loss, aux


def _broadcast(prefix: Any, tree: Any, name: str) -> list[bool]:
    """A bool for each leaf, from a pytree prefix; for a module also a dict from filter to bool."""
    if is_identity(tree) and isinstance(prefix, dict):
        call = open_call((tree,), {}, any_leaf=True)
        specs = assign(
            call,
            (tree,),
            {},
            (prefix,),
            name=name,
            keyword=True,
            ambient=lambda path, ref: True,
        )
        lists = zip((*specs.refs, *specs.leaves), (*call.values, *call.leaves), strict=False)
        return [bool(spec) for spec, x in lists for _ in jax.tree.leaves(x)]
    mask: list[bool] = []
    try:
        jax.tree.map(lambda m, x: mask.extend([bool(m)] * len(jax.tree.leaves(x))), prefix, tree)
    except ValueError as error:
        raise DifferentiationError(
            f"The filter_tree of {name} is no prefix of its first argument: {error}"
        ) from None
    return mask
