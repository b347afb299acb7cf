"""What JAX calls a program and its inputs: the user's function, its arguments and the Refs in them.

JAX takes both from the function that it is given: the name and the place from `__name__` and
`__wrapped__`, the inputs from its signature, when it traces. So none of this costs a call anything.
"""

from __future__ import annotations

import functools
import inspect
import types
import weakref
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import jax

from nnx._ambient import ambient
from refx import Node, Ref
from refx.node import is_identity

__all__: list[str] = []

P = TypeVar("P", bound=Callable[..., Any])

# The parameters of pure functions that are lists of inputs, and what is in each.
_LISTS = frozenset({"donated", "values", "leaves", "others"})


def program_name(fn: Callable[..., Any]) -> str:
    """What a compiled program is called: like the function, or, of a module, like its class."""
    while isinstance(fn, functools.partial):
        fn = fn.func
    name = getattr(fn, "__name__", None)
    if name == "__call__":
        name = getattr(fn, "__qualname__", name).split(".")[-2:][0]
    return name if isinstance(name, str) else type(fn).__name__


Spread = Callable[[dict[str, Any], Any], Iterable[tuple[str, int, Any]]]


def named(pure: P, fn: Callable[..., Any], call: Any = None, spread: Spread | None = None) -> P:
    """Have JAX call `pure`, which is traced for a call of `fn`, and its inputs by the user's names.

    Args:
      pure: a function of the lists `values`, `leaves`, `others`, or of what `spread` knows.
      fn: the user's function.
      call: the call that it is traced for; the ambient one without it.
      spread: gives `(list, position, value)` for each input, of the arguments and the call.
    """
    made: Any = pure
    made.__name__ = made.__qualname__ = program_name(fn)
    while isinstance(fn, functools.partial):
        fn = fn.func
    if isinstance(fn, types.MethodType):
        fn = fn.__func__
    if hasattr(inspect.unwrap(fn) if callable(fn) else fn, "__code__"):
        made.__wrapped__ = fn
    made.__signature__ = _Inputs(pure, fn, call, spread or _lists)
    return pure


def _weakly(x: Any) -> Callable[[], Any]:
    # JAX may keep a signature for longer than its function.
    if isinstance(x, types.MethodType):
        return weakref.WeakMethod(x)
    try:
        return weakref.ref(x)
    except TypeError:
        return lambda: x


class _Inputs(inspect.Signature):
    """The signature of a pure function; bound to arguments, each input in the lists has a name."""

    __slots__ = ("_call", "_fn", "_spread")

    def __init__(self, pure: Callable[..., Any], fn: Any, call: Any, spread: Spread):
        super().__init__(list(inspect.signature(pure, follow_wrapped=False).parameters.values()))
        self._fn = _weakly(fn)
        self._call = None if call is None else _weakly(call)
        self._spread = _weakly(spread)

    def bind(self, *args: Any, **kwargs: Any) -> inspect.BoundArguments:
        bound = super().bind(*args, **kwargs)
        call = ambient.call if self._call is None else self._call()
        spread = self._spread()
        if call is None or spread is None:
            return bound
        names = InputNames(self._fn(), call)
        found: dict[str, Any] = {}
        for kind, i, x in spread(bound.arguments, call):
            name = names.name(kind, i) if kind in _LISTS else kind
            found[name if name not in found else f"{name} ({len(found)})"] = x
        # JAX puts what this maps to after its name.
        bound.arguments = found
        return bound


def _lists(arguments: dict[str, Any], call: Any) -> Iterable[tuple[str, int, Any]]:
    for name, given in arguments.items():
        yield from ((name, i, x) for i, x in enumerate(given if name in _LISTS else [given]))


class InputNames:
    """The user's names for the inputs of a pure function, for one call."""

    def __init__(self, fn: Any, call: Any):
        self._fn = fn
        self._layout = call.layout
        self._roots = call.roots
        self._paths = _argument_paths(call.layout.form)
        self._parameters = parameters(fn)

    def name(self, kind: str, i: int) -> str:
        """The name of the i-th of the `values`, the `leaves`, the `others` or the `donated`."""
        layout, form = self._layout, self._layout.form
        if kind == "others":
            numbers = [n for n in range(form.treedef.num_leaves) if n not in form.where]
            return self._argument(numbers[i])
        if kind == "donated":
            i = layout.donated[i]
        paths = layout.dagdef.leaf_paths if kind == "leaves" else layout.dagdef.ref_paths
        root, *path = paths[i]
        owner = self._roots[int(root)]
        below = ".value" if isinstance(owner, Ref) else attribute_path(path)
        return f"{self._root(int(root), owner)}{below}"

    def _root(self, i: int, owner: Any) -> str:
        layout = self._layout
        given = len(layout.form.where)
        if i < given:
            return self._argument(layout.form.where[i])
        if i >= given + layout.closed:
            return "scope"
        return _variable(self._fn, owner) or type(owner).__name__

    def _argument(self, number: int) -> str:
        """The name of an argument, given the number of a leaf of the arguments."""
        if number >= len(self._paths):
            return f"argument {number}"
        kind, key, *rest = self._paths[number]
        where = jax.tree_util.keystr(tuple(rest))
        if kind.idx == 1:
            return f"{key.key}{where}"
        count, fixed, _ = self._layout.statics or (0, (), ())
        positions = [n for n in range(count) if n not in dict(fixed)]
        position = positions[key.idx] if positions else key.idx
        for i, parameter in enumerate(self._parameters):
            if parameter.kind is parameter.VAR_POSITIONAL:
                return f"{parameter.name}[{position - i}]{where}"
            if i == position:
                return f"{parameter.name}{where}"
        return f"args[{position}]{where}"


def attribute_path(path: Any) -> str:
    """A path as Python writes it: `.blocks[0].kernel`."""
    parts = (f"[{p}]" if p.isdigit() else f".{p}" if p.isidentifier() else f"[{p!r}]" for p in path)
    return "".join(parts)


def _argument_paths(form: Any) -> list[Any]:
    """The key path of each leaf in `(args, kwargs)`; none where a pytree takes no stand-ins."""
    stand_ins: list[Any] = [object()] * form.treedef.num_leaves
    for i in form.where:
        stand_ins[i] = Node()
    try:
        tree = form.treedef.unflatten(stand_ins)
        paths = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_identity)[0]
    except Exception:
        return []
    return [path for path, _ in paths]


def parameters(fn: Any) -> list[inspect.Parameter]:
    """The parameters of a function; none where Python cannot tell."""
    try:
        return list(inspect.signature(fn).parameters.values())
    except (TypeError, ValueError):
        return []


def _variable(fn: Any, root: Any) -> str | None:
    """The name by which a function closes over a root."""
    fn = inspect.unwrap(fn) if callable(fn) else fn
    code = getattr(fn, "__code__", None)
    if code is None:
        return None
    for name, cell in zip(code.co_freevars, fn.__closure__ or (), strict=False):
        try:
            if cell.cell_contents is root:
                return name
        except ValueError:
            continue
    return next((n for n in code.co_names if fn.__globals__.get(n) is root), None)
