"""Figures of a `SpectralMeasure`. Matplotlib is imported when the first figure is drawn."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from specdens.arguments import checked_count
from specdens.smoothing import Gaussian, checked_smoothing

if TYPE_CHECKING:
    from specdens.measure import SpectralMeasure
    from specdens.smoothing import Smoothing

_BULK, _OUTLIER = "#3b6ea5", "#c8553d"


def plot_density(
    measure: SpectralMeasure,
    ax: Any = None,
    *,
    log: bool = True,
    smoothing: Smoothing | None = None,
    num_points: int = 2000,
    label: str = "density",
    color: str = _BULK,
) -> Any:
    """Draw the smoothed density as a curve with its standard error, and isolated eigenvalues as
    stems.

    Resolved eigenvalues that stand at least six smoothing widths from any other node are stems, as
    high as their mass k/n: on a logarithmic axis one eigenvalue of many millions is visible beside
    the bulk. All other mass is in the curve.

    Parameters
    ----------
    measure : SpectralMeasure
    ax : matplotlib Axes, optional
        By default a new figure's.
    log : bool
        Logarithmic vertical axis.
    smoothing : Smoothing, optional
        By default the measure's.
    num_points : int
        Of the curve.
    label, color : str
        Of the curve.

    Returns
    -------
    matplotlib Axes
    """
    ax = _axes(ax)
    smoothing = checked_smoothing(smoothing or measure.smoothing)
    isolated = isolated_outliers(measure, smoothing)
    stems = measure.outliers.eigenvalues[isolated]
    heights = np.nan_to_num(measure.outliers.multiplicities[isolated], nan=1.0) / measure.dimension
    x = grid(measure, num_points)
    curve = np.where(np.isin(measure.nodes, stems), 0.0, measure.weights)
    rows = [smoothing.density(x, t) @ w for t, w in zip(measure.nodes, curve, strict=True)]
    mean = np.mean(rows, axis=0)
    ax.plot(x, mean, color=color, lw=1.3, label=label, zorder=3)
    if measure.num_probes > 1:
        error = np.std(rows, axis=0, ddof=1) / measure.num_probes**0.5
        low = np.maximum(mean - error, 1e-3 * mean if log else -np.inf)
        ax.fill_between(x, low, mean + error, color=color, alpha=0.25, lw=0)
    mass = np.min(heights, initial=1 / measure.dimension)
    if len(stems):
        ax.vlines(stems, 0.2 * mass if log else 0.0, heights, color=_OUTLIER, lw=1.2, zorder=4)
        ax.plot(stems, heights, "o", color=_OUTLIER, ms=4, zorder=5,
                label=f"{len(stems)} isolated eigenvalues, mass 1/n")  # fmt: skip
    if log:
        ax.set_yscale("log")
        ax.set_ylim(0.2 * mass, 4 * max(mean.max(), heights.max(initial=0)))
    else:
        ax.set_ylim(bottom=0)
    ax.set_xlabel("eigenvalue")
    ax.set_ylabel("spectral density")
    ax.legend(frameon=False)
    return ax


def isolated_outliers(measure: SpectralMeasure, smoothing: Smoothing | None = None) -> np.ndarray:
    """Return a mask of the outliers that stand six smoothing widths or more from any other node."""
    smoothing = smoothing or measure.smoothing
    nodes = np.unique(measure.nodes[measure.weights != 0])
    gaps = np.diff(nodes, prepend=-np.inf, append=np.inf)
    places = np.searchsorted(nodes, measure.outliers.eigenvalues)
    alone = np.minimum(gaps[:-1], gaps[1:]) >= 6 * smoothing.resolution
    return alone[np.minimum(places, len(nodes) - 1)]


def plot_cdf(
    measure: SpectralMeasure,
    ax: Any = None,
    *,
    confidence: float = 0.95,
    num_points: int = 2000,
    color: str = _BULK,
) -> Any:
    """Draw the distribution function as computed, with its certified band where there is one.

    Parameters
    ----------
    measure : SpectralMeasure
    ax : matplotlib Axes, optional
    confidence : float
        Of the band.
    num_points : int
    color : str

    Returns
    -------
    matplotlib Axes
    """
    ax = _axes(ax)
    x = grid(measure, num_points)
    ax.step(
        x, measure.cdf(x, Gaussian(0)).value, where="post", color=color, lw=1.4, label="estimate"
    )
    if measure.provenance.get("probes") == "sphere" and measure.rule is not None:
        lower, upper = measure.cdf_band(x, confidence)
        ax.fill_between(x, lower, upper, color=color, alpha=0.2, lw=0, step="post",
                        label=f"{100 * confidence:g} % band")  # fmt: skip
    ax.set_xlabel("eigenvalue")
    ax.set_ylabel("fraction of eigenvalues below")
    ax.set_ylim(-0.02, 1.02)
    ax.legend(frameon=False, loc="lower right")
    return ax


def grid(measure: SpectralMeasure, num_points: int = 2000) -> np.ndarray:
    """Return points to draw at, ascending: half evenly spaced, half dense where the bulk is."""
    checked_count("num_points", num_points, 4)
    low, high = measure.support
    margin = 0.03 * (high - low) or 4 * measure.smoothing.resolution
    levels = np.linspace(0.001, 0.999, max(2, num_points // 4))
    nodes = np.unique(measure.nodes[measure.weights != 0])
    between = np.interp(np.linspace(0, 1, num_points // 4), np.linspace(0, 1, len(nodes)), nodes)
    even = np.linspace(low - margin, high + margin, num_points // 2)
    return np.unique(np.concatenate([even, measure.quantile(levels), between]))


def _axes(ax: Any) -> Any:
    if ax is not None:
        return ax
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        msg = "plots need matplotlib, which is not installed; pip install 'specdens[plot]'."
        raise ImportError(msg) from error

    return plt.subplots(figsize=(7, 4), layout="constrained")[1]
