"""Matrices and spectra with prescribed eigenvalues."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from specdens.arguments import checked_count, checked_nonnegative, checked_numbers, checked_seed
from specdens.backends import Array, backend_of
from specdens.spaces import VectorSpace


def matrix_with_spectrum(eigenvalues: ArrayLike, *, seed: int = 0, like: Array = None) -> Array:
    """Return a dense Hermitian matrix with given eigenvalues and random eigenvectors.

    Parameters
    ----------
    eigenvalues : array_like of shape (n,)
    seed : int
        Of the eigenvectors (Haar distributed).
    like : array, optional
        Library, device and dtype of the result; by default NumPy float64. Complex gives a complex
        Hermitian matrix.

    Raises
    ------
    ValueError
        If `eigenvalues` is empty, not one-dimensional or not finite.
    TypeError
        If they are no real numbers.

    Examples
    --------
    >>> A = matrix_with_spectrum([1.0, 2.0, 4.0])
    >>> np.linalg.eigvalsh(A).round(12)
    array([1., 2., 4.])
    """
    values = checked_numbers("eigenvalues", eigenvalues)
    if values.ndim != 1 or not values.size or not np.isfinite(values).all():
        msg = f"eigenvalues has shape {values.shape}; expected (n,), one or more, all finite."
        raise ValueError(msg)
    space = None if like is None else VectorSpace.like(like)
    rng = np.random.default_rng(checked_seed(seed))
    gaussian = rng.standard_normal((values.size, values.size))
    if space is not None and space.is_complex:
        gaussian = gaussian + 1j * rng.standard_normal((values.size, values.size))
    Q, R = np.linalg.qr(gaussian)  # noqa: N806
    Q = Q * (np.diagonal(R) / np.abs(np.diagonal(R)))  # noqa: N806
    matrix = (Q * values) @ Q.conj().T
    matrix = (matrix + matrix.conj().T) / 2
    if space is None:
        return matrix
    return backend_of(like).from_numpy(matrix, space.dtype, space.device)


def spiked_spectrum(
    dimension: int = 2000, num_outliers: int = 20, *, bulk_width: float = 1e-3, seed: int = 0
) -> np.ndarray:
    """Return eigenvalues like a trained network's Hessian: a narrow bulk at zero and outliers.

    Parameters
    ----------
    dimension, num_outliers : int
    bulk_width : float
        Standard deviation of the normally distributed bulk.
    seed : int

    Returns
    -------
    ndarray of shape (dimension,)
        Ascending; the outliers are spaced geometrically from 0.1 to 50.
    """
    checked_count("dimension", dimension, checked_count("num_outliers", num_outliers, 0))
    checked_nonnegative("bulk_width", bulk_width)
    bulk = bulk_width * np.random.default_rng(checked_seed(seed)).standard_normal(
        dimension - num_outliers
    )
    return np.sort(np.concatenate([bulk, np.geomspace(0.1, 50, num_outliers)]))
