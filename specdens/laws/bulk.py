r"""Random-matrix laws of the bulk of a spectrum, and robust fits of them. NumPy and SciPy only.

Both laws live on an interval with square-root edges. With the angle
:math:`x = \text{middle} + \text{half width} \cdot \cos\varphi`, the mass above x is an elementary
function of :math:`\varphi`, accurate at either edge; distribution functions, quantiles and means of
parts follow from it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from math import comb

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import minimize_scalar

from specdens.arguments import (
    checked_choice,
    checked_count,
    checked_number,
    checked_numbers,
    checked_positive,
    checked_probabilities,
)
from specdens.laws.distances import goodness_of_fit
from specdens.laws.samples import Masses, masses
from specdens.measure import SpectralMeasure

#: Fits by quantiles use these of the bulk: what lies outside, up to a twentieth, moves nothing.
_LEVELS = np.linspace(0.05, 0.95, 37)
_METHODS = ("quantiles", "moments")


class _EdgeLaw(ABC):
    """Distribution, quantiles and partial means of a law on an interval, from its mass by angle."""

    atom = 0.0

    @property
    @abstractmethod
    def support(self) -> tuple[float, float]:
        """Both edges."""

    @abstractmethod
    def _mass_above(self, angle: np.ndarray) -> np.ndarray:
        """Return the mass of the part above."""

    @abstractmethod
    def _mean_above(self, angle: np.ndarray) -> np.ndarray:
        """Return the integral of x over the part above."""

    def _angle(self, x: np.ndarray) -> np.ndarray:
        low, high = self.support
        x = np.clip(x, low, high)
        return 2 * np.arctan2(np.sqrt(high - x), np.sqrt(x - low))

    def _angle_of_quantile(self, q: np.ndarray) -> np.ndarray:
        """Return the angle above which lies the mass 1 - q, by bisection."""
        above = np.minimum(1 - q, 1 - self.atom)
        low, high = np.zeros(q.shape), np.full(q.shape, np.pi)
        for _ in range(54):  # to the last bit of a double
            middle = (low + high) / 2
            enough = self._mass_above(middle) >= above
            low, high = np.where(enough, low, middle), np.where(enough, middle, high)
        return np.where(above >= 1 - self.atom, np.pi, (low + high) / 2)

    def cdf(self, x: ArrayLike) -> np.ndarray:
        """Return the mass up to and including `x`, an atom at zero with it."""
        x = checked_numbers("x", x)
        below = 1 - self._mass_above(self._angle(x))
        low, high = self.support
        outside = np.where(x < low, self.atom * (x >= 0), 1.0)
        return np.where((x >= low) & (x < high), below, outside)

    def quantile(self, q: ArrayLike) -> np.ndarray:
        """Return the smallest x with a mass of at least `q` up to it.

        Raises
        ------
        ValueError
            If `q` does not lie between 0 and 1.
        """
        q = checked_probabilities("q", q)
        low, high = self.support
        half = self._angle_of_quantile(q) / 2
        x = low * np.sin(half) ** 2 + high * np.cos(half) ** 2
        return np.where((q <= self.atom) & (self.atom > 0), 0.0, x)

    def mean_up_to(self, q: ArrayLike) -> np.ndarray:
        """Return the integral of the quantile function from 0 to `q`; the mean for ``q=1``."""
        angles = self._angle_of_quantile(checked_probabilities("q", q))
        return self._mean_above(np.asarray(np.pi)) - self._mean_above(angles)


@dataclass(frozen=True)
class Semicircle(_EdgeLaw):
    r"""Wigner's law: the bulk of a symmetric matrix with independent entries.

    Its density is :math:`\frac{2}{\pi R^2} \sqrt{R^2 - (x - c)^2}`. For an n by n matrix with
    independent off-diagonal entries of variance s^2, R is :math:`2 s \sqrt n`.

    Parameters
    ----------
    radius : float
        R, above 0.
    center : float
        c.

    Raises
    ------
    ValueError
        If `radius` is not positive or a number is not finite.

    References
    ----------
    Wigner (1955), Ann. Math. 62, 548. Anderson, Guionnet, Zeitouni (2010), section 2.1.

    Examples
    --------
    >>> [float(Semicircle(2.0).moment(order)) for order in (0, 2, 4, 6)]  # Catalan numbers
    [1.0, 1.0, 2.0, 5.0]
    """

    radius: float
    center: float = 0.0

    def __post_init__(self) -> None:
        checked_positive("radius", self.radius)
        if not np.isfinite(checked_number("center", self.center)):
            msg = f"center={self.center} must be finite."
            raise ValueError(msg)

    @property
    def support(self) -> tuple[float, float]:
        """Edges of the bulk."""
        return self.center - self.radius, self.center + self.radius

    @property
    def edge_coefficient(self) -> float:
        """A, for the density is A sqrt(E - x) below the upper edge E."""
        return float(2**1.5 / (np.pi * self.radius**1.5))

    def pdf(self, x: ArrayLike) -> np.ndarray:
        """Return the density at `x`, 0 outside the support."""
        z = (checked_numbers("x", x) - self.center) / self.radius
        inside = np.clip((1 - z) * (1 + z), 0, None)
        return 2 / (np.pi * self.radius) * np.sqrt(inside)

    def moment(self, order: int) -> float:
        """Return the mean of ``x ** order``."""
        half, order = self.radius / 2, checked_count("order", order, 0)
        even = range(0, order + 1, 2)
        powers = {j: half**j * self.center ** (order - j) for j in even}
        return float(sum(comb(order, j) * _catalan(j // 2) * powers[j] for j in even))

    def _mass_above(self, angle: np.ndarray) -> np.ndarray:
        return (angle - np.sin(angle) * np.cos(angle)) / np.pi

    def _mean_above(self, angle: np.ndarray) -> np.ndarray:
        cap = self.radius * 2 / (3 * np.pi) * np.sin(angle) ** 3
        return self.center * self._mass_above(angle) + cap

    @classmethod
    def fit(cls, source: SpectralMeasure | ArrayLike, *, method: str = "quantiles") -> Semicircle:
        """Fit center and radius to a spectrum.

        Parameters
        ----------
        source : SpectralMeasure or array_like of shape (n,)
            A measure, or eigenvalues.
        method : str
            ``"quantiles"`` regresses the quantiles between 5 and 95 percent on those of the law:
            outliers count by their number only, not by their size. ``"moments"`` takes mean and
            variance, which outliers ruin.

        Returns
        -------
        Semicircle

        Raises
        ------
        ValueError
            If `method` is unknown or the bulk has no width.

        Examples
        --------
        >>> eigenvalues = Semicircle(2.0).quantile((np.arange(200) + 0.5) / 200)
        >>> round(Semicircle.fit([*eigenvalues, 50.0, 90.0]).radius, 1)
        2.0
        """
        sample = masses(source)
        if checked_choice("method", method, _METHODS) == "moments":
            mean = float(sample.weights @ sample.values)
            variance = float(sample.weights @ (sample.values - mean) ** 2)
            return cls(_width(2 * np.sqrt(variance), sample), mean)
        slope, center = np.polyfit(cls(1.0).quantile(_LEVELS), sample.quantile(_LEVELS), 1)
        return cls(_width(slope, sample), float(center))


@dataclass(frozen=True)
class MarchenkoPastur(_EdgeLaw):
    r"""Law of Marchenko and Pastur: the eigenvalues of :math:`X X^* / T` for pure noise X (n, T).

    With c = n / T and entries of variance v, the density is
    :math:`\sqrt{(b - x)(x - a)} / (2 \pi c v x)` between the edges
    :math:`a, b = v (1 \mp \sqrt c)^2`. For c > 1 the matrix has rank T, and 1 - 1/c of the mass is
    an `atom` at zero, which `pdf` does not show.

    Parameters
    ----------
    ratio : float
        c, above 0.
    variance : float
        v, above 0: the mean of the law.

    Raises
    ------
    ValueError
        If a parameter is not positive and finite.

    References
    ----------
    Marchenko, Pastur (1967), Math. USSR Sb. 1, 457. Bai, Silverstein (2010), chapter 3.

    Examples
    --------
    >>> law = MarchenkoPastur(4.0)
    >>> law.support, law.atom, float(law.cdf(0.5))
    ((1.0, 9.0), 0.75, 0.75)
    """

    ratio: float
    variance: float = 1.0

    def __post_init__(self) -> None:
        checked_positive("ratio", self.ratio)
        checked_positive("variance", self.variance)

    @property
    def atom(self) -> float:  # type: ignore[override]
        """Mass at zero: 1 - 1 / ratio if that is positive."""
        return max(0.0, 1 - 1 / self.ratio)

    @property
    def support(self) -> tuple[float, float]:
        """Edges of the bulk, without the atom."""
        root = np.sqrt(self.ratio)
        return float(self.variance * (1 - root) ** 2), float(self.variance * (1 + root) ** 2)

    @property
    def edge_coefficient(self) -> float:
        """A, for the density is A sqrt(E - x) below the upper edge E."""
        low, high = self.support
        return float(np.sqrt(high - low) / (2 * np.pi * self.ratio * self.variance * high))

    def pdf(self, x: ArrayLike) -> np.ndarray:
        """Return the density of the bulk at `x`; at zero it is infinite for ``ratio=1``."""
        x = checked_numbers("x", x)
        low, high = self.support
        inside = (x >= low) & (x <= high) & (x > 0)
        at = np.where(inside, x, high)
        density = np.sqrt((high - at) * (at - low)) / (2 * np.pi * self.ratio * self.variance * at)
        return np.where((x == 0) & (low == 0), np.inf, density)

    def moment(self, order: int) -> float:
        """Return the mean of ``x ** order``, the atom included: a Narayana polynomial in ratio."""
        if checked_count("order", order, 0) == 0:
            return 1.0
        terms = (
            comb(order, r) * comb(order - 1, r) / (r + 1) * self.ratio**r for r in range(order)
        )
        return float(self.variance**order * sum(terms))

    def _mass_above(self, angle: np.ndarray) -> np.ndarray:
        # The integral of (2/pi) sin^2 / (1 + r^2 + 2 r cos), from its Fourier series.
        r = min(self.ratio, 1 / self.ratio) ** 0.5
        turn = np.arctan2(r * np.sin(angle), 1 + r * np.cos(angle))
        return (1 - self.atom) / np.pi * (angle - turn + (turn - r * np.sin(angle)) / r**2)

    def _mean_above(self, angle: np.ndarray) -> np.ndarray:
        return self.variance / np.pi * (angle - np.sin(angle) * np.cos(angle))

    @classmethod
    def fit(
        cls,
        source: SpectralMeasure | ArrayLike,
        *,
        ratio: float | None = None,
        method: str = "quantiles",
    ) -> MarchenkoPastur:
        """Fit ratio and variance to a spectrum.

        Parameters
        ----------
        source : SpectralMeasure or array_like of shape (n,)
            A measure, or eigenvalues.
        ratio : float, optional
            The ratio where it is known; then only the variance is fitted.
        method : str
            ``"quantiles"`` matches the quantiles between 5 and 95 percent of what is not zero:
            outliers count by their number only, not by their size. The share of zeros may be the
            atom or not, whichever is closer in Kolmogorov-Smirnov distance. ``"moments"`` takes
            mean and variance, which outliers ruin.

        Returns
        -------
        MarchenkoPastur

        Raises
        ------
        ValueError
            If `method` is unknown, the bulk has no width, or its eigenvalues are negative.

        Examples
        --------
        >>> eigenvalues = MarchenkoPastur(0.5).quantile((np.arange(200) + 0.5) / 200)
        >>> law = MarchenkoPastur.fit([*eigenvalues, 90.0])
        >>> round(law.ratio, 1), round(law.variance, 1)
        (0.5, 1.0)
        """
        sample = masses(source)
        if checked_choice("method", method, _METHODS) == "moments":
            mean = float(sample.weights @ sample.values)
            variance = float(sample.weights @ (sample.values - mean) ** 2)
            scale = _positive_scale(mean)
            return cls(_width(variance / mean**2, sample) if ratio is None else ratio, scale)
        if ratio is not None:
            return cls._scaled(ratio, sample)[0]
        _width(float(np.ptp(sample.quantile(_LEVELS))), sample)
        best = minimize_scalar(
            lambda root: cls._scaled(root**2, sample)[1],
            bounds=(1e-4, 1),
            method="bounded",
            options={"xatol": 1e-7},
        )
        candidates = [cls._scaled(float(best.x) ** 2, sample)[0]]
        zeros = float(sample.weights[sample.values == 0].sum())
        if zeros > 0:
            candidates.append(cls._scaled(1 / (1 - zeros), sample)[0])
        return min(candidates, key=lambda law: goodness_of_fit(source, law).kolmogorov_smirnov)

    @classmethod
    def _scaled(cls, ratio: float, sample: Masses) -> tuple[MarchenkoPastur, float]:
        """Return the law of this ratio that is closest in the bulk's quantiles, and how close."""
        unit = cls(ratio)
        levels = unit.atom + (1 - unit.atom) * _LEVELS
        expected, found = unit.quantile(levels), sample.quantile(levels)
        scale = _positive_scale(float(found @ expected / (expected @ expected)))
        return cls(ratio, scale), float(np.sum((scale * expected - found) ** 2))


def _catalan(order: int) -> int:
    return comb(2 * order, order) // (order + 1)


def _positive_scale(scale: float) -> float:
    if not scale > 0:
        msg = (
            f"source has its bulk around {scale:.3g}; a Marchenko-Pastur law needs eigenvalues "
            "above zero, fit a Semicircle instead."
        )
        raise ValueError(msg)
    return scale


def _width(width: float, sample: Masses) -> float:
    """Return `width` of the bulk if there is one."""
    if not width > 1e-12 * np.abs(sample.values).max():
        msg = (
            f"source has a bulk without width ({sample.values.size} distinct values among "
            f"{sample.dimension} eigenvalues); no law can be fitted to one point."
        )
        raise ValueError(msg)
    return float(width)
