"""How the documentation site is built: ``sphinx-build -W --keep-going docs build/docs``. Nothing is fetched."""

from __future__ import annotations

from typing import Any

import latex2mathml.converter
from docutils.nodes import SkipNode
from sphinx.util.nodes import make_refnode

import captum_m2ib

project = "captum_m2ib"
author = "The captum_m2ib authors"
version = release = captum_m2ib.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
root_doc = "index"
exclude_patterns = ["images/*.md"]

# Markdown as a code host shows it, with formulas between dollar signs and a link for every heading.
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

# Docstrings are Captum's: Google's sections with types in them, in reStructuredText.
autodoc_typehints = "none"
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "show-inheritance": True}
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False
add_module_names = False

# A reference that leads nowhere is an error; types in prose ("sequence of str") are no references.
nitpicky = True
nitpick_ignore_regex = [("py:(class|obj)", ".*"), ("py:.*", r"captum_m2ib\.audit\..*")]

html_theme = "furo"
html_title = f"captum_m2ib {release}"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_show_copyright = False
html_show_sphinx = False
html_math_renderer = "mathml"


def visit_inline(self: Any, node: Any) -> None:
    r"""Write a formula as MathML, which browsers draw by themselves, where MathJax would be a remote script."""
    self.body.append(latex2mathml.converter.convert(node.astext()))
    raise SkipNode


def visit_block(self: Any, node: Any) -> None:
    r"""Write a formula on lines of its own."""
    formula = latex2mathml.converter.convert(node.astext(), display="block")
    self.body.append(f'<div class="formula">{formula}</div>')
    raise SkipNode


def resolve(app: Any, env: Any, node: Any, contnode: Any) -> Any:
    """Find what a docstring calls by its bare name, whatever room it is documented in."""
    objects = env.domains["py"].objects
    found = [name for name in objects if f".{name}".endswith(f".{node.get('reftarget')}")]
    if node.get("refdomain") != "py" or len(found) != 1:
        return None
    entry = objects[found[0]]
    return make_refnode(app.builder, node["refdoc"], entry.docname, entry.node_id, contnode, found[0])


def setup(app: Any) -> None:
    app.connect("missing-reference", resolve)
    app.add_html_math_renderer("mathml", (visit_inline, None), (visit_block, None))
