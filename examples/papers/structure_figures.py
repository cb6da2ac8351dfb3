"""Figures of class structure: spectra of the parts of G, and class and pair means in the plane."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from report import Report

from specdens import eigsh, hierarchy, slq
from specdens_torch import ClassStructure, GaussNewton

COLORS = {"G": "black", "within": "C7", "class": "C3", "cross": "C0", "equal": "C2"}
SMALL_PARTS = ("class", "cross", "equal")
LOW, HIGH = -5, 1  # powers of ten that are shown


def three_levels(report: Report, structure: ClassStructure) -> None:
    """Draw the log spectrum of G with its parts, and its largest eigenvalues in their order.

    On the left as in figure 5 of arXiv 2008.11865. On the right two lines mark C - 1 and C (C - 1),
    where outliers and a bulk of pairs of classes would end.

    Parameters
    ----------
    report : Report
    structure : ClassStructure
    """
    operator = GaussNewton(structure.risk)
    number_of_pairs = structure.num_classes * (structure.num_classes - 1)
    whole = eigsh(operator, number_of_pairs + 20, progress=False).eigenvalues[::-1]
    settings = {"num_probes": 2 if report.quick else 10, "num_steps": 60 if report.quick else 120}
    measures = {
        "G": slq(operator, progress=False, **settings),
        "within": slq(structure.G_within, progress=False, **settings),
    }
    spectra = {part: structure.eigenvalues(part) for part in SMALL_PARTS}

    def draw(axes) -> None:
        _draw_levels(axes[0], measures, spectra)
        _draw_ranks(axes[1], whole, spectra, structure.num_classes)

    report.figure("three_levels", draw, columns=2)


def _draw_levels(ax, measures: Mapping[str, Any], spectra: Mapping[str, np.ndarray]) -> None:
    edges = np.linspace(LOW, HIGH, 61)
    width = edges[1] - edges[0]
    x = np.linspace(LOW, HIGH, 600)
    for name, measure in measures.items():
        # The density is one of natural logarithms.
        density = np.log(10) * measure.log_pdf(x * np.log(10), width=width * np.log(10)).value
        ax.plot(x, measure.dimension * width * density, color=COLORS[name], label=name)
    for part, values in spectra.items():
        seen = np.log10(values[values > 10.0**LOW])
        label = "c = c'" if part == "equal" else part
        ax.hist(seen, edges, color=COLORS[part], alpha=0.6, label=label)
    ax.set(xlabel="log10 of the eigenvalue", ylabel="eigenvalues per bin", yscale="log")
    ax.set(ylim=(0.5, None), title="G and its parts")
    ax.legend()


def _draw_ranks(ax, whole: np.ndarray, spectra: Mapping[str, np.ndarray], num_classes: int) -> None:
    for name, values in {"G": whole, "class": spectra["class"], "cross": spectra["cross"]}.items():
        seen = values[values > 10.0**LOW]
        ax.plot(np.arange(1, len(seen) + 1), seen, ".", color=COLORS[name], label=name)
    for number, text in (
        (num_classes - 1, "C - 1"),
        (num_classes * (num_classes - 1), "C (C - 1)"),
    ):
        ax.axvline(number + 0.5, color="0.7", linewidth=1)
        ax.text(number + 0.5, 1.02, text, ha="center", transform=ax.get_xaxis_transform())
    ax.set(xscale="log", yscale="log", xlabel="number from the top", ylabel="eigenvalue")
    ax.legend(loc="lower left")


def means(report: Report, structures: Mapping[int, ClassStructure]) -> None:
    """Draw class means and pair means in the plane, as figure 5 of arXiv 1901.08244 does.

    Parameters
    ----------
    report : Report
    structures : mapping
        From epochs.
    """
    points = {
        epoch: hierarchy.embedding(structure.squared_distances(), method="tsne")
        for epoch, structure in structures.items()
    }

    def draw(axes) -> None:
        for ax, (epoch, at) in zip(axes, points.items(), strict=True):
            _draw_means(ax, at, structures[epoch].num_classes)
            ax.set(xticks=[], yticks=[], title=f"Means of classes and pairs, epoch {epoch}")

    report.figure("class_means", draw, columns=len(points))


def _draw_means(ax, points: np.ndarray, num_classes: int) -> None:
    """Draw circles for class means, dots for pairs, crosses for those of c' = c; a color for c."""
    classes, pairs = points[:num_classes], points[num_classes:].reshape(num_classes, -1, 2)
    for c in range(num_classes):
        ax.plot(*np.delete(pairs[c], c, axis=0).T, ".", color=f"C{c}")
        ax.plot(*pairs[c, c], "x", color=f"C{c}")
        ax.plot(*classes[c], "o", color=f"C{c}", markersize=9, markeredgecolor="black")
        ax.annotate(str(c), classes[c], textcoords="offset points", xytext=(5, 5))
