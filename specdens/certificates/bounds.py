"""Bounds on the error of a randomized classifier on new data, and what they are made of."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from specdens.arguments import checked_probabilities, is_integer, shown
from specdens.certificates.binary import kl_inverse
from specdens.certificates.checks import (
    check_counts,
    check_delta,
    check_examples,
    check_positive,
    checked_divergences,
)
from specdens.certificates.gaussian import PriorGrid, gaussian_kl


def pac_bayes_bound(
    empirical_error: ArrayLike,
    kl: float,
    num_examples: int,
    *,
    index: int,
    grid: PriorGrid | None = None,
) -> np.ndarray:
    r"""Return the bound on the expected error on new data, for a given empirical error.

    .. math:: \mathrm{kl}^{-1}\Bigl( \hat e \,\Big|\,
              \frac{\mathrm{KL} + 2 \ln j + \ln(\pi^2 n / (6\delta))}{n - 1} \Bigr)

    Parameters
    ----------
    empirical_error : array_like
        Expected fraction of the n examples that a drawn classifier gets wrong, or an upper bound.
    kl : float
        Divergence of the posterior from the prior with the index below.
    num_examples : int
        n: the number of independent examples that the empirical error is measured on.
    index : int
        j, of the prior's variance in the grid; an integer, as the theorem demands.
    grid : PriorGrid, optional

    Returns
    -------
    ndarray
        Holds with probability ``1 - grid.delta`` over the examples.

    Raises
    ------
    ValueError
        If an argument is out of range.

    References
    ----------
    Dziugaite, Roy (2017), arXiv 1703.11008.

    Examples
    --------
    >>> float(pac_bayes_bound(0.02, 50.0, 10_000, index=391)).__round__(4)
    0.0422
    """
    if not is_integer(index) or index < 1:
        msg = (
            f"index={shown(index)} must be an integer of at least 1; PriorGrid.neighbors gives two."
        )
        raise ValueError(msg)
    cost = (grid or PriorGrid()).cost(index, num_examples)
    budget = (checked_divergences("kl", kl) + cost) / (num_examples - 1)
    return kl_inverse(checked_probabilities("empirical_error", empirical_error), budget)


def monte_carlo_upper(error: ArrayLike, num_samples: int, delta: float = 0.01) -> np.ndarray:
    r"""Return an upper bound on an expected error from independent draws of the classifier.

    Parameters
    ----------
    error : array_like
        Average error of the draws.
    num_samples : int
        m, the number of draws.
    delta : float
        Probability that the bound fails.

    Returns
    -------
    ndarray
        :math:`\mathrm{kl}^{-1}(q \mid \ln(2/\delta) / m)`.

    Raises
    ------
    ValueError
        If an argument is out of range.

    References
    ----------
    Dziugaite, Roy (2017), arXiv 1703.11008.

    Examples
    --------
    >>> float(monte_carlo_upper(0.03, 50_000)).__round__(5)
    0.03255
    """
    check_counts(num_samples=num_samples)
    check_delta("delta", delta)
    return kl_inverse(checked_probabilities("error", error), math.log(2 / delta) / num_samples)


@dataclass(frozen=True)
class Certificate:
    """A bound on the error of a randomized classifier, with all that it is made of.

    Attributes
    ----------
    bound : float
        The expected error on new data is below it with probability `confidence`.
    empirical_error : float
        Average error of the drawn classifiers on the examples.
    error_upper : float
        Bound on its expectation over all draws.
    kl : float
        Divergence of the posterior from the prior.
    prior_variance : float
        That of the grid which gave the better bound.
    index : int
        Its place in the grid.
    confidence : float
        One less both probabilities of failure.
    num_examples, num_samples : int
        Examples that the errors were measured on, and drawn classifiers.
    """

    bound: float
    empirical_error: float
    error_upper: float
    kl: float
    prior_variance: float
    index: int
    confidence: float
    num_examples: int
    num_samples: int


def certificate(
    errors: ArrayLike,
    mean: ArrayLike,
    scales: ArrayLike,
    prior_mean: ArrayLike,
    prior_variance: float,
    num_examples: int,
    *,
    multiplicities: ArrayLike = 1,
    grid: PriorGrid | None = None,
    delta: float = 0.01,
) -> Certificate:
    """Return the certificate of a Gaussian posterior from the errors of classifiers drawn from it.

    Parameters
    ----------
    errors : array_like of shape (m,)
        Fraction of the examples that each of m independent draws gets wrong.
    mean, scales, prior_mean
        Posterior and center of the prior, see `gaussian_kl`.
    prior_variance : float
        A good one; it is rounded to the grid up and down, and the better bound kept.
    num_examples : int
        n: the examples that `errors` were measured on.
    multiplicities : int or array_like of shape (k,)
        As in `gaussian_kl`.
    grid : PriorGrid, optional
    delta : float
        Probability that the draws mislead.

    Returns
    -------
    Certificate
        With confidence ``1 - grid.delta - delta``.

    Raises
    ------
    ValueError
        If an argument is out of range, or an error is not a multiple of ``1 / num_examples``.
    TypeError
        If an argument is no number, or `grid` none.

    Notes
    -----
    It is valid only if `prior_mean` and the grid were fixed before the examples were seen.

    References
    ----------
    Dziugaite, Roy (2017), arXiv 1703.11008.

    Examples
    --------
    >>> w0, w = np.zeros(3), np.full(3, 0.1)
    >>> found = certificate([0.1, 0.2, 0.1], w, [0.05] * 3, w0, 0.01, num_examples=1000)
    >>> found.index, round(found.kl, 2), round(found.confidence, 3)
    (230, 2.45, 0.965)
    """
    grid = PriorGrid() if grid is None else grid
    if not isinstance(grid, PriorGrid):
        msg = f"grid has type {type(grid).__qualname__}; expected a PriorGrid."
        raise TypeError(msg)
    check_examples(num_examples)
    check_positive("prior_variance", prior_variance)
    measured = np.atleast_1d(checked_probabilities("errors", errors))
    wrong = measured * num_examples
    if measured.ndim != 1 or measured.size == 0 or (np.abs(wrong - np.rint(wrong)) > 1e-3).any():
        msg = (
            f"errors of shape {measured.shape} must be a vector of multiples of "
            f"1 / num_examples = 1 / {num_examples}: n of the bound is the number of examples that "
            "the errors are measured on."
        )
        raise ValueError(msg)
    error = float(measured.mean())
    upper = float(monte_carlo_upper(error, measured.size, delta))
    found = []
    for index in grid.neighbors(min(prior_variance, grid.variance(1))):
        variance = grid.variance(index)
        kl = gaussian_kl(mean, scales, prior_mean, variance, multiplicities=multiplicities)
        bound = float(pac_bayes_bound(upper, kl, num_examples, index=index, grid=grid))
        found.append((bound, kl, variance, index))
    bound, kl, variance, index = min(found)
    confidence = 1 - grid.delta - delta
    return Certificate(
        bound, error, upper, kl, variance, index, confidence, num_examples, measured.size
    )


@dataclass(frozen=True, eq=False)
class PacBayesResult:
    """What an optimized PAC-Bayes bound came to.

    Attributes
    ----------
    certificate : Certificate
        The bound and its parts.
    posterior : object
        The distribution over classifiers that it holds for, of the framework's own kind.
    history : mapping of str to ndarray
        By epoch: ``"surrogate"``, the average surrogate loss; ``"kl"``; ``"prior_variance"``; and
        ``"objective"``, which was minimized.
    """

    certificate: Certificate
    posterior: Any
    history: Mapping[str, np.ndarray] = field(repr=False)

    @property
    def bound(self) -> float:
        """Bound on the expected error of the randomized classifier on new data."""
        return self.certificate.bound

    @property
    def empirical_error(self) -> float:
        """Average error of the drawn classifiers on the training examples."""
        return self.certificate.empirical_error

    @property
    def kl(self) -> float:
        """Divergence of the posterior from the prior."""
        return self.certificate.kl

    @property
    def prior_scale(self) -> float:
        """Standard deviation of the prior, the root of its variance."""
        return math.sqrt(self.certificate.prior_variance)

    @property
    def confidence(self) -> float:
        """Probability that the bound holds."""
        return self.certificate.confidence
