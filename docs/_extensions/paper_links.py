"""Makes links of papers that docstrings cite as ``arXiv:1811.07062`` or ``doi:10.1137/0712047``."""

from __future__ import annotations

import re
from collections.abc import Iterator

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.transforms import SphinxTransform

_PAPER = re.compile(r"\b(?P<kind>arXiv|doi):(?P<number>[\w.-]+/[^\s,;]*\w|\d{4}\.\d{4,5})")
_ADDRESSES = {"arXiv": "https://arxiv.org/abs/", "doi": "https://doi.org/"}
_LEFT_ALONE = (nodes.reference, nodes.literal, nodes.FixedTextElement, nodes.Titular)


def linked(text: str) -> Iterator[nodes.Node]:
    """Give the parts of a text, those that name a paper as links to it."""
    end = 0
    for paper in _PAPER.finditer(text):
        yield nodes.Text(text[end : paper.start()])
        yield nodes.reference("", paper[0], refuri=_ADDRESSES[paper["kind"]] + paper["number"])
        end = paper.end()
    yield nodes.Text(text[end:])


class PaperLinks(SphinxTransform):
    """Replaces names of papers in text, unless the author made links of them."""

    default_priority = 800  # after all that parses

    def apply(self) -> None:
        """Change the document."""
        for text in list(self.document.findall(nodes.Text)):
            above = text.parent
            while above and not isinstance(above, _LEFT_ALONE):
                above = above.parent
            if not above and _PAPER.search(text):
                text.parent.replace(text, [node for node in linked(text) if node.astext()])


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the change."""
    app.add_transform(PaperLinks)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
