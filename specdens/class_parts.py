"""Parts of a Gauss-Newton matrix by classes: names, checks of options, division by weights."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from specdens.arguments import checked_choice, shown
from specdens.arguments import is_integer as is_integer

#: Those that means by class and by pair of classes make up, and their sum.
PARTS = ("class", "cross", "equal", "means")

#: Those that one mean for each class makes up, so that C * C inner products tell all of them.
CLASS_PARTS = ("class", "equal")


def check_part(part: str, *, of_model: bool = False) -> None:
    """Refuse what is not the name of a part that has a small matrix.

    Parameters
    ----------
    part : str
        One of `PARTS`.
    of_model : bool
        Whether there is the remaining part ``G_within`` as an operator, to be pointed at.

    Raises
    ------
    ValueError
        If it is another.
    TypeError
        If it is no word.

    Examples
    --------
    >>> check_part("all")
    Traceback (most recent call last):
    ValueError: part='all' is unknown; expected one of 'class', 'cross', 'equal', 'means'.
    """
    within = "G_within has no small matrix: specdens.slq and specdens.eigsh take it as an operator"
    checked_choice("part", part, PARTS, within if of_model else "")


def check_weighting(weighting: str) -> None:
    """Refuse what is no weighting of the pairs of classes.

    Raises
    ------
    ValueError
        If it is neither ``"probability"`` nor ``"uniform"``.
    TypeError
        If it is no word.

    Examples
    --------
    >>> check_weighting("uniform")
    """
    checked_choice("weighting", weighting, ("probability", "uniform"))


def check_num_classes(num_classes: int | None) -> None:
    """Refuse what is no number of classes, and not None, which leaves it to be found.

    Raises
    ------
    ValueError
        If it is not an integer of at least 2.

    Examples
    --------
    >>> check_num_classes(10)
    """
    if num_classes is not None and (not is_integer(num_classes) or num_classes < 2):
        msg = f"num_classes={shown(num_classes)} must be an integer of at least 2, or None."
        raise ValueError(msg)


def divided(numbers: ArrayLike, weights: np.ndarray) -> np.ndarray:
    """Return numbers over weights, zero where a weight is: the means of what there is none of.

    Examples
    --------
    >>> divided(np.array([3.0, 0.0]), np.array([2.0, 0.0]))
    array([1.5, 0. ])
    """
    positive = weights > 0
    return np.asarray(np.where(positive, np.divide(numbers, np.where(positive, weights, 1.0)), 0.0))


def inverse_weights(weights: np.ndarray) -> np.ndarray:
    """Return 1 / w, and zero where w is.

    Examples
    --------
    >>> inverse_weights(np.array([2.0, 0.0]))
    array([0.5, 0. ])
    """
    return divided(1.0, weights)
