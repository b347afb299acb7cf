"""`nnx.capture`: what every submodule returned, with no change to the model."""

from __future__ import annotations

import itertools
import threading
import types
from collections.abc import Callable, Hashable
from typing import Any

import jax
import jax.numpy as jnp

import refx
from nnx.module import Module
from nnx.training._cells import strong
from nnx.training._shadow import CELLS, TAG, Shadow, Tag
from nnx.transforms.axes import AxisError
from refx import Filter, Partition, Ref, RefError
from refx.node import attributes, tell
from refx.partition import Path, dotted, listed
from refx.trace import current_trace, local, trace_ref, transformation

__all__ = ["CaptureError", "capture", "sow"]

_tokens = itertools.count()


class CaptureError(RefError):
    """A value cannot be captured where it is computed, or there is nothing to capture from."""


class _Recorders(threading.local):
    def __init__(self) -> None:
        self.stack: list[Recorder] = []


_recorders = _Recorders()


def capture(
    model: Any, collection: Hashable = "intermediates", filter: Filter = ...
) -> Callable[..., tuple[Any, Partition]]:
    """Call a model and get what each of its submodules returned, too.

    Neither the model nor its classes are changed, and an ordinary call costs nothing: the call goes
    to a stand-in of the modules that is around the same Refs, so updates (batch statistics,
    counters) are in the model as always. (In the call, the type of a module is a subclass of its
    class.) It works in any transformation: inside of `nnx.jit`,
    `nnx.grad(..., has_aux=True)` or `nnx.scan`, return what was captured.

    Where the model itself runs submodules in an nnx transformation, their outputs come out as their
    updates do: those of layers that `nnx.scan` or `nnx.vmap` slice (`nnx.Stack`) are stacked along a
    leading axis, a cell that a loop carries has the output of the last step, and several calls in one
    transformation leave the last output; of a branch that was not taken it is NaN or zero. A layer
    that `nnx.vmap` or `nnx.shard_map` uses whole, for each example, has no place for outputs that
    differ: leave it out by `filter`. A model that has calls in transformations is called twice, the
    first time to find shapes, so capture it under `nnx.jit`.

    Args:
      model: a module, or a bound method of one.
      collection: which values count that modules store with `nnx.sow`.
      filter: whose outputs are captured, as a filter over modules: a function `(path, module) ->
        bool`, `nnx.PathContains("attention")`, `nnx.OfType(nnx.Linear)`, `...` for all, and None for
        none, which leaves what modules store themselves.

    Returns:
      A function with the arguments of the model, which returns `(y, captured)`. `captured` is a
      Partition from the path of each module that was called to what it returned: the tuple of
      outputs, in order, for one that was called several times. The model itself is at `()`.

    Raises:
      CaptureError: a selected submodule is called where nothing can come out by a Ref, such as in a
        plain `jax` transformation that is part of the model, or in `nnx.vmap` with the same weights
        in every lane.

    >>> import jax, jax.numpy as jnp, nnx
    >>> with nnx.scope(jax.random.key(0)):
    ...     model = nnx.Sequential(nnx.Linear(2, 8), nnx.relu, nnx.Linear(8, 1))
    >>> y, captured = nnx.capture(model, "intermediates")(jnp.ones((5, 2)))
    >>> captured
    Partition({
      '': float32[5,1],
      'layers.0': float32[5,8],
      'layers.2': float32[5,1],
    })
    """
    method = None
    if isinstance(model, types.MethodType):
        method, model = model.__func__, model.__self__
    if not isinstance(model, Module):
        raise CaptureError(
            f"nnx.capture takes a module or a bound method of one, but got a "
            f"{type(model).__name__}: {model!r:.80}. Set keys and flags around the call: "
            f"`with nnx.scope(key, training=True):`."
        )
    selects = refx.to_predicate(filter)

    def capturing(*args: Any, **kwargs: Any) -> tuple[Any, Partition]:
        # Read through the model, so that a closure over it finds the whole of it at once.
        before = refx.get_partition(model)
        streams = refx.get_partition(local.scope) if local.scope is not None else None
        inner: dict[Path, Any] = {}
        while True:
            recorder = Recorder(model, collection, selects, inner)
            shadow = recorder.shadow
            shadow.open()
            _recorders.stack.append(recorder)
            try:
                call = shadow.root if method is None else types.MethodType(method, shadow.root)
                out = call(*args, **kwargs)
            except AxisError as error:
                # Without Refs for outputs it went well, the time before.
                if not inner:
                    raise
                raise CaptureError(_differ(inner)) from error
            finally:
                _recorders.stack.remove(recorder)
            if recorder.found.keys() <= inner.keys():
                captured = recorder.captured()
                return shadow.close(out), captured
            inner = {**inner, **recorder.found}
            _restore(model, before)
            if streams is not None:
                _restore(local.scope, streams)

    return capturing


def _differ(inner: dict[Path, Any]) -> str:
    path = next(iter(inner))
    leave = (
        f"nnx.Not(nnx.PathContains({path[-1]!r}))" if path else "lambda path, module: path != ()"
    )
    return (
        f"The outputs of {listed(inner)} cannot all be captured: nnx.vmap or nnx.shard_map has some of "
        f"them whole, so that an output would differ between the lanes or shards of a Ref that has one "
        f"value. Leave them out, nnx.capture(model, filter={leave}), values of nnx.sow by another "
        f"collection; or map the call of the model, nnx.vmap(nnx.capture(model))(xs)."
    )


