"""Formulas as MathML, which browsers draw themselves: no scripts, fonts or network."""

from __future__ import annotations

from typing import Any

from docutils import nodes
from docutils.utils.math import MathError, latex2mathml
from sphinx.application import Sphinx
from sphinx.util import logging

_logger = logging.getLogger(__name__)


def _mathml(node: nodes.math | nodes.math_block, *, block: bool) -> str:
    """Return the formula of a node, or its source and a warning where TeX is not understood."""
    tex = node.astext()
    try:
        return str(latex2mathml.tex2mathml(tex, as_block=block))
    except MathError as error:
        _logger.warning("formula not understood (%s): %s", error, tex, location=node)
        return f"<code>{nodes.Text(tex)}</code>"


def _visit_inline(translator: Any, node: nodes.math) -> None:
    translator.body.append(f'<span class="math">{_mathml(node, block=False)}</span>')
    raise nodes.SkipNode


def _visit_block(translator: Any, node: nodes.math_block) -> None:
    translator.body.append(
        f'<div class="math" style="overflow-x: auto">{_mathml(node, block=True)}</div>\n'
    )
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the renderer under the name ``mathml``."""
    app.add_html_math_renderer("mathml", (_visit_inline, None), (_visit_block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
