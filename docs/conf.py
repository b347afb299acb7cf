"""Sphinx settings: `sphinx-build -W -b html docs docs/_build/html`."""

import ast
import inspect
import re
import sys
import textwrap
from pathlib import Path

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.util.osutil import relative_uri

sys.path.insert(0, str(Path(__file__).parent.parent))

project = "nnx"
author = "The nnx authors"
extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
exclude_patterns = ["_build"]
nitpicky = False

html_theme = "furo"
html_title = "nnx"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sphinx = False
html_show_copyright = False
html_copy_source = False
html_favicon = "_static/favicon.svg"
html_math_renderer = "mathml"

# Pages with {code-cell} blocks are notebooks: the build runs them and shows what they print and draw.
nb_execution_mode = "cache"
nb_execution_in_temp = True
nb_execution_raise_on_error = True
nb_execution_timeout = 300
nb_merge_streams = True
nb_output_stderr = "remove-warn"
copybutton_exclude = ".linenos, .gp, .go"

myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3

autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "special-members": "__call__"}
python_use_unqualified_type_names = True
napoleon_numpy_docstring = False


def setup(app):
    """Docstrings are written for an editor; this turns them into reStructuredText."""
    # Runs before napoleon, which turns the sections into fields.
    app.connect("autodoc-process-docstring", as_rst, priority=400)
    app.connect("autodoc-process-signature", with_arguments)
    app.connect("doctree-resolved", label_cells)
    app.connect("doctree-resolved", link_pictures)
    # Browsers draw MathML themselves, but would have to download MathJax.
    app.add_html_math_renderer("mathml", (formula, None), (formula, None))


def label_cells(app, doctree, docname):
    """Label each cell with the head of its column. site.css shows the labels when a row becomes a stack."""
    for table in doctree.findall(nodes.table):
        heads = [cell.astext() for cell in next(table.findall(nodes.thead)).findall(nodes.entry)]
        if len(heads) < 3:
            continue
        table["classes"].append("stacks")
        if len(heads) > 8:
            table["classes"].append("dense")
        for row in next(table.findall(nodes.tbody)).findall(nodes.row):
            for head, cell in list(zip(heads, row.findall(nodes.entry)))[1:]:
                if head and cell.astext():
                    cell.insert(0, nodes.inline("", head, classes=["label"]))


def link_pictures(app, doctree, docname):
    """Make each picture a link to its file, because it is small on a phone."""
    here = app.builder.get_target_uri(docname)
    for image in list(doctree.findall(nodes.image)):
        image.setdefault("alt", "A picture that code of this page has drawn.")
        if image["uri"] in app.env.images and not isinstance(image.parent, nodes.reference):
            file = f"{app.builder.imagedir}/{app.env.images[image['uri']][1]}"
            link = nodes.reference("", "", refuri=relative_uri(here, file), internal=True)
            image.replace_self(link)
            link += image


def formula(translator, node):
    """TeX as MathML."""
    block = isinstance(node, nodes.math_block)
    translator.body.append(tex2mathml(node.astext(), as_block=block))
    raise nodes.SkipNode


def with_arguments(app, what, name, obj, options, signature, return_annotation):
    """The arguments of a constructor, from its source. Autodoc would show those of the metaclass."""
    if what != "class" or not isinstance(obj, type):
        return None
    if obj.__init__ is object.__init__:
        return "()", None
    try:
        source = textwrap.dedent(inspect.getsource(obj.__init__))
    except (OSError, TypeError):
        return None
    arguments = ast.parse(source).body[0].args
    (arguments.posonlyargs or arguments.args).pop(0)
    return f"({ast.unparse(arguments)})", None


def as_rst(app, what, name, obj, options, lines):
    """Rewrite the text between the examples of a docstring in place."""
    # An example begins with >>> and ends at the next empty line.
    parts = re.split(r"(?m)^( *>>>(?:.*\S.*(?:\n|\Z))+)", "\n".join(lines))
    parts[::2] = map(text_as_rst, parts[::2])
    lines[:] = "".join(parts).split("\n")


def text_as_rst(text):
    """Code in double backticks, stars as they are, and the names of arguments in one line."""
    text = re.sub(
        r"(?m)^ +(?:[\w*]+,\s+)+[\w*]+: ",
        lambda names: re.sub(r",\s+", ", ", names[0]),
        text,
    )
    text = text.replace("Raises (when called):", "Raises:")
    # Every other part is code.
    parts = re.split(r"`([^`]+)`", text)
    for i, part in enumerate(parts):
        if i % 2:
            parts[i] = f"``{' '.join(part.split())}``"
            if parts[i + 1][:1].isalnum():
                parts[i] += "\\ "
        else:
            parts[i] = re.sub(r"(?<!\\)\*", r"\\*", part)
    return "".join(parts)
