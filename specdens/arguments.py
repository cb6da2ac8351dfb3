"""Checks of arguments, in the same words everywhere: the name, what was passed, what is expected.

NumPy only. A wrong type is a TypeError, a wrong value a ValueError.
"""

from __future__ import annotations

import operator
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

_LONGEST = 80  # characters of a value that is shown as it is


def shown(value: Any) -> str:
    """Return a value as it is written, an array or a long text in short.

    Examples
    --------
    >>> shown("a"), shown(np.zeros((2, 3)))
    ("'a'", 'ndarray of shape (2, 3)')
    """
    shape = getattr(value, "shape", None)
    if isinstance(shape, tuple) and shape:
        return f"{type(value).__qualname__} of shape {tuple(shape)}"
    text = str(value) if isinstance(value, np.generic) else repr(value)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."


def is_integer(value: Any) -> bool:
    """Tell whether a value is an integer of Python or NumPy, and no truth value.

    Examples
    --------
    >>> is_integer(np.int64(3)), is_integer(3.0), is_integer(True)
    (True, False, False)
    """
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def checked_integer(name: str, value: Any, advice: str = "") -> int:
    """Return an integer of any library as an int.

    Raises
    ------
    TypeError
        If it is none.
    """
    if not isinstance(value, bool | np.bool_):
        try:
            return operator.index(value)
        except TypeError:
            pass
    msg = f"{name}={shown(value)} must be an integer{_tail(advice)}"
    raise TypeError(msg)


def checked_count(name: str, value: Any, least: int = 1, advice: str = "") -> int:
    """Return an integer of at least `least`.

    Raises
    ------
    TypeError
        If it is no integer.
    ValueError
        If it is less.
    """
    count = checked_integer(name, value, advice)
    if count < least:
        msg = f"{name}={count} must be at least {least}{_tail(advice)}"
        raise ValueError(msg)
    return count


def checked_seed(seed: Any, name: str = "seed") -> int:
    """Return an integer that fits into 64 bits without a sign.

    Raises
    ------
    TypeError
        If it is no integer.
    ValueError
        If it does not fit.
    """
    value = checked_integer(name, seed)
    if not 0 <= value < 2**64:
        msg = f"{name}={value} must lie in [0, 2**64)."
        raise ValueError(msg)
    return value


def checked_number(name: str, value: Any, advice: str = "") -> float:
    """Return a real number as a float; nan and infinity are numbers.

    Raises
    ------
    TypeError
        If it is none.
    """
    odd = isinstance(value, bool | np.bool_ | str | bytes | complex | np.complexfloating)
    if not odd and getattr(value, "ndim", 0) == 0:
        try:
            return float(value)
        except (TypeError, ValueError, RuntimeError):  # the last is torch's, for complex numbers
            pass
    msg = f"{name}={shown(value)} must be a real number{_tail(advice)}"
    raise TypeError(msg)


def checked_positive(name: str, value: Any, advice: str = "") -> float:
    """Return a number above 0 and finite.

    Raises
    ------
    TypeError
        If it is no number.
    ValueError
        If it is another.
    """
    number = checked_number(name, value, advice)
    if not 0 < number < np.inf:
        msg = f"{name}={value} must be positive and finite{_tail(advice)}"
        raise ValueError(msg)
    return number


def checked_nonnegative(name: str, value: Any, advice: str = "") -> float:
    """Return a finite number from 0 up.

    Raises
    ------
    TypeError
        If it is no number.
    ValueError
        If it is another.
    """
    number = checked_number(name, value, advice)
    if not 0 <= number < np.inf:
        msg = f"{name}={value} must be a finite number from 0 up{_tail(advice)}"
        raise ValueError(msg)
    return number


def checked_fraction(name: str, value: Any, advice: str = "") -> float:
    """Return a number between 0 and 1, both excluded.

    Raises
    ------
    TypeError
        If it is no number.
    ValueError
        If it is another.
    """
    number = checked_number(name, value, advice)
    if not 0 < number < 1:
        msg = f"{name}={value} must lie between 0 and 1{_tail(advice)}"
        raise ValueError(msg)
    return number


def checked_numbers(name: str, values: Any) -> np.ndarray:
    """Return real numbers, one or many, as a float64 array.

    Raises
    ------
    TypeError
        If some are not real numbers, or rows have different lengths.
    """
    msg = f"{name}={shown(values)} must be a real number or an array of real numbers on the host."
    try:
        array = np.asarray(values)
        kind = array.dtype.kind
        if kind not in "cSUmM" and not (kind == "O" and any(v is None for v in array.flat)):
            return array.astype(np.float64, copy=False)
        if kind == "c":
            msg = f"{name} is complex; expected real numbers, perhaps {name}.real."
    except (TypeError, ValueError):
        pass
    raise TypeError(msg)


