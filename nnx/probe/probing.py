"""What probes do: the hooks on the outputs of marked modules.

A probe (`nnx.capture`, `nnx.patch`, `nnx.output_grad`, `nnx.debug.find_nonfinite`) is a set of hooks.
The modules that it is about are marked (see `nnx.probe.stand_in`). While its call runs, `ambient.probe` is a
`Context`, which knows what the marks mean.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from nnx._ambient import ambient
from nnx.probe.records import (
    Group,
    Hook,
    Mark,
    Probe,
    ProbeError,
    Record,
    added,
    counts,
    output_of,
    plain,
    shapes,
    text,
)
from nnx.probe.stand_in import MARK
from nnx.surgery import modules
from nnx.transforms.branches import cond
from refx import Node, opened, refs
from refx.describe import transformation
from refx.frame import local
from refx.node import attributes
from refx.partition import Path
from refx.trace import current_trace, program_between, trace_ref

__all__: list[str] = []


class Run:
    """One probe in one body.

    `arrays` has for each patch the arrays that its function closes over.
    """

    __slots__ = ("arrays", "base", "frame", "functions", "inputs", "probe", "records", "trace")

    def __init__(self, probe: Probe, arrays: Any, inputs: Group | None, functions: Any, base: int):
        self.probe = probe
        self.arrays = arrays
        self.inputs = iter(inputs.items) if inputs is not None else None
        self.functions = functions
        self.records: list[Any] = []
        # The number of loops around the call of the probe.
        self.base = base
        self.frame = local.frame
        self.trace = trace_ref()

    def is_here(self) -> bool:
        """Whether code runs in the body itself, and not in a transformation of JAX in it."""
        return local.frame is self.frame and current_trace(()) is self.trace()

    def sees(self, what: str) -> bool:
        """Whether a value can come out from where code runs; if not, that may be an error."""
        here = self.is_here()
        if not here and not self.probe.quiet:
            raise ProbeError(
                f"{what} cannot be seen in {transformation()} inside of the model: what is computed "
                f"in there does not come out. Use the nnx transformation of that name in the model, or "
                f"do not select the module."
            )
        return here

    def next_input(self) -> Any:
        """The next input; None without any."""
        if self.inputs is None:
            return None
        given = next(self.inputs)
        return given.value if isinstance(given, Record) else given


class Key:
    """What a body needs to know of the probes, apart from arrays. Equal ones are one object.

    `probes` are pairs of a probe and the number of loops around its call. `sliced` has for each loop
    around the body which modules it takes slices of, by level and path.
    """

    __slots__ = ("__weakref__", "probes", "sliced")

    def __init__(self, probes: tuple[tuple[Probe, int], ...], sliced: tuple[Any, ...]):
        self.probes = probes
        self.sliced = sliced


# A bound for keys that ever new patches could fill; what is dropped is made, and compiled, again.
_MOST = 512
_keys: dict[Any, Key] = {}


def key_of(probes: tuple[tuple[Probe, int], ...], sliced: tuple[Any, ...]) -> Key:
    """The one Key with this content."""
    if len(_keys) >= _MOST:
        _keys.clear()
    content = probes, sliced
    return _keys.get(content) or _keys.setdefault(content, Key(*content))


class Context:
    """The probes that are active in one body, outer ones first, and the loops around it."""

    def __init__(self, runs: list[Run], indices: list[Any], sliced: tuple[Any, ...]):
        self.runs = runs
        # For each loop that stacks: the number of the step, and what it slices.
        self.indices = indices
        self.sliced = sliced
        self._outer: list[Any] = []

    def __enter__(self) -> Context:
        self._outer.append(ambient.probe)
        ambient.probe = self
        return self

    def __exit__(self, *exc: object) -> None:
        ambient.probe = self._outer.pop()

    def with_probe(
        self, probe: Probe, functions: Any = (), arrays: Any = (), inputs: Group | None = None
    ) -> Any:
        """This context and one more probe, whose call begins here."""
        run = Run(probe, list(arrays), inputs, functions, len(self.indices))
        return type(self)([*self.runs, run], self.indices, self.sliced)

    @classmethod
    def begin(cls, key: Key, constants: Any, inputs: Any, loop: Any = None, args: Any = ()) -> Any:
        """The context of a body.

        Args:
          key: that of the context around it.
          constants: its arrays.
          inputs: what is added to outputs.
          loop: the number of the step or the lane, where the body is that of a loop that stacks.
          args: the arguments of such a body, to see which modules are slices.
        """
        arrays, indices = constants
        runs = [
            Run(probe, a, i, [f.bind(x) for f, x in zip(probe.patches, a, strict=True)], base)
            for (probe, base), a, i in zip(key.probes, arrays, inputs, strict=True)
        ]
        sliced = key.sliced
        if loop is not None:
            sliced = (*sliced, sliced_modules(args, sliced))
            indices = [*indices, loop]
        return cls(runs, list(indices), sliced)

    # ---- crossing into a transformation

    @property
    def key(self) -> Key:
        return key_of(tuple((run.probe, run.base) for run in self.runs), self.sliced)

    def constants(self) -> Any:
        """The arrays that a body needs: the same in every step and lane."""
        return [run.arrays for run in self.runs], self.indices

    def inputs(self) -> list[Any]:
        """What is added to outputs in the next transformation, by probe."""
        return [run.next_input() if run.is_here() else None for run in self.runs]

    def deliver(self, groups: list[Group], kind: str = "call") -> None:
        """Take what a transformation recorded."""
        for run, group in zip(self.runs, groups, strict=True):
            first = next(group.records(), None)
            if run.is_here() or (first is not None and run.sees(output_of(first.path))):
                run.records.append(group.of(kind, group.step))

    def groups(self) -> list[Group]:
        """What was recorded here, by probe."""
        return [Group(run.records) for run in self.runs]

    # ---- hooks

    def changed(self, mark: Mark, name: str, hook: Hook, out: Any) -> Any:
        """What a module is to return in the place of its output."""
        run, label = self.runs[mark.level], _label(name)
        for number, at in hook.patches:
            if not run.is_here():
                _check_kept(run, mark, label)
            out = self._patched(run, mark, label, number, at, out)
        if hook.recorded and run.probe.adds and run.sees(output_of(mark.path, label)):
            out = added(out, run.next_input())
        return out

    def record(self, mark: Mark, name: str, hook: Hook, given: Any, out: Any) -> None:
        """Take note of what a module returned."""
        run, label = self.runs[mark.level], _label(name)
        if hook.recorded and run.sees(output_of(mark.path, label)):
            value = counts(given, out) if run.probe.counts else plain(out)
            run.records.append(Record(mark.path, label, self._axes(run, mark), value))

    def sow(self, mark: Mark, name: str, value: Any, collection: Any) -> None:
        """Record a value that a module stores."""
        run = self.runs[mark.level]
        if run.probe.collection is None or run.probe.collection != (collection,):
            return
        if run.sees(output_of((*mark.path, name))):
            axes = self._axes(run, mark)
            run.records.append(Record((*mark.path, name), "sow", axes, plain(value)))

    def _stacks(self, mark: Mark) -> list[int]:
        """The loops around this call that take slices of the module."""
        place = mark.level, mark.path
        return [i for i, sliced in enumerate(self.sliced) if place in sliced]

    def _axes(self, run: Run, mark: Mark) -> tuple[int, ...]:
        return tuple(i - run.base for i in self._stacks(mark) if i >= run.base)

    def _patched(
        self,
        run: Run,
        mark: Mark,
        label: str,
        number: int,
        at: tuple[int, ...],
        out: Any,
    ) -> Any:
        function, stacks = run.functions[number], self._stacks(mark)
        if not at:
            return _checked(function(out), mark, label)
        if len(at) != len(stacks):
            raise ProbeError(
                f"{output_of(mark.path, label)} was to be patched in layer {', '.join(map(str, at))} of a "
                f"stack, but {len(stacks)} loops around its call take slices of its Refs. Leave out "
                f"the number, or run the layers in nnx.Stack, nnx.scan or nnx.vmap."
            )
        chosen = jnp.array(True)
        for i, n in zip(stacks, at, strict=True):
            chosen = chosen & (self.indices[i] == n)
        # In the other layers it must give what the module gives.
        old = jax.tree.map(jnp.asarray, out)

        def patched(out: Any) -> Any:
            new = jax.tree.map(jnp.asarray, _checked(function(out), mark, label))
            if shapes(new) != shapes(out):
                raise ProbeError(
                    f"The patch of {output_of(mark.path, label)} in one layer of a stack returned "
                    f"{text(new)} in the place of {text(out)}. All layers of a stack return the same "
                    f"shapes and dtypes: cast or reshape it."
                )
            return new

        return suspended(cond, chosen, patched, lambda out: out, old)


def _label(method: str) -> str:
    return "" if method == "__call__" else method


def _check_kept(run: Run, mark: Mark, label: str) -> None:
    if program_between(run.trace(), current_trace(())) is not None:
        raise ProbeError(
            f"{output_of(mark.path, label)} cannot be patched in {transformation()} inside of the model: "
            f"JAX keeps the program, and another call would go on with this patch. Use the nnx "
            f"transformation of that name in the model."
        )


def _checked(out: Any, mark: Mark, label: str) -> Any:
    if out is None:
        raise ProbeError(
            f"The patch of {output_of(mark.path, label)} returned None. It takes the output of the module "
            f"and returns what comes in its place."
        )
    return out


def around(name: str, method: Any, module: Any, args: Any, kwargs: Any) -> Any:
    """Call a watched method of a marked module."""
    out = method(module, *args, **kwargs)
    context: Context | None = ambient.probe
    if context is None:
        return out
    found = [
        (mark, hook)
        for mark in reversed(attributes(module).get(MARK, ()))
        for method, hook in mark.hooks
        if method == name and mark.level < len(context.runs)
    ]
    # All see what the module gives to its caller: with the changes of the others.
    for mark, hook in found:
        out = context.changed(mark, name, hook, out)
    for mark, hook in found:
        context.record(mark, name, hook, (args, kwargs), out)
    return out


def suspended(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a transformation that has its probes in its body already."""
    outer, ambient.probe = ambient.probe, None
    try:
        return fn(*args, **kwargs)
    finally:
        ambient.probe = outer


def sliced_modules(args: Any, before: tuple[frozenset[Any], ...]) -> frozenset[tuple[int, Path]]:
    """The marked modules in the arguments of a loop's body that are slices, by level and path."""
    found: dict[tuple[int, Path], bool] = {}
    for root in opened.leaves(args):
        for module in modules(root).values() if isinstance(root, Node) else ():
            for mark in attributes(module).get(MARK, ()):
                place = (mark.level, mark.path)
                axes = first_axes(module)
                known = sum(place in s for s in before)
                if axes is not None and mark.axes is not None:
                    found[place] = mark.axes - axes > known
                else:
                    # A module without Refs is what the module around it is.
                    found[place] = found.get((mark.level, mark.path[:-1]), False)
    return frozenset(place for place, is_slice in found.items() if is_slice)


def first_axes(module: Any) -> int | None:
    """The number of axes of the first Ref of a module that holds an array; None without any."""
    for ref in refs(module).values():
        for x in jax.tree.leaves(ref._value):
            return jnp.ndim(x)
    return None
