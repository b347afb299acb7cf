"""Find how the modules of a model are called, by an abstract call that computes nothing."""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

import refx
from nnx._ambient import ambient
from nnx.probe.stand_in import MARK, StandIn
from nnx.scope import Scope, entered, make_scope
from nnx.transforms.simple import eval_shape
from refx import Node, Ref
from refx.frame import local
from refx.node import attributes
from refx.partition import Path
from refx.text import is_arraylike
from refx.trace import current_trace, trace_ref

__all__ = ["Arguments", "Call", "abstract", "record"]

_tokens = itertools.count()


def abstract(x: Any) -> Any:
    """The shape and dtype of an array; everything else unchanged."""
    if not is_arraylike(x):
        return x
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


class Arguments(NamedTuple):
    """The arguments of a call: the arrays, separate from the static rest.

    `jax.jit` would turn Python numbers into arrays, too; here they are static, because `train=True`
    is a setting.
    """

    treedef: Any
    arrays: tuple[Any, ...]
    others: tuple[Any, ...]

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Arguments:
        leaves, treedef = jax.tree.flatten((args, dict(kwargs)), is_leaf=_is_identity)
        dynamic = [is_arraylike(x) or _is_identity(x) for x in leaves]
        return cls(
            treedef,
            tuple(x for x, d in zip(leaves, dynamic, strict=True) if d),
            tuple(_HERE if d else x for x, d in zip(leaves, dynamic, strict=True)),
        )

    def restore(self, arrays: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments, with these arrays filled in."""
        rest = iter(arrays)
        leaves = [next(rest) if x is _HERE else x for x in self.others]
        return jax.tree.unflatten(self.treedef, leaves)

    @property
    def key(self) -> Any:
        """A key that is equal only for arguments of the same program."""
        avals = tuple((x.shape, str(x.dtype)) for x in self.arrays)
        return self.treedef, avals, tuple(map(_exact, self.others))


_HERE = object()


def _is_identity(x: Any) -> bool:
    return isinstance(x, Ref | Node)


def _exact(x: Any) -> Any:
    try:
        hash(x)
    except TypeError:
        return id(x)
    return type(x), x


class Call(NamedTuple):
    """One call of a module. `values` are the shapes that the module has in the call, by path.

    In a transformation that slices the module (`nnx.scan`, `nnx.vmap`) they have fewer axes than in
    the model. `times` is the product of the sizes of the missing axes.
    """

    args: Arguments
    out: Any
    values: dict[Path, Any]
    times: int


class Mark(NamedTuple):
    """The module that a stand-in represents, and the record of its calls."""

    token: int
    path: Path


_CALL = frozenset({"__call__"})


class _Recorder:
    def __init__(self, tree: Node):
        self.token = next(_tokens)
        self.direct: dict[Path, list[Call]] = {}
        # The body of a transformation may be traced several times. The last trace counts.
        self.nested: dict[Path, tuple[int, list[Call]]] = {}
        self.stand_in = StandIn(
            tree, lambda path, module, old: (Mark(self.token, path), _CALL), _around
        )
        self.frame: Any = None
        self.trace: Any = None
        self.out: Any = None

    def start(self) -> None:
        """Begin the call here."""
        self.frame, self.trace = local.frame, trace_ref()
        self.direct.clear()
        self.nested.clear()

    def note(self, path: Path, call: Call) -> None:
        """Record that a module was called."""
        frame = local.frame
        if frame is self.frame and current_trace(()) is self.trace():
            self.direct.setdefault(path, []).append(call)
            return
        uid = frame.uid if frame is not None else -1
        if path not in self.nested or self.nested[path][0] != uid:
            self.nested[path] = (uid, [])
        self.nested[path][1].append(call)

    def calls(self) -> dict[Path, list[Call]]:
        """The calls of each module, by path."""
        paths = [*self.direct, *(p for p in self.nested if p not in self.direct)]
        return {p: self.direct.get(p, []) + self.nested.get(p, (0, []))[1] for p in paths}


class _Running(threading.local):
    def __init__(self) -> None:
        self.recorders: list[_Recorder] = []


_running = _Running()


def _around(name: str, call: Any, module: Any, args: Any, kwargs: Any) -> Any:
    mark: Mark | None = attributes(module).get(MARK)
    running = _running.recorders if mark is not None else ()
    recorder = next((r for r in running if mark is not None and r.token == mark.token), None)
    if recorder is None or mark is None:
        return call(module, *args, **kwargs)
    # Look before the call, because the call may write values of other shapes.
    values = {p: jax.tree.map(abstract, r._value) for p, r in refx.refs(module).items()}
    shapes = jax.tree.map(abstract, (args, kwargs), is_leaf=_is_identity)
    out = call(module, *args, **kwargs)
    times = _repeats(recorder.frame)
    if times == 1:
        # A plain jax transformation shows only in the shapes of the values.
        whole = refx.refs(recorder.stand_in.modules[mark.path])
        times = _lanes({p: r._value for p, r in whole.items()}, values)
    recorder.note(
        mark.path, Call(Arguments.of(*shapes), jax.tree.map(abstract, out), values, times)
    )
    return out


def _repeats(outermost: Any) -> int:
    """How often the bodies around this call run, up to the body that called the model."""
    times, frame = 1, local.frame
    while frame is not None and frame is not outermost:
        times *= frame.repeats
        frame = frame.parent
    return times


def _lanes(whole: Mapping[Path, Any], seen: Mapping[Path, Any]) -> int:
    for path, value in seen.items():
        # The whole model lacks Refs that the call itself has made.
        a, b = _shape(whole.get(path, value)), _shape(value)
        if len(a) > len(b) and a[len(a) - len(b) :] == b:
            return math.prod(a[: len(a) - len(b)])
    return 1


def _shape(value: Any) -> tuple[int, ...]:
    return value.shape if is_arraylike(value) else ()


def default_scope() -> Scope:
    """The ambient scope. If it has no keys, it gets some; their values do not matter."""
    around: Scope | None = ambient.scope
    if around is not None and "default" in around.streams:
        return around
    return make_scope({"default": jax.random.key(0)})


def record(
    model: Node, function: Callable[..., Any] | None, arguments: Arguments
) -> dict[Path, list[Call]]:
    """Call a model abstractly. Return the calls of each of its modules, by canonical path.

    Args:
      model: the module.
      function: the method to call, unbound; `__call__` if None.
      arguments: the arguments of the call.
    """
    recorder = _Recorder(model)

    def run(model: Any, arrays: Any) -> Any:
        recorder.start()
        args, kwargs = arguments.restore(arrays)
        out = model(*args, **kwargs) if function is None else function(model, *args, **kwargs)
        recorder.out = jax.tree.map(abstract, out, is_leaf=_is_identity)
        # The record already holds the outputs, so modules and other objects need not be returned.
        return [x for x in jax.tree.leaves(out, is_leaf=_is_identity) if is_arraylike(x)]

    _running.recorders.append(recorder)
    try:
        with entered(default_scope()):
            eval_shape(run, recorder.stand_in.root, list(arguments.arrays))
    finally:
        _running.recorders.remove(recorder)
    calls = recorder.calls()
    if function is not None:
        values = {p: jax.tree.map(abstract, r._value) for p, r in refx.refs(model).items()}
        shapes = Arguments(
            arguments.treedef, tuple(map(abstract, arguments.arrays)), arguments.others
        )
        calls[()] = [Call(shapes, recorder.out, values, 1)]
    return calls
