"""The result of every estimator: a measure that stands for the eigenvalues, with its uncertainty.

NumPy only. Density, distribution function, counts, moments, traces, files and plots exist once,
here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from specdens.arguments import (
    check_alike,
    checked_choice,
    checked_count,
    checked_fraction,
    checked_number,
    checked_numbers,
    checked_probabilities,
)
from specdens.estimate import Accuracy, Estimate, average, checked_rule, equal_mass, jumps, smoothed
from specdens.interpretation import Rule, band, join, plain, read, steps_of
from specdens.quadrature import step_distance
from specdens.sharpening import Outliers
from specdens.smoothing import Chebyshev, Gaussian, Smoothing, checked_smoothing


@dataclass(frozen=True, eq=False, repr=False)
class SpectralMeasure:
    r"""A probability measure that stands for the eigenvalues.

    It is :math:`\frac1p \sum_{ij} w_{ij} \delta_{\theta_{ij}}` for nodes and weights of p probes.

    Estimators return it. To build one by hand, pass nodes, weights and the dimension.

    Parameters
    ----------
    nodes : ndarray of shape (p, m)
        Float64, in eigenvalue units, one row per probe.
    weights : ndarray of shape (p, m)
        Float64; each row sums to 1. Padded entries weigh 0.
    dimension : int
        n: turns averages over eigenvalues into traces and counts.
    smoothing : Smoothing, optional
        How `pdf` and `cdf` broaden the nodes unless told otherwise. By default a `Gaussian` as wide
        as the range of the nodes that are not outliers, divided by the number of Lanczos steps.
    outliers : Outliers
        Eigenvalues that were resolved one by one; in `nodes` and `weights` they have their exact
        mass.
    rule : KrylovRule, MomentRule or DeflatedRule, optional
        The rule as it was computed, before outliers were given their exact mass.
    provenance : mapping
        How the measure was made: method, settings, seed, versions, time.

    Raises
    ------
    ValueError
        If shapes differ, an entry is not finite or `dimension` is below 1.
    TypeError
        If `nodes` or `weights` are no numbers, `dimension` no integer or `smoothing` none.

    Examples
    --------
    >>> measure = SpectralMeasure(np.array([[1.0, 3.0]]), np.array([[0.5, 0.5]]), dimension=4)
    >>> float(measure.trace().value), float(measure.count(2, 4).value)
    (8.0, 2.0)
    """

    nodes: np.ndarray
    weights: np.ndarray
    dimension: int
    smoothing: Smoothing = None  # type: ignore[assignment]  # filled in below
    outliers: Outliers = field(default_factory=Outliers.none)
    rule: Rule | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        nodes, weights = checked_rule(self.nodes, self.weights)
        checked_count("dimension", self.dimension)
        object.__setattr__(self, "nodes", nodes)
        object.__setattr__(self, "weights", weights)
        if self.smoothing is None:
            object.__setattr__(self, "smoothing", self._default_smoothing())
        checked_smoothing(self.smoothing)

    @classmethod
    def from_rule(
        cls,
        rule: Rule,
        dimension: int,
        provenance: Mapping[str, Any],
        smoothing: Smoothing | None = None,
    ) -> SpectralMeasure:
        """Build the measure of a finished run: outliers sharpened if the probes were random.

        `provenance` must hold ``isotropic`` (random probes) and ``complex`` (complex vectors).
        """
        reading = read(rule, dimension, provenance)
        return cls(
            reading.nodes,
            reading.weights,
            dimension,
            smoothing or reading.smoothing,  # type: ignore[arg-type]
            reading.outliers,
            rule,
            provenance,
        )

    def _default_smoothing(self) -> Gaussian:
        bulk = self.nodes[self.is_bulk] if self.is_bulk.any() else self.nodes
        steps = self.nodes.shape[1] if self.rule is None else steps_of(self.rule)
        width = float(np.ptp(bulk)) / steps
        tiny = 1e-3 * float(np.abs(self.nodes).max())  # all bulk nodes equal, or none
        return Gaussian(width if width > 1e-9 * tiny else tiny or 1e-3)

    @property
    def accuracy(self) -> Accuracy | None:
        """What `density` knows of its error; None for other estimators."""
        told = self.provenance.get("accuracy")
        return None if told is None else Accuracy(**told)

    @property
    def num_probes(self) -> int:
        """Number of probes p."""
        return self.nodes.shape[0]

    @property
    def is_bulk(self) -> np.ndarray:
        """Mask (p, m) of the nodes that carry weight and are not outliers."""
        return (self.weights != 0) & ~np.isin(self.nodes, self.outliers.eigenvalues)

    @property
    def support(self) -> tuple[float, float]:
        """Smallest and largest node that carries weight."""
        used = self.nodes[self.weights != 0]
        return float(used.min()), float(used.max())

    def integrate(self, f: Callable[[np.ndarray], np.ndarray]) -> Estimate:
        """Return the average of `f` over the eigenvalues, ``tr f(A) / n``.

        Parameters
        ----------
        f : callable
            Takes and returns an array, element by element. Called on nodes that carry weight only.

        Returns
        -------
        Estimate
            Its standard error is that of the probes, as everywhere below.

        Raises
        ------
        ValueError
            If `f` returns another shape.
        TypeError
            If `f` is no function, or returns something else than numbers.
        """
        return average(f, self.nodes, self.weights)

    def trace(self, f: Callable[[np.ndarray], np.ndarray] = np.asarray) -> Estimate:
        """Return ``tr f(A)``, by default the trace; ``np.log`` gives the log-determinant.

        Returns
        -------
        Estimate
            The average that `integrate` returns, times n.
        """
        return Estimate(*(self.dimension * part for part in self.integrate(f)))

    def moment(self, order: int) -> Estimate:
        """Return the average of ``eigenvalue ** order``.

        Returns
        -------
        Estimate

        Raises
        ------
        ValueError
            If `order` is negative.
        TypeError
            If it is no integer.
        """
        power = checked_count("order", order, 0, "use integrate for other functions")
        return self.integrate(lambda x: x**power)

    def count(self, low: float, high: float) -> Estimate:
        """Return how many eigenvalues lie in the closed interval [low, high], without smoothing.

        An interval narrower than the steps resolve can miss nodes that stand for eigenvalues in it:
        half a gap on either side is safe.

        Returns
        -------
        Estimate
            Of up to n.
        """
        if not checked_number("low", low) <= checked_number("high", high):
            msg = f"low={low} must not exceed high={high}; swap them."
            raise ValueError(msg)
        return self.trace(lambda x: ((x >= low) & (x <= high)).astype(np.float64))

    def pdf(self, x: ArrayLike, smoothing: Smoothing | None = None) -> Estimate:
        """Return the density at `x`, in 1 / eigenvalue units; it integrates to 1 as it is.

        Returns
        -------
        Estimate
            Two arrays in the shape of `x`.
        """
        return smoothed(self._broadening(smoothing).density, x, self.nodes, self.weights)

    def cdf(self, x: ArrayLike, smoothing: Smoothing | None = None) -> Estimate:
        """Return the fraction of eigenvalues up to `x`: the integral of `pdf`.

        ``smoothing=Gaussian(0)`` gives the step function of the rule itself.

        Returns
        -------
        Estimate
            Two arrays in the shape of `x`.
        """
        return smoothed(self._broadening(smoothing).cumulative, x, self.nodes, self.weights)

    def _broadening(self, smoothing: Smoothing | None) -> Smoothing:
        return self.smoothing if smoothing is None else checked_smoothing(smoothing)

    def log_pdf(self, x: ArrayLike, width: float | None = None) -> Estimate:
        r"""Return the density of :math:`u = \ln |\lambda|` at `x`, both signs together.

        It integrates over u to 1 minus the mass that sits at exactly zero, up to rounding, which no
        logarithmic axis can show.

        Parameters
        ----------
        x : array_like
            Natural logarithms.
        width : float, optional
            Standard deviation of the Gaussian kernel in u. By default the range of the nodes'
            logarithms divided by the number of nodes per probe.

        Returns
        -------
        Estimate
            Two arrays in the shape of `x`.
        """
        zero = self.rule.resolution if self.rule is not None else 0.0
        shown = (np.abs(self.nodes) > zero) & (self.weights != 0)
        logs = np.log(np.abs(np.where(shown, self.nodes, 1.0)))
        logarithmic = replace(
            self,
            nodes=np.where(shown, logs, logs[shown].mean() if shown.any() else 0.0),
            weights=np.where(shown, self.weights, 0.0),
            outliers=Outliers.none(),
            smoothing=None if width is None else Gaussian(width),  # type: ignore[arg-type]
        )
        return logarithmic.pdf(x)

    def cdf_band(self, x: ArrayLike, confidence: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
        """Return bounds on the distribution function of the eigenvalues that hold at all `x`
        together.

        The true number of eigenvalues up to x, divided by n, lies between them for all x with
        probability `confidence` at least. `specdens.bands` has the inequalities, their sources, and
        the one step that is tested and not proven.

        Parameters
        ----------
        x : array_like of shape (q,)
        confidence : float
            Between 0 and 1.

        Returns
        -------
        lower, upper : ndarray of shape (q,)

        Raises
        ------
        ValueError
            If `confidence` is out of range, or the probes are not uniform on the sphere.
        """
        checked_fraction("confidence", confidence, "it is a probability")
        if self.rule is None or self.provenance.get("probes") != "sphere":
            msg = (
                f"probes={self.provenance.get('probes')!r}: the band holds for a Gauss rule of "
                "sphere probes only; use slq(..., probes=sphere)."
            )
            raise ValueError(msg)
        freedoms = 2 if self.provenance["complex"] else 1
        at = checked_numbers("x", x)
        return band(self.rule, self.dimension, at, confidence, freedoms)

    def quantile(self, q: ArrayLike) -> np.ndarray:
        """Return the smallest node up to which a fraction `q` of eigenvalues lies, unsmoothed."""
        q = checked_probabilities("q", q)
        nodes, cumulative = jumps(self.nodes, self.weights)
        cumulative = np.maximum.accumulate(cumulative)  # signed weights of moments go up and down
        # A rounding below the jump is the jump: cumulative sums of weights are not exact.
        return nodes[np.minimum(np.searchsorted(cumulative, q - 1e-12), len(nodes) - 1)]

    def distance(self, other: SpectralMeasure | ArrayLike) -> float:
        r"""Return the Wasserstein-1 distance :math:`\int |F - G|` to another measure, without
        smoothing.

        Parameters
        ----------
        other : SpectralMeasure or array_like of shape (n,)
            A measure, or eigenvalues of equal mass.
        """
        if isinstance(other, SpectralMeasure):
            theirs = jumps(other.nodes, other.weights)
        else:
            theirs = equal_mass("other", other)
        return step_distance(*jumps(self.nodes, self.weights), *theirs)

    def plain(self) -> SpectralMeasure:
        """Return the measure of the rule as computed, without outliers at their exact mass."""
        if self.rule is None:
            return self
        return SpectralMeasure(
            *plain(self.rule, self.dimension),
            self.dimension,
            self.smoothing if isinstance(self.smoothing, Chebyshev) else None,  # type: ignore[arg-type]
            rule=self.rule,
            provenance=self.provenance,
        )

    def extend(self, other: SpectralMeasure) -> SpectralMeasure:
        """Return the measure of the probes of both, which must come from the same operator.

        Raises
        ------
        ValueError
            If the dimensions or kinds of probes differ, or the seeds agree: the same probes twice
            would claim a smaller error than there is.
        TypeError
            If `other` is no measure.
        """
        if not isinstance(other, SpectralMeasure):
            msg = f"other has type {type(other).__qualname__}; expected a SpectralMeasure."
            raise TypeError(msg)
        if self.rule is None or other.rule is None:
            whose = "this measure" if self.rule is None else "other"
            msg = f"{whose} has no rule, as slq and kpm keep it; only measures of runs are joined."
            raise ValueError(msg)
        mine, theirs = ({**m.provenance, "dimension": m.dimension} for m in (self, other))
        check_alike("other", theirs, "this measure", mine, ("dimension", "probes", "method"))
        seeds = [*self.provenance["seeds"], *other.provenance["seeds"]]
        if len(set(seeds)) < len(seeds):
            msg = f"seed={other.provenance['seeds']} was used already; run other with another seed."
            raise ValueError(msg)
        rule = join([self.rule, other.rule])
        provenance = {**self.provenance, "seeds": seeds, "num_probes": rule.num_probes}
        provenance.pop("accuracy", None)  # that of one part alone
        return SpectralMeasure.from_rule(rule, self.dimension, provenance)

    def plot(
        self, ax: Any = None, log: bool = True, *, kind: str = "density", **options: Any
    ) -> Any:
        """Draw the measure and return the matplotlib axes.

        Parameters
        ----------
        ax : matplotlib Axes, optional
            By default a new figure's.
        log : bool
            Logarithmic vertical axis, for the density.
        kind : str
            ``"density"`` with isolated eigenvalues as stems (`specdens.plotting.plot_density`), or
            ``"cdf"`` with its certified band (`specdens.plotting.plot_cdf`).
        **options
            Passed on.
        """
        from specdens.plotting import plot_cdf, plot_density  # imports matplotlib

        checked_choice("kind", kind, ("density", "cdf"))
        if kind == "cdf":
            return plot_cdf(self, ax, **options)
        return plot_density(self, ax, log=log, **options)

    def save(self, path: str | Path) -> None:
        """Write the measure to a ``.npz`` file: arrays, and a JSON header with the provenance."""
        from specdens.saving import save  # builds measures, so it comes after this module

        save(self, path)

    def __repr__(self) -> str:
        from specdens.html import measure_text

        return measure_text(self)

    def _repr_html_(self) -> str:
        from specdens.html import measure_html

        return measure_html(self)