def sow(module: Module, name: str, value: Any, collection: Hashable = "intermediates") -> None:
    """Store a value of a running call for `nnx.capture`; without one around it, do nothing.

    Args:
      module: the module that stores it, `self`.
      name: the value is captured at the path of the module and this name.
      value: any pytree of arrays.
      collection: is stored if `nnx.capture` was given the same.

    >>> import jax, jax.numpy as jnp, nnx
    >>> class Square(nnx.Module):
    ...     def __call__(self, x):
    ...         nnx.sow(self, "input", x)
    ...         return x * x
    >>> y, captured = nnx.capture(Square(), filter=None)(jnp.array(3.0))
    >>> float(y), float(captured["input"])
    (9.0, 3.0)
    """
    tag: Tag | None = attributes(module).get(TAG)
    recorder = _recorder(tag)
    if recorder is not None and tag is not None and recorder.collection == collection:
        recorder.note(module, (*tag.path, name), value)


def _recorder(tag: Tag | None) -> Recorder | None:
    for recorder in reversed(_recorders.stack):
        if tag is not None and recorder.token == tag.token:
            return recorder
    return None


def _around(call: Any, module: Any, args: Any, kwargs: Any) -> Any:
    # One that the model made of the type of another is not in the model.
    tag: Tag | None = attributes(module).get(TAG)
    recorder = _recorder(tag)
    if recorder is None or tag is None:
        return call(module, *args, **kwargs)
    recorder.enter(module, tag.path)
    try:
        out = call(module, *args, **kwargs)
        if recorder.selects(tag.path, module):
            recorder.note(module, tag.path, out)
        return out
    finally:
        recorder.prefixes.pop()


class Recorder:
    """What one call of a captured model leaves behind.

    A value that is computed where the capture runs is kept in `direct`. One that is computed in a
    transformation inside of the model would be a tracer that leaks, so it leaves through a Ref of
    the stand-in of its module, like every update. Such a Ref must be there before the call, in the
    right shape: `found` has the shapes that were met, and `inner` those of the call before.
    """

    def __init__(self, model: Module, collection: Hashable, selects: Any, inner: dict[Path, Any]):
        self.token = next(_tokens)
        self.collection = collection
        self.selects = selects
        self.shadow = Shadow(model, self.token, _around)
        self.direct: dict[Path, list[Any]] = {}
        self.found: dict[Path, Any] = {}
        # For the calls that are running: the axes by which a transformation slices their module.
        self.prefixes: list[tuple[int, ...]] = []
        self._frame = local.frame
        self._trace = trace_ref()
        self._shapes = {
            path: [jnp.shape(x) for x in jax.tree.leaves(cell._value)]
            for path, cell in refx.refs(self.shadow.root).items()
        }
        self._cells: dict[Path, Ref[Any]] = {}
        for path, like in inner.items():
            owner = path if path in self.shadow.modules else path[:-1]
            self._cells[path] = cell = Ref(jax.tree.map(_blank, like), collection)
            cells = attributes(self.shadow.modules[owner]).setdefault(CELLS, {})
            tell(self.shadow.modules[owner])
            cells[dotted(path)] = cell

    def enter(self, module: Any, path: Path) -> None:
        """A call of a module begins."""
        prefix = self.prefixes[-1] if self.prefixes else ()
        if not self._here():
            for name, cell in refx.refs(module).items():
                was = self._shapes.get((*path, *name))
                now = [jnp.shape(x) for x in jax.tree.leaves(cell._value)]
                if was and now and was[0][len(was[0]) - len(now[0]) :] == now[0]:
                    prefix = was[0][: len(was[0]) - len(now[0])]
                    break
        self.prefixes.append(prefix)

    def note(self, module: Any, path: Path, value: Any) -> None:
        """A module returned or stored a value."""
        if self._here():
            self.direct.setdefault(path, []).append(value)
            return
        cell = attributes(module).get(CELLS, {}).get(dotted(path))
        try:
            if cell is not None:
                cell.value = jax.tree.map(lambda x: strong(jnp.asarray(x)), value)
                return
            prefix = self.prefixes[-1] if self.prefixes else ()
            self.found[path] = jax.tree.map(
                lambda x: jax.ShapeDtypeStruct((*prefix, *jnp.shape(x)), jnp.result_type(x)), value
            )
        except (RefError, TypeError) as error:
            raise CaptureError(
                f"The output of {dotted(path) or 'the model'!r}, a {type(module).__name__}, cannot "
                f"be captured in {transformation()}: what is computed in there comes out by Refs "
                f"only. Use the nnx transformation of that name in the model, or leave the module "
                f"out: nnx.capture(model, filter=nnx.Not(nnx.PathContains(...)))."
            ) from error

    def captured(self) -> Partition:
        """Everything, in the order of the model."""
        values = {path: list(found) for path, found in self.direct.items()}
        for path, cell in self._cells.items():
            values.setdefault(path, []).append(cell.value)
        order = {path: i for i, path in enumerate(self.shadow.modules)}

        def place(path: Path) -> tuple[int, bool]:
            return (order[path], False) if path in order else (order[path[:-1]], True)

        return Partition(
            (path, found[0] if len(found) == 1 else tuple(found))
            for path, found in sorted(values.items(), key=lambda item: place(item[0]))
        )

    def _here(self) -> bool:
        return local.frame is self._frame and current_trace(()) is self._trace()


def _blank(like: jax.ShapeDtypeStruct) -> jax.Array:
    inexact = jnp.issubdtype(like.dtype, jnp.inexact)
    return jnp.full(like.shape, jnp.nan if inexact else 0, like.dtype)


def _restore(tree: Any, before: Partition) -> None:
    now = refx.get_partition(tree)
    cells = refx.refs(tree)
    for path, value in before.items():
        if path in cells and now[path] is not value:
            cells[path].value = value
