"""The directive ``tree``: the modules of a folder, each with the first line of its docstring."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective


def purpose(path: Path) -> str:
    """Return what a file is for, as its docstring begins."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    line = re.sub(r":math:`([^`]+)`", r"$\1$", text.partition("\n")[0])
    return line.replace("``", "`").replace("|", "\\|")


def rows(folder: Path) -> list[tuple[str, str]]:
    """Return the modules and packages of a folder with their purposes, packages as one line."""
    found = []
    for path in sorted(folder.iterdir()):
        start = path / "__init__.py" if path.is_dir() else path
        if start.suffix == ".py" and start.exists() and path.name != "__init__.py":
            found.append((f"{path.name}/" if path.is_dir() else path.name, purpose(start)))
    return found


class Tree(SphinxDirective):
    """``{tree} specdens`` is a table of what is in that folder of the repository."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Return the table."""
        folder = Path(self.env.srcdir).parent / self.arguments[0]
        lines = ["| in `" + self.arguments[0] + "` | what it is for |", "|---|---|"]
        lines += [f"| `{name}` | {text} |" for name, text in rows(folder)]
        holder = nodes.container()
        self.state.nested_parse(StringList(lines, source=str(folder)), 0, holder)
        self.env.note_reread()
        return [holder]


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the directive."""
    app.add_directive("tree", Tree)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
