"""Eigenpairs, spectra and embeddings of vectors that are known by their inner products only."""

from __future__ import annotations

from importlib import import_module
from typing import Any, NamedTuple

import numpy as np

from specdens.arguments import checked_numbers


class Attribution(NamedTuple):
    r"""How much of given eigenpairs lies in a subspace, and how much would by chance.

    Attributes
    ----------
    share : float
        :math:`\sum_j |\lambda_j| \, \|Q^\top v_j\|^2 / \sum_j |\lambda_j|`, between 0 and 1.
    baseline : float
        The expected share of directions that are uniform on the sphere, dim / p.
    """

    share: float
    baseline: float


def attributed(
    eigenvalues: np.ndarray, energies: np.ndarray, rank: int, dimension: int
) -> Attribution:
    r"""Return the share of eigenpairs that lies in a subspace.

    Parameters
    ----------
    eigenvalues : array of shape (k,)
    energies : array of shape (k,)
        Squared norms :math:`\|Q^\top v_j\|^2` of the unit eigenvectors' projections.
    rank, dimension : int
        Dimensions of the subspace and of the space.

    Returns
    -------
    Attribution

    Raises
    ------
    ValueError
        If the numbers of eigenvalues and vectors differ, or all eigenvalues are zero.

    Examples
    --------
    >>> attributed(np.array([3.0, -1.0]), np.array([1.0, 0.0]), rank=2, dimension=10)
    Attribution(share=0.75, baseline=0.2)
    """
    sizes = abs(checked_numbers("eigenvalues", eigenvalues))
    energies = checked_numbers("energies", energies)
    if sizes.ndim != 1 or sizes.shape != energies.shape:
        msg = (
            f"eigenvalues has shape {sizes.shape} and there are {energies.size} eigenvectors; "
            "expected one eigenvalue for each."
        )
        raise ValueError(msg)
    if not 0 < sizes.sum() < np.inf:
        msg = f"eigenvalues has entries of total size {sizes.sum()}; expected a positive number."
        raise ValueError(msg)
    return Attribution(float(sizes @ energies / sizes.sum()), rank / dimension)


def weighted_gram(gram: np.ndarray, weights: np.ndarray) -> np.ndarray:
    r"""Return :math:`\sqrt{w_j} K_{jk} \sqrt{w_k}`, whose spectrum is that of the weighted sum.

    Parameters
    ----------
    gram : array of shape (m, m)
        Inner products of m vectors.
    weights : array of shape (m,)
        Not negative.

    Returns
    -------
    ndarray of shape (m, m), float64
        Its eigenvalues are those of :math:`\sum_j w_j g_j g_j^\top`, but for zeros.

    Raises
    ------
    TypeError
        If some entries are not real numbers.
    ValueError
        If shapes do not fit, or a weight is negative.

    Examples
    --------
    >>> weighted_gram(np.eye(2), np.array([4.0, 9.0]))
    array([[4., 0.],
           [0., 9.]])
    """
    matrix, weights = checked_numbers("gram", gram), checked_numbers("weights", weights)
    if weights.ndim != 1 or matrix.shape != (weights.size, weights.size):
        msg = (
            f"gram has shape {matrix.shape} and weights {weights.shape}; expected (m, m) and (m,), "
            "one weight for each vector."
        )
        raise ValueError(msg)
    if not (weights >= 0).all():
        msg = f"weights has entries down to {weights.min()}; expected none that is negative."
        raise ValueError(msg)
    root = np.sqrt(weights)
    return np.asarray(root[:, None] * matrix * root)


def spectrum_of(matrix: np.ndarray) -> np.ndarray:
    """Return the eigenvalues of a symmetric matrix, descending.

    Parameters
    ----------
    matrix : array of shape (m, m)

    Returns
    -------
    ndarray of shape (m,), float64

    Examples
    --------
    >>> spectrum_of(np.diag([1.0, 3.0, 2.0]))
    array([3., 2., 1.])
    """
    return np.asarray(np.linalg.eigvalsh(matrix)[::-1])


