"""Spectra of class structure from small matrices: Gram matrices of pair means and their weights.

A Gauss-Newton matrix of softmax cross-entropy with C classes is a weighted second moment of
vectors that belong to pairs (c, c') of classes, c the true class and c' any. Their weighted means
g_cc' split it into parts whose nonzero eigenvalues are those of matrices as small as C x C, which
is all that is needed here. Pairs are in row-major order, c * C + c'.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from specdens.arguments import checked_numbers
from specdens.class_parts import PARTS as PARTS
from specdens.class_parts import check_part
from specdens.gram import Attribution as Attribution
from specdens.gram import attributed as attributed
from specdens.gram import embedding as embedding
from specdens.gram import range_of as range_of
from specdens.gram import spectrum_of
from specdens.gram import weighted_basis as weighted_basis
from specdens.gram import weighted_eigenvalues as weighted_eigenvalues
from specdens.gram import weighted_gram as weighted_gram


def class_weights(pair_weights: np.ndarray) -> np.ndarray:
    r"""Return the weight of every class, :math:`w_c = \sum_{c' \ne c} w_{cc'}`.

    Parameters
    ----------
    pair_weights : array of shape (C, C)
        Weights :math:`w_{cc'}` of the pairs, not negative.

    Returns
    -------
    ndarray of shape (C,), float64

    Raises
    ------
    ValueError
        If `pair_weights` is not a square matrix of finite numbers that are not negative.

    References
    ----------
    Papyan (2020), Traces of class/cross-class structure pervade deep learning spectra, JMLR
    21(252), section 6. arXiv:2008.11865

    Examples
    --------
    >>> class_weights(np.array([[0.5, 0.25], [0.125, 0.125]]))
    array([0.25 , 0.125])
    """
    return _off_diagonal(_checked_weights(pair_weights)).sum(1)


def part_gram(gram: np.ndarray, pair_weights: np.ndarray, part: str) -> np.ndarray:
    r"""Return the symmetric matrix whose eigenvalues are the nonzero ones of a part.

    A part is :math:`(g A)(g A)^\top` with the pair means as columns of g and a matrix A that holds
    square roots of the weights; this is :math:`A^\top (g^\top g) A`.

    Parameters
    ----------
    gram : array of shape (C * C, C * C)
        Inner products of the pair means, not weighted, pairs in row-major order.
    pair_weights : array of shape (C, C)
        Weights :math:`w_{cc'}` of the pairs, not negative.
    part : {"class", "cross", "equal", "means"}
        ``"class"`` is :math:`\sum_c w_c g_c g_c^\top`, ``"cross"`` the sum of :math:`w_{cc'}
        (g_{cc'} - g_c)(g_{cc'} - g_c)^\top` over c' other than c, ``"equal"`` that of
        :math:`w_{cc} g_{cc} g_{cc}^\top`, and ``"means"`` the sum of the three.

    Returns
    -------
    ndarray, float64
        (C, C) for ``"class"`` and ``"equal"``, (C * (C - 1), C * (C - 1)) for ``"cross"`` and
        (C * C, C * C) for ``"means"``. Its other eigenvalues are zero.

    Raises
    ------
    ValueError
        If the shapes do not belong together, or `part` is none of the four.

    References
    ----------
    Papyan (2020), JMLR 21(252), Eqs. 6.3-6.4. arXiv:2008.11865

    Examples
    --------
    Two classes, pair means along the four axes:

    >>> part_gram(np.eye(4), np.array([[0.5, 0.25], [0.125, 0.125]]), "class")
    array([[0.25 , 0.   ],
           [0.   , 0.125]])
    """
    weights, gram = _checked(pair_weights, gram)
    return _on_both_sides(lambda matrix: _contracted(matrix, weights, part), gram)


def part_eigenvalues(gram: np.ndarray, pair_weights: np.ndarray, part: str) -> np.ndarray:
    """Return the eigenvalues of `part_gram`, descending: those of the part, but for zeros.

    Parameters
    ----------
    gram, pair_weights, part
        As in `part_gram`.

    Returns
    -------
    ndarray, float64
        As many as `part_gram` has rows, in squared units of the pair means. Those that are zero are
        so up to rounding, of either sign.

    Raises
    ------
    ValueError
        As `part_gram`.

    References
    ----------
    Papyan (2020), JMLR 21(252), section 6. arXiv:2008.11865

    Examples
    --------
    >>> part_eigenvalues(np.eye(4), np.array([[0.5, 0.25], [0.125, 0.125]]), "means")
    array([0.5  , 0.25 , 0.125, 0.125])
    """
    return spectrum_of(part_gram(gram, pair_weights, part))


def part_basis(
    gram: np.ndarray, pair_weights: np.ndarray, part: str, precision: float | None = None
) -> tuple[np.ndarray, np.ndarray]:
    r"""Return the nonzero eigenvalues of a part and its eigenvectors as sums of pair means.

    The eigenvectors are the columns of :math:`g X`, with the pair means as columns of g: an
    orthonormal basis of the part's range, up to rounding.

    Parameters
    ----------
    gram, pair_weights, part
        As in `part_gram`.
    precision : float, optional
        Relative rounding of `gram`. Eigenvalues up to the largest one, times this, times the number
        of them count as zero. By default that of float64.

    Returns
    -------
    eigenvalues : ndarray of shape (r,), float64
        Descending.
    coefficients : ndarray of shape (C * C, r), float64
        The matrix X.

    Raises
    ------
    ValueError
        As `part_gram`.

    References
    ----------
    Papyan (2020), JMLR 21(252), section 6. arXiv:2008.11865

    Examples
    --------
    >>> eigenvalues, X = part_basis(np.eye(4), np.array([[0.5, 0.25], [0.0, 0.0]]), "class")
    >>> eigenvalues, abs(X.ravel())  # the second class has no examples
    (array([0.25]), array([0., 1., 0., 0.]))
    """
    weights = _checked_weights(pair_weights)
    eigenvalues, vectors = range_of(part_gram(gram, weights, part), precision)
    return eigenvalues, _expanded(vectors / np.sqrt(eigenvalues), weights, part)


def part_tables(products: np.ndarray, pair_weights: np.ndarray, part: str) -> np.ndarray:
    r"""Return the factors b with which a part's product is a weighted sum of pair means.

    With the inner products :math:`a_{cc'} = g_{cc'}^\top v`, the product of a part with v is
    :math:`\sum_{cc'} w_{cc'} b_{cc'} g_{cc'}`.

    Parameters
    ----------
    products : array of shape (C, C) or (C, C, k)
        The inner products a, of k vectors.
    pair_weights : array of shape (C, C)
        Weights of the pairs, not negative.
    part : {"class", "cross", "equal", "means"}
        See `part_gram`.

    Returns
    -------
    ndarray of the shape of `products`, float64

    Raises
    ------
    ValueError
        As `part_gram`.

    References
    ----------
    Papyan (2020), JMLR 21(252), Eqs. 6.3-6.4. arXiv:2008.11865

    Examples
    --------
    >>> weights = np.array([[0.5, 0.25], [0.125, 0.125]])
    >>> part_tables(np.array([[1.0, 2.0], [3.0, 4.0]]), weights, "class")
    array([[0., 2.],
           [3., 0.]])
    """
    weights = _checked_weights(pair_weights)
    a = np.asarray(products, dtype=np.float64)
    if a.ndim not in (2, 3) or a.shape[:2] != weights.shape:
        msg = (
            f"products has shape {a.shape}; expected {weights.shape} as pair_weights, or that with "
            "one more axis."
        )
        raise ValueError(msg)
    check_part(part)
    trailing = (...,) + (None,) * (a.ndim - 2)
    if part == "means":
        return a
    if part == "equal":
        return np.asarray(np.eye(len(weights))[trailing] * a)
    shares = _shares(weights)
    means = np.einsum("cd,cd...->c...", shares, a)[:, None]
    other = (1.0 - np.eye(len(weights)))[trailing]
    return np.asarray(other * (means if part == "class" else a - means))


def class_gram(gram: np.ndarray, pair_weights: np.ndarray) -> np.ndarray:
    r"""Return the inner products of the class means.

    That of class c is :math:`g_c = \sum_{c' \ne c} w_{cc'} g_{cc'} / w_c`.

    Parameters
    ----------
    gram, pair_weights
        As in `part_gram`.

    Returns
    -------
    ndarray of shape (C, C), float64
        Rows and columns of classes of weight zero are zero.

    Raises
    ------
    ValueError
        If the shapes do not belong together.

    References
    ----------
    Papyan (2020), JMLR 21(252), section 6. arXiv:2008.11865

    Examples
    --------
    >>> class_gram(np.diag([1.0, 2.0, 3.0, 4.0]), np.ones((2, 2)))
    array([[2., 0.],
           [0., 3.]])
    """
    weights, gram = _checked(pair_weights, gram)
    shares = _shares(weights)
    return _on_both_sides(lambda matrix: _summed(shares, matrix), gram)


def squared_distances(gram: np.ndarray, pair_weights: np.ndarray) -> np.ndarray:
    """Return the squared distances between all class means and pair means.

    Parameters
    ----------
    gram, pair_weights
        As in `part_gram`.

    Returns
    -------
    ndarray of shape (C + C * C, C + C * C), float64
        The class means first, then the pair means in row-major order. Means of weight zero are the
        origin.

    Raises
    ------
    ValueError
        If the shapes do not belong together.

    References
    ----------
    Papyan (2019), Measurements of three-level hierarchical structure in the outliers in the
    spectrum of deepnet Hessians, ICML, section 4. arXiv:1901.08244

    Examples
    --------
    >>> distances = squared_distances(np.eye(4), np.ones((2, 2)))
    >>> distances[0]  # the class mean of the first class is its mean for c' = 2
    array([0., 2., 2., 0., 2., 2.])
    """
    weights, gram = _checked(pair_weights, gram)
    mixed = _summed(_shares(weights), gram)  # (C, C * C), class means with pair means
    extended = np.block([[class_gram(gram, weights), mixed], [mixed.T, gram]])
    norms = np.diagonal(extended)
    return np.asarray(np.maximum(norms[:, None] + norms - (extended + extended.T), 0.0))


def _on_both_sides(contract: Callable[[np.ndarray], np.ndarray], gram: np.ndarray) -> np.ndarray:
    """Return A^T gram A, symmetric to the bit, where `contract` returns A^T times a matrix."""
    matrix = contract(contract(gram).T)
    return np.asarray((matrix + matrix.T) / 2)


def _contracted(matrix: np.ndarray, weights: np.ndarray, part: str) -> np.ndarray:
    """Return A^T times a matrix of C * C rows, with (g A)(g A)^T the part."""
    check_part(part)
    number = len(weights)
    root = np.sqrt(weights)
    if part == "equal":
        return np.asarray(np.diagonal(root)[:, None] * matrix[:: number + 1])
    scaled = root.reshape(-1, 1) * matrix
    if part == "means":
        return np.asarray(scaled)
    shares = np.sqrt(_shares(weights))  # unit vectors, one for each class
    sums = _summed(shares, scaled)  # A^T of the class part
    if part == "class":
        return sums
    spread = scaled.reshape(number, number, scaled.shape[1]) - shares[..., None] * sums[:, None]
    return np.asarray(spread[~np.eye(number, dtype=bool)])


def _expanded(vectors: np.ndarray, weights: np.ndarray, part: str) -> np.ndarray:
    """Return A times a matrix, of C * C rows."""
    number, width = len(weights), vectors.shape[1]
    shares = np.sqrt(_shares(weights))
    rows = np.zeros((number, number, width))
    if part == "class":
        rows[:] = shares[..., None] * vectors[:, None]
    elif part == "equal":
        rows[np.eye(number, dtype=bool)] = vectors
    elif part == "means":
        rows[:] = vectors.reshape(rows.shape)
    else:
        rows[~np.eye(number, dtype=bool)] = vectors
        rows -= shares[..., None] * _summed(shares, rows.reshape(weights.size, width))[:, None]
    return np.asarray((np.sqrt(weights)[..., None] * rows).reshape(weights.size, width))


def _off_diagonal(weights: np.ndarray) -> np.ndarray:
    return np.asarray(np.where(np.eye(len(weights), dtype=bool), 0.0, weights))


def _shares(weights: np.ndarray) -> np.ndarray:
    """Return w_cc' / w_c for c' other than c, zero for c' = c and for classes without weight."""
    others = _off_diagonal(weights)
    totals = others.sum(1, keepdims=True)
    # Dividing by the largest first keeps weights that are close to underflow apart.
    largest = others.max(1, keepdims=True, initial=0.0)
    scaled = others / np.where(largest > 0, largest, 1.0)
    return np.asarray(scaled / np.where(totals > 0, scaled.sum(1, keepdims=True), 1.0))


