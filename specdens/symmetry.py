"""Whether matrices that are there as arrays, dense or sparse, are Hermitian."""

from __future__ import annotations

from typing import Any

import numpy as np

from specdens.backends import Array
from specdens.spaces import VectorSpace

_ENTRIES_AT_ONCE = 2**22  # of a dense matrix
_MOST_BLOCKS = 64
_SAMPLED_ENTRIES = 2**11  # of a sparse matrix, whose product takes a thousand times as many


def check_dense(matrix: Array, space: VectorSpace) -> None:
    """Refuse a dense matrix that is not Hermitian.

    Raises
    ------
    ValueError
    """
    xp = space.backend.xp
    parts = space.backend.jit(lambda matrix: _asymmetry(matrix, xp))(matrix)
    largest, asymmetry = (float(part) for part in parts)
    _refuse(largest, asymmetry, space.precision)


def _asymmetry(matrix: Array, xp: Any) -> tuple[Array, Array]:
    """Return max |A| and max |A - A^H|, in blocks of rows so that no second matrix is made."""
    n = matrix.shape[0]
    rows = max(1, _ENTRIES_AT_ONCE // n, -(-n // _MOST_BLOCKS))
    largest, asymmetry = [], []
    for start in range(0, n, rows):
        part = slice(start, min(start + rows, n))
        block = matrix[part, :]
        mirror = xp.permute_dims(matrix[:, part], (1, 0))
        mirror = xp.conj(mirror) if xp.isdtype(matrix.dtype, "complex floating") else mirror
        largest.append(xp.max(xp.abs(block)))
        asymmetry.append(xp.max(xp.abs(block - mirror)))
    return xp.max(xp.stack(largest)), xp.max(xp.stack(asymmetry))


def check_sparse(matrix: Any, space: VectorSpace) -> None:
    """Refuse a SciPy matrix in CSR form that is not Hermitian, as far as some entries tell.

    Every stored entry of a small matrix is compared with its mirror image, and of a large one an
    even sample: that costs a small part of a product, and finds a missing triangle, the directions
    of a graph and rows that were normalized.

    Raises
    ------
    ValueError
    """
    if matrix.nnz <= _SAMPLED_ENTRIES:
        places = np.arange(matrix.nnz)
    else:
        places = np.random.default_rng(0).integers(matrix.nnz, size=_SAMPLED_ENTRIES)
    rows = np.searchsorted(matrix.indptr, places, side="right") - 1
    columns = matrix.indices[places]
    with np.errstate(invalid="ignore"):  # the first product reports what is not finite
        entries, mirror = _entries(matrix, rows, columns), _entries(matrix, columns, rows)
        asymmetry = np.abs(entries - np.conj(mirror)).max(initial=0.0)
    # The largest entry of all takes longer to find than these, and is seldom needed.
    if asymmetry > space.precision**0.5 * np.abs(entries).max(initial=0.0):
        _refuse(float(np.abs(matrix.data).max()), float(asymmetry), space.precision)


def _entries(matrix: Any, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Return some entries; SciPy alone would look at the order of the whole matrix first."""
    found, places = np.unique(rows, return_inverse=True)
    return np.asarray(matrix[found][places, columns])


def _refuse(largest: float, asymmetry: float, precision: float) -> None:
    # Matrices from automatic differentiation are symmetric to a few roundings only, so allow eps **
    # 0.5.
    if asymmetry > precision**0.5 * largest:  # false for NaN: the first product reports it
        msg = (
            f"operator is not Hermitian: max |A - A^H| = {asymmetry:.3g} against max |A| = "
            f"{largest:.3g}; pass (A + A.T.conj()) / 2 if that is what you mean."
        )
        raise ValueError(msg)
