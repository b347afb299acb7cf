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
from refx.text import a_kind, array_text

__all__ = ["MissingFlagError", "MissingStreamError", "get_flag", "make_rng", "scope"]


class MissingStreamError(RefError):
    """A random key was requested where no scope has a stream for it."""


class MissingFlagError(RefError):
    """A flag was read that no scope sets and that has no default."""


class Scope(Node):
    """Streams and flags. It is a Node, so it crosses a boundary like any argument: its streams are
    Refs that advance, and its flags are static, so a new value of a flag causes a new trace.
    """

    def __init__(self, streams: dict[str, RngStream], flags: dict[str, Any]):
        self.streams = streams
        self.flags = flags

    def lanes(self, size: int) -> Scope:
        """The scope that `size` lanes see together: stacked keys, one for each lane."""
        return Scope({name: s.lanes(size) for name, s in self.streams.items()}, self.flags)


def make_scope(rngs: Any = None, **flags: Any) -> Scope:
    """A scope inside the ambient one. It inherits what it does not set."""
    for name, flag in flags.items():
        if isinstance(flag, jax.Array | np.ndarray):
            raise _array_flag(name, flag)
        if name == "flags" and isinstance(flag, Mapping):
            raise UnhashableStaticError(
                f"A scope was given {a_kind(type(flag))} as a flag called 'flags'. Pass flags by "
                f"name: {', '.join(f'{key}={value!r}' for key, value in flag.items())}; from a "
                f"dict, write **flags."
            )
        if name in _KEYS and isinstance(flag, int) and not isinstance(flag, bool):
            raise TypeError(
                f"A scope was given the number {flag} as a flag called {name!r}, which does not "
                f"seed anything. Did you mean rngs={flag}? Pass keys and seeds as rngs, the "
                "first argument."
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
            f"{what}. Did you mean rngs={stream}? Pass random keys as rngs, the first argument."
        )
    return UnhashableStaticError(
        f"{what}, but flags are static. Pass a Python value, as with bool(...), or pass the array "
        f"as an argument of the function."
    )


def _streams(rngs: Any) -> dict[str, RngStream]:
    if not isinstance(rngs, Mapping):
        rngs = {"default": rngs}
    return {n: k if isinstance(k, RngStream) else RngStream(k) for n, k in rngs.items()}


@contextlib.contextmanager
def scope(rngs: Any = None, **flags: Any) -> Iterator[None]:
    """Within this context, `make_rng` and `get_flag` use these streams and flags.

    Args:
      rngs: a key (typed or legacy) or an int seed, which seeds every stream; or an `RngStream`,
        which serves every name and continues from its current count; or a mapping from stream name
        to any of these, where `"default"` serves all other names. With None, the streams of the
        outer scope stay.
      **flags: hashable values by name. Flags of the outer scope stay unless they are set here.

    Raises:
      UnhashableStaticError: a flag is an array (perhaps a key meant for `rngs`); or the flags were
        given in a dict, as `flags={...}`.
      TypeError: an int is given as `key`, `rng` or `seed` instead of `rngs`.

    The scope crosses the boundary of every nnx transformation. Its streams are inputs, so each call
    of a jitted function gets new keys, deterministically. Its flags are static.

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


# People call any model with these flags, whether or not it has a layer that reads them.
_OF_LAYERS = {"training", "deterministic", "use_running_average", "decode"}
_ever_asked: set[str] = set()

COMPILED: Any = object()
"""An entry in the set of flags that were read: a compiled program ran, which may have read others
when it was traced.
"""


@contextlib.contextmanager
def expected(flags: Mapping[str, Any], call: str, advice: str) -> Iterator[None]:
    """Within this context, warn about given flags that nothing reads.

    Warns:
      UserWarning: nothing read one of the flags, so it had no effect.
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
            f"No module read the flag {name!r} of {call}, so it changed nothing. The flags that "
            f"were read: {', '.join(known) or 'none'}. {advice}",
            UserWarning,
            stacklevel=4,
        )


def make_rng(name: str = "default") -> jax.Array:
    """The next key of the ambient stream `name`, or of `"default"` if no stream has that name.

    Returns:
      A key of the kind that the scope was given, typed or legacy.

    Raises:
      MissingStreamError: no scope is active, or it has neither of the two streams.

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
    """The error for a stream that no scope has; `asked` is the class of the module that needs it."""
    there = f"the scope has only {sorted(streams)}" if streams else "no scope with keys is active"
    make = "Cls.init(jax.random.key(0))(...)"
    call = "model.apply(rngs=jax.random.key(0))(x)"
    ways = f"Make the module with {make}, call it with {call}"
    if name != "params":
        rest = ", or after model.eval(), when it drops nothing" if name == "dropout" else ""
        ways = f"Call the model with {call}{rest}, make it with {make}"
    who = f" by a {asked}" if asked else ""
    return MissingStreamError(
        f"A key of the random stream {name!r} was requested{who}, but {there}. {ways}, or put the "
        "code in `with nnx.scope(jax.random.key(0)):`. For this stream alone, pass "
        f"{{{name!r}: key}} as the key."
    )


def get_flag(name: str, default: Any = MISSING) -> Any:
    """The ambient flag `name`, or the default.

    Raises:
      MissingFlagError: no scope sets the flag, and no default was given.

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
        f"No scope sets the flag {name!r} (set: {', '.join(flags) or 'none'}), and it has no "
        f"default. Set it with nnx.scope({name}=...), model.apply({name}=...), or as an attribute "
        "of the module."
    )
