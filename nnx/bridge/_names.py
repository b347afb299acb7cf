"""Name maps: from names in other libraries to our paths."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from refx.partition import dotted

__all__: list[str] = []

Names = Mapping[str, Any] | Callable[[str], Any] | Sequence[tuple[str, str | None]]

NO_RULE = object()


def renamer(names: Names | None) -> Callable[[str], Any]:
    """A function from their name to our path. It returns None to drop the name, or `NO_RULE`.

    Args:
      names: a dict whose keys are names or prefixes of names, a function, or a list of `(regex, template)`.
    """
    if names is None:
        return lambda name: name
    if isinstance(names, Mapping):
        table = names

        def by_prefix(name: str) -> Any:
            parts = name.split(".")
            for n in range(len(parts), 0, -1):
                prefix = ".".join(parts[:n])
                if prefix in table:
                    target = table[prefix]
                    rest = parts[n:]
                    return (
                        None if target is None else ".".join(filter(None, [dotted(target), *rest]))
                    )
            return name

        return by_prefix
    if callable(names):
        return names
    rules = [(re.compile(pattern), template) for pattern, template in names]

    def by_regex(name: str) -> Any:
        for pattern, template in rules:
            match = pattern.fullmatch(name)
            if match is not None:
                return None if template is None else match.expand(template)
        return NO_RULE

    return by_regex


def without_prefix(name: str, prefix: str | Sequence[str]) -> str:
    """A name without the prefixes that it begins with, taken off in order."""
    for head in [prefix] if isinstance(prefix, str) else prefix:
        name = name.removeprefix(f"{head.rstrip('.')}.")
    return name
