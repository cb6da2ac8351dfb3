"""The divergence of two coins, and its inverse, which turns divergences into bounds."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import rel_entr, xlog1py, xlogy

from specdens.arguments import checked_probabilities
from specdens.certificates.checks import checked_divergences

_MOST_NEWTON_STEPS = 60
_TINY = np.finfo(np.float64).tiny


def binary_kl(q: ArrayLike, p: ArrayLike) -> np.ndarray:
    r"""Return :math:`\mathrm{kl}(q \| p) = q \ln \frac qp + (1 - q) \ln \frac{1 - q}{1 - p}`.

    Parameters
    ----------
    q, p : array_like
        Probabilities; they are broadcast.

    Returns
    -------
    ndarray of float64
        In nats; infinite where p excludes what q allows.

    Raises
    ------
    ValueError
        If a probability is outside [0, 1].
    TypeError
        If an argument is no number.

    Examples
    --------
    >>> float(binary_kl(0.0, 0.5))  # ln 2
    0.6931...
    """
    q, p = checked_probabilities("q", q), checked_probabilities("p", p)
    return np.asarray(rel_entr(q, p) + rel_entr(1 - q, 1 - p))


def kl_inverse(q: ArrayLike, c: ArrayLike) -> np.ndarray:
    r"""Return the largest p with :math:`\mathrm{kl}(q \| p) \le c`.

    Parameters
    ----------
    q : array_like
        Probabilities.
    c : array_like
        Divergences, zero or positive, infinity included; broadcast with `q`.

    Returns
    -------
    ndarray of float64
        At least `q` and at most 1.

    Raises
    ------
    ValueError
        If `q` is outside [0, 1] or `c` is negative.
    TypeError
        If an argument is no number.

    Notes
    -----
    kl is convex in p, so Newton's iteration that begins above the root falls to it monotonically.
    It begins at the smaller of two upper bounds: Pinsker's, :math:`q + \sqrt{c/2}`, and
    :math:`1 - e^{-(c + h)/(1 - q)}` with h the entropy of q. The unknown is :math:`p - q`, whose
    relative error stays that of double precision for small c.

    References
    ----------
    Dziugaite, Roy (2017), arXiv 1703.11008.

    Examples
    --------
    >>> p = kl_inverse([0.0, 0.1, 1.0], 0.05)
    >>> p.round(4).tolist()
    [0.0488, 0.2201, 1.0]
    >>> float(binary_kl(0.1, p[1])).__round__(12)
    0.05
    """
    q, c = np.broadcast_arrays(checked_probabilities("q", q), checked_divergences("c", c))
    q = np.where(q < 1e-290, 0.0, q)  # so that d / q below cannot overflow
    easy = (q == 0) | (q == 1) | (c == 0) | np.isinf(c)
    p, k = np.where(easy, 0.5, q), np.where(easy, 0.5, c)  # any numbers where a formula follows
    entropy = -xlogy(p, p) - xlog1py(1 - p, -p)
    d = np.minimum(np.sqrt(k / 2), 1 - p - np.exp(-(k + entropy) / (1 - p)))
    for _ in range(_MOST_NEWTON_STEPS):
        inside = d < 1 - p  # otherwise the root is 1 in double precision
        e = np.where(inside, d, (1 - p) / 2)
        excess = -xlog1py(p, e / p) - xlog1py(1 - p, -e / (1 - p)) - k
        step = np.where(inside & (e > 0), excess * (p + e) * (1 - p - e) / np.maximum(e, _TINY), 0)
        d = np.clip(d - step, 0, 1 - p)
        if (np.abs(step) <= 1e-16 * d).all():
            break
    known = np.where(c == 0, q, np.where(q == 0, -np.expm1(-c), 1.0))
    return np.asarray(np.where(easy, known, np.minimum(q + d, 1.0)))
