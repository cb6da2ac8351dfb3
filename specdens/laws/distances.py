"""How far a spectrum is from a law. NumPy only."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import ArrayLike

from specdens.arguments import shown
from specdens.laws.samples import masses
from specdens.laws.tails import PowerLaw
from specdens.measure import SpectralMeasure


class Law(Protocol):
    """What `goodness_of_fit` needs: a distribution, perhaps with an atom at zero."""

    @property
    def atom(self) -> float:
        """Mass at exactly zero."""
        ...

    def cdf(self, x: ArrayLike) -> np.ndarray:
        """Return the mass up to `x`."""
        ...

    def mean_up_to(self, q: ArrayLike) -> np.ndarray:
        """Return the integral of the quantile function from 0 to `q`."""
        ...


class Fit(NamedTuple):
    """Distances between a spectrum and a law.

    Attributes
    ----------
    kolmogorov_smirnov : float
        Largest difference of the distribution functions, between 0 and 1.
    wasserstein : float
        Wasserstein-1 distance, the integral of that difference, in eigenvalue units.
    """

    kolmogorov_smirnov: float
    wasserstein: float


def goodness_of_fit(source: SpectralMeasure | ArrayLike, law: Law) -> Fit:
    r"""Return how far a spectrum is from a law.

    Both distances are exact, without a grid: the Kolmogorov-Smirnov distance is reached at an
    eigenvalue, and :math:`W_1 = \int_0^1 |Q_1 - Q_2|\, dq` is a sum of partial means of the law.

    Parameters
    ----------
    source : SpectralMeasure or array_like of shape (n,)
        A measure, unsmoothed, or eigenvalues.
    law : MarchenkoPastur, Semicircle or PowerLaw
        A `PowerLaw` speaks of the tail only: it is compared with the eigenvalues from its `x_min`
        on.

    Returns
    -------
    Fit

    Raises
    ------
    ValueError
        If no eigenvalue lies where the law does.
    TypeError
        If `law` is none, such as a class without its parameters.

    Notes
    -----
    Eigenvalues of random matrices repel each other and stay within about 1/n of their law, far
    closer than the n^(-1/2) of independent samples: p-values of the usual Kolmogorov-Smirnov test
    do not apply to them.

    Examples
    --------
    >>> from specdens.laws import Semicircle
    >>> fit = goodness_of_fit([-1.0, 1.0], Semicircle(2.0))
    >>> round(fit.kolmogorov_smirnov, 3)
    0.304
    """
    if isinstance(law, type) or not hasattr(law, "mean_up_to"):
        expected = "MarchenkoPastur, Semicircle or PowerLaw, from numbers or from fit"
        msg = f"law={shown(law)} is no law; pass a {expected}."
        raise TypeError(msg)
    sample = masses(source)
    if isinstance(law, PowerLaw):
        sample = sample.above(law.x_min)
    values, after = sample.values, sample.cumulative
    before = np.concatenate([[0.0], after[:-1]])
    at = law.cdf(values)
    left = at - law.atom * (values == 0)
    largest = max(np.abs(after - at).max(), np.abs(before - left).max())
    # |x - Q(q)| over each step: Q crosses x at q = F(x).
    crossing = np.clip(at, before, after)
    partial = [law.mean_up_to(np.clip(q, 0, 1)) for q in (before, crossing, after)]
    below = values * (crossing - before) - (partial[1] - partial[0])
    above = (partial[2] - partial[1]) - values * (after - crossing)
    return Fit(float(largest), float(np.sum(below + above)))
