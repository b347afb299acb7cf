"""What people who come from elsewhere get wrong when they write or make a module."""

from __future__ import annotations

import difflib
import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from refx.text import array_text

__all__: list[str] = []


def check_arguments(cls: type, kwargs: dict[str, Any]) -> None:
    """Refuse arguments of a constructor that are habits from elsewhere, or dtypes that are none.

    Raises:
      TypeError: `rngs` for a class that takes none; a string that is not a dtype, for a layer.
    """
    if "rngs" in kwargs:
        parameters = inspect.signature(cls.__init__).parameters.values()
        if not any(p.name == "rngs" or p.kind is p.VAR_KEYWORD for p in parameters):
            raise TypeError(
                f"{cls.__name__} takes no rngs: its keys come from the scope around it. Make the model "
                f"with Net.init(jax.random.key(0))(...), or in `with nnx.scope(jax.random.key(0)):`."
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
                    f"{cls.__name__} got {name}={given!r}, which is no dtype of JAX.{meant}"
                ) from None


_DTYPES = ("bfloat16", "float16", "float32", "float64", "int8", "int32", "complex64")
CHECKED = frozenset({"rngs", "dtype", "param_dtype"})
"""The arguments that `check_arguments` looks at."""


def explain_data(cls: type, args: Any, kwargs: Any, error: Exception) -> None:
    """Say that a constructor was given data, where that is why its arguments do not fit.

    Where they do fit, as where the first has a default, the error gets a note.
    """
    arrays = (jax.Array, np.ndarray)
    given = next((x for x in (*args, *kwargs.values()) if isinstance(x, arrays)), None)
    if given is None or jnp.issubdtype(given.dtype, jax.dtypes.prng_key):
        return
    name = cls.__name__
    advice = (
        f"{name}.init(key)(...) makes a {name}, with the arguments of its constructor, but "
        f"it was given data, {array_text(given)}. That comes with the call: "
        f"model = {name}.init(key)(...), then model(x)."
    )
    try:
        inspect.signature(cls.__init__).bind(None, *args, **kwargs)
    except TypeError:
        raise TypeError(f"{error}. {advice}") from None
    error.add_note(advice)


def forward_instead(cls: type) -> Any:
    """A `__call__` for a class that has a method `forward` instead of one."""

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        raise TypeError(
            f"A {type(self).__name__} cannot be called: it has a method named forward, and no "
            f"__call__. Rename it: def __call__(self, ...)."
        )

    return __call__
