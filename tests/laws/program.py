"""A program as data: its text, how to run it, and what it leaves behind."""

from __future__ import annotations

import contextlib
import gc
import types
import warnings
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import numpy as np

import nnx
from tests.laws.library import Library, Nnx, Python, Stop
from tests.laws.reference import Differs, Dual
from tests.laws.things import Boom, text

NNX, PYTHON = Nnx("nnx"), Python("Python")


@dataclass(frozen=True)
class Line:
    """One line. `simpler` are lines that may replace it when the program shrinks."""

    text: str
    simpler: tuple[str, ...] = ()


@dataclass(frozen=True)
class Block:
    """A line that ends with a colon, and the lines indented under it."""

    head: str
    body: tuple[Node, ...]


Node = Line | Block


@dataclass(frozen=True)
class Program:
    """The prelude, which makes things, and the steps, which use them.

    `law` is the law that the program tests. `may` holds the names of the errors that nnx may raise for it, each with
    a reason. `cells` puts all names in one function, so that functions close over cells instead of globals.
    """

    law: int
    prelude: tuple[Node, ...]
    steps: tuple[Node, ...]
    may: tuple[tuple[str, str], ...] = ()
    real: bool = False
    cells: bool = False
    seed: Any = None

    def __str__(self) -> str:
        return "\n".join([*render(self.prelude, 0), "# ---", *render(self.steps, 0)])


def render(nodes: tuple[Node, ...], depth: int) -> Iterator[str]:
    """The lines of a program."""
    pad = "    " * depth
    for node in nodes:
        if isinstance(node, Line):
            yield pad + node.text
        else:
            yield pad + node.head
            yield from render(node.body, depth + 1) if node.body else [f"{pad}    pass"]


@dataclass
class Result:
    """The state after the prelude and after each step, and the error that ended the run."""

    states: list[Any] = field(default_factory=list)
    error: BaseException | None = None
    # The state just after a step raised.
    after_error: Any = None
    # Whether the prelude ran without an error.
    began: bool = False


def execute(
    program: Program, lib: Library, watched: list[weakref.ref[Any]] | None = None
) -> Result:
    """Run a program with one of the libraries; `watched` gets weak references to what it made at the start."""
    result = Result()
    lib.real = program.real
    names = lib.namespace()
    builtin = set(names)
    steps = _cells if program.cells else _globals
    running = steps(program, names)
    labels: dict[int, str] = {}
    keep: list[Any] = []
    try:
        for found in running:
            mine = {k: v for k, v in found.items() if k not in builtin and k != "main"}
            if not result.states:
                _label(lib, mine, labels, keep)
                if watched is not None:
                    watched += _watch(lib, keep)
            result.began = True
            result.states.append(state_of(lib, mine, labels))
            last = mine
    except Exception as error:
        result.error = error
        if result.began:
            result.after_error = state_of(lib, last, labels)
    finally:
        lib.restore()
        running.close()
        # Delete every name: whatever is still alive then is a leak.
        names.clear()
    return result


def _watch(lib: Library, objects: list[Any]) -> Iterator[weakref.ref[Any]]:
    for x in objects:
        if isinstance(x, (lib.Module, lib.Ref)):
            yield weakref.ref(x)
        if isinstance(x, lib.Ref) and isinstance(x.value, jax.Array):
            yield weakref.ref(x.value)


def _globals(program: Program, names: dict[str, Any]) -> Iterator[dict[str, Any]]:
    exec(_compiled("\n".join(render(program.prelude, 0))), names)
    yield names
    for step in program.steps:
        exec(_compiled("\n".join(render((step,), 0))), names)
        yield names


def _cells(program: Program, names: dict[str, Any]) -> Iterator[dict[str, Any]]:
    lines = ["def main():", *render(program.prelude, 1), "    yield"]
    for step in program.steps:
        lines += [*render((step,), 1), "    yield"]
    exec(_compiled("\n".join(lines)), names)
    main: types.GeneratorType[Any, Any, Any] = names["main"]()
    for _ in main:
        assert main.gi_frame is not None
        yield dict(main.gi_frame.f_locals)


def _compiled(source: str) -> types.CodeType:
    return compile(source, "<program>", "exec")


