"""Eigenvalues with their masses, whether they come as an array or as a measure. NumPy only."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from specdens.arguments import checked_numbers
from specdens.measure import SpectralMeasure


class Masses(NamedTuple):
    """Distinct eigenvalues, ascending, the share of all eigenvalues at each, and their number n."""

    values: np.ndarray
    weights: np.ndarray
    dimension: float

    @property
    def cumulative(self) -> np.ndarray:
        """Fraction of eigenvalues up to and including each value."""
        return np.cumsum(self.weights)

    def quantile(self, q: np.ndarray) -> np.ndarray:
        """Return quantiles interpolated between the middles of the steps."""
        return np.interp(q, self.cumulative - self.weights / 2, self.values)

    def above(self, threshold: float) -> Masses:
        """Return the part from `threshold` on as a distribution of its own.

        Its `dimension` is the number of eigenvalues there; of a measure it need not be whole.

        Raises
        ------
        ValueError
            If there is nothing.
        """
        kept = self.values >= threshold
        mass = float(self.weights[kept].sum())
        if not mass > 0:
            largest = f"its largest is {self.values[-1]:.6g}"
            msg = f"source has no eigenvalue from {threshold:.6g} on; {largest}."
            raise ValueError(msg)
        return Masses(self.values[kept], self.weights[kept] / mass, mass * self.dimension)


def masses(source: SpectralMeasure | ArrayLike, name: str = "source") -> Masses:
    """Return the eigenvalues of `source` with their masses; errors call it `name`.

    Values that rounding cannot tell from zero (below n times the double precision of the largest,
    or the resolution of the measure's rule) are zero. Of a measure with signed weights the running
    maximum of the distribution function is taken.

    Parameters
    ----------
    source : SpectralMeasure or array_like of shape (n,)
        A measure, or eigenvalues of equal mass.

    Raises
    ------
    ValueError
        If there are no eigenvalues, or some are not finite.
    TypeError
        If they are complex, or no numbers.

    Examples
    --------
    >>> masses([3.0, 1.0, 1.0, 0.0]).weights
    array([0.25, 0.5 , 0.25])
    """
    if isinstance(source, SpectralMeasure):
        used = source.weights != 0
        values, weights = source.nodes[used], source.weights[used] / source.num_probes
        dimension = source.dimension
        resolution = 0.0 if source.rule is None else source.rule.resolution
    else:
        values = checked_numbers(name, source).ravel()
        dimension, resolution = values.size, 0.0
        weights = np.full(dimension, 1 / max(dimension, 1))
    if values.size == 0:
        msg = f"{name} has no eigenvalues; expected at least one."
        raise ValueError(msg)
    bad = int((~np.isfinite(values)).sum())
    if bad:
        msg = f"{name} has {bad} of {values.size} eigenvalues that are NaN or Inf; drop them."
        raise ValueError(msg)
    rounding = dimension * np.finfo(np.float64).eps * np.abs(values).max()
    values = np.where(np.abs(values) <= max(rounding, resolution), 0.0, values)
    distinct, positions = np.unique(values, return_inverse=True)
    cumulative = np.cumsum(np.bincount(positions, weights=weights))
    cumulative = np.maximum.accumulate(np.clip(cumulative, 0, None)) / cumulative[-1]
    return Masses(distinct, np.diff(np.minimum(cumulative, 1.0), prepend=0.0), dimension)
