"""The scope: the ambient random streams and flags, one per thread."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nnx._ambient import ambient
from nnx.rng import RngStream
from refx import MISSING, Node, RefError, UnhashableStaticError
from refx.text import array_text

__all__ = ["MissingFlagError", "MissingStreamError", "get_flag", "make_rng", "scope"]


class MissingStreamError(RefError):
    """A random key was asked for where no scope has a stream for it."""


class MissingFlagError(RefError):
    """A flag was asked for that no scope sets and that has no default."""


class Scope(Node):
    """Streams and flags. It is a Node, so it crosses a boundary like any argument: its streams are
    Refs that advance, and its flags are static, so another value of a flag means a new trace.
    """

    def __init__(self, streams: dict[str, RngStream], flags: dict[str, Any]):
        self.streams = streams
        self.flags = flags

    def lanes(self, size: int) -> Scope:
        """The scope that `size` lanes see together: stacked keys, one for each lane."""
        return Scope({name: s.lanes(size) for name, s in self.streams.items()}, self.flags)


def make_scope(rngs: Any = None, **flags: Any) -> Scope:
    """A scope inside the ambient one: what it does not set is as outside."""
    for name, flag in flags.items():
        if isinstance(flag, jax.Array | np.ndarray):
            raise _array_flag(name, flag)
        if name == "flags" and isinstance(flag, Mapping):
            raise UnhashableStaticError(
                f"A scope was given a {type(flag).__name__} as a flag called 'flags'. Flags are given "
                f"by name: {', '.join(f'{key}={value!r}' for key, value in flag.items())}; from a "
                f"dict, write **flags."
            )
        if name in _KEYS and isinstance(flag, int) and not isinstance(flag, bool):
            raise TypeError(
                f"A scope was given the number {flag} as a flag called {name!r}, which seeds "
                f"nothing. Did you mean rngs={flag}? Keys and seeds are given by rngs, the first "
                f"argument."
            )
    outer: Scope | None = ambient.scope
    streams = dict(outer.streams) if outer is not None else {}
    if rngs is not None:
        streams = _streams(rngs) if not isinstance(rngs, Mapping) else {**streams, **_streams(rngs)}
    return Scope(streams, {**(outer.flags if outer is not None else {}), **flags})


_KEYS = ("key", "keys", "rng", "seed")


def _array_flag(name: str, flag: Any) -> UnhashableStaticError:
    what = f"The flag {name!r} of a scope is an array, {array_text(flag)}"
    if jnp.issubdtype(flag.dtype, jax.dtypes.prng_key) or flag.dtype == jnp.uint32:
        stream = "key" if name in _KEYS else f"{{{name!r}: key}}"
        return UnhashableStaticError(
            f"{what}. Did you mean rngs={stream}? Random keys are given by rngs, the first argument."
        )
    return UnhashableStaticError(
        f"{what}, but flags are static. Pass a Python value, as with bool(...), or give an array to "
        f"the function as an argument."
    )


def _streams(rngs: Any) -> dict[str, RngStream]:
    if not isinstance(rngs, Mapping):
        rngs = {"default": rngs}
    return {n: k if isinstance(k, RngStream) else RngStream(k) for n, k in rngs.items()}


@contextlib.contextmanager
def scope(rngs: Any = None, **flags: Any) -> Iterator[None]:
    """Within this context `make_rng` and `get_flag` answer from these streams and flags.

    Args:
      rngs: a key (typed or legacy) or an int seed, which seeds every stream; or an `RngStream`, which
        serves every name and goes on where it is; or a mapping from stream name to any of these,
        where `"default"` serves the names it lacks. With None the streams of the scope outside stay.
      **flags: hashable values by name. Flags of the scope outside stay unless they are set here.

    Raises:
      UnhashableStaticError: a flag is an array: a key that was to be `rngs`, perhaps; or the flags
        were given in a dict, as `flags={...}`.
      TypeError: an int is given as `key`, `rng` or `seed`, and not as `rngs`.

    The scope crosses the boundary of every nnx transformation: its streams are inputs, so that each
    call of a jitted function gets new keys, deterministically, and its flags are static.

    >>> import jax, nnx
    >>> with nnx.scope(jax.random.key(0), training=True):
    ...     key = nnx.make_rng("dropout")
    ...     nnx.get_flag("training")
    True
    """
    inner = make_scope(rngs, **flags)
    with entered(inner):
        yield


@contextlib.contextmanager
def entered(inner: Scope | None) -> Iterator[None]:
    """Make `inner` the ambient scope of this thread."""
    outer = ambient.scope
    ambient.scope = inner
    try:
        yield
    finally:
        ambient.scope = outer


# A model may have no layer that one of these is for, and is still called with it.
_OF_LAYERS = {"training", "deterministic", "use_running_average", "decode"}
_ever_asked: set[str] = set()

COMPILED: Any = object()
"""Among the flags that were asked for: a program ran that may ask for more when it is traced."""


@contextlib.contextmanager
def expected(flags: Mapping[str, Any], call: str, advice: str) -> Iterator[None]:
    """Within this context, flags that were given by name have to be asked for.

    Warns:
      UserWarning: nobody asked for one of the flags, so it did nothing.
    """
    names = flags.keys() - _OF_LAYERS
    if not names:
        yield
        return
    asked: set[Any] = set()
    outer, ambient.asked = ambient.asked, asked
    try:
        yield
    finally:
        ambient.asked = outer
        if outer is not None:
            outer |= asked
    unused = names - asked - (_ever_asked if COMPILED in asked else set())
    for name in sorted(unused):
        known = sorted(x for x in asked if x is not COMPILED)
        warnings.warn(
            f"No module asked for the flag {name!r} of {call}, so it changed nothing. The flags that "
            f"were asked for: {', '.join(known) or 'none'}. {advice}",
            UserWarning,
            stacklevel=4,
        )


def make_rng(name: str = "default") -> jax.Array:
    """The next key of the ambient stream `name`, or of `"default"` if there is none of that name.

    Returns:
      A key of the kind, typed or legacy, that the scope was given.

    Raises:
      MissingStreamError: no scope is active, or it has neither stream.

    >>> import jax, nnx
    >>> with nnx.scope(jax.random.key(0)):
    ...     a, b = nnx.make_rng("params"), nnx.make_rng("params")
    >>> bool((a == b).all())
    False
    """
    around: Scope | None = ambient.scope
    streams = around.streams if around is not None else {}
    if name in streams:
        return streams[name].next()
    if "default" in streams:
        return streams["default"].next(name)
    raise missing_stream(name, streams)


def missing_stream(name: str, streams: Mapping[str, Any], asked: str = "") -> MissingStreamError:
    """The error for a stream that no scope has; `asked` is the class of the module that asked."""
    there = f"the scope has only {sorted(streams)}" if streams else "no scope with keys is active"
    make = "Cls.init(jax.random.key(0))(...)"
    call = "model.apply(rngs=jax.random.key(0))(x)"
    ways = f"Make the module with {make}, call it with {call}"
    if name != "params":
        rest = ", or after model.eval(), where it drops nothing" if name == "dropout" else ""
        ways = f"Call the model with {call}{rest}, make it with {make}"
    who = f" by a {asked}" if asked else ""
    return MissingStreamError(
        f"A key of the random stream {name!r} was asked for{who}, but {there}. {ways}, or put the code "
        f"in `with nnx.scope(jax.random.key(0)):`. For this stream alone, pass {{{name!r}: key}} as "
        f"the key."
    )


def get_flag(name: str, default: Any = MISSING) -> Any:
    """The ambient flag `name`, or the default.

    Raises:
      MissingFlagError: no scope sets the flag and there is no default.

    >>> import nnx
    >>> nnx.get_flag("training", False)
    False
    """
    around: Scope | None = ambient.scope
    _ever_asked.add(name)
    if ambient.asked is not None:
        ambient.asked.add(name)
    if around is not None and name in around.flags:
        return around.flags[name]
    if default is not MISSING:
        return default
    flags = sorted(around.flags) if around is not None else []
    raise MissingFlagError(
        f"The flag {name!r} is set by no scope (set are: {', '.join(flags) or 'none'}) and has no "
        f"default. Set it with nnx.scope({name}=...), model.apply({name}=...), or as an attribute "
        f"of the module."
    )