def _summed(factors: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Return the sums over c' of factors (C, C) times rows (c, c') of a matrix, (C, m)."""
    blocks = matrix.reshape(*factors.shape, matrix.shape[1])
    return np.asarray(np.matmul(factors[:, None], blocks)[:, 0])


def _checked_weights(pair_weights: np.ndarray) -> np.ndarray:
    weights = checked_numbers("pair_weights", pair_weights)
    if weights.ndim != 2 or weights.shape[0] != weights.shape[1] or not weights.size:
        msg = (
            f"pair_weights has shape {weights.shape}; expected (C, C) with one row for each class."
        )
        raise ValueError(msg)
    if not (np.isfinite(weights).all() and (weights >= 0).all()):
        msg = (
            f"pair_weights has entries from {weights.min()} to {weights.max()}; expected finite "
            "weights that are not negative."
        )
        raise ValueError(msg)
    return weights


def _checked(pair_weights: np.ndarray, gram: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the weights and the Gram matrix of the pairs in double precision."""
    weights, matrix = _checked_weights(pair_weights), checked_numbers("gram", gram)
    if matrix.shape != (weights.size, weights.size):
        msg = (
            f"gram has shape {matrix.shape}; expected {(weights.size, weights.size)}, the inner "
            f"products of one mean for each of the {weights.size} pairs in pair_weights."
        )
        raise ValueError(msg)
    return weights, matrix
