"""Claims of papers against what was measured: printed, judged, written to JSON.

Every script in this folder prints lines ``id  quantity  value  accepted  PASS`` or ``FAIL``, the
value being its range over the seeds and other runs, and exits with 1 if a claim fails. A row
without an accepted range is information. ``--out`` receives the rows as JSON, and figures where
matplotlib is installed.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

PASS, FAIL, INFO = "PASS", "FAIL", "info"


@dataclass(frozen=True)
class Row:
    """One claim.

    Attributes
    ----------
    id : str
        Letter of the paper and number of the claim.
    quantity : str
    values : tuple of float
        One for every run.
    accepted : str
    verdict : {"PASS", "FAIL", "info"}
    note : str
        What must be known to read the row.
    """

    id: str
    quantity: str
    values: tuple[float, ...]
    accepted: str
    verdict: str
    note: str

    @property
    def range(self) -> str:
        """The smallest and the largest value; one, if they are equal."""
        low, high = (f"{x:.3g}" for x in (min(self.values), max(self.values)))
        return low if low == high else f"{low} to {high}"


class Report:
    """Collects rows and prints each as it comes.

    Parameters
    ----------
    name : str
        Of the script: that of the JSON file.
    options : argparse.Namespace
        With `quick`, `seeds` and `out`.
    """

    def __init__(self, name: str, options: argparse.Namespace) -> None:
        self.name, self.quick, self.out = name, bool(options.quick), options.out
        self.seeds = range(options.seeds or (1 if self.quick else 3))
        self.options = options
        self.rows: list[Row] = []
        self._began = time.perf_counter()

    def row(
        self,
        id: str,
        quantity: str,
        values: ArrayLike,
        *,
        low: float | None = None,
        high: float | None = None,
        share: float = 1.0,
        note: str = "",
    ) -> None:
        """Add a claim: values, one per run, between `low` and `high`, both included.

        Parameters
        ----------
        id, quantity : str
        values : array_like
        low, high : float, optional
            Without either the row is information.
        share : float
            The part of the runs that must lie in the range.
        note : str
        """
        numbers = np.asarray(values, dtype=np.float64).ravel()
        inside = np.ones(numbers.shape, dtype=bool)
        if low is not None:
            inside &= numbers >= low
        if high is not None:
            inside &= numbers <= high
        judged = not (low is None and high is None)
        holds = numbers.size > 0 and inside.mean() >= share
        verdict = (PASS if holds else FAIL) if judged else INFO
        accepted = _accepted(low, high, share)
        self.rows.append(Row(id, quantity, tuple(map(float, numbers)), accepted, verdict, note))
        row = self.rows[-1]
        print(f"{id:5s} {quantity:58s} {row.range:>21s}  {accepted:22s} {verdict}", flush=True)
        if note:
            print(f"      ({note})")

    def figure(self, name: str, draw: Callable[[Any], None], columns: int = 1) -> None:
        """Write the figure that `draw` makes on the axes it is given, if matplotlib is there.

        Parameters
        ----------
        name : str
            Of the file, without its ending.
        draw : callable
            Called with one Axes, or with an array of them if `columns` is above 1.
        columns : int
            Axes beside each other.
        """
        if find_spec("matplotlib") is None:
            return
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        plain = {"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}
        with plt.rc_context({**plain, "font.size": 10}):
            figure, axes = plt.subplots(
                1, columns, figsize=(5.5 * columns, 4), layout="constrained"
            )
            draw(axes)
            self.out.mkdir(parents=True, exist_ok=True)
            figure.savefig(self.out / f"{name}.png", dpi=160)
            plt.close(figure)

    def finish(self) -> int:
        """Write the rows to JSON and return the exit status: 1 if a claim failed."""
        failed = [row for row in self.rows if row.verdict == FAIL]
        seconds = time.perf_counter() - self._began
        self.out.mkdir(parents=True, exist_ok=True)
        path = self.out / f"{self.name}.json"
        content = {
            "script": self.name,
            "quick": self.quick,
            "seeds": list(self.seeds),
            "seconds": round(seconds, 1),
            "rows": [asdict(row) | {"range": row.range} for row in self.rows],
        }
        path.write_text(json.dumps(content, indent=2) + "\n")
        judged = sum(row.verdict != INFO for row in self.rows)
        print(
            f"\n{judged - len(failed)} of {judged} claims hold, {len(self.seeds)} seed(s), "
            f"{seconds:.0f} s; rows: {path}"
        )
        return 1 if failed else 0


def span(epochs: Sequence[int]) -> str:
    """Return the epochs in words."""
    return f"epoch {epochs[0]}" if len(epochs) == 1 else f"epochs {epochs[0]} to {epochs[-1]}"


def parser(description: str | None) -> argparse.ArgumentParser:
    """Return the options that all scripts share."""
    options = argparse.ArgumentParser(description=(description or "").partition("\n")[0])
    options.add_argument("--quick", action="store_true", help="one seed, few checkpoints")
    options.add_argument("--seeds", type=int, default=None, help="number of seeds: 3, or 1")
    options.add_argument("--out", type=Path, default=Path("papers_out"), help="folder of results")
    return options


def run(
    name: str,
    parts: Sequence[Callable[[Report], None]],
    options: argparse.Namespace,
) -> int:
    """Run the parts of a script on one report and return its exit status."""
    report = Report(name, options)
    for part in parts:
        part(report)
    return report.finish()


def _accepted(low: float | None, high: float | None, share: float) -> str:
    if low is None and high is None:
        return "-"
    if low == high:
        text = f"= {low:g}"
    elif low is None:
        text = f"<= {high:g}"
    elif high is None:
        text = f">= {low:g}"
    else:
        text = f"in [{low:g}, {high:g}]"
    return text if share == 1 else f"{text} in {share:.0%}"
