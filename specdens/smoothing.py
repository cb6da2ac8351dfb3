r"""How a quadrature rule is broadened into a density, chosen after the run. NumPy only.

A smoothing has two methods: ``density(x, nodes)``, the kernel :math:`k(x, \theta)`, and
``cumulative(x, nodes)``, its integral up to `x`. Both return an array of shape ``(len(x),
len(nodes))``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, cast

import numpy as np
from scipy.special import ndtr

from specdens.arguments import (
    checked_callable,
    checked_count,
    checked_interval,
    checked_nonnegative,
    checked_positive,
    shown,
)
from specdens.damping import Damping, damping_name, describe_damping, jackson, make_damping


class Smoothing(Protocol):
    """What `SpectralMeasure.pdf` and `SpectralMeasure.cdf` broaden nodes with."""

    def density(self, x: np.ndarray, nodes: np.ndarray) -> np.ndarray:
        """Return the kernel at x (q,) of every node (m,): (q, m), in 1 / eigenvalue units."""
        ...

    def cumulative(self, x: np.ndarray, nodes: np.ndarray) -> np.ndarray:
        """Return the kernel's integral up to x (q,) of every node (m,): (q, m)."""
        ...

    @property
    def resolution(self) -> float:
        """Distance below which two nodes blur into one, in eigenvalue units."""
        ...


@dataclass(frozen=True)
class Gaussian:
    """Normal kernel.

    Parameters
    ----------
    width : float
        Standard deviation, in eigenvalue units. With 0 there is no density, but `cumulative` is the
        unsmoothed step function.

    Raises
    ------
    ValueError
        If `width` is negative or not finite.

    Examples
    --------
    >>> float(Gaussian(0.5).cumulative(np.array([1.0]), np.array([1.0]))[0, 0])
    0.5
    """

    width: float

    def __post_init__(self) -> None:
        _check_width(self.width, zero_allowed=True)

    def density(self, x: np.ndarray, nodes: np.ndarray) -> np.ndarray:
        _check_width(self.width, zero_allowed=False)
        z = (x[:, None] - nodes) / self.width
        return np.exp(-0.5 * z**2) / (self.width * np.sqrt(2 * np.pi))

    def cumulative(self, x: np.ndarray, nodes: np.ndarray) -> np.ndarray:
        if self.width == 0:
            return (x[:, None] >= nodes).astype(np.float64)
        return ndtr((x[:, None] - nodes) / self.width)

    @property
    def resolution(self) -> float:
        return self.width


@dataclass(frozen=True)
class Lorentzian:
    """Cauchy kernel: the density of states seen with an imaginary part, as resolvents give it.

    Parameters
    ----------
    width : float
        Half width at half maximum, in eigenvalue units, above 0.

    Raises
    ------
    ValueError
        If `width` is not positive and finite.
    """

    width: float

    def __post_init__(self) -> None:
        _check_width(self.width, zero_allowed=False)

    def density(self, x: np.ndarray, nodes: np.ndarray) -> np.ndarray:
        return self.width / np.pi / ((x[:, None] - nodes) ** 2 + self.width**2)

    def cumulative(self, x: np.ndarray, nodes: np.ndarray) -> np.ndarray:
        return 0.5 + np.arctan((x[:, None] - nodes) / self.width) / np.pi

    @property
    def resolution(self) -> float:
        return self.width