def _label(lib: Library, names: dict[str, Any], labels: dict[int, str], keep: list[Any]) -> None:
    """Name every object that the prelude made after the first way to reach it."""
    # Python lists the variables of a function in an order that depends on what closes over them.
    todo = [(x, name) for name, x in sorted(names.items(), reverse=True)]
    while todo:
        x, name = todo.pop()
        parts = lib.parts(x)
        if (parts is None and not isinstance(x, lib.Ref)) or id(x) in labels or type(x) is tuple:
            if type(x) is not tuple:
                continue
        else:
            labels[id(x)] = name
        keep.append(x)
        todo += [(part, f"{name}.{key}") for key, part in reversed(parts or [])]


def state_of(lib: Library, names: dict[str, Any], labels: dict[int, str]) -> dict[str, Any]:
    """Everything visible, as plain data: every name, every object once, and the contents of classes."""
    seen: dict[int, str] = {}
    state: dict[str, Any] = {}

    def show(x: Any, held: bool = False) -> Any:
        if isinstance(x, (types.FunctionType, types.MethodType, type, types.ModuleType)):
            return None
        is_ref = isinstance(x, lib.Ref)
        parts = lib.parts(x)
        if parts is None and not is_ref:
            # A name may be a number here and an array there; an attribute is one or the other.
            return text(x) if held and not lib.is_array(x) else value_of(lib, x)
        if type(x) is tuple:
            return tuple(show(part, held) for _, part in parts or [])
        if id(x) not in seen:
            label = seen[id(x)] = labels.get(id(x)) or f"new {len(seen)}"
            if is_ref:
                state[label] = ("Ref", x.collection, value_of(lib, x.value))
            else:
                state[label] = None
                state[label] = (
                    type(x).__name__,
                    tuple(
                        # A computed value may be a number here and an array there.
                        (k if type(k) is str else text(k), show(v, k not in ("w", "c")))
                        for k, v in parts or []
                    ),
                )
        return f"-> {seen[id(x)]}"

    for name, x in names.items():
        # A compiled module is a function here and a module there.
        if not name.startswith("j") and (not callable(x) or lib.parts(x) is not None):
            state[f"{name} ="] = show(x)
    for name, x in lib.changes().items():
        state[f"{name} ="] = show(x)
    return state


def value_of(lib: Library, x: Any) -> Any:
    """A number, an array or a setting as plain data."""
    if isinstance(x, Dual):
        return ("dual", x.value)
    if isinstance(x, jax.core.Tracer):
        return "a tracer"
    if type(x) in (tuple, list):
        return type(x)(value_of(lib, part) for part in x)
    if type(x) is dict:
        return {text(key): value_of(lib, part) for key, part in x.items()}
    if isinstance(x, jax.Array) and jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
        return ("key", jax.random.key_data(x).ravel().tolist())
    if isinstance(x, (jax.Array, np.ndarray)) and x.dtype != object:
        array = np.asarray(x)
        return float(array) if array.ndim == 0 else [float(v) for v in array.ravel()]
    if isinstance(x, (np.integer, np.floating)) or type(x) in (int, float):
        return float(x)
    if type(x).__name__ in ("TypedInt", "TypedFloat"):
        # `jax.checkpoint` turns a Python number that a function returns into this.
        return float(x)
    if callable(x) and not isinstance(x, type):
        return None
    return text(x)


def same(a: Any, b: Any) -> bool:
    """Whether two states are the same, up to the rounding of float32."""
    if isinstance(a, float) and isinstance(b, float):
        return a == b or abs(a - b) <= 1e-4 * max(1.0, abs(a))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(v, b[k]) for k, v in a.items())
    if isinstance(a, (list, tuple)) and type(a) is type(b):
        return len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


def difference(expected: dict[str, Any], got: dict[str, Any]) -> str:
    """The parts in which two states differ."""
    lines = []
    for name in {**expected, **got}:
        a, b = expected.get(name, "nothing"), got.get(name, "nothing")
        if not same(a, b):
            lines.append(f"{name}: expected {a}, got {b}")
    return "\n".join(lines)


@dataclass
class Verdict:
    """The outcome of a program: `kind` is "ok", "raised" (an allowed error), "void", or the fault."""

    kind: str
    detail: str = ""
    step: int = 0
    # The name of the error that nnx raised, if any.
    error: str = ""

    @property
    def wrong(self) -> bool:
        return self.kind not in ("ok", "raised", "void")


