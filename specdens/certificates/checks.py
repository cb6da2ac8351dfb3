"""Checks of probabilities and counts."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike


def probabilities(name: str, values: ArrayLike) -> np.ndarray:
    array = np.asarray(values, dtype=np.float64)
    if not ((array >= 0) & (array <= 1)).all():
        msg = f"{name}={array} must lie between 0 and 1."
        raise ValueError(msg)
    return array


def check_positive(name: str, value: float) -> None:
    if not 0 < value < math.inf:
        msg = f"{name}={value} must be positive and finite."
        raise ValueError(msg)


def check_delta(name: str, value: float) -> None:
    if not 0 < value < 1:
        msg = f"{name}={value} must lie between 0 and 1: it is a probability of failure."
        raise ValueError(msg)


def check_examples(number: int) -> None:
    if not (isinstance(number, int | np.integer) and number >= 2):
        msg = f"num_examples={number!r} must be an integer of at least 2."
        raise ValueError(msg)
