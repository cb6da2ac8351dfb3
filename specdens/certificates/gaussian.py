"""Gaussian priors and posteriors: their divergence, and the choice of the prior's variance."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from specdens.arguments import checked_number, checked_numbers
from specdens.certificates.checks import check_delta, check_examples, check_positive


def gaussian_kl(
    mean: ArrayLike,
    scales: ArrayLike,
    prior_mean: ArrayLike,
    prior_variance: float,
    *,
    multiplicities: ArrayLike = 1,
) -> float:
    r"""Return KL of the posterior :math:`N(w, U \operatorname{diag}(s^2) U^\top)` from the prior.

    .. math:: \tfrac12 \Bigl[ \tfrac1\lambda \sum_i s_i^2 + \tfrac1\lambda \|w - w_0\|^2
              - D + D \ln \lambda - 2 \sum_i \ln s_i \Bigr]

    for the prior :math:`N(w_0, \lambda I)`. The orthogonal matrix U does not occur: both terms
    with the covariance depend on its eigenvalues only.

    Parameters
    ----------
    mean : array_like of shape (D,)
        w.
    scales : array_like of shape (k,)
        Standard deviations s, along any orthonormal basis.
    prior_mean : array_like of shape (D,)
        :math:`w_0`.
    prior_variance : float
        :math:`\lambda`.
    multiplicities : int or array_like of shape (k,)
        Number of directions that each scale stands for; they add up to D.

    Returns
    -------
    float

    Raises
    ------
    ValueError
        If lengths do not fit, a scale or the variance is not positive and finite, a multiplicity is
        negative, or an entry of the means is not finite.
    TypeError
        If an argument is no number.

    References
    ----------
    Wu, Zhu, Wu, Wang, Ge (2020), arXiv 2010.04261.

    Examples
    --------
    >>> gaussian_kl([0.0, 1.0], [1.0, 1.0], [0.0, 0.0], 1.0)
    0.5
    """
    w, w0 = checked_numbers("mean", mean), checked_numbers("prior_mean", prior_mean)
    s, count = checked_numbers("scales", scales), checked_numbers("multiplicities", multiplicities)
    check_positive("prior_variance", prior_variance)
    if count.shape not in ((), s.shape):
        msg = f"multiplicities have shape {count.shape}, scales {s.shape}; pass one for each scale."
        raise ValueError(msg)
    if not (count >= 0).all():
        msg = f"multiplicities={count.min():g} must not be negative: they count directions."
        raise ValueError(msg)
    count = np.broadcast_to(count, s.shape)
    if w.shape != w0.shape or w.ndim != 1 or s.ndim != 1 or count.sum() != w.size:
        msg = (
            f"mean has shape {w.shape}, prior_mean {w0.shape}, and scales stand for "
            f"{count.sum():g} directions; expected two vectors of one length D and scales for D "
            "directions."
        )
        raise ValueError(msg)
    if not ((s > 0).all() and np.isfinite(s).all()):
        msg = (
            "scales must be positive and finite; a direction without variance has infinite "
            "divergence from the prior."
        )
        raise ValueError(msg)
    if not (np.isfinite(w).all() and np.isfinite(w0).all()):
        msg = "mean or prior_mean has entries that are nan or infinite; both must be finite."
        raise ValueError(msg)
    ratio = s**2 / prior_variance
    divergence = (count * np.maximum(ratio - 1 - np.log(ratio), 0)).sum() + (
        (w - w0) ** 2
    ).sum() / prior_variance
    return 0.5 * float(divergence)


@dataclass(frozen=True)
class PriorGrid:
    r"""The prior variances :math:`\lambda_j = b\, e^{-j/c}`, :math:`j = 1, 2, \ldots`, one of
    which may be chosen after seeing the data.

    Parameters
    ----------
    largest : float
        b.
    precision : float
        c: neighbors differ by the factor :math:`e^{-1/c}`.
    delta : float
        Probability that the bound fails for any of them.

    Raises
    ------
    ValueError
        If a number is not positive and finite, or `delta` is not below 1.

    References
    ----------
    Dziugaite, Roy (2017), arXiv 1703.11008, whose values are the defaults.

    Examples
    --------
    >>> grid = PriorGrid()
    >>> grid.neighbors(0.002)
    (391, 392)
    >>> round(grid.variance(391), 6)
    0.002004
    >>> round(grid.cost(391, num_examples=1000), 3)  # 2 ln 391 + ln(1000 pi^2 / (6 delta))
    23.032
    """

    largest: float = 0.1
    precision: float = 100.0
    delta: float = 0.025

    def __post_init__(self) -> None:
        check_positive("largest", self.largest)
        check_positive("precision", self.precision)
        check_delta("delta", self.delta)

    def variance(self, index: float) -> float:
        """Return the prior variance with that index (the formula's, for one between integers)."""
        return self.largest * math.exp(-checked_number("index", index) / self.precision)

    def index(self, variance: float) -> float:
        """Return the index of a variance, a real number."""
        check_positive("variance", variance)
        return self.precision * math.log(self.largest / variance)

    def neighbors(self, variance: float) -> tuple[int, int]:
        """Return the integer indices on both sides of a variance, equal below the first."""
        below = math.floor(self.index(variance))
        return max(1, below), max(1, below + 1)

    def cost(self, index: float, num_examples: int) -> float:
        r"""Return :math:`2 \ln j + \ln(\pi^2 n / (6\delta))`, which the bound adds to KL.

        Parameters
        ----------
        index : float
            j, which is :math:`c \ln(b / \lambda)`; at least 1.
        num_examples : int
            n.
        """
        if not checked_number("index", index) >= 1:
            msg = f"index={index} must be at least 1: prior variances lie below {self.largest}."
            raise ValueError(msg)
        check_examples(num_examples)
        return 2 * math.log(index) + math.log(math.pi**2 * num_examples / (6 * self.delta))
