"""A number with its standard error over the probes, and how far a measure is from the truth."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Estimate(NamedTuple):
    """A number, or an array of numbers, and its standard error over the probes.

    The standard error measures the randomness of the probes, not the finite number of steps or the
    smoothing; it is nan with a single probe and 0 where nothing was estimated.
    """

    value: np.ndarray
    stderr: np.ndarray

    def __str__(self) -> str:
        if np.ndim(self.value):
            return f"Estimate(value={self.value}, stderr={self.stderr})"
        value, stderr = float(self.value), float(self.stderr)
        if np.isfinite(value) and np.isnan(stderr):
            return f"{value:.6g} (one probe: no standard error)"
        if not (np.isfinite([value, stderr]).all() and stderr > 1e-12 * abs(value)):
            return f"{value:.6g} ± {stderr:.1g}"
        # Two digits of the error, and as many of the value as that leaves meaningful.
        digits = 1 - int(np.floor(np.log10(stderr)))
        if 0 <= digits <= 6:
            return f"{value:.{digits}f} ± {stderr:.{digits}f}"
        places = max(1, digits + int(np.floor(np.log10(max(abs(value), stderr)))) + 1)
        return f"{value:.{places}g} ± {stderr:.2g}"

    def __repr__(self) -> str:
        return str(self) if np.ndim(self.value) else f"Estimate({self})"


def over_probes(samples: np.ndarray) -> Estimate:
    """Return mean and standard error over the first axis (p, ...)."""
    p = samples.shape[0]
    spread = samples.std(axis=0, ddof=1) if p > 1 else np.full(samples.shape[1:], np.nan)
    return Estimate(samples.mean(axis=0), spread / np.sqrt(p))


class Accuracy(NamedTuple):
    """How far a measure of `density` is from the truth, in Wasserstein-1 distance over range."""

    statistical: float  # of too few probes, at `confidence`
    quadrature: float  # of too few steps
    tolerance: float  # what was asked for
    confidence: float
    num_products: int  # columns multiplied

    @property
    def total(self) -> float:
        """Sum of both parts."""
        return self.statistical + self.quadrature

    @property
    def converged(self) -> bool:
        """Whether the sum is within the tolerance."""
        return self.total <= self.tolerance
