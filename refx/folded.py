"""Values by path as short text: of parts that repeat, such as the layers of a model, show only one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

__all__: list[str] = []

# Two equal neighbours are not folded.
_FOLD = 3

Line = tuple[tuple[str, ...], str, int]


def folded(entries: Sequence[tuple[tuple[str, ...], str]]) -> Iterator[Line]:
    """Fold three or more equal numbered parts of the entries, pairs of a path and a text, into one.

    Yields (path, text, count). An entry that stands for several has a number such as `0..11` in its path.
    """
    k = 0
    while k < len(entries):
        path, text = entries[k]
        before = entries[k - 1][0] if k else ()
        for j, part in enumerate(path):
            # Only at the beginning of a part, so that each part is compared once.
            if not part.isdigit() or before[: j + 1] == path[: j + 1]:
                continue
            size, last, end = _repeated(entries, k, j)
            count = (end - k) // size
            if count >= _FOLD:
                once = [(p[j + 1 :], t) for p, t in entries[k : k + size]]
                for inner, shown, times in folded(once):
                    yield (*path[:j], f"{part}..{last}", *inner), shown, count * times
                k = end
                break
        else:
            yield path, text, 1
            k += 1


def _repeated(
    entries: Sequence[tuple[tuple[str, ...], str]], start: int, j: int
) -> tuple[int, str, int]:
    """The size of the part that begins at `start`, and the number and the end of the last part like it."""
    path = entries[start][0]
    size = 1
    while start + size < len(entries) and entries[start + size][0][: j + 1] == path[: j + 1]:
        size += 1
    last, end = path[j], start + size
    while end + size <= len(entries):
        there = entries[end][0]
        if len(there) <= j or there[:j] != path[:j] or not there[j].isdigit():
            break
        same = all(
            p[: j + 1] == there[: j + 1] and (p[j + 1 :], t) == (q[j + 1 :], u)
            for (p, t), (q, u) in zip(
                entries[end : end + size], entries[start : start + size], strict=True
            )
        )
        after = entries[end + size][0] if end + size < len(entries) else ()
        # A longer part is a different one.
        if not same or after[: j + 1] == there[: j + 1]:
            break
        last, end = there[j], end + size
    return size, last, end