@dataclass(frozen=True, repr=False)
class Chebyshev:
    r"""The kernel polynomial method as a smoothing of any rule.

    .. math:: k(x, \theta) = \frac{1}{\pi d \sqrt{1 - \tilde x^2}}
              \Bigl(g_0 + 2 \sum_{r=1}^{N} g_r T_r(\tilde\theta) T_r(\tilde x)\Bigr),
              \qquad \tilde x = (x - c) / d

    with c and d the center and half width of `interval`. A Gauss rule of m nodes knows the moments
    up to degree 2m - 1 exactly, and so gives there exactly what moments of the matrix would.

    Parameters
    ----------
    degree : int
        N, at least 1. Features narrower than about ``pi * d / N`` are smeared out.
    interval : tuple of float
        Ends ``(low, high)`` of an interval that holds all nodes; outside it the density is 0.
    damping : callable
        ``damping(degree)`` returns the N + 1 factors g: `jackson`, `fejer`, `LorentzDamping`,
        `lanczos_sigma`, `undamped`, or any other. `jackson` keeps the density nonnegative.

    Raises
    ------
    ValueError
        If `degree` is below 1, the interval is empty, a node lies outside it, or `damping` returns
        another number of factors.
    TypeError
        If `degree` is no integer, `interval` no pair of numbers or `damping` no function.

    Examples
    --------
    >>> Chebyshev(16, (0, 1))
    Chebyshev(degree=16, interval=(0, 1), damping=jackson)
    """

    degree: int
    interval: tuple[float, float]
    damping: Damping = jackson

    def __post_init__(self) -> None:
        checked_count("degree", self.degree)
        checked_interval("interval", self.interval)
        expected = "a function of the degree, such as jackson or LorentzDamping(4.0)"
        checked_callable("damping", self.damping, expected)
        shape = np.shape(self.damping(self.degree))
        if shape != (self.degree + 1,):
            msg = (
                f"damping={damping_name(self.damping)} returns factors of shape {shape} for degree "
                f"{self.degree}; expected ({self.degree + 1},): pass {expected}."
            )
            raise ValueError(msg)

    def __repr__(self) -> str:
        low, high = self.interval
        return (
            f"Chebyshev(degree={self.degree}, interval=({low:.8g}, {high:.8g}), "
            f"damping={damping_name(self.damping)})"
        )

    def density(self, x: np.ndarray, nodes: np.ndarray) -> np.ndarray:
        position, inside = self._scaled(x)
        moments = self._moments(nodes)
        angles = np.arccos(position)
        series = np.cos(np.outer(angles, np.arange(self.degree + 1))) @ moments
        half = (self.interval[1] - self.interval[0]) / 2
        with np.errstate(divide="ignore"):
            edge = np.where(inside, 1 / (np.pi * half * np.sqrt(1 - position**2)), 0.0)
        return series * np.where(np.isfinite(edge), edge, 0.0)[:, None]

    def cumulative(self, x: np.ndarray, nodes: np.ndarray) -> np.ndarray:
        position, _ = self._scaled(x)
        moments = self._moments(nodes)
        angles, orders = np.arccos(position), np.arange(1, self.degree + 1)
        # The integral of T_r / sqrt(1 - x^2) up to x is -sin(r arccos x) / r.
        waves = -np.sin(np.outer(angles, orders)) / (np.pi * orders)
        return (1 - angles / np.pi)[:, None] * moments[0] + waves @ moments[1:]

    @property
    def resolution(self) -> float:
        return np.pi / (self.degree + 1) * (self.interval[1] - self.interval[0]) / 2

    def _scaled(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Map x to [-1, 1], clipped, and say which were inside."""
        low, high = self.interval
        position = (x - (low + high) / 2) / ((high - low) / 2)
        return np.clip(position, -1, 1), np.abs(position) < 1

    def _moments(self, nodes: np.ndarray) -> np.ndarray:
        """Return damped moments (N + 1, m) of unit masses at the nodes, doubled above order 0."""
        low, high = self.interval
        slack = 1e-10 * (high - low)
        if nodes.size and (nodes.min() < low - slack or nodes.max() > high + slack):
            msg = (
                f"interval=({low:.6g}, {high:.6g}) leaves out nodes between {nodes.min():.6g} and "
                f"{nodes.max():.6g}; widen it."
            )
            raise ValueError(msg)
        position, _ = self._scaled(nodes)
        factors = self.damping(self.degree) * np.where(np.arange(self.degree + 1) == 0, 1, 2)
        return factors[:, None] * np.cos(np.outer(np.arange(self.degree + 1), np.arccos(position)))


def _check_width(width: float, *, zero_allowed: bool) -> None:
    check = checked_nonnegative if zero_allowed else checked_positive
    check("width", width, "it is in the unit of the eigenvalues")


def checked_smoothing(smoothing: Any) -> Smoothing:
    """Return what can broaden nodes.

    Raises
    ------
    TypeError
        If it cannot, such as a class without its parameters.
    """
    methods = (getattr(smoothing, name, None) for name in ("density", "cumulative"))
    if isinstance(smoothing, type) or not all(map(callable, methods)):
        msg = (
            f"smoothing={shown(smoothing)} cannot broaden a measure; pass Gaussian(width), "
            "Lorentzian(width) or Chebyshev(degree, interval)."
        )
        raise TypeError(msg)
    return cast("Smoothing", smoothing)


_KINDS: dict[str, Callable[..., Smoothing]] = {
    "Gaussian": Gaussian,
    "Lorentzian": Lorentzian,
    "Chebyshev": Chebyshev,
}


def describe_smoothing(smoothing: Smoothing) -> tuple[str, dict[str, Any]]:
    """Return name and parameters of one of the smoothings above, for a file.

    Raises
    ------
    ValueError
        If it, or its damping, is none of specdens' own.
    """
    name = type(smoothing).__name__
    parameters = dict(vars(smoothing))
    if "damping" in parameters:
        parameters["damping"] = describe_damping(parameters["damping"])
    if name not in _KINDS or parameters.get("damping", "") is None:
        msg = (
            f"smoothing={shown(smoothing)} is not specdens' own and cannot be saved; replace it, "
            "or its damping, by one of specdens."
        )
        raise ValueError(msg)
    return name, parameters


def make_smoothing(name: str, parameters: dict[str, Any]) -> Smoothing:
    """Return the smoothing that `describe_smoothing` took apart."""
    if "interval" in parameters:
        parameters = {**parameters, "interval": tuple(parameters["interval"])}
        parameters["damping"] = make_damping(parameters.get("damping", "jackson"))
    return _KINDS[name](**parameters)
