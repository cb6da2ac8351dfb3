"""Formulas as SVG drawn by the build: alike in all browsers, without scripts, fonts or network."""

from __future__ import annotations

from html import escape
from typing import Any
from xml.etree import ElementTree

import ziamath
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util import logging

_logger = logging.getLogger(__name__)
_SIZE = 18  # pixels, for text of 16
ziamath.config.precision = 2
ziamath.config.svg2 = False  # no symbols with ids, which formulas of one page would share


def _has_lines(tex: str) -> bool:
    """Return whether a formula has several lines, or marks to align, outside of environments."""
    return r"\begin" not in tex and ("&" in tex or r"\\" in tex)


def _draw(node: nodes.math | nodes.math_block, *, inline: bool) -> str:
    """Return the formula of a node in the text's color; sizes follow the text, too."""
    tex = node.astext()
    aligned = rf"\begin{{aligned}}{tex}\end{{aligned}}" if _has_lines(tex) else tex
    try:
        formula = ziamath.Latex(aligned, size=_SIZE, color="currentColor", inline=inline)
    except Exception as error:  # of many kinds; the page is complete but for this formula
        _logger.warning("formula that cannot be drawn (%s): %s", error, tex, location=node)
        return f"<code>{escape(tex)}</code>"
    if "\\" in formula.mathmlstr():
        _logger.warning("formula with an unknown command: %s", tex, location=node)
    svg = formula.svgxml()
    _, top, width, height = (float(number) / 16 for number in svg.attrib["viewBox"].split())
    svg.attrib |= {"width": f"{width:.3f}em", "height": f"{height:.3f}em"}
    svg.attrib |= {"role": "img", "aria-label": " ".join(tex.split())}
    if inline:
        svg.attrib["style"] = f"vertical-align: {-(top + height):.3f}em"
    return ElementTree.tostring(svg, encoding="unicode")


def _visit_inline(translator: Any, node: nodes.math) -> None:
    translator.body.append(_draw(node, inline=True))
    raise nodes.SkipNode


def _visit_block(translator: Any, node: nodes.math_block) -> None:
    drawing = _draw(node, inline=False)
    style = "overflow-x: auto; text-align: center; margin: 0.5em 0"
    translator.body.append(f'<div style="{style}">{drawing}</div>\n')
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the renderer under the name ``svg``."""
    app.add_html_math_renderer("svg", (_visit_inline, None), (_visit_block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
