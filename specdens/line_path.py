"""A quantity at places on a straight line between two points, and its barrier above the chord."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from specdens.arguments import checked_numbers, shown


@dataclass(frozen=True, eq=False)
class LinePath:
    """What `along_line` of the adapters found: a quantity on the line between two points.

    Attributes
    ----------
    alphas : ndarray of shape (m,)
        Places on the line, 0 at the start and 1 at the end.
    values : ndarray of shape (m,) or (m, ...)
        The quantity there.
    ends : ndarray of shape (2,) or (2, ...)
        The quantity at the start and at the end.
    """

    alphas: np.ndarray
    values: np.ndarray
    ends: np.ndarray

    @property
    def chord(self) -> np.ndarray:
        """The values of the straight line between both ends, in the shape of `values`."""
        alphas = self.alphas.reshape(-1, *(1,) * (self.values.ndim - 1))
        return (1 - alphas) * self.ends[0] + alphas * self.ends[1]

    @property
    def barrier(self) -> float | np.ndarray:
        """Largest height above the chord between the ends, where it is 0: never negative."""
        between = (self.alphas >= 0) & (self.alphas <= 1)
        height = (self.values - self.chord)[between].max(axis=0, initial=0.0)
        return float(height) if self.values.ndim == 1 else height

    def __repr__(self) -> str:
        low, high = self.alphas.min(), self.alphas.max()
        barrier = np.array2string(np.asarray(self.barrier), precision=4)
        return (
            f"LinePath({len(self.alphas)} points from {low:g} to {high:g}, barrier {barrier} "
            "above the chord)"
        )


def line_path(alphas: ArrayLike, value: Callable[[float], np.ndarray]) -> LinePath:
    """Return the quantity ``value(alpha)`` at `alphas`, and at both ends.

    Parameters
    ----------
    alphas : array-like of shape (m,)
        Places, 0 at the start and 1 at the end.
    value : callable
        Returns the quantity at a place, as an array of one shape. Called once for each place, and
        for the ends where these are not among them.

    Returns
    -------
    LinePath

    Raises
    ------
    ValueError
        If `alphas` are not finite numbers in one row.
    TypeError
        If they are no numbers.

    Examples
    --------
    >>> path = line_path([0, 0.5, 1], lambda alpha: np.asarray(1 + 2 * alpha * (1 - alpha)))
    >>> path.barrier
    0.5
    """
    places = checked_numbers("alphas", alphas).copy()
    if places.ndim != 1 or not places.size or not np.isfinite(places).all():
        msg = (
            f"alphas={shown(alphas)} must be finite numbers in one row; np.linspace(0, 1, 21) are "
            "some."
        )
        raise ValueError(msg)
    values = [value(alpha) for alpha in places.tolist()]
    known = dict(zip(places.tolist(), values, strict=True))
    ends = [known[alpha] if alpha in known else value(alpha) for alpha in (0.0, 1.0)]
    return LinePath(places, np.stack(values), np.stack(ends))
