"""Show a model as text, tables, pages and pictures.

Modules print with `tree_repr`, `tree_html` and `show_node`, but `tabulate` is built on modules. So these
three are loaded only when something is printed, which also keeps `import nnx` quick.
"""

import importlib
from typing import TYPE_CHECKING

__all__ = ["show_node", "tree_html", "tree_repr"]

if TYPE_CHECKING:
    from nnx.show.folding import tree_html
    from nnx.show.html import show_node
    from nnx.show.text import tree_repr
else:
    _WHERE = {"show_node": "html", "tree_html": "folding", "tree_repr": "text"}

    def __getattr__(name):
        if name not in _WHERE:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}", name=name)
        return getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)
