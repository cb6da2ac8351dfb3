r"""Damping of Chebyshev series: factors :math:`g_0, ..., g_N` that keep a cut series from ringing.

A damping is a callable ``damping(degree)`` that returns the factors (N + 1,) of degree N. Formulas
as collected by Weisse, Wellein, Alvermann, Fehske (2006), Rev. Mod. Phys. 78, 275, table I.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from specdens.arguments import checked_count, checked_positive

Damping: TypeAlias = Callable[[int], np.ndarray]


def jackson(degree: int) -> np.ndarray:
    r"""Return Jackson's damping factors :math:`g_0, ..., g_N` for `degree` N: (N + 1,).

    .. math:: (M + 1) g_r = (M - r + 1) \cos\frac{\pi r}{M + 1}
              + \sin\frac{\pi r}{M + 1} \cot\frac{\pi}{M + 1}

    with M = N + 1 moments (eq. 71). The damped kernel is nowhere negative, and the narrowest such
    kernel: about a Gaussian of standard deviation ``pi / M`` times the half width of the interval.

    Parameters
    ----------
    degree : int
        N, at least 0.

    Returns
    -------
    ndarray of shape (N + 1,)

    Examples
    --------
    >>> float(jackson(4)[0])
    1.0
    """
    m = checked_count("degree", degree, 0) + 1
    r = np.arange(m)
    phase = np.pi / (m + 1)
    return ((m - r + 1) * np.cos(phase * r) + np.sin(phase * r) / np.tan(phase)) / (m + 1)


def fejer(degree: int) -> np.ndarray:
    """Return Fejer's factors ``1 - r / M`` with M = N + 1: nonnegative, broader than `jackson`.

    Parameters
    ----------
    degree : int
        N, at least 0.

    Returns
    -------
    ndarray of shape (N + 1,)

    Examples
    --------
    >>> fejer(3)
    array([1.  , 0.75, 0.5 , 0.25])
    """
    m = checked_count("degree", degree, 0) + 1
    return 1 - np.arange(m) / m


def lanczos_sigma(degree: int, power: int = 3) -> np.ndarray:
    r"""Return Lanczos' factors :math:`(\sin(\pi r / M) / (\pi r / M))^{power}` with M = N + 1.

    With the power 3 close to `jackson`; not strictly nonnegative.

    Parameters
    ----------
    degree : int
        N, at least 0.
    power : int
        1 damps least.

    Returns
    -------
    ndarray of shape (N + 1,)

    Examples
    --------
    >>> lanczos_sigma(1, power=1).round(6)
    array([1.     , 0.63662])
    """
    m = checked_count("degree", degree, 0) + 1
    return np.sinc(np.arange(m) / m) ** power


def undamped(degree: int) -> np.ndarray:
    """Return ones: the cut series itself, which rings near steps but keeps every moment.

    Parameters
    ----------
    degree : int
        N, at least 0.

    Returns
    -------
    ndarray of shape (N + 1,)

    Examples
    --------
    >>> undamped(2)
    array([1., 1., 1.])
    """
    return np.ones(checked_count("degree", degree, 0) + 1)


@dataclass(frozen=True)
class LorentzDamping:
    r"""Damping :math:`\sinh(\lambda (1 - r / M)) / \sinh \lambda` with M = N + 1.

    The kernel is nearly a `Lorentzian` of half width :math:`\lambda / M` times the half width of
    the interval, as resolvents with an imaginary part have it (eq. 79).

    Parameters
    ----------
    strength : float
        :math:`\lambda`, above 0; 3 to 5 are usual. Larger values suppress ringing more.

    Raises
    ------
    ValueError
        If `strength` is not positive and finite.

    Examples
    --------
    >>> LorentzDamping(4.0)(1).round(6)
    array([1.      , 0.132901])
    """

    strength: float = 4.0

    def __post_init__(self) -> None:
        checked_positive("strength", self.strength, "3 to 5 are usual")

    def __call__(self, degree: int) -> np.ndarray:
        """Return the factors (N + 1,) of degree N."""
        m = checked_count("degree", degree, 0) + 1
        rest = 1 - np.arange(m) / m
        return np.sinh(self.strength * rest) / np.sinh(self.strength)


_NAMED: dict[str, Damping] = {f.__name__: f for f in (jackson, fejer, lanczos_sigma, undamped)}


def damping_name(damping: Damping) -> str:
    """Return a damping as it is written, without the addresses of functions."""
    name = getattr(damping, "__name__", None)
    return str(name or re.sub(r"<function ([\w.<>]+) at 0x[0-9a-f]+>", r"\1", repr(damping)))


def describe_damping(damping: Damping) -> Any:
    """Return one of the dampings above as something JSON can hold, or None for any other."""
    if isinstance(damping, LorentzDamping):
        return {"lorentz": damping.strength}
    return next((name for name, known in _NAMED.items() if known is damping), None)


def make_damping(described: Any) -> Damping:
    """Return the damping that `describe_damping` described."""
    if isinstance(described, dict):
        return LorentzDamping(described["lorentz"])
    return _NAMED[described]