def checked_probabilities(name: str, values: Any) -> np.ndarray:
    """Return numbers between 0 and 1, both included, as a float64 array.

    Raises
    ------
    TypeError
        If some are not real numbers.
    ValueError
        If one is another; the first is named.
    """
    array = checked_numbers(name, values)
    wrong = array[~((array >= 0) & (array <= 1))]
    if wrong.size:
        msg = f"{name}={wrong.flat[0]:.6g} must lie between 0 and 1, ends included."
        raise ValueError(msg)
    return array


def checked_interval(name: str, value: Any, *, point: bool = False) -> tuple[float, float]:
    """Return the ends of a finite interval; with `point` they may be equal.

    Raises
    ------
    TypeError
        If it is no pair of numbers.
    ValueError
        If the ends are not finite or in the wrong order.
    """
    try:
        low, high = (checked_number(name, end) for end in value)
    except (TypeError, ValueError) as error:
        msg = f"{name}={shown(value)} must be a pair (low, high) of real numbers."
        raise TypeError(msg) from error
    if not (np.isfinite([low, high]).all() and (low < high or (point and low == high))):
        msg = f"{name}=({low:.6g}, {high:.6g}) must be finite with low < high."
        raise ValueError(msg)
    return low, high


def checked_choice(name: str, value: Any, choices: Iterable[str], advice: str = "") -> str:
    """Return one of some words.

    Raises
    ------
    TypeError
        If it is no word.
    ValueError
        If it is another.
    """
    known = tuple(choices)
    if isinstance(value, str) and value in known:
        return value
    expected = " or ".join(map(repr, known)) if len(known) < 3 else _listed(known)
    msg = f"{name}={shown(value)} is unknown; expected {expected}{_tail(advice)}"
    raise ValueError(msg) if isinstance(value, str) else TypeError(msg)


def checked_callable(name: str, value: Any, expected: str) -> None:
    """Refuse what cannot be called.

    Raises
    ------
    TypeError
    """
    if not callable(value):
        msg = f"{name}={shown(value)} cannot be called; pass {expected}."
        raise TypeError(msg)


def check_alike(
    name: str,
    value: Mapping[str, Any],
    other_name: str,
    other: Mapping[str, Any],
    keys: Iterable[str],
) -> None:
    """Refuse to join what differs in one of some properties.

    Raises
    ------
    ValueError
        For the first of `keys` that differs.
    """
    for key in keys:
        if value.get(key) != other.get(key):
            msg = (
                f"{name} has {key}={value.get(key)!r}, {other_name} {other.get(key)!r}; only like "
                "can be joined."
            )
            raise ValueError(msg)


def checked_path(name: str, value: Any) -> Path:
    """Return the path of a file.

    Raises
    ------
    TypeError
        If it is none.
    """
    if not isinstance(value, str | os.PathLike):
        msg = f"{name}={shown(value)} must be the path of a file, a str or a Path."
        raise TypeError(msg)
    return Path(value)


def values_of(f: Callable[[np.ndarray], Any], x: np.ndarray) -> np.ndarray:
    """Return f(x), an array like `x`; a constant stands for an array of it.

    Raises
    ------
    TypeError
        If f is no function, or returns something else than numbers.
    ValueError
        If it returns another shape.
    """
    checked_callable("f", f, "a function of an array of eigenvalues")
    try:
        values = np.asarray(f(x))
    except (TypeError, ValueError) as error:
        error.add_note("f is called with an array of eigenvalues: use np.log, not math.log.")
        raise
    if values.dtype.kind not in "biufc":
        msg = f"f returns {values.dtype} for an array of eigenvalues; it must return numbers."
        raise TypeError(msg)
    if values.ndim == 0:
        return np.broadcast_to(values, x.shape)
    if values.shape != x.shape:
        msg = (
            f"f returns shape {values.shape} for eigenvalues of shape {x.shape}; it must work "
            "element by element."
        )
        raise ValueError(msg)
    return values


def _listed(words: tuple[str, ...]) -> str:
    return f"one of {', '.join(map(repr, words))}"


def _tail(advice: str) -> str:
    return f"; {advice}." if advice else "."
