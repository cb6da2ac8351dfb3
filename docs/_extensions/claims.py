"""The directive ``claims``: what `examples/papers` measured, from the JSON that its scripts wrote.

``python examples/papers/digits.py --out docs/_data/papers`` brings new numbers here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective


def table(script: str, content: dict[str, Any], prefixes: list[str]) -> list[str]:
    """Return the rows whose id begins with one of `prefixes`, in Markdown."""
    rows = [r for r in content["rows"] if r["id"].startswith(tuple(prefixes))]
    if not rows:
        return []
    seeds = content["seeds"]
    what = f"{len(seeds)} seeds" if len(seeds) > 1 else f"seed {seeds[0]}"
    lines = [f"Measured by `examples/papers/{script}.py`, {what}:", ""]
    lines += ["| row | quantity | measured | accepted | |", "|---|---|---|---|---|"]
    for row in rows:
        verdict = {"PASS": "pass", "info": ""}.get(row["verdict"], "**fail**")
        accepted = f"`{row['accepted']}`" if row["accepted"] and verdict else ""
        quantity = row["quantity"].replace("|", "\\|")
        lines.append(f"| {row['id']} | {quantity} | {row['range']} | {accepted} | {verdict} |")
    return [*lines, ""]


class Claims(SphinxDirective):
    """``{claims} P1 G3`` shows the measured rows P1..., G3... of all scripts."""

    required_arguments = 1
    final_argument_whitespace = True

    def run(self) -> list[nodes.Node]:
        """Return the tables."""
        lines: list[str] = []
        for path in sorted((Path(self.env.srcdir) / "_data" / "papers").glob("*.json")):
            self.env.note_dependency(str(path))
            content = json.loads(path.read_text(encoding="utf-8"))
            lines += table(path.stem, content, self.arguments[0].split())
        if not lines:
            msg = f"no measured row begins with {self.arguments[0]!r}"
            raise self.error(msg)
        holder = nodes.container(classes=["claims"])
        self.state.nested_parse(StringList(lines, source=self.env.docname), 0, holder)
        return [holder]


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the directive."""
    app.add_directive("claims", Claims)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
