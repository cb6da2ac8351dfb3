r"""How many eigenvalues stand apart from the bulk: a test of the gaps at the top of a spectrum.

**Null hypothesis.** The largest eigenvalues are the top of a bulk, :math:`\lambda_i = E + s\, a_i`
with unknown edge E and scale s, where the :math:`a_1 > a_2 > \ldots` are

- ``edge="airy"``: the Airy process, the limit at the soft (square-root) edge of a random matrix,
  whose largest point has the law of Tracy and Widom. It is simulated as the top of two ensembles
  of finite order (at least `ORDER`, and 3 times the points used), by the tridiagonal models of
  Dumitriu and Edelman (2002): the Gaussian one, whose density below the edge grows more slowly than
  the square root, and the square Laguerre one (Wishart matrices), whose density grows faster. The
  larger of the two p-values counts, so that the test holds for either, before the limit.
- ``edge="exponential"``: the largest of independent values with an exponential tail, without
  repulsion: :math:`a_i - a_{i+1}` is exponential with mean 1/i, independently (Rényi).
- ``edge="power-law"``: the same for the logarithms of the eigenvalues, so that ratios count and not
  differences.

**Statistic.** If exactly i eigenvalues were outliers, :math:`\lambda_{i+1}` would be the top of the
bulk, and :math:`S_i = (\lambda_{i+1} - \lambda_{i+1+L}) / \mathrm{E}(a_1 - a_{1+L})` estimate s.
The gap in units of it is :math:`t_i = (\lambda_i - \lambda_{i+1}) / S_i`, which neither E nor s
changes. If the bulk is given, s is that of its fitted edge instead, :math:`(\pi n A)^{-2/3}` for a
density :math:`\approx A \sqrt{E - x}`.

**p-values.** That of gap i is the probability under the null hypothesis that the largest of all
:math:`t_j` examined is at least :math:`t_i`, from simulated spectra that are treated alike; the
observed one counts as one of them. The number of outliers is that of the eigenvalues above the
*last* significant gap. As :math:`t_i` looks only at :math:`\lambda_i` and below, what lies under
the true outliers behaves as under the null hypothesis: too many outliers are found with a
probability up to the significance, whatever the outliers are.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike
from scipy.linalg import eigvalsh_tridiagonal

from specdens.arguments import (
    checked_choice,
    checked_count,
    checked_fraction,
    checked_numbers,
    checked_positive,
    checked_seed,
)
from specdens.laws.bulk import MarchenkoPastur, Semicircle
from specdens.laws.distances import goodness_of_fit
from specdens.laws.samples import masses
from specdens.measure import SpectralMeasure

#: Least order of the simulated Gaussian ensembles.
ORDER = 100
#: Most spacings that the scale is taken from.
_REFERENCE = 7
_EDGES = ("airy", "exponential", "power-law")


@dataclass(frozen=True)
class OutlierGap:
    """Result of `outlier_gap_test`.

    Attributes
    ----------
    num_outliers : int
        Eigenvalues above the last significant gap; 0 if there is none.
    p_value : float
        Of the hypothesis that there are no outliers: that of the largest gap.
    location : int
        Number of eigenvalues above the largest gap, significant or not.
    gaps : ndarray of shape (m,)
        Gap i + 1 lies between eigenvalues i + 1 and i + 2; in units of the local scale of an edge.
    p_values : ndarray of shape (m,)
        Of each gap, corrected for having looked at all of them.
    significance : float
    edge : str
        The null hypothesis.
    """

    num_outliers: int
    p_value: float
    location: int
    gaps: np.ndarray
    p_values: np.ndarray
    significance: float
    edge: str


def outlier_gap_test(
    eigenvalues_descending: ArrayLike,
    bulk: SpectralMeasure | ArrayLike | None = None,
    *,
    num_samples: int = 999,
    seed: int = 0,
    edge: str = "airy",
    significance: float = 0.05,
    max_outliers: int | None = None,
    beta: float = 1.0,
) -> OutlierGap:
    r"""Test whether the largest eigenvalues stand apart from the bulk, and count those that do.

    The module's text states the null hypothesis, the statistic and what the p-values mean.

    Parameters
    ----------
    eigenvalues_descending : array_like of shape (m,)
        The largest eigenvalues or all, descending, with some of the bulk: about ten more than
        there are outliers, and at least three.
    bulk : SpectralMeasure or array_like of shape (n,), optional
        Of the operator, to take the scale from its fitted edge (`MarchenkoPastur` or `Semicircle`,
        whichever is closer) rather than from the eigenvalues below each gap. Only where the bulk
        follows such a law; outliers in it do not matter if they are few.
    num_samples : int
        Spectra simulated; the smallest p-value is 1 / (num_samples + 1).
    seed : int
        Of the simulation.
    edge : str
        Null hypothesis: ``"airy"``, ``"exponential"`` or ``"power-law"``. The last two expect large
        gaps without outliers, and suit heavy-tailed bulks.
    significance : float
        Between 0 and 1.
    max_outliers : int, optional
        Number of gaps examined; by default up to half of the eigenvalues given, and up to 30. A
        null space (eigenvalues at zero up to rounding) is no bulk with an edge: eigenvalues from
        the first zero on are not looked at.
    beta : float
        1 for real symmetric operators, 2 for complex Hermitian ones (``"airy"`` only).

    Returns
    -------
    OutlierGap

    Raises
    ------
    ValueError
        If eigenvalues are not finite, not descending or too few, or an argument is out of range.
    TypeError
        If eigenvalues are complex or no numbers, or a count is not an integer.

    References
    ----------
    Dumitriu, Edelman (2002), J. Math. Phys. 43, 5830. Tracy, Widom (1996), Comm. Math. Phys. 177,
    727. Ramírez, Rider, Virág (2011), J. Amer. Math. Soc. 24, 919. Rényi (1953), Acta Math. Hung.
    4, 191. Onatski (2009), Econometrica 77, 1447, tests ratios of such gaps.

    Examples
    --------
    >>> bulk = np.cos(np.linspace(0.1, 3.1, 40))
    >>> outlier_gap_test([9.0, 7.0, *bulk], num_samples=99).num_outliers
    2
    """
    _check_arguments(num_samples, edge, significance, beta)
    checked_seed(seed)
    top = _checked(eigenvalues_descending, edge)
    least = 3 if bulk is None else 2
    if top.size < least:
        msg = (
            f"eigenvalues_descending has {top.size} usable eigenvalues (null space cut off) "
            f"of at least {least}; pass about ten more than there are outliers."
        )
        raise ValueError(msg)
    most = top.size - (2 if bulk is None else 1)
    count = min(30, top.size // 2)
    if max_outliers is not None:
        count = checked_count("max_outliers", max_outliers)
    if count > most:
        msg = f"max_outliers={count} must be at most {most} for {top.size} usable eigenvalues."
        raise ValueError(msg)
    reference = 0
    if bulk is None:
        reference = min(_REFERENCE, top.size - 1 - count)
    if bulk is None:
        scale = None
    elif edge == "airy":
        scale = _edge_scale(bulk)
    else:
        msg = f"edge={edge!r} takes its scale from the gaps and not from a bulk; leave bulk out."
        raise ValueError(msg)
    p_values = np.zeros(count)
    for ensemble in ("gaussian", "laguerre") if edge == "airy" else ("exponential",):
        simulated = _null(ensemble, count + 1 + reference, num_samples, seed, float(beta))
        statistics, largest = _statistics(top, simulated, count, reference, scale)
        exceeding = (largest[:, None] >= statistics).sum(axis=0)
        p_values = np.maximum(p_values, (1 + exceeding) / (1 + num_samples))
    significant = np.flatnonzero(p_values <= significance)
    return OutlierGap(
        num_outliers=int(significant[-1]) + 1 if significant.size else 0,
        p_value=float(p_values.min()),
        location=int(np.argmax(statistics)) + 1,
        gaps=statistics,
        p_values=p_values,
        significance=significance,
        edge=edge,
    )


def _statistics(
    top: np.ndarray, simulated: np.ndarray, count: int, reference: int, scale: float | None
) -> tuple[np.ndarray, np.ndarray]:
    """Return t_i (count,) of the eigenvalues, and the largest of every simulated spectrum."""
    if scale is not None:
        largest = (simulated[:, :count] - simulated[:, 1:]).max(axis=1)
        return (top[:count] - top[1 : count + 1]) / scale, largest
    expected = float((simulated[:, 0] - simulated[:, reference]).mean())
    observed, null = (_gaps(x, count, reference, expected) for x in (top[None], simulated))
    return observed[0], null.max(axis=1)


def _gaps(top: np.ndarray, count: int, reference: int, expected: float) -> np.ndarray:
    """Return t_i, i = 1, ..., count, of every row of eigenvalues, descending."""
    gaps = top[:, :count] - top[:, 1 : count + 1]
    spread = top[:, 1 : count + 1] - top[:, 1 + reference : count + 1 + reference]
    # Repeated eigenvalues: no gap is no outlier, any gap above a point is infinitely large.
    return np.divide(gaps * expected, spread, out=np.where(gaps > 0, np.inf, 0.0), where=spread > 0)


@lru_cache(maxsize=32)
def _null(ensemble: str, size: int, num_samples: int, seed: int, beta: float) -> np.ndarray:
    """Return the `size` largest points (num_samples, size) of a null hypothesis."""
    rng = np.random.default_rng(seed)
    if ensemble == "exponential":
        spacings = rng.exponential(size=(num_samples, size)) / np.arange(1, size + 1)
        return np.cumsum(spacings[:, ::-1], axis=1)[:, ::-1]
    order = max(ORDER, 3 * size)
    samples = np.empty((num_samples, size))
    model = _gaussian if ensemble == "gaussian" else _laguerre
    for sample in samples:
        diagonal, off_diagonal, scale = model(order, beta, rng)
        sample[:] = eigvalsh_tridiagonal(diagonal, off_diagonal)[: -size - 1 : -1] / scale
    return samples


def _gaussian(
    order: int, beta: float, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, float]:
    """Return the tridiagonal model of the Gaussian ensemble, and its scale s at the edge."""
    diagonal = np.sqrt(2) * rng.standard_normal(order)
    off_diagonal = np.sqrt(rng.chisquare(beta * np.arange(order - 1, 0, -1)))
    return diagonal, off_diagonal, beta**0.5 * order ** (-1 / 6)


def _laguerre(
    order: int, beta: float, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, float]:
    """Return B B^T for the bidiagonal model B of the square Laguerre ensemble, and its scale s."""
    main = rng.chisquare(beta * np.arange(order, 0, -1))
    below = rng.chisquare(beta * np.arange(order - 1, 0, -1))
    diagonal = main + np.concatenate([[0.0], below])
    return diagonal, np.sqrt(main[:-1] * below), beta * order * (order / 4) ** (-2 / 3)


def _edge_scale(bulk: SpectralMeasure | ArrayLike) -> float:
    """Return s = (pi n A)^(-2/3) of the closer law, whose density is A sqrt(E - x) at its edge."""
    sample = masses(bulk, "bulk")
    candidates: list[Semicircle | MarchenkoPastur] = [Semicircle.fit(bulk)]
    if sample.values[0] >= 0:
        candidates.append(MarchenkoPastur.fit(bulk))
    law = min(candidates, key=lambda law: goodness_of_fit(bulk, law).kolmogorov_smirnov)
    return (np.pi * sample.dimension * law.edge_coefficient) ** (-2 / 3)


def _checked(eigenvalues: ArrayLike, edge: str) -> np.ndarray:
    """Return the eigenvalues above a null space, or their logarithms."""
    top = checked_numbers("eigenvalues_descending", eigenvalues)
    if top.ndim != 1 or not np.isfinite(top).all() or (np.diff(top) > 0).any():
        msg = (
            f"eigenvalues_descending has shape {top.shape}; expected a list of finite numbers, "
            "descending: pass numpy.sort(eigenvalues)[::-1]."
        )
        raise ValueError(msg)
    zero = top.size * np.finfo(np.float64).eps * np.abs(top).max(initial=0.0)
    kept = top > zero if edge == "power-law" else np.abs(top) > zero
    top = top[: int(np.argmin(kept))] if not kept.all() else top
    return np.log(top) if edge == "power-law" else top


def _check_arguments(num_samples: int, edge: str, significance: float, beta: float) -> None:
    checked_choice("edge", edge, _EDGES)
    checked_fraction("significance", significance)
    checked_count("num_samples", num_samples)
    if not (num_samples + 1) * significance >= 1:
        least = int(np.ceil(1 / significance)) - 1
        msg = (
            f"num_samples={num_samples} can give no p-value down to significance={significance}; "
            f"take {least} at least."
        )
        raise ValueError(msg)
    checked_positive("beta", beta, "1 for real, 2 for complex Hermitian operators")
