"""The directive ``gallery``: cards of examples, each with the question that its docstring asks."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective


def question(script: Path) -> str:
    """Return the first line of a script's docstring."""
    text = ast.get_docstring(ast.parse(script.read_text(encoding="utf-8"))) or ""
    return text.partition("\n")[0].replace("``", "")


def scripts(examples: Path, patterns: list[str]) -> list[Path]:
    """Return the scripts that patterns stand for.

    Raises
    ------
    ValueError
        If a pattern stands for none.
    """
    found: list[Path] = []
    for pattern in patterns:
        matches = [
            path for path in sorted(examples.glob(pattern)) if "__main__" in path.read_text("utf-8")
        ]
        if not matches:
            message = f"no script in examples/ is called {pattern!r}; correct the gallery."
            raise ValueError(message)
        found += matches
    return found


class Gallery(SphinxDirective):
    """The content is a path or pattern below ``examples/`` a line.

    A file that is not a script, a module that others import, is left out. The picture of a script
    is ``_static/gallery/NAME.png``.
    """

    has_content = True

    def run(self) -> list[nodes.Node]:
        """Return a container of cards, arranged by ``_static/gallery.css``."""
        grid = nodes.container(classes=["gallery"])
        examples = Path(self.env.srcdir).parent / "examples"
        for script in scripts(examples, list(self.content)):
            grid += self._card(script.relative_to(examples).as_posix())
        self.env.note_reread()
        return [grid]

    def _card(self, path: str) -> nodes.container:
        docs = Path(self.env.srcdir)
        script = docs.parent / "examples" / path
        self.env.note_dependency(str(script))
        card = nodes.container(classes=["gallery-card"])
        picture = f"_static/gallery/{script.stem}.png"
        if (docs / picture).exists():
            card += nodes.image(uri=f"/{picture}", alt=f"figure of {path}")
        link = addnodes.download_reference(
            "", reftarget=f"/../examples/{path}", refdoc=self.env.docname
        )
        link += nodes.literal(path, path)
        card += nodes.paragraph("", "", link, classes=["gallery-name"])
        text = question(script)
        card += nodes.paragraph(text, text)
        return card


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the directive and the style of the cards."""
    app.add_directive("gallery", Gallery)
    app.add_css_file("gallery.css")
    return {"parallel_read_safe": True, "parallel_write_safe": True}
