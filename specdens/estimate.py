"""Numbers with standard errors over the probes, averages that give them, and accuracies."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from specdens.arguments import checked_numbers, values_of

#: Digits of a long sum in double precision that its rounding leaves.
_MOST_DIGITS = 12


class Estimate(NamedTuple):
    """A number, or an array of numbers, and its standard error over the probes.

    The standard error measures the randomness of the probes, not the finite number of steps or the
    smoothing; it is nan with a single probe and 0 where nothing was estimated.

    Examples
    --------
    >>> Estimate(np.array(3.14159), np.array(0.012))
    Estimate(3.142 ± 0.012)
    """

    value: np.ndarray
    stderr: np.ndarray

    def __str__(self) -> str:
        if np.ndim(self.value):
            return f"Estimate(value={self.value}, stderr={self.stderr})"
        value = complex(self.value) if np.iscomplexobj(self.value) else float(self.value)
        stderr = float(self.stderr)
        if np.isfinite(value) and np.isnan(stderr):
            return f"{value:.6g} (one probe: no standard error)"
        if not np.isfinite([value, stderr]).all():
            return f"{value:.6g} ± {stderr:.2g}"
        return _matched(value, stderr)

    def __repr__(self) -> str:
        return str(self) if np.ndim(self.value) else f"Estimate({self})"


def _matched(value: float | complex, stderr: float) -> str:
    """Return two digits of the error, and the digits of the value down to the same place.

    An error below the rounding of the value does not limit its digits.
    """
    first, last = _exponent(max(abs(value), stderr)), _exponent(stderr) - 1
    if stderr == 0 or first - last >= _MOST_DIGITS:
        return f"{value:.{_MOST_DIGITS}g} ± {stderr:.1g}"
    if not -5 < first < 7:
        return f"{value:z.{first - last}e} ± {stderr:.1e}"
    decimals = max(0, -last)
    shown, error = (np.round(number, -last) for number in (value, stderr))
    if decimals > 6:
        return f"{shown:z.{decimals}f} ± {stderr:.1e}"
    return f"{shown:z.{decimals}f} ± {error:.{decimals}f}"


def _exponent(number: float) -> int:
    """Return the power of ten of the first of two significant digits."""
    return int(f"{number:.1e}".split("e")[1])


def over_probes(samples: np.ndarray) -> Estimate:
    """Return mean and standard error over the first axis (p, ...)."""
    p = samples.shape[0]
    spread = samples.std(axis=0, ddof=1) if p > 1 else np.full(samples.shape[1:], np.nan)
    return Estimate(samples.mean(axis=0), spread / np.sqrt(p))


def checked_rule(nodes: ArrayLike, weights: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Return nodes and weights as finite float64 arrays (p, m).

    Raises
    ------
    ValueError
        If shapes differ, or an entry is not finite.
    """
    t, w = (np.atleast_2d(checked_numbers(*a)) for a in (("nodes", nodes), ("weights", weights)))
    if t.shape != w.shape or t.ndim != 2 or t.size == 0:
        msg = f"nodes have shape {t.shape}, weights {w.shape}; expected one (p, m)."
        raise ValueError(msg)
    if not (np.isfinite(t).all() and np.isfinite(w).all()):
        msg = "nodes or weights have entries that are NaN or Inf; both must be finite."
        raise ValueError(msg)
    return t, w


def average(
    f: Callable[[np.ndarray], np.ndarray], nodes: np.ndarray, weights: np.ndarray
) -> Estimate:
    """Return the average of f over nodes (p, m) with weights (p, m); f sees no padding."""
    used = weights != 0
    values = values_of(f, nodes[used])
    terms = np.zeros(nodes.shape, dtype=np.result_type(values, np.float64))
    terms[used] = weights[used] * values
    return over_probes(terms.sum(axis=1))


def smoothed(
    kernel: Callable[..., np.ndarray], x: ArrayLike, nodes: np.ndarray, weights: np.ndarray
) -> Estimate:
    """Return the sum at `x` of weights times kernels at the nodes, (p, m) both."""
    at = checked_numbers("x", x)
    rows = [kernel(at.ravel(), t[w != 0]) @ w[w != 0] for t, w in zip(nodes, weights, strict=True)]
    return over_probes(np.stack(rows).reshape(len(rows), *at.shape))


def jumps(nodes: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return all nodes, ascending, and the average distribution function just after each."""
    used = weights.ravel() != 0
    order = np.argsort(nodes.ravel()[used], kind="stable")
    shares = weights.ravel()[used] / len(weights)
    return nodes.ravel()[used][order], np.cumsum(shares[order])


def equal_mass(name: str, eigenvalues: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Return the `jumps` of eigenvalues of equal mass.

    Raises
    ------
    ValueError
        If there are none, or one is not finite.
    """
    values = checked_numbers(name, eigenvalues).ravel()
    if not (values.size and np.isfinite(values).all()):
        msg = f"{name} has {values.size} eigenvalues; expected one or more, all finite."
        raise ValueError(msg)
    return jumps(values[None], np.full((1, values.size), 1 / values.size))


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
