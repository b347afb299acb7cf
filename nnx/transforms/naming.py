"""Names in JAX for a program and its inputs: the user's function, its arguments and their Refs.

JAX reads both from the function when it traces: the name and the source line from `__name__` and
`__wrapped__`, and the inputs from its signature. So this costs nothing in a call.
"""

from __future__ import annotations

import functools
import inspect
import types
import weakref
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeVar

import jax

from nnx._ambient import ambient
from nnx.transforms.call import Values
from nnx.transforms.layout import Layout
from refx import Node, opened

__all__: list[str] = []

P = TypeVar("P", bound=Callable[..., Any])


def program_name(fn: Callable[..., Any]) -> str:
    """The name of a compiled program: that of the function, or of the class of a module."""
    while isinstance(fn, functools.partial):
        fn = fn.func
    name = getattr(fn, "__name__", None)
    if name == "__call__":
        name = getattr(fn, "__qualname__", name).split(".")[-2:][0]
    return name if isinstance(name, str) else type(fn).__name__


class Input(NamedTuple):
    """An input of a call: the number of its list in `Values`, and its place there."""

    kind: int
    number: int


Labels = Callable[[Any], tuple[Any, ...]]


def inputs_of(call: Any) -> Values:
    """An `Input` for each value of a call."""
    lists = enumerate(call.values)
    return Values(*[[Input(kind, i) for i in range(len(values))] for kind, values in lists])


def named(pure: P, fn: Callable[..., Any], call: Any = None, labels: Labels | None = None) -> P:
    """Let JAX use the user's names for `pure`, which is traced for a call of `fn`, and for its inputs.

    Args:
      pure: a function of the `Values` of the call, or of the arguments that `labels` describes.
      fn: the user's function.
      call: the call for which it is traced. The default is the ambient call.
      labels: returns, for a call, the arguments of `pure`, with an `Input` or a name for each value.
    """
    made: Any = pure
    made.__name__ = made.__qualname__ = program_name(fn)
    while isinstance(fn, functools.partial):
        fn = fn.func
    if isinstance(fn, types.MethodType):
        fn = fn.__func__
    if hasattr(inspect.unwrap(fn) if callable(fn) else fn, "__code__"):
        made.__wrapped__ = fn
    made.__signature__ = _Inputs(pure, fn, call, labels or _all_values)
    return pure


def _all_values(call: Any) -> tuple[Any, ...]:
    return (inputs_of(call),)


def _weakly(x: Any) -> Callable[[], Any]:
    # JAX may keep a signature longer than its function.
    if isinstance(x, types.MethodType):
        return weakref.WeakMethod(x)
    try:
        return weakref.ref(x)
    except TypeError:
        return lambda: x


class _Inputs(inspect.Signature):
    """The signature of a pure function. When bound to arguments, it names each input of the call."""

    __slots__ = ("_call", "_fn", "_labels")

    def __init__(self, pure: Callable[..., Any], fn: Any, call: Any, labels: Labels):
        super().__init__(list(inspect.signature(pure, follow_wrapped=False).parameters.values()))
        self._fn = _weakly(fn)
        self._call = None if call is None else _weakly(call)
        self._labels = _weakly(labels)

    def bind(self, *args: Any, **kwargs: Any) -> inspect.BoundArguments:
        bound = super().bind(*args, **kwargs)
        call = ambient.call if self._call is None else self._call()
        labels = self._labels()
        if call is None or labels is None:
            return bound
        names = CallNames(self._fn(), call.layout, _others(self._fn(), call))
        flat, treedef = jax.tree.flatten(labels(call), is_leaf=lambda x: type(x) is Input)
        found: dict[str, Any] = {}
        for label, x in zip(flat, treedef.flatten_up_to(args), strict=True):
            name = names.python(label) if type(label) is Input else label
            found[name if name not in found else f"{name} ({len(found)})"] = x
        # JAX appends the paths inside each value to these names.
        bound.arguments = found
        return bound


class CallNames:
    """The user's names for the inputs of a call. Each is a path: a variable and the keys below it.

    `roots` and `arguments` are in the order of the call.
    """

    def __init__(self, fn: Any, layout: Layout, others: Iterable[tuple[Any, ...]]):
        """`others` are the names of the roots that are not arguments."""
        form = layout.form
        count, fixed, _ = layout.statics or (0, (), ())
        self._layout = layout
        self._parameters = parameters(fn)
        # The positions of the arguments that are not static.
        self._positions = [n for n in range(count) if n not in dict(fixed)]
        paths = _argument_paths(form)
        given = [self._argument(i, paths) for i in range(form.treedef.num_leaves)]
        self.arguments = [path for i, path in enumerate(given) if i not in form.where]
        self.roots = [*(given[i] for i in form.where), *others]
        self._prefixes = [path[0] + jax.tree_util.keystr(path[1:]) for path in self.roots]

    def python(self, at: Input) -> str:
        """The name of an input in Python's syntax: `model.blocks[0].kernel`."""
        dagdef = self._layout.dagdef
        if at.kind == 2:
            first, *keys = self.arguments[at.number]
            return first + jax.tree_util.keystr(tuple(keys))
        root, *path = (dagdef.leaf_paths if at.kind else dagdef.ref_paths)[at.number]
        below = attribute_path(path) if path else ".value"
        return self._prefixes[int(root)] + below

    def _argument(self, number: int, paths: list[Any]) -> tuple[Any, ...]:
        if not paths:
            return (f"argument {number}",)
        kind, key, *rest = paths[number]
        if kind.idx == 1:
            return (key.key, *rest)
        position = self._positions[key.idx] if self._positions else key.idx
        return (self.parameter(position), *rest)

    def parameter(self, position: int) -> str:
        """The name of a positional argument."""
        for i, parameter in enumerate(self._parameters):
            if parameter.kind is parameter.VAR_POSITIONAL:
                return f"{parameter.name}[{position - i}]"
            if i == position:
                return parameter.name
        return f"args[{position}]"


def _others(fn: Any, call: Any) -> list[tuple[Any, ...]]:
    """The names of the roots of a call that are not arguments."""
    given, layout = len(call.layout.form.where), call.layout
    closed = call.roots[given : given + layout.closed]
    names = [(_variable(fn, root) or type(root).__name__,) for root in closed]
    return [*names, ("scope",)] if layout.has_scope else names


def attribute_path(path: Any) -> str:
    """A path in Python's syntax: `.blocks[0].kernel`."""
    parts = (f"[{p}]" if p.isdigit() else f".{p}" if p.isidentifier() else f"[{p!r}]" for p in path)
    return "".join(parts)


def _argument_paths(form: Any) -> list[Any]:
    """The key path of each leaf in `(args, kwargs)`; empty if a pytree does not accept stand-ins."""
    stand_ins: list[Any] = [jax.ShapeDtypeStruct((), bool)] * form.treedef.num_leaves
    for i in form.where:
        stand_ins[i] = Node()
    try:
        tree = form.treedef.unflatten(stand_ins)
        paths = opened.flatten_with_path(tree)[0]
    except Exception:
        return []
    return [path for path, _ in paths]


def parameters(fn: Any) -> list[inspect.Parameter]:
    """The parameters of a function; empty if Python does not know them."""
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
