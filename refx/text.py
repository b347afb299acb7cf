"""Text for messages: arrays by dtype and shape, and the names that a library on top of refx uses."""

from __future__ import annotations

from typing import Any

__all__: list[str] = []

ALTERNATIVES = {
    "library": "refx",
    "clone": "a refx.clone",
    "frozen": "refx.frozen",
    "param": 'refx.RefField("params")',
    "field": "refx.RefField({!r})",
    "holder": "turn your own class into a refx.Node or a registered pytree",
    "a transformation": "a transformation that merges its arguments",
    "same name": "a transformation that splits its arguments and its closure",
    "compiles": "",
    "looks": "",
    "mask": "",
    "would pass over it": " and every transformation",
    "writes back": "",
    "in its place": "one that splits its arguments and updates them from its result",
    "not on a copy": "Change a refx.clone of the module and return that.",
}
"""The advice in messages, by topic. A library on top of refx puts its own names here."""


def is_arraylike(x: Any) -> bool:
    """Whether `x` has a shape and a dtype. Its data is not read."""
    return not isinstance(x, type) and hasattr(x, "shape") and hasattr(x, "dtype")


ADVICE: dict[Any, str] = {}
"""By collection, extra advice for a forbidden write. A library on top of refx puts its own here."""


def array_text(x: Any, dtype: Any = None) -> str:
    """Text such as `float32[8,128]` for anything with a shape and a dtype. Its data is not read."""
    return f"{x.dtype if dtype is None else dtype}[{','.join(map(str, x.shape))}]"


def with_article(name: str, *, start: bool = False) -> str:
    """A name with its article: `a Linear`, `an Embed`, `an MLP`; `start` begins a sentence."""
    # The first letter of an acronym is spelled out: an "em", but a "gee".
    vowels = "AEFHILMNORSX" if name[:2].isupper() else "AEIOaeio"
    article = "an" if name[0] in vowels else "a"
    return f"{article.capitalize() if start else article} {name}"


def a_kind(kind: type, *, start: bool = False) -> str:
    """The name of a class with its article; `start` begins a sentence."""
    return with_article(kind.__name__, start=start)


def key_name(key: Any) -> str:
    """The name in JAX's key of a part of a pytree: `kernel`, `0`."""
    for attribute in ("name", "key", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)


def ours(name: str) -> str:
    """A public name with its package: `refx.clone`, or that of a library on top of refx."""
    return f"{ALTERNATIVES['library']}.{name}"
