"""`nnx.display`: a model as treescope's interactive tree, in a notebook or as a page."""

from __future__ import annotations

import dataclasses
import html
import os
import threading
from pathlib import Path
from typing import Any

from nnx.show._format import clip, short
from nnx.show._walk import ARRAY, BACK, NODE, REF, STATIC, Walk
from refx import Node, Ref

__all__ = ["display", "register", "show_node"]


def display(model: Any, path: str | os.PathLike[str] | None = None) -> None:
    """Show a model as an interactive tree with parts that unfold, and arrays as pictures.

    In a notebook, the tree is the output of the cell; elsewhere, it is printed as text. A module or
    Ref in several places is shown at the first place, with the number of places, and named at the
    others. This needs treescope: `pip install treescope`.

    Args:
      model: a module, a Ref, a Partition, or any pytree of these.
      path: a file to write instead: a self-contained HTML page that needs no network.

    Raises:
      ImportError: treescope is not installed.

    >>> import jax, nnx, pathlib, tempfile
    >>> model = nnx.Linear.init(jax.random.key(0))(3, 4)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     page = pathlib.Path(folder) / "model.html"
    ...     nnx.display(model, page)
    ...     "Linear" in page.read_text()
    True
    """
    treescope = _treescope()
    register()
    drawn = treescope.ArrayAutovisualizer(maximum_size=_picture_size(model))

    def pictures(value: Any, path: str | None) -> Any:
        # Treescope tries to draw an array even if it has no values, and fails.
        return None if getattr(value, "size", 1) == 0 else drawn(value, path)

    if path is not None:
        with (
            treescope.active_autovisualizer.set_scoped(pictures),
            treescope.using_expansion_strategy(max_height=60, target_width=100),
            treescope.active_renderer.set_scoped(_without_html(treescope)),
        ):
            tree = treescope.render_to_html(model)
        title = html.escape(type(model).__name__)
        Path(path).write_text(_PAGE.format(title=title, tree=tree), encoding="utf-8")
    elif _in_notebook():
        with treescope.active_renderer.set_scoped(_without_html(treescope)):
            treescope.display(model, autovisualize=pictures)
    else:
        print(model if isinstance(model, Node) else treescope.render_to_text(model))


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>body {{ margin: 1rem; background: #fff; color: #000; }}</style>
</head>
<body>
{tree}
</body>
</html>
"""

# The pictures of all arrays together have about this many cells, so that a page has only a few
# megabytes.
_CELLS = 200_000


def _picture_size(model: Any) -> int:
    count = sum(item.kind in (REF, ARRAY) for item in Walk(model).items)
    return min(4000, max(64, _CELLS // max(count, 1)))


def _without_html(treescope: Any) -> Any:
    """Treescope's renderer, without the hook that would also show a module's `_repr_html_`."""
    from treescope.handlers import append_repr_html_when_present

    renderer = treescope.active_renderer.get()
    hooks = [hook for hook in renderer.wrapper_hooks if hook is not append_repr_html_when_present]
    return dataclasses.replace(renderer, wrapper_hooks=hooks)


def _treescope() -> Any:
    try:
        import treescope
    except ImportError as error:
        raise ImportError(
            "nnx.display needs treescope, which is not installed: pip install treescope. "
            "print(model), nnx.tabulate and nnx.graph work without it."
        ) from error
    return treescope


def _in_notebook() -> bool:
    try:
        from IPython import get_ipython  # pyright: ignore[reportMissingImports]
    except ImportError:
        return False
    return get_ipython() is not None


def register() -> None:
    """Teach treescope to show modules and Refs well.

    `nnx.display` calls this, and so does treescope when it is given a module.

    Raises:
      ImportError: treescope is not installed.
    """
    _treescope()
    from treescope import type_registries

    handlers: dict[type[Any], Any] = type_registries.TREESCOPE_HANDLER_REGISTRY
    handlers[Node] = show_node
    handlers[Ref] = _show_ref
    # Treescope warns about mutable objects in several places, by their address. We show sharing by
    # path.
    type_registries.IMMUTABLE_TYPES_REGISTRY[Node] = True
    type_registries.IMMUTABLE_TYPES_REGISTRY[Ref] = True


class _Drawing(threading.local):
    """The model that is being drawn: where each object is, how often, and what is drawn already."""

    def __init__(self) -> None:
        self.root: Any = None
        self.depth = 0

    def begin(self, root: Any) -> None:
        """Start with a model."""
        walk = Walk(root)
        self.root = root
        self.walk = walk
        self.numbers = {
            id(item.obj): i for i, item in enumerate(walk.items) if item.kind in (NODE, REF)
        }
        self.places: dict[int, int] = {}
        for item in walk.items:
            if item.kind == BACK:
                self.places[item.target] = self.places.get(item.target, 1) + 1
        self.done: set[int] = set()


_drawing = _Drawing()
# Treescope recurses into the contents, and Python allows about a thousand nested calls.
_DEPTH = 10


class _Again:
    """Stands for an object that is shown in another place."""

    def __init__(self, number: int):
        self.number = number

    def __treescope_repr__(self, path: str | None, inner: Any) -> Any:
        from treescope import rendering_parts as parts

        name = ".".join(_drawing.walk.path(self.number)) or "the root"
        return parts.custom_text_color(parts.text(f"<same as {name}>"), css_color="#b35900")


def show_node(node: Node, path: str | None, inner: Any) -> Any:
    """Render a module for treescope: the part of `__treescope_repr__` that needs treescope."""
    register()
    if _drawing.root is not None:
        return _shown_once(node, path, inner)
    _drawing.begin(node)
    try:
        return _shown_once(node, path, inner)
    finally:
        _drawing.root = None
        _drawing.depth = 0


def _shown_once(x: Any, path: str | None, inner: Any) -> Any:
    number = _drawing.numbers.get(id(x))
    if number is None:
        return _whole(x, path, inner, None)
    if number in _drawing.done:
        return _Again(number).__treescope_repr__(path, inner)
    _drawing.done.add(number)
    return _whole(x, path, inner, number)


def _whole(x: Any, path: str | None, inner: Any, number: int | None) -> Any:
    from treescope import formatting_util, repr_lib
    from treescope import rendering_parts as parts

    places = _drawing.places.get(number, 1) if number is not None else 1
    notes = [f"shared: {places} places"] if places > 1 else []
    if isinstance(x, Ref):
        collection = x.collection
        facts = [collection if isinstance(collection, str) else short(collection)]
        facts += [f"{k}={short(v, 40)}" for k, v in x.metadata.items()]
        # After a transformation has ended, its Refs hold tracers that can be named but not read.
        shown = inner(x._value, path=f"{path}.value" if path else None)
        notes = facts + notes
    elif _drawing.depth >= _DEPTH:
        shown = parts.siblings_with_annotations(f"{type(x).__name__}(… display it by itself)")
    else:
        _drawing.depth += 1
        try:
            shown = repr_lib.render_object_constructor(
                object_type=type(x),
                attributes=_parts(x, number),
                path=path,
                subtree_renderer=inner,
                color=formatting_util.color_from_string(type(x).__qualname__),
            )
        finally:
            _drawing.depth -= 1
    if not notes:
        return shown
    comment = parts.comment_color(parts.text(f"  # {', '.join(notes)}"))
    return parts.siblings_with_annotations(shown, extra_annotations=[comment])


def _parts(node: Node, number: int | None) -> dict[str, Any]:
    """The contents of a module, and then its settings that differ from the defaults."""
    walk, i = (Walk(node), 0) if number is None else (_drawing.walk, number)
    items = [walk.items[j] for j in walk.children(i)]
    held = {
        str(x.name): _Again(x.target) if x.kind == BACK and number is not None else x.obj
        for x in items
        if x.kind != STATIC
    }
    return held | {str(x.name): _clipped(x.obj) for x in items if x.kind == STATIC}


def _clipped(value: Any) -> Any:
    return clip(value, 200) if type(value) is str and len(value) > 200 else value


def _show_ref(cell: Ref[Any], path: str | None, inner: Any) -> Any:
    if _drawing.root is None:
        return _whole(cell, path, inner, None)
    return _shown_once(cell, path, inner)