def expected_of(program: Program) -> tuple[Program, Result | None]:
    """The meaning of a program, and the part of it that has a meaning; None if it has none."""
    expected = execute(program, PYTHON)
    if not expected.began or (
        expected.error is not None and not isinstance(expected.error, (Boom, Differs))
    ):
        cut = len(expected.states) - 1
        if cut <= 0:
            return program, None
        program = replace(program, steps=program.steps[:cut])
        expected.error = None
    if not all(finite(state) for state in expected.states):
        return program, None
    return program, expected


def judge(program: Program) -> Verdict:
    """Run a program with both libraries, and compare."""
    program, expected = expected_of(program)
    if expected is None:
        return Verdict("void")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        got = execute(program, NNX)
    return compare(program, expected, got)


def compare(program: Program, expected: Result, got: Result) -> Verdict:
    """The outcome of the two runs of a program."""
    if not got.began and type(got.error).__name__ in dict(program.may):
        return Verdict("raised", type(got.error).__name__)
    if not got.began:
        return Verdict(f"raised {type(got.error).__name__}", f"in the prelude: {got.error}")
    for i, (a, b) in enumerate(zip(expected.states, got.states)):
        if not same(a, b):
            return Verdict("wrong", difference(a, b), i)
    step = len(got.states)
    if got.error is not None:
        name = type(got.error).__name__
        if not same(got.states[-1], got.after_error) and not _half_way(program, got):
            changes = difference(got.states[-1], got.after_error)
            return Verdict("changed by an error", f"{name}: {got.error}\n{changes}", step, name)
        # An error in a callback arrives as an error of JAX's runtime.
        kinds = (nnx.RefError, Boom, jax.errors.JaxRuntimeError)
        meant = len(expected.states) == step and isinstance(expected.error, (Boom, Differs))
        if (meant and isinstance(got.error, kinds)) or name in dict(program.may):
            return Verdict("raised", name, step, name)
        if _in_a_branch_not_taken(program, expected, name):
            return Verdict("raised", name, step, name)
        return Verdict(f"raised {name}", str(got.error), step, name)
    if len(expected.states) < step or expected.error is not None:
        return Verdict("no error", f"Python raised {type(expected.error).__name__}", step)
    return Verdict("ok")


def _half_way(program: Program, got: Result) -> bool:
    """Whether Python leaves the same state if it stops at a call of a transformation.

    What an ordinary function did before that call stays done, as with any error.
    """
    for stop in range(_MOST_CALLS):
        with _python(stop=stop) as lib:
            found = execute(program, lib)
        if not isinstance(found.error, Stop):
            return False
        if len(found.states) == len(got.states) and same(found.after_error, got.after_error):
            return True
    return False


def _in_a_branch_not_taken(program: Program, expected: Result, name: str) -> bool:
    """Whether a branch that the program does not take raises that error, or leaves other shapes.

    JAX traces every branch.
    """
    for turn in range(1, 8):
        with _python(turn=turn) as lib:
            found = execute(program, lib)
        if type(found.error).__name__ == name:
            return True
        states = zip(expected.states, found.states)
        if name == "BranchError" and any(_shapes(a) != _shapes(b) for a, b in states):
            return True
    return False


_MOST_CALLS = 40


@contextlib.contextmanager
def _python(*, turn: int = 0, stop: int | None = None) -> Iterator[Python]:
    PYTHON.turn, PYTHON.stop = turn, stop
    try:
        yield PYTHON
    finally:
        PYTHON.turn, PYTHON.stop = 0, None


def _shapes(x: Any) -> Any:
    """A state without its numbers."""
    if isinstance(x, float):
        return 0.0
    if isinstance(x, dict):
        return {k: _shapes(v) for k, v in x.items()}
    return type(x)(map(_shapes, x)) if isinstance(x, (list, tuple)) else x


def finite(x: Any) -> bool:
    """Whether no number in a state is too large to be compared."""
    if isinstance(x, float):
        return abs(x) < 1e6
    if isinstance(x, dict):
        return all(map(finite, x.values()))
    return all(map(finite, x)) if isinstance(x, (list, tuple)) else True


def forget() -> None:
    """Drop the programs that JAX caches, because one run has very many of them."""
    jax.clear_caches()
    gc.unfreeze()
    gc.collect()