def weighted_eigenvalues(gram: np.ndarray, weights: np.ndarray) -> np.ndarray:
    r"""Return the eigenvalues of :math:`\sum_j w_j g_j g_j^\top`, but for zeros.

    Parameters
    ----------
    gram, weights
        As in `weighted_gram`.

    Returns
    -------
    ndarray of shape (m,), float64
        Descending.

    Examples
    --------
    >>> weighted_eigenvalues(np.eye(2), np.array([4.0, 9.0]))
    array([9., 4.])
    """
    return spectrum_of(weighted_gram(gram, weights))


def range_of(gram: np.ndarray, precision: float | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Return the eigenpairs of a Gram matrix that are not zero, descending.

    Parameters
    ----------
    gram : array of shape (m, m)
        Symmetric and positive semidefinite, up to rounding.
    precision : float, optional
        Relative rounding of its entries, by default that of float64. Eigenvalues up to the largest
        one, times this, times m count as zero.

    Returns
    -------
    eigenvalues : ndarray of shape (r,), float64
    eigenvectors : ndarray of shape (m, r), float64

    Examples
    --------
    >>> range_of(np.diag([0.0, 2.0]))[0]
    array([2.])
    """
    eigenvalues, vectors = np.linalg.eigh(checked_numbers("gram", gram))
    precision = max(precision or 0.0, float(np.finfo(np.float64).eps))
    floor = float(eigenvalues.max(initial=0.0)) * precision * len(eigenvalues)
    order = np.flatnonzero(eigenvalues > floor)[::-1]
    return eigenvalues[order], vectors[:, order]


def weighted_basis(
    gram: np.ndarray, weights: np.ndarray, precision: float | None = None
) -> np.ndarray:
    r"""Return X, so that :math:`g X` is an orthonormal basis of the range of the weighted sum.

    Parameters
    ----------
    gram, weights
        As in `weighted_gram`.
    precision : float, optional
        As in `range_of`.

    Returns
    -------
    ndarray of shape (m, r), float64
        The columns of :math:`g X` are eigenvectors of :math:`\sum_j w_j g_j g_j^\top`, those of the
        largest eigenvalues first.

    Examples
    --------
    >>> abs(weighted_basis(np.diag([4.0, 1.0]), np.array([1.0, 9.0])))
    array([[0. , 0.5],
           [1. , 0. ]])
    """
    eigenvalues, vectors = range_of(weighted_gram(gram, weights), precision)
    return np.asarray(np.sqrt(weights)[:, None] * vectors / np.sqrt(eigenvalues))


def check_number(k: int, number: int) -> None:
    """Refuse to give more eigenvalues than there are, or none.

    Raises
    ------
    ValueError
        If k is below 1 or above their number.

    Examples
    --------
    >>> check_number(3, 2)
    Traceback (most recent call last):
    ValueError: k=3 must lie between 1 and 2, the number of eigenvalues.
    """
    if not 1 <= k <= number:
        msg = f"k={k} must lie between 1 and {number}, the number of eigenvalues."
        raise ValueError(msg)


def embedding(
    squared_distances: np.ndarray,
    dimension: int = 2,
    method: str = "mds",
    perplexity: float | None = None,
    seed: int = 0,
) -> np.ndarray:
    """Return points in few dimensions whose distances are like the given ones.

    Parameters
    ----------
    squared_distances : array of shape (m, m)
        Symmetric, with a diagonal of zeros; see `squared_distances`.
    dimension : int
        Number of coordinates, at most m.
    method : {"mds", "tsne"}
        Classical multidimensional scaling, which keeps distances as well as a linear map can, or
        t-SNE, which keeps neighbors and needs scikit-learn.
    perplexity : float, optional
        Of t-SNE, the number of neighbors that count. By default C - 1 for the m = C + C * C means
        of C classes.
    seed : int
        Of the random start of t-SNE.

    Returns
    -------
    ndarray of shape (m, dimension), float64
        Centered. With ``"mds"`` along the principal axes, each signed so that its largest entry is
        positive.

    Raises
    ------
    ValueError
        If `squared_distances` is not such a matrix, or an argument has no meaning.
    ImportError
        If `method` is ``"tsne"`` and scikit-learn is not installed.

    References
    ----------
    Torgerson (1952), Multidimensional scaling: I. Theory and method, Psychometrika 17(4).
    Papyan (2019), ICML, section 4 (t-SNE of perplexity C - 1). arXiv:1901.08244

    Examples
    --------
    >>> points = np.array([0.0, 1.0, 5.0])
    >>> embedding((points[:, None] - points) ** 2, dimension=1).ravel().round(9)
    array([-2., -1.,  3.])
    """
    distances = _checked_distances(squared_distances)
    number = len(distances)
    if isinstance(dimension, bool) or not 1 <= dimension <= number:
        msg = f"dimension={dimension!r} must be an integer from 1 to the {number} points there are."
        raise ValueError(msg)
    if method == "mds":
        return _scaled(distances, int(dimension))
    if method != "tsne":
        msg = f"method={method!r} is unknown; expected 'mds' or 'tsne'."
        raise ValueError(msg)
    return _neighbors(distances, int(dimension), perplexity, seed)


def _scaled(distances: np.ndarray, dimension: int) -> np.ndarray:
    centered = distances - distances.mean(0)
    inner = -0.5 * (centered - centered.mean(1, keepdims=True))
    eigenvalues, vectors = np.linalg.eigh((inner + inner.T) / 2)
    leading = slice(None, -dimension - 1, -1)
    points = vectors[:, leading] * np.sqrt(np.maximum(eigenvalues[leading], 0.0))
    largest = np.take_along_axis(points, abs(points).argmax(0)[None], 0)
    return np.asarray(points * np.where(largest < 0, -1.0, 1.0))


def _neighbors(
    distances: np.ndarray, dimension: int, perplexity: float | None, seed: int
) -> np.ndarray:
    number = len(distances)
    if perplexity is None:
        num_classes = (np.sqrt(1 + 4 * number) - 1) / 2
        if num_classes != round(num_classes) or num_classes < 2:
            msg = (
                f"perplexity=None has a meaning for the C + C * C means of C classes only, not for "
                f"{number} points; pass a number below {number}."
            )
            raise ValueError(msg)
        perplexity = num_classes - 1
    if not 0 < perplexity < number:
        msg = f"perplexity={perplexity!r} must be positive and below the number of points {number}."
        raise ValueError(msg)
    try:
        manifold: Any = import_module("sklearn.manifold")  # which has no annotations
    except ImportError as error:
        msg = "method='tsne' needs scikit-learn: pip install scikit-learn, or use method='mds'."
        raise ImportError(msg) from error
    exact = "exact" if dimension > 3 else "barnes_hut"
    tsne = manifold.TSNE(
        dimension,
        perplexity=float(perplexity),
        metric="precomputed",
        init="random",
        method=exact,
        random_state=seed,
    )
    points = np.asarray(tsne.fit_transform(np.sqrt(distances)), dtype=np.float64)
    return np.asarray(points - points.mean(0))


def _checked_distances(squared_distances: np.ndarray) -> np.ndarray:
    distances = checked_numbers("squared_distances", squared_distances)
    square = distances.ndim == 2 and distances.shape[0] == distances.shape[1] and distances.size
    if not square or not np.isfinite(distances).all() or (distances < 0).any():
        msg = (
            f"squared_distances has shape {distances.shape}; expected a square matrix of finite "
            "numbers that are not negative."
        )
        raise ValueError(msg)
    if np.diagonal(distances).any() or not np.allclose(distances, distances.T):
        msg = "squared_distances is not symmetric with zeros on the diagonal; pass all distances."
        raise ValueError(msg)
    return distances
