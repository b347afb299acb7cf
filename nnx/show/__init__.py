"""What a person sees of a model: text, tables, pages and pictures.

`text` is what modules print as, so `nnx.module` is built on it; `tabulate` is built on modules. So
nothing but `text` is imported here.
"""

from nnx.show.text import tree_repr

__all__ = ["tree_repr"]
