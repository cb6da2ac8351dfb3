"""Checks of divergences and counts, and of what a bound demands of priors, labels and bases."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from specdens.arguments import (
    checked_count,
    checked_fraction,
    checked_numbers,
    checked_positive,
    is_integer,
    shown,
)


def check_positive(name: str, value: Any) -> None:
    checked_positive(name, value)


def check_delta(name: str, value: Any) -> None:
    checked_fraction(name, value, "it is a probability of failure")


def check_examples(number: Any) -> None:
    checked_count("num_examples", number, 2)


def check_counts(**counts: Any) -> None:
    for name, count in counts.items():
        if not is_integer(count) or count < 1:
            msg = f"{name}={shown(count)} must be a positive integer."
            raise ValueError(msg)


def checked_divergences(name: str, values: ArrayLike) -> np.ndarray:
    """Return numbers from zero to infinity, both included, as a float64 array."""
    array = checked_numbers(name, values)
    wrong = array[~(array >= 0)]
    if wrong.size:
        msg = f"{name}={wrong.flat[0]} must be zero or positive: it is a divergence."
        raise ValueError(msg)
    return array


def check_rows(numbers: Iterable[int | None], arrays: str) -> None:
    """Refuse batches without a number of examples; `arrays` is what a framework calls them."""
    if any(number is None for number in numbers):
        msg = (
            f"data have batches whose {arrays} share no first axis; a bound counts examples, so "
            "inputs and targets need one row for each."
        )
        raise ValueError(msg)


def check_center(*, finite: bool, trained: bool, present: str, advice: str = "") -> None:
    """Refuse a prior's center that is not finite, or that the data determined.

    Parameters
    ----------
    finite, trained : bool
        Whether all entries are finite, and whether they are those after training.
    present : str
        What the trained parameters are called.
    advice : str
        How to keep the initial ones.
    """
    if not finite:
        msg = "prior_mean has entries that are nan or infinite."
        raise ValueError(msg)
    if trained:
        msg = (
            f"prior_mean equals {present}, so that the prior would depend on the data "
            f"they were trained on; pass the initial ones{advice}."
        )
        raise ValueError(msg)


def is_single_logit(shape: tuple[int, ...]) -> bool:
    """Tell whether outputs of that shape are one logit for each example."""
    return len(shape) == 1 or (len(shape) == 2 and shape[1] == 1)


def check_class_shapes(
    logits: tuple[int, ...], targets: tuple[int, ...], *, dtype: Any, whole: bool
) -> None:
    """Refuse outputs and targets that are not (n, C) logits and n integers.

    Parameters
    ----------
    logits, targets : tuple of int
        Shapes.
    dtype : dtype
        Of the targets.
    whole : bool
        Whether that is an integer type.
    """
    if len(logits) != 2 or len(targets) != 1 or not whole:
        msg = (
            f"logits of shape (n, {', '.join(map(str, logits[1:]))}) with {dtype} "
            f"targets of shape {targets} are no classifier; expected one logit and "
            "labels -1, 1 or 0, 1, or (n, C) logits and n integer labels."
        )
        raise ValueError(msg)


def check_class_range(lowest: int, highest: int, num_classes: int) -> None:
    if lowest < 0 or highest >= num_classes:
        msg = (
            f"labels lie between {lowest} and {highest}; expected 0 to {num_classes - 1}. "
            "Leave examples with ignored labels out of the data."
        )
        raise ValueError(msg)


def check_refresh(basis: Any, refresh_every: int | None) -> None:
    """Refuse to make a basis anew that does not depend on the parameters."""
    if refresh_every is not None and (basis == "standard" or isinstance(basis, Mapping)):
        msg = (
            f"refresh_every={refresh_every} makes a basis anew, but this one never changes; pass "
            "basis='kronecker', 'exact' or a function of the risk."
        )
        raise ValueError(msg)


def check_basis_names(found: Iterable[str], names: Iterable[str], kind: str) -> None:
    """Refuse a basis of what does not vary; `kind` is what an adapter calls the parameters."""
    known = list(names)
    unknown = [name for name in found if name not in known]
    if unknown:
        msg = f"basis names {unknown}, which are none of the {kind} that vary, {known}."
        raise ValueError(msg)


def check_orthonormal(
    name: str, deviation: float, *, order: int, epsilon: float, library: str
) -> None:
    r"""Refuse a basis whose :math:`Q^\top Q - I` is more than rounding.

    Parameters
    ----------
    name : str
        Of the parameter.
    deviation : float
        The largest absolute entry of that difference.
    order : int
        Length of the columns.
    epsilon : float
        Distance from 1 to the next number of the type of Q.
    library : str
        Where the framework has ``qr`` and ``eigh``.
    """
    if not deviation <= 30 * order**0.5 * epsilon:
        msg = (
            f"basis of {name!r} is not orthonormal: an entry of Q^T Q differs from the identity by "
            f"{deviation:.2g}. KL is invariant under rotations only; use {library}.qr or eigh."
        )
        raise ValueError(msg)
