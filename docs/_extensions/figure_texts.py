"""Says of pictures without a description, for those who cannot see them, what they are."""

from __future__ import annotations

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.transforms import SphinxTransform


class FigureTexts(SphinxTransform):
    """Describes the figures that cells draw; without it their text is the name of a file."""

    default_priority = 800  # after all that parses

    def apply(self) -> None:
        """Change the document."""
        for image in self.document.findall(nodes.image):
            image.setdefault("alt", "figure drawn by the code above")


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the change."""
    app.add_transform(FigureTexts)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
