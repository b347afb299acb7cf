"""`nnx.capture`, `nnx.patch`, `nnx.output_grad`: look at outputs inside a model, and change them.

Each calls a stand-in of the model (`nnx.probe.stand_in`) in which the selected modules carry marks.
A context (`nnx.probe.probing`) knows what the marks mean.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Hashable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from nnx._ambient import ambient
from nnx.module import Module
from nnx.probe.functions import Function
from nnx.probe.lift_loops import Active
from nnx.probe.lifts import zeros_like
from nnx.probe.probing import around, first_axes
from nnx.probe.records import (
    Group,
    Hook,
    Mark,
    Probe,
    ProbeError,
    is_float,
)
from nnx.probe.selecting import Selected, assembled, select
from nnx.probe.stand_in import MARK, StandIn
from nnx.surgery import Where, listed_modules, modules
from nnx.transforms.callables import function_name
from nnx.transforms.grad import value_and_grad
from nnx.transforms.jit import BoundJit
from nnx.transforms.simple import eval_shape
from refx import Partition, opened
from refx.node import attributes, is_identity
from refx.partition import Path
from refx.text import a_kind

__all__ = ["ProbeError", "capture", "output_grad", "patch", "sow"]


def _call_method(method: Any, model: Module, *args: Any, **kwargs: Any) -> Any:
    return around(method.__name__, method, model, args, kwargs)


class _Target(NamedTuple):
    """The thing to call: a function of a model, and the model if the function is bound to one."""

    call: Callable[..., Any]
    model: Module | None

    @classmethod
    def of(cls, name: str, x: Any) -> _Target:
        if isinstance(x, Module):
            return cls(lambda model, *args, **kwargs: model(*args, **kwargs), x)
        method, model = getattr(x, "__func__", None), getattr(x, "__self__", None)
        if isinstance(x, BoundJit):
            method, model = x._jit, x._module
        if isinstance(x, types.MethodType | BoundJit) and isinstance(model, Module):
            # On the model itself, this is the method that `where` may select by name.
            return cls(functools.partial(_call_method, method), model)
        if isinstance(x, _Patched):
            return cls(x.on, x.target.model)
        if hasattr(type(x), "_as_argument") or not callable(x) or isinstance(x, type):
            raise ProbeError(
                f"{name} takes a module, a bound method of a module, or a function whose first "
                f"argument is a module, but got {a_kind(type(x))}: {x!r:.80}. Set keys and "
                "flags around the call: `with nnx.scope(key, training=True):`."
            )
        return cls(x, None)

    def with_model(self, name: str, args: tuple[Any, ...]) -> tuple[Module, tuple[Any, ...]]:
        """The model of a call, and the other arguments."""
        if self.model is not None:
            return self.model, args
        if not args or not isinstance(args[0], Module):
            raise ProbeError(
                f"{name} was given the function {function_name(self.call)}, whose first argument "
                f"must be the model, but is {'missing' if not args else type(args[0]).__name__}."
            )
        return args[0], args[1:]


def _run(
    call: Callable[..., Any],
    model: Module,
    args: Any,
    kwargs: Any,
    hooks: Mapping[Path, tuple[tuple[str, Hook], ...]],
    probe: Probe,
    *,
    abstract: bool = False,
    **given: Any,
) -> tuple[Any, Group]:
    """Call `call(model, ...)` with a probe. Return the output and the records.

    Args:
      call: the function of the model.
      model: the model.
      args: the other arguments.
      kwargs: the keyword arguments.
      hooks: what to do with outputs, by path and method.
      probe: says what the hooks mean.
      abstract: whether to drop everything that the call writes.
      **given: the functions and arrays of patches, and the values to add to outputs.
    """
    context = ambient.probe if ambient.probe is not None else Active([], [], ())
    level = len(context.runs)

    def mark(path: Path, module: Module, old: Any) -> tuple[Hashable, frozenset[str]]:
        outer = old if type(old) is tuple else ()
        own = Mark(level, path, first_axes(module), hooks.get(path, ()))
        marks = (*(m for m in outer if m.level < level), own)
        return marks, frozenset(method for m in marks for method, _ in m.hooks)

    stand_in = StandIn(model, mark, around)
    with context.with_probe(probe, **given) as inner:
        out = call(stand_in.root, *args, **kwargs)
    if not abstract:
        stand_in.close()
    return stand_in.originals(out), stand_in.originals(inner.groups()[level])


def capture(
    model: Any, where: Where = ..., *, collection: Hashable = "intermediates"
) -> Callable[..., tuple[Any, Partition]]:
    """Call a model, and also get the outputs of modules inside it.

    The model and its classes stay unchanged, and ordinary calls cost nothing. The call goes to a
    stand-in with the same Refs, so updates (batch statistics, counters) reach the model as always.
    (During the call, the type of a module may be a subclass of its class.) It works in any
    transformation, and gradients flow through captured outputs. Inside `nnx.jit`,
    `nnx.grad(..., has_aux=True)` or `nnx.scan`, return the captured outputs.

    The model may call its modules inside nnx transformations. In `nnx.jit`, `nnx.remat` and
    `nnx.grad`, outputs come out in order. In loops and batches (`nnx.scan`, `nnx.Stack`,
    `nnx.vmap`, also with shared weights), they are stacked along leading axes, outer loops first.
    An `nnx.while_loop` gives the outputs of its last step. A branch that was not taken gives nan or
    zero.

    Args:
      model: a module, a bound method of a module, the result of `nnx.patch`, or a function whose
        first argument is a module, such as a whole training step.
      where: selects the modules to capture. It may be a class; a glob over paths such as
        `"blocks.*.mlp"` (`*` is one name, `**` any number, `""` the model); a predicate
        `(path, module) -> bool` or a filter such as `nnx.PathContains("attention")`; a tuple of
        these; `...` for all; or None, which leaves only the values that modules store with
        `nnx.sow`. A glob may end with a method, `"embed.attend"`, and may contain the number of a
        layer in a stack, `"stack.layers.3.mlp"`.
      collection: says which values are captured that modules store with `nnx.sow`.

    Returns:
      A function with the arguments of the model that returns `(y, captured)`. `captured` is a
      Partition from the path of each called module to its output. If a module was called several
      times, that is the tuple of its outputs, in order.

    Raises:
      ProbeError: `where` selects nothing; or a selected module is called where its output cannot
        come out: in a plain `jax` transformation inside the model, or in a function with a custom
        rule.

    >>> import jax, jax.numpy as jnp, nnx
    >>> with nnx.scope(jax.random.key(0)):
    ...     model = nnx.Sequential(nnx.Linear(2, 8), nnx.relu, nnx.Linear(8, 1))
    >>> y, captured = nnx.capture(model, "layers.*")(jnp.ones((5, 2)))
    >>> captured
    Partition({
      'layers.0': float32[5,8],
      'layers.2': float32[5,1],
    })
    """
    target = _Target.of("nnx.capture", model)

    def capturing(*args: Any, **kwargs: Any) -> tuple[Any, Partition]:
        root, rest = target.with_model("nnx.capture", args)
        found = modules(root)
        selected = select("nnx.capture", where, found)
        probe = Probe(collection=(collection,))
        out, group = _run(target.call, root, rest, kwargs, _recording(selected), probe)
        return out, assembled("nnx.capture", found, selected, group)

    return capturing


def _recording(selected: Selected) -> dict[Path, tuple[tuple[str, Hook], ...]]:
    hooks: dict[Path, tuple[tuple[str, Hook], ...]] = {}
    for path, method in selected:
        hooks[path] = (*hooks.get(path, ()), (method, Hook(recorded=True)))
    return hooks


def sow(module: Module, name: str, value: Any, collection: Hashable = "intermediates") -> None:
    """Store a value for the `nnx.capture` around this call. Without one, do nothing.

    Args:
      module: the module that stores it, `self`.
      name: the value is captured under the path of the module followed by this name.
      value: any pytree of arrays.
      collection: the value is only stored if `nnx.capture` was given the same collection.

    >>> import jax, jax.numpy as jnp, nnx
    >>> class Square(nnx.Module):
    ...     def __call__(self, x):
    ...         nnx.sow(self, "input", x)
    ...         return x * x
    >>> y, captured = nnx.capture(Square(), None)(jnp.array(3.0))
    >>> float(y), float(captured["input"])
    (9.0, 3.0)
    """
    context: Active | None = ambient.probe
    if context is None:
        return
    for mark in attributes(module).get(MARK, ()):
        if mark.level < len(context.runs):
            context.sow(mark, name, value, collection)


def patch(model: Any, patches: Mapping[Any, Callable[[Any], Any]]) -> Callable[..., Any]:
    """Call a model with the outputs of some of its modules replaced.

    The model stays unchanged: only calls of the returned function are patched. Patches work in
    every transformation inside the model and around the call: under `nnx.jit`, `nnx.grad`, in one
    layer of an `nnx.Stack`. Gradients flow through them and to the arrays that they close over. A
    compiled function inside the model compiles once for a patch. Another array in the patch, such
    as a new steering vector, does not compile again.

    Args:
      model: as for `nnx.capture`. The result of `nnx.patch` may be patched again.
      patches: a dict whose keys select modules, like `where` of `nnx.capture`. Each value is a
        function that takes the output and returns its replacement. Several patches of one module
        apply in order.

    Returns:
      A function with the arguments of the model.

    Raises:
      ProbeError: a key selects nothing; the function returns None or, in one layer of a stack,
        another shape or dtype; or a module is called in a plain `jax` transformation that caches
        its program.

    >>> import jax, jax.numpy as jnp, nnx
    >>> with nnx.scope(jax.random.key(0)):
    ...     model = nnx.Sequential(nnx.Linear(2, 8), nnx.relu, nnx.Linear(8, 1))
    >>> silent = nnx.patch(model, {"layers.0": lambda h: h * 0})
    >>> silent(jnp.ones((1, 2))).tolist()
    [[0.0]]

    What the patch changed can be captured:

    >>> y, captured = nnx.capture(silent, "layers.0")(jnp.ones((1, 2)))
    >>> float(captured["layers.0"].sum())
    0.0
    """
    if not isinstance(patches, Mapping):
        raise ProbeError(
            "nnx.patch takes a dict from a selector of modules to a function of their output, but "
            f"got {a_kind(type(patches))}. Write nnx.patch(model, {{'layers.0': fn}})."
        )
    for where, fn in patches.items():
        if not callable(fn):
            raise ProbeError(
                f"nnx.patch got {a_kind(type(fn))} for {where!r}, but needs a function that takes "
                f"the output: lambda output: ..."
            )
    return _Patched(_Target.of("nnx.patch", model), dict(patches))


class _Patched:
    """A model with patches that can be called."""

    def __init__(self, target: _Target, patches: dict[Any, Callable[[Any], Any]]):
        self.target = target
        self._patches = patches

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        model, rest = self.target.with_model("nnx.patch", args)
        return self.on(model, *rest, **kwargs)

    def on(self, model: Module, *args: Any, **kwargs: Any) -> Any:
        """The thing to call, for a given model."""
        numbers: dict[Path, dict[str, list[Any]]] = {}
        found = modules(model)
        for i, where in enumerate(self._patches):
            for (path, method), chosen in select("nnx.patch", where, found).items():
                hooks = numbers.setdefault(path, {}).setdefault(method, [])
                hooks += [(i, tuple(n for _, n in at)) for at in chosen]
        hooks = {
            path: tuple((method, Hook(tuple(chosen))) for method, chosen in methods.items())
            for path, methods in numbers.items()
        }
        functions = list(self._patches.values())
        taken = [Function(fn) for fn in functions]
        probe = Probe(tuple(f.without_arrays() for f in taken))
        arrays = [f.arrays for f in taken]
        return _run(
            self.target.call, model, args, kwargs, hooks, probe, functions=functions, arrays=arrays
        )[0]

    def __repr__(self) -> str:
        return f"<nnx.patch of {', '.join(map(repr, self._patches))}>"


def output_grad(
    loss: Callable[..., Any], where: Where = ..., *, has_aux: bool = False
) -> Callable[..., Any]:
    """The gradient of a loss with respect to the outputs of modules inside a model.

    It is the gradient at that point of the computation, exactly as if the output were an input of
    the rest. If a module is called several times, the gradient is a tuple. In loops and batches it
    is stacked, like the result of `nnx.capture`. Writes of the loss take effect, as in `nnx.grad`.

    Args:
      loss: a function of a model and other arguments that returns a scalar, or a module or bound
        method that does.
      where: selects the modules, as for `nnx.capture`.
      has_aux: whether `loss` returns `(scalar, aux)`.

    Returns:
      A function with the arguments of `loss`. It returns a Partition with the paths of
      `nnx.capture`, or `(Partition, aux)`. Leaves without a gradient, such as integers, get a zero
      of dtype float0.

    Raises:
      ProbeError: `where` selects nothing; no selected module is called; or one is called in an
        `nnx.while_loop`, which has no gradient.

    >>> import jax, jax.numpy as jnp, nnx
    >>> with nnx.scope(jax.random.key(0)):
    ...     model = nnx.Sequential(nnx.Linear(2, 8), nnx.relu, nnx.Linear(8, 1))
    >>> grads = nnx.output_grad(lambda m, x: m(x).sum(), "layers.*")(model, jnp.ones((5, 2)))
    >>> grads["layers.2"].tolist()
    [[1.0], [1.0], [1.0], [1.0], [1.0]]
    """
    name = "nnx.output_grad"
    target = _Target.of(name, loss)

    def gradient(*args: Any, **kwargs: Any) -> Any:
        root, rest = target.with_model(name, args)
        found = modules(root)
        selected = select(name, where, found)
        hooks = _recording(selected)
        # Numbers, strings and so on are settings, as in an ordinary call.
        leaves, treedef = opened.flatten((rest, kwargs))
        dynamic = [is_identity(x) or isinstance(x, jax.Array | np.ndarray) for x in leaves]

        def called(arrays: Any) -> tuple[Any, Any]:
            todo = iter(arrays)
            flat = [next(todo) if d else x for d, x in zip(dynamic, leaves, strict=True)]
            return jax.tree.unflatten(treedef, flat)

        arrays = [x for d, x in zip(dynamic, leaves, strict=True) if d]

        def look(model: Any, arrays: Any) -> Group:
            given = called(arrays)
            return _run(target.call, model, *given, hooks, Probe(), abstract=True)[1]

        shapes: Group = eval_shape(look, root, arrays)
        if not any(True for _ in shapes.records()):
            raise ProbeError(
                f"{name} found no call of the modules that {where!r} selects while it computed the "
                "loss, so there is no output to differentiate: "
                f"{listed_modules([path for path, _ in selected])}."
            )

        def body(zeros: Group, model: Any, arrays: Any) -> Any:
            given = called(arrays)
            out, _ = _run(target.call, model, *given, hooks, Probe(adds=True), inputs=zeros)
            if has_aux and isinstance(out, tuple) and len(out) == 2:
                return out
            return out if has_aux else (out, None)

        body.__qualname__ = function_name(loss)
        (_, aux), grads = value_and_grad(body, has_aux=True)(zeros_like(shapes), root, arrays)
        named = assembled(name, found, selected, _in_place(shapes, grads))  # pyright: ignore[reportArgumentType]
        return (named, aux) if has_aux else named

    return functools.wraps(target.call)(gradient) if target.model is None else gradient


def _in_place(shapes: Group, grads: Group) -> Group:
    """The gradients, in the structures of the outputs."""
    items: list[Any] = []
    for like, item in zip(shapes.items, grads.items, strict=True):
        if isinstance(like, Group):
            items.append(_in_place(like, item))
            continue
        todo = iter(item.value)
        leaves, treedef = jax.tree.flatten(like.value)
        zero = [np.zeros(x.shape, jax.dtypes.float0) if not is_float(x) else None for x in leaves]
        value = jax.tree.unflatten(treedef, [next(todo) if z is None else z for z in zero])
        items.append(like.of(value))
    return Group(items, grads.kind)
