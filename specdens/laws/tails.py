r"""Power-law tails of a spectrum: maximum likelihood, goodness of fit, an alternative. NumPy only.

After Clauset, Shalizi and Newman (2009), SIAM Review 51(4), 661 (arXiv 0706.1062), for continuous
values. Eigenvalues of a measure carry weights: sums over the tail become weighted sums, and its
effective number of eigenvalues is its mass times n. That treats eigenvalues as independent draws,
as the cited method does; those of a random matrix are not, they are more regular, so that standard
errors are on the safe side and a good fit is found more often than the p-value says.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import erfc

from specdens.arguments import (
    checked_count,
    checked_number,
    checked_numbers,
    checked_positive,
    checked_probabilities,
    checked_seed,
)
from specdens.laws.samples import Masses, masses
from specdens.measure import SpectralMeasure


class LikelihoodRatio(NamedTuple):
    """Vuong's comparison of two models that are not nested.

    Attributes
    ----------
    statistic : float
        Log-likelihood ratio over its standard deviation: positive for the power law.
    p_value : float
        Probability of a statistic as far from zero if both models were equally far from the truth.
    """

    statistic: float
    p_value: float


@dataclass(frozen=True)
class PowerLaw:
    r"""Tail :math:`p(x) = \frac{\alpha - 1}{x_\min} (x / x_\min)^{-\alpha}` from x_min on.

    Parameters
    ----------
    alpha : float
        Exponent, above 1.
    x_min : float
        Where the tail begins, above 0, in eigenvalue units.
    stderr : float
        Standard error of `alpha`, (alpha - 1) / sqrt(tail_size); nan unless fitted.
    tail_size : float
        Effective number of eigenvalues in the tail; nan unless fitted.
    distance : float
        Kolmogorov-Smirnov distance of the tail it was fitted to; nan unless fitted.
    selected : bool
        Whether `x_min` was chosen by the fit. `p_value` then chooses it anew in every sample.

    Raises
    ------
    ValueError
        If `alpha` is not above 1 or `x_min` not positive.

    Examples
    --------
    >>> law = PowerLaw(3.0, x_min=1.0)
    >>> float(law.cdf(2.0)), float(law.quantile(0.75)), law.moment(1)
    (0.75, 2.0, 2.0)
    """

    alpha: float
    x_min: float
    stderr: float = np.nan
    tail_size: float = np.nan
    distance: float = np.nan
    selected: bool = False

    #: No mass at zero, ever: the other laws' property.
    atom = 0.0

    def __post_init__(self) -> None:
        if not 1 < checked_number("alpha", self.alpha) < np.inf:
            msg = f"alpha={self.alpha} must be above 1 and finite; otherwise p is no density."
            raise ValueError(msg)
        checked_positive("x_min", self.x_min)

    @property
    def support(self) -> tuple[float, float]:
        """Where the tail begins, and infinity."""
        return self.x_min, np.inf

    def pdf(self, x: ArrayLike) -> np.ndarray:
        """Return the density at `x` of what lies from x_min on: it integrates to 1 there."""
        z = checked_numbers("x", x) / self.x_min
        density = (self.alpha - 1) / self.x_min * np.maximum(z, 1.0) ** -self.alpha
        return np.where(z >= 1, density, 0.0)

    def cdf(self, x: ArrayLike) -> np.ndarray:
        """Return the part of the tail up to `x`."""
        z = np.maximum(checked_numbers("x", x) / self.x_min, 1.0)
        return -np.expm1((1 - self.alpha) * np.log(z))

    def quantile(self, q: ArrayLike) -> np.ndarray:
        """Return x with the part `q` of the tail up to it; infinity for ``q=1``."""
        with np.errstate(divide="ignore"):
            return self.x_min * np.exp(-np.log1p(-checked_probabilities("q", q)) / (self.alpha - 1))

    def moment(self, order: int) -> float:
        """Return the mean of ``x ** order``, infinite from ``order = alpha - 1`` on."""
        left = self.alpha - 1 - checked_count("order", order, 0)
        return float((self.alpha - 1) / left * self.x_min**order) if left > 0 else np.inf

    def mean_up_to(self, q: ArrayLike) -> np.ndarray:
        """Return the integral of the quantile function from 0 to `q`."""
        with np.errstate(divide="ignore"):
            remaining = -np.log1p(-checked_probabilities("q", q))
        exponent = (2 - self.alpha) / (self.alpha - 1)
        if exponent == 0:
            return self.x_min * remaining
        return self.x_min * np.expm1(exponent * remaining) / exponent

    @classmethod
    def fit(
        cls,
        source: SpectralMeasure | ArrayLike,
        *,
        x_min: float | None = None,
        min_tail: int = 10,
        num_candidates: int = 100,
    ) -> PowerLaw:
        r"""Fit the upper tail of a spectrum by maximum likelihood.

        :math:`\hat\alpha = 1 + W / \sum_i w_i \ln(x_i / x_\min)` with W the mass of the tail (their
        equation 3.1). Of all `x_min` the one is taken whose law is closest to its tail in
        Kolmogorov-Smirnov distance (section 3.3).

        Parameters
        ----------
        source : SpectralMeasure or array_like of shape (n,)
            A measure, or eigenvalues. Those that are not positive count as body. For the negative
            tail pass the eigenvalues with their signs changed.
        x_min : float, optional
            Where the tail begins; chosen by default.
        min_tail : int
            Least effective number of eigenvalues that a chosen tail must have.
        num_candidates : int
            `x_min` is chosen among this many eigenvalues, geometric in the size of their tails; or
            among all, if there are not more.

        Returns
        -------
        PowerLaw
            With its standard error, tail size and distance.

        Raises
        ------
        ValueError
            If the tail has fewer than two distinct eigenvalues, or `min_tail` leaves none.

        Examples
        --------
        >>> eigenvalues = PowerLaw(2.5, 1.0).quantile((np.arange(1000) + 0.5) / 1000)
        >>> law = PowerLaw.fit(eigenvalues, x_min=1.0)
        >>> round(law.alpha, 2), round(law.stderr, 3)
        (2.5, 0.047)
        """
        return _fitted(masses(source), x_min, min_tail, num_candidates)

    def p_value(
        self,
        source: SpectralMeasure | ArrayLike,
        *,
        num_samples: int = 1000,
        seed: int = 0,
        min_tail: int = 10,
        num_candidates: int = 100,
    ) -> float:
        """Return how plausible the law is for the tail, by a parametric bootstrap.

        Each sample has n eigenvalues: each comes from the tail, and then from this law, with the
        tail's probability, otherwise from the eigenvalues below x_min. It is fitted as the source
        was, and the p-value is the part of samples whose Kolmogorov-Smirnov distance is as large as
        that of the source, which is counted as one of them (section 4.1 of the paper; it advises
        to doubt the law below 0.1).

        Parameters
        ----------
        source : SpectralMeasure or array_like of shape (n,)
            What the law was fitted to. For a measure whose nodes carry more than 1/n, unresolved
            eigenvalues, the steps add to the distance and the p-value is too low.
        num_samples : int
            N; the p-value is known to about 0.5 / sqrt(N).
        seed : int
        min_tail, num_candidates : int
            As passed to `fit`.

        Returns
        -------
        float
            Above 0, at most 1.

        Raises
        ------
        ValueError
            If `num_samples` is below 1, or the law was not fitted.
        """
        checked_count("num_samples", num_samples)
        checked_seed(seed)
        if not np.isfinite(self.distance):
            msg = f"distance={self.distance}: this law was not fitted; use PowerLaw.fit."
            raise ValueError(msg)
        sample = masses(source)
        rng = np.random.default_rng(seed)
        body = sample.values < self.x_min
        n = max(2, round(sample.dimension))
        share = float(sample.weights[~body].sum())
        x_min = None if self.selected else self.x_min
        # With x_min given the body plays no part, and the size of the tail is that of the source.
        tail_size = max(2, round(n * share))
        larger = 0
        for _ in range(num_samples):
            if self.selected:
                tail_size = max(2, rng.binomial(n, share))
            tail = self.quantile(rng.random(tail_size))
            values, counts = tail, np.ones(tail_size)
            if self.selected and body.any():
                chances = sample.weights[body] / sample.weights[body].sum()
                drawn = rng.multinomial(max(0, n - tail_size), chances)
                values = np.concatenate([sample.values[body][drawn > 0], tail])
                counts = np.concatenate([drawn[drawn > 0], counts])
            order = np.argsort(values)
            synthetic = Masses(values[order], counts[order] / counts.sum(), float(counts.sum()))
            fitted = _fitted(synthetic, x_min, min_tail, num_candidates)
            larger += fitted.distance >= self.distance
        return (1 + larger) / (1 + num_samples)

    def against_exponential(self, source: SpectralMeasure | ArrayLike) -> LikelihoodRatio:
        r"""Compare with an exponential tail from the same x_min by Vuong's likelihood ratio.

        The alternative is :math:`\lambda e^{-\lambda (x - x_\min)}`, fitted by maximum likelihood.

        Parameters
        ----------
        source : SpectralMeasure or array_like of shape (n,)
            What the law was fitted to.

        Returns
        -------
        LikelihoodRatio

        Raises
        ------
        ValueError
            If the tail has fewer than two distinct eigenvalues.

        References
        ----------
        Vuong (1989), Econometrica 57, 307; Clauset et al., section 5.1 and appendix C.
        """
        tail = masses(source).above(self.x_min)
        excess = float(tail.weights @ (tail.values - self.x_min))
        if tail.values.size < 2:
            start = f"x_min={self.x_min:.6g}"
            msg = f"source has one distinct eigenvalue from {start} on; two are needed."
            raise ValueError(msg)
        power = np.log(self.pdf(tail.values))
        exponential = -np.log(excess) - (tail.values - self.x_min) / excess
        difference = power - exponential
        mean = float(tail.weights @ difference)
        deviation = float(np.sqrt(tail.weights @ (difference - mean) ** 2))
        statistic = mean * np.sqrt(tail.dimension) / deviation
        return LikelihoodRatio(float(statistic), float(erfc(abs(statistic) / np.sqrt(2))))


def _fitted(sample: Masses, x_min: float | None, min_tail: int, num_candidates: int) -> PowerLaw:
    """Return the fit of the tail from `x_min` on, or from the best of the candidates."""
    checked_positive("min_tail", min_tail)
    checked_count("num_candidates", num_candidates)
    positive = sample.values > 0
    if x_min is not None:
        checked_positive("x_min", x_min)
        positive = sample.values >= x_min
    values = sample.values[positive]
    weights = sample.weights[positive]
    if values.size < 2:
        msg = f"source has {values.size} distinct positive eigenvalues in its tail; two are needed."
        raise ValueError(msg)
    above = np.cumsum(weights[::-1])[::-1]  # mass from each value on
    if x_min is not None:
        starts, origins = np.array([0]), np.array([np.log(x_min)])
    else:
        starts = _candidates(above[:-1] * sample.dimension, min_tail, num_candidates)
        origins = np.log(values[starts])
    logs = np.log(values)
    log_sums = np.cumsum((weights * logs)[::-1])[::-1]
    exponents = above[starts] / (log_sums[starts] - above[starts] * origins)  # alpha - 1
    distances = _distances(logs, weights, starts, origins, exponents)
    best = int(np.argmin(distances))
    tail_size = float(above[starts[best]] * sample.dimension)
    exponent = float(exponents[best])
    return PowerLaw(
        1 + exponent,
        float(values[starts[best]]) if x_min is None else x_min,
        exponent / tail_size**0.5,
        tail_size,
        float(distances[best]),
        x_min is None,
    )


def _candidates(sizes: np.ndarray, min_tail: int, num_candidates: int) -> np.ndarray:
    """Return where tails may start, given how many eigenvalues each would have (descending)."""
    allowed = int((sizes >= min_tail * (1 - 1e-9)).sum())
    if allowed == 0:
        msg = f"min_tail={min_tail} exceeds the largest tail of {sizes.max():.3g}; lower it."
        raise ValueError(msg)
    if allowed <= num_candidates:
        return np.arange(allowed)
    wanted = np.geomspace(sizes[0], sizes[allowed - 1], num_candidates)
    return np.unique(np.minimum(np.searchsorted(-sizes, -wanted), allowed - 1))


def _distances(
    logs: np.ndarray,
    weights: np.ndarray,
    starts: np.ndarray,
    origins: np.ndarray,
    exponents: np.ndarray,
) -> np.ndarray:
    """Return the Kolmogorov-Smirnov distance of every candidate's law to its tail."""
    distances = np.empty(len(starts))
    for i, start in enumerate(starts):
        tail = weights[start:]
        after = np.cumsum(tail)
        law = -np.expm1(-exponents[i] * (logs[start:] - origins[i]))
        gap = after / after[-1] - law
        distances[i] = max(gap.max(), (tail / after[-1] - gap).max())
    return distances
