"""`nnx.debug.find_nonfinite`: find where the first nan or infinity of a computation comes from."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from nnx._ambient import ambient
from nnx.module import Module
from nnx.probe.lift_loops import Active
from nnx.probe.probing import around, first_axes
from nnx.probe.reached import reached, substituted
from nnx.probe.records import Group, Hook, Mark, Probe, Record, count
from nnx.probe.stand_in import StandIn
from nnx.scope import entered
from nnx.transforms.callables import unbound
from refx import clone, opened, refs
from refx.node import is_identity
from refx.partition import Path, dotted
from refx.text import key_name

__all__ = ["NonFinite", "find_nonfinite"]


@dataclasses.dataclass(frozen=True, repr=False)
class NonFinite:
    """The first value that is not finite. Its `str` is a sentence about it.

    Attributes:
      kind: `"output"`, of a module; `"argument"`, an array that the call was given; `"value"`, a
        Ref that was not finite before the call; `"written"`, a Ref that was not finite after it;
        `"output gradient"`, of the output of a module; `"gradient"`, of a parameter; or `"result"`,
        of the function.
      path: the name of the argument and the path inside it, joined by dots.
      module: the class name of the module, or None.
      step: the step numbers of the loops around it, outer loops first.
      nans, infinities: how many values are nan, and how many are infinite, in that step.
      input_is_finite: whether the input of the module was finite; None if there is no module.
      before: the Refs and arguments that were not finite before the call.
    """

    kind: str
    path: str
    module: str | None
    step: tuple[int, ...]
    nans: int
    infinities: int
    input_is_finite: bool | None
    before: tuple[str, ...]

    def __str__(self) -> str:
        module = f" ({self.module})" if self.module else ""
        step = f" in step {', '.join(map(str, self.step))}" if self.step else ""
        what = {
            "output": f"The output of {self.path!r}{module} is the first that is not finite{step}",
            "argument": f"The argument {self.path!r} was not finite before the call",
            "value": f"Ref {self.path!r} was not finite before the call",
            "written": f"All outputs of modules are finite, but Ref {self.path!r} was written and is not",
            "output gradient": (
                f"The gradient of the output of {self.path!r}{module} is the first on the way back "
                f"that is not finite{step}, so the code that uses this output produced it"
            ),
            "gradient": (
                f"The gradient of {self.path!r} is not finite, although the gradients of all "
                "outputs are"
            ),
            "result": f"All outputs of modules are finite, but the result of the function{self.path} is not",
        }[self.kind]
        text = f"{what}: {self.nans} nan, {self.infinities} infinite."
        if self.kind == "output" and self.input_is_finite is not None:
            given = (
                "finite"
                if self.input_is_finite
                else "already not finite, and was made outside modules"
            )
            text += f" Its input is {given}."
        others = [name for name in self.before if name != self.path]
        if others and self.kind != "result":
            text += f" Not finite before the call: {', '.join(others[:4])}."
        return text

    def __repr__(self) -> str:
        return f"NonFinite({str(self)!r})"


def find_nonfinite(fn: Callable[..., Any]) -> Callable[..., NonFinite | None]:
    """Find where the first nan or infinity of a computation comes from.

    The function runs on copies. Nothing that it writes is kept, and random streams do not advance.
    It counts the values that are not finite in the output of each module, in every nnx
    transformation. Compiled functions are compiled once for this. In `nnx.grad` and
    `nnx.value_and_grad`, the gradients of these outputs are checked too, from the last to the
    first. In loops, each step is checked. Code inside plain `jax` transformations is not checked.

    Args:
      fn: a function (compiled or not), a module, or a bound method of a module. Modules are found
        in the arguments, in closures, and in globals that the function reads.

    Returns:
      A function with the arguments of `fn`. It returns a `NonFinite` to print, or None if
      everything is finite. The `NonFinite` names the first layer, in the order of the computation,
      whose output is not finite, or the layer's parameter if that was not finite before. If there
      is no such layer, it names the first output on the way back whose gradient is not finite, or a
      gradient, a written Ref, or the result.

    >>> import jax.numpy as jnp, nnx
    >>> class Log(nnx.Module):
    ...     def __call__(self, x):
    ...         return jnp.log(x)
    >>> with nnx.scope(0):
    ...     model = nnx.Sequential(nnx.Linear(2, 2), nnx.relu, Log())
    >>> print(nnx.debug.find_nonfinite(model)(jnp.zeros((1, 2))))
    The output of 'layers.2' (Log) is the first that is not finite: 0 nan, 2 infinite. Its input is finite.
    """

    def finding(*args: Any, **kwargs: Any) -> NonFinite | None:
        return _Search(fn, args, kwargs).result()

    return finding


class _Search:
    """One call, on copies."""

    def __init__(self, fn: Any, args: tuple[Any, ...], kwargs: dict[str, Any]):
        inner, bound = unbound(fn)
        given = {**_names(inner, bound + args), **kwargs}
        if bound:
            # If the module itself is called, paths begin at the module.
            given = {"": bound[0], **dict(list(given.items())[1:])}
        flat = [
            (_joined(name, tuple(map(key_name, keys))), x)
            for name, arg in given.items()
            for keys, x in opened.flatten_with_path(arg)[0]
        ]
        found = reached(fn) if not bound else {}
        # Every module and Ref once, by name.
        roots: dict[str, Any] = {}
        for name, x in flat:
            if is_identity(x):
                roots[name] = x
        for name, x in found.items():
            if not any(x is y for y in roots.values()):
                roots[name] = x
        copies = clone(list(roots.values()))
        self._roots = dict(zip(roots, copies, strict=True))
        self._arrays = {name: x for name, x in flat if not is_identity(x)}
        self._before = dict(self._values())
        self._modules: dict[Path, Module] = {}
        context = ambient.probe if ambient.probe is not None else Active([], [], ())
        level = len(context.runs)

        def mark(path: Path, module: Module, old: Any) -> tuple[Any, frozenset[str]]:
            hooks = (("__call__", Hook(recorded=True)),)
            own = Mark(level, path, first_axes(module), hooks)
            outer = old if type(old) is tuple else ()
            marks = (*(m for m in outer if m.level < level), own)
            return marks, frozenset(method for m in marks for method, _ in m.hooks)

        stand_in = StandIn(copies, mark, around)
        self._classes = {p: type(m).__name__ for p, m in stand_in.modules.items()}
        new = {id(x): y for x, y in zip(roots.values(), stand_in.root, strict=True)}
        args, kwargs = opened.map(
            lambda x: new[id(x)] if is_identity(x) else x, (bound + args, kwargs)
        )
        called = substituted(inner, new)
        probe = Probe(counts=True, quiet=True)
        scope = clone(ambient.scope) if ambient.scope is not None else None
        with entered(scope), context.with_probe(probe) as active:
            self._out = called(*args, **kwargs)
        self._group: Group = jax.device_get(active.groups()[level])

    def _values(self) -> Iterator[tuple[str, Any]]:
        """The values of all Refs by name."""
        for name, root in self._roots.items():
            for path, ref in refs(root).items():
                yield _joined(name, path), ref.value

    def _named(self, path: Path) -> str:
        return _joined(list(self._roots)[int(path[0])], path[1:])

    def result(self) -> NonFinite | None:
        """The first value that is not finite."""
        bad_before = {
            name: n for name, x in {**self._before, **self._arrays}.items() if any(n := _count(x))
        }
        before = tuple(bad_before)
        found = next(_events(self._group), None)
        if found is not None:
            record, step, given, (nans, infinities) = found
            kind = {"gradient": "gradient", "cotangent": "output gradient"}.get(
                record.label, "output"
            )
            path, module = ".".join(record.path), None
            if kind != "gradient":
                path, module = self._named(record.path), self._classes.get(record.path)
            own = [name for name in bad_before if _is_inside(name, path) and name in self._before]
            if kind == "output" and own:
                return NonFinite("value", own[0], None, (), *bad_before[own[0]], None, before)
            finite = None if given is None else not any(given)
            if kind == "output" and given is not None and any(given):
                # An input was not finite: say which argument, if it was an argument.
                argument = next((name for name in bad_before if name in self._arrays), None)
                if argument is not None:
                    counts = bad_before[argument]
                    return NonFinite("argument", argument, None, (), *counts, None, before)
            return NonFinite(kind, path, module, step, nans, infinities, finite, before)
        for name, value in self._values():
            if any(n := _count(value)) and name not in bad_before:
                return NonFinite("written", name, None, (), *n, None, before)
        for keys, x in opened.flatten_with_path(self._out)[0]:
            if not is_identity(x) and any(n := _count(x)):
                where = jax.tree_util.keystr(keys)
                return NonFinite("result", where and f" at {where}", None, (), *n, None, before)
        return None


def _names(fn: Any, args: tuple[Any, ...]) -> dict[str, Any]:
    try:
        bound = inspect.signature(fn).bind_partial(*args)
    except (TypeError, ValueError):
        return {f"argument {i}": x for i, x in enumerate(args)}
    named: dict[str, Any] = {}
    for name, x in bound.arguments.items():
        kind = inspect.signature(fn).parameters[name].kind
        if kind is inspect.Parameter.VAR_POSITIONAL:
            named |= {f"{name}.{i}": y for i, y in enumerate(x)}
        else:
            named[name] = x
    return named


def _joined(name: str, path: Path) -> str:
    return ".".join(part for part in (name, dotted(path)) if part)


def _is_inside(name: str, path: str) -> bool:
    return not path or name == path or name.startswith(path + ".")


def _count(x: Any) -> tuple[int, int]:
    nans, infinities = (0, 0)
    for leaf in jax.tree.leaves(x):
        if isinstance(leaf, float):
            leaf = np.asarray(leaf)
        if isinstance(leaf, jax.Array | np.ndarray):
            a, b = map(int, count(leaf))
            nans, infinities = nans + a, infinities + b
    return nans, infinities


_Event = tuple[Record, tuple[int, ...], Any, tuple[int, int]]


def _events(group: Group, step: tuple[int, ...] = (), back: bool = False) -> Iterator[_Event]:
    """Everything that is not finite, in the order of the computation. `back` marks the backward pass."""
    back = back or group.kind == "backward"
    for item in reversed(group.items) if back else group.items:
        if isinstance(item, Record):
            if item.value is None:
                continue
            single = back or item.label == "gradient"
            given, out = (None, item.value) if single else item.value
            if np.any(out):
                label = "cotangent" if back else item.label
                counts = int(out[0]), int(out[1])
                yield Record(item.path, label, (), None), step, given, counts
        elif item.kind == "loop":
            leaves = [np.asarray(x) for x in jax.tree.leaves(item)]
            length = len(leaves[0]) if leaves else 0
            for i in reversed(range(length)) if back else range(length):
                if any(x[i].any() for x in leaves):
                    inner = jax.tree.map(lambda x, i=i: x[i], item).of("call")
                    yield from _events(inner, (*step, i), back)
        elif item.kind == "while":
            yield from _events(item.of("call"), (*step, int(item.step)), back)
        else:
            yield from _events(item, step, back)
