"""Record which code runs while a function is traced."""

from __future__ import annotations

import functools
import gc
import sys
import types
from collections.abc import Callable
from typing import Any

__all__: list[str] = []

# Their results depend only on their arguments and on JAX's settings.
_PURE = frozenset(
    {"jax", "jaxlib", "numpy", "ml_dtypes", "opt_einsum", "optax", "abc", "_abc", "cmath", "copy"}
    | {"_collections", "_collections_abc", "collections", "contextlib", "dataclasses", "enum"}
    | {"_functools", "functools", "itertools", "math", "numbers", "operator", "_operator", "re"}
    | {"string", "types", "typing", "typing_extensions"}
)
# Streams of random numbers, and files.
_IMPURE = ("numpy.random.", "numpy.lib.npyio.", "numpy.lib._npyio_impl.")
# Python's own C functions that read more than their arguments.
_READ_ANYTHING = frozenset(
    {"__import__", "breakpoint", "compile", "eval", "exec", "globals", "input", "locals", "open"}
    | {"vars", "__subclasses__", "fromfile"}
)
# These can find an attribute whose name is not in the code.
_BY_STRING = frozenset(
    {"getattr", "hasattr", "attrgetter", "methodcaller", "__dict__", "__getattribute__"}
)
# Ignore callbacks of weak references, which run at any time. Import statements are read from the
# code itself.
_UNSEEN = frozenset(
    {"weakref", "_weakrefset"} | {"importlib._bootstrap", "importlib._bootstrap_external"}
)


def is_pure(name: Any) -> bool:
    """Whether the record ignores the code of the module called `name`."""
    if type(name) is not str:
        return False
    if name.partition(".")[0] in _PURE:
        return not f"{name}.".startswith(_IMPURE)
    # The generated code of a namedtuple has its own module.
    return name.startswith("namedtuple_") or f"{name}.".startswith("nnx.purify.")


def home(cls: type) -> str:
    """The module that defines a class."""
    # Bypass any metaclass.
    name = type.__dict__["__module__"].__get__(cls)
    return name if type(name) is str else ""


class Record:
    """A profile function that records which code runs: `with Record() as record:`.

    `ran` are the functions that ran, as code and globals, without those of pure libraries.
    `complete` is False if a C function was called that may read more than its arguments and its
    object, or if another profiler was running, so that nothing could be recorded. `by_string` is
    True if names of attributes were computed.
    """

    def __init__(self) -> None:
        self.complete = True
        self.by_string = self._prints = self._collecting = False
        self._hook: Any = None
        # Python runs finalizers, and the callbacks of libraries, wherever it happens to collect garbage.
        # The first callback sees the start before any other, the last one sees the end after them.
        self._callbacks = (self._on_start, self._on_stop)
        self._ran: dict[tuple[int, int], tuple[types.CodeType, dict[str, Any]]] = {}

    @property
    def ran(self) -> list[tuple[types.CodeType, dict[str, Any]]]:
        """The functions that ran, each as its code and its globals."""
        return list(self._ran.values())

    def __enter__(self) -> Record:
        if sys.getprofile() is None:
            self._hook = self._make_hook()
            gc.callbacks.insert(0, self._callbacks[0])
            gc.callbacks.append(self._callbacks[1])
            sys.setprofile(self._hook)
        return self

    def __exit__(self, *exc: object) -> None:
        if self._hook is not None and sys.getprofile() is self._hook:
            sys.setprofile(None)
        else:
            self.complete = False
        if self._hook is not None:
            for callback in self._callbacks:
                gc.callbacks.remove(callback)
        self._hook = None

    def _on_start(self, phase: str, _: Any) -> None:
        self._collecting = self._collecting or phase == "start"

    def _on_stop(self, phase: str, _: Any) -> None:
        self._collecting = self._collecting and phase != "stop"

    def _make_hook(self) -> Callable[..., None]:
        # JAX triggers this very often during the trace, so irrelevant calls must return quickly.
        kinds: dict[int, tuple[str, Any]] = {}

        def hook(frame: types.FrameType, event: str, arg: Any) -> None:
            if event == "call" or event == "c_call":
                scope = frame.f_globals
                known = kinds.get(id(scope))
                if known is None:
                    # Keep the globals alive, because Python may reuse the id of a deleted object.
                    known = kinds[id(scope)] = (_kind_of(scope), scope)
                if known[0] != "pure":
                    self._note(frame, event, arg)
            elif arg is print:
                self._prints = False

        hook.record = self  # pyright: ignore[reportFunctionMemberAccess]
        return hook

    def _note(self, frame: types.FrameType, event: str, arg: Any) -> None:
        # Code that handles printing, in a notebook or a test, is not part of the program.
        if self._prints or self._collecting or not _is_for_user(frame):
            return
        if event == "call":
            code, scope = frame.f_code, frame.f_globals
            self._ran[id(code), id(scope)] = (code, scope)
            self.by_string = self.by_string or not _BY_STRING.isdisjoint(code.co_names)
            # It returns modules by name, and the name may be computed.
            self.complete = self.complete and scope.get("__name__") != "importlib"
        else:
            self._prints = arg is print
            self.complete = self.complete and reads_arguments_only(arg)
            self.by_string = self.by_string or arg.__name__ in _BY_STRING


def _is_for_user(frame: types.FrameType | None) -> bool:
    """Whether a frame runs the user's code, or Python's standard library on behalf of the user."""
    while frame is not None:
        if _is_told(frame):
            return False
        kind = _kind_of(frame.f_globals)
        if kind != "shared":
            return kind == "user"
        # JAX also uses the standard library, and nnx uses `refx`.
        frame = frame.f_back
    return False


def _is_told(frame: types.FrameType) -> bool:
    """Whether a frame is a callback that JAX calls when it compiles. It is not part of a program."""
    caller = frame.f_back
    name = caller.f_globals.get("__name__") if caller is not None else None
    return type(name) is str and name.startswith("jax.") and name.endswith(".monitoring")


def _kind_of(scope: dict[str, Any]) -> str:
    name = scope.get("__name__")
    return _kind(name) if type(name) is str else "user"


@functools.lru_cache(maxsize=4096)
def _kind(name: str) -> str:
    if is_pure(name) or name in _UNSEEN:
        return "pure"
    top = name.partition(".")[0]
    in_python = top in sys.stdlib_module_names and top != "__main__"
    return "shared" if in_python or top == "refx" else "user"


def is_recording() -> bool:
    """Whether the trace of another purified function is being recorded in this thread."""
    return hasattr(sys.getprofile(), "record")


def reads_arguments_only(fn: Any) -> bool:
    """Whether a C function reads only its arguments and the object to which it is bound."""
    owner = getattr(fn, "__self__", None)
    if owner is None or isinstance(owner, types.ModuleType):
        where = fn.__module__
    else:
        bases = [*type(owner).__mro__]
        if isinstance(owner, type):
            bases = [*owner.__mro__, *bases]
        where = next((home(base) for base in bases if fn.__name__ in vars(base)), None)
    return fn.__name__ not in _READ_ANYTHING and (where == "builtins" or is_pure(where))
