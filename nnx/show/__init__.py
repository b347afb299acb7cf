"""Show a model as text, tables, pages and pictures.

`nnx.module` uses `text` to print modules, while `tabulate` itself uses modules. So only `text` is
imported here.
"""

from nnx.show.text import tree_repr

__all__ = ["tree_repr"]
