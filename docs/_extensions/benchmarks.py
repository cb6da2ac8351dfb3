"""The directive ``benchmark``: tables of published numbers, see `tests/benchmarks/publish.py`."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

_MOST_COLUMNS = 3  # of rivals; where there are more, the best of each row is shown


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    """Return a table in Markdown."""
    lines = [list(head), *(list(row) for row in rows)]
    rule = ["---"] * len(lines[0])
    return ["", *("| " + " | ".join(line) + " |" for line in [lines[0], rule, *lines[1:]]), ""]


def _contenders(rows: list[dict[str, Any]], side: str) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row[side]))


def _cells(row: dict[str, Any], side: str, names: list[str]) -> list[str]:
    """Return a number for each contender, or the best of them with its name if there are many."""
    numbers = row[side]
    if len(names) <= _MOST_COLUMNS:
        return [_number(numbers.get(name)) for name in names]
    best = min(numbers, key=numbers.__getitem__)
    return [f"{_number(numbers[best])} ({best})"]


def verdict(row: dict[str, Any], targets: list[dict[str, Any]]) -> str:
    """Return whether the targets of a row, those whose text begins with its name, were met."""
    own = [target["met"] for target in targets if target["what"].startswith(f"{row['what']}:")]
    if not own:
        return ""
    return "met" if all(own) else f"**missed** {own.count(False)} of {len(own)}"


def measurements(published: dict[str, Any]) -> list[str]:
    """Return the table of what was measured, in Markdown."""
    rows, targets = published["table"], published["targets"]
    ours, rivals = (_contenders(rows, side) for side in ("ours", "rivals"))
    heads = rivals if len(rivals) <= _MOST_COLUMNS else ["best rival"]
    return _table(
        [f"what ({published['unit']})", *ours, *heads, "ratio", "targets"],
        (
            [
                row["what"],
                *_cells(row, "ours", ours),
                *_cells(row, "rivals", rivals),
                _number(row["ratio"]),
                verdict(row, targets),
            ]
            for row in rows
        ),
    )


def targets(published: dict[str, Any]) -> list[str]:
    """Return the table of targets, in Markdown."""
    return _table(
        ["target", "value", "wanted", ""],
        (
            [
                target["what"],
                _number(target["value"])
                + (f" ± {_number(target['noise'])}" if "noise" in target else ""),
                f"`{target['wanted']}`",
                "met" if target["met"] else "**missed**",
            ]
            for target in published["targets"]
        ),
    )


def page(published: dict[str, Any]) -> list[str]:
    """Return all that is shown of one benchmark, in Markdown."""
    machine = published["machine"]
    where = [machine.get("graphics_processor"), machine["processor"]]
    threads = machine.get("torch_threads") or published["settings"].get("threads")
    where.append(f"{machine['cpu_count']} cores" + (f", {threads} threads" if threads else ""))
    versions = ", ".join(f"{name} {version}" for name, version in published["versions"].items())
    met = [target["met"] for target in published["targets"]]
    lines = [
        f"*{published['benchmark']}.* Measured on {machine['date'][:10]} by `{published['script']}`"
        f" on {', '.join(part for part in where if part)}; {versions}.",
        *measurements(published),
    ]
    if met:
        lines += [f"{sum(met)} of {len(met)} targets met:", *targets(published)]
    return [*lines, *(f"- {note}" for note in published["notes"]), ""]


class Benchmark(SphinxDirective):
    """``{benchmark} NAME`` shows ``_data/benchmarks/NAME.json``."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Return the paragraphs and tables."""
        path = Path(self.env.srcdir) / "_data" / "benchmarks" / f"{self.arguments[0]}.json"
        self.env.note_dependency(str(path))
        holder = nodes.container(classes=["benchmark"])
        lines = page(json.loads(path.read_text(encoding="utf-8")))
        self.state.nested_parse(StringList(lines, source=str(path)), 0, holder)
        return [holder]


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the directive."""
    app.add_directive("benchmark", Benchmark)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
