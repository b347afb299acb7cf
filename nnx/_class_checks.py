"""Checks for mistakes that users of other libraries make when they write or make a module."""

from __future__ import annotations

import difflib
import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from refx.text import a_kind, array_text

__all__: list[str] = []


def check_arguments(cls: type, kwargs: dict[str, Any]) -> None:
    """Refuse constructor arguments that other libraries take, and strings that do not name a dtype.

    Raises:
      TypeError: `rngs` for a class that does not take it; or a string that is not a dtype, for a layer.
    """
    if "rngs" in kwargs:
        parameters = inspect.signature(cls.__init__).parameters.values()
        if not any(p.name == "rngs" or p.kind is p.VAR_KEYWORD for p in parameters):
            raise TypeError(
                f"{cls.__name__} does not take rngs: its keys come from the scope around it. Make "
                "the model with Net.init(jax.random.key(0))(...), or in "
                "`with nnx.scope(jax.random.key(0)):`."
            )
    if not any(base.__module__.startswith("nnx.layers.") for base in cls.__mro__):
        return
    for name in ("dtype", "param_dtype"):
        if isinstance(given := kwargs.get(name), str):
            try:
                jnp.dtype(given)
            except TypeError:
                close = difflib.get_close_matches(given, _DTYPES, 1, 0.5)
                meant = f" Did you mean {close[0]!r}?" if close else ""
                raise TypeError(
                    f"{cls.__name__} got {name}={given!r}, which is not a JAX dtype.{meant}"
                ) from None


_DTYPES = ("bfloat16", "float16", "float32", "float64", "int8", "int32", "complex64")
CHECKED = frozenset({"rngs", "dtype", "param_dtype"})
"""The arguments that `check_arguments` checks."""


def explain_data(cls: type, args: Any, kwargs: Any, error: Exception) -> None:
    """Explain an error of a constructor that was given data instead of its arguments.

    If the arguments would fit, for example because the first has a default, the error gets a note.
    """
    arrays = (jax.Array, np.ndarray)
    given = next((x for x in (*args, *kwargs.values()) if isinstance(x, arrays)), None)
    if given is None or jnp.issubdtype(given.dtype, jax.dtypes.prng_key):
        return
    name = cls.__name__
    advice = (
        f"{name}.init(key)(...) makes a {name} and takes the arguments of its constructor, but "
        f"it was given data, {array_text(given)}. Pass data to the call: "
        f"model = {name}.init(key)(...), then model(x)."
    )
    try:
        inspect.signature(cls.__init__).bind(None, *args, **kwargs)
    except TypeError:
        raise TypeError(f"{error}. {advice}") from None
    error.add_note(advice)


def forward_instead(cls: type) -> Any:
    """A `__call__` for a class that has only a method `forward`."""

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        raise TypeError(
            f"{a_kind(type(self), start=True)} cannot be called: it has a method named forward, but no "
            "__call__. Rename it: def __call__(self, ...)."
        )

    return __call__
