r"""Matrices of a layer in terms of Kronecker products: eigenvectors, and how well they fit.

A vector of the space of a layer's weight is a matrix of shape (m, d), rows first (row-major), with
m outputs and d inputs of the layer. Then :math:`A \otimes B`, with A of m rows and B of d, maps X
to :math:`A X B^\top`, and the eigenvectors :math:`u_i \otimes v_j` are the matrices of rank one
:math:`u_i v_j^\top`. Everything here is real.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from specdens.backends import Array
from specdens.gram import check_number
from specdens.operators import Arithmetic
from specdens.spaces import LinearOperator, VectorSpace


class RankRatio(NamedTuple):
    r"""How close reshaped vectors are to rank one.

    Attributes
    ----------
    ratio : float or ndarray of shape (k,)
        :math:`\sigma_1 / \|X\|_F`, from ``min(m, d) ** -0.5`` to 1, which is rank one.
    stable_rank : float or ndarray of shape (k,)
        :math:`\|X\|_F^2 / \sigma_1^2`, from 1 to ``min(m, d)``.
    baseline : float
        About what the ratio of a random direction is,
        :math:`(\sqrt m + \sqrt d) / \sqrt{m d}`, at most 1.
    """

    ratio: float | np.ndarray
    stable_rank: float | np.ndarray
    baseline: float


class Correspondence(NamedTuple):
    r"""Which vectors of the two bases the eigenvectors of a layer are made of.

    Attributes
    ----------
    left : ndarray of shape (r, k)
        Entry (i, k) is :math:`\|u_i^\top \mathrm{Mat}(h_k)\|^2`. With a complete basis every column
        sums to 1.
    right : ndarray of shape (s, k)
        Entry (j, k) is :math:`\|\mathrm{Mat}(h_k) v_j\|^2`.
    """

    left: np.ndarray
    right: np.ndarray


class KroneckerEigenpairs(NamedTuple):
    """Leading eigenpairs of a Kronecker product, or of a matrix near to one.

    Attributes
    ----------
    eigenvalues : ndarray of shape (k,)
        Descending, on the host in float64.
    eigenvectors : array of shape (m * d, k)
        Orthonormal columns, in the library and on the device of the bases.
    pairs : ndarray of shape (k, 2) or None
        Columns i and j of the bases whose product ``u_i (x) v_j`` an eigenvector is; None if the
        eigenvectors are no such products.
    """

    eigenvalues: np.ndarray
    eigenvectors: Array
    pairs: np.ndarray | None


def reshaped_rank_ratio(v: Array, shape: tuple[int, int]) -> RankRatio:
    r"""Tell how close vectors, as matrices of a layer's weight, are to rank one.

    Eigenvectors of a Kronecker product have rank one; those of a layer's Hessian are close to it
    where the product is a good approximation.

    Parameters
    ----------
    v : array of shape (m * d,) or (m * d, k)
        A vector, or one in each column, of any length but zero.
    shape : tuple of int
        ``(m, d)``, outputs and inputs of the layer.

    Returns
    -------
    RankRatio

    Raises
    ------
    ValueError
        If the length is not m d, or a vector is zero or not finite.

    References
    ----------
    Wu, Zhu, Wu, Wang, Ge (2020), arXiv 2010.04261, section 4 and appendix.

    Examples
    --------
    >>> first, second = np.kron([1.0, 2.0], [1.0, 1.0, 0.0]), np.array([1.0, 0, 0, 0, 1, 0])
    >>> result = reshaped_rank_ratio(np.stack([first, second], axis=1), (2, 3))
    >>> result.ratio.round(4), result.stable_rank.round(4)
    (array([1.    , 0.7071]), array([1., 2.]))
    """
    m, d = _checked_shape(shape)
    space = VectorSpace.like(v)
    top = [
        float(space.to_numpy(space.backend.xp.linalg.svdvals(matrix)[:1])[0])
        for matrix in _unit_matrices(v, m, d, "v")
    ]
    ratio = np.minimum(np.array(top), 1.0)
    baseline = min(1.0, float((m**0.5 + d**0.5) / (m * d) ** 0.5))
    if v.ndim == 1:
        return RankRatio(float(ratio[0]), float(ratio[0] ** -2), baseline)
    return RankRatio(ratio, ratio**-2.0, baseline)


def correspondence(eigenvectors: Array, left_basis: Array, right_basis: Array) -> Correspondence:
    r"""Return how much of each eigenvector lies along each vector of two Kronecker factors' bases.

    If eigenvector :math:`h_k` is :math:`u_i \otimes v_j`, column k is 1 at i in one matrix, at j in
    the other, and zero elsewhere: heat maps of both show permutations.

    Parameters
    ----------
    eigenvectors : array of shape (m * d, k)
        Of a layer's Hessian or Gauss-Newton matrix, row-major; ``(m * d,)`` is one. They count with
        length 1.
    left_basis : array of shape (m, r)
        Orthonormal columns :math:`u_i`, such as eigenvectors of :math:`E[M]`.
    right_basis : array of shape (d, s)
        Orthonormal columns :math:`v_j`, such as eigenvectors of :math:`E[x x^\top]`.

    Returns
    -------
    Correspondence

    Raises
    ------
    ValueError
        If shapes do not fit, a basis is not orthonormal, or a vector is zero or not finite.

    References
    ----------
    Wu, Zhu, Wu, Wang, Ge (2020), arXiv 2010.04261, section 4.

    Examples
    --------
    >>> h = np.kron([0.0, 1.0], [1.0, 0.0, 0.0])
    >>> left, right = correspondence(h, np.eye(2), np.eye(3))
    >>> left[:, 0], right[:, 0]
    (array([0., 1.]), array([1., 0., 0.]))
    """
    bases = [("left_basis", left_basis), ("right_basis", right_basis)]
    wide = [_checked_basis(name, basis) for name, basis in bases]
    m, d = (int(basis.shape[0]) for basis in wide)
    space = VectorSpace.like(eigenvectors)
    xp = space.backend.xp
    left, right = [], []
    for matrix in _unit_matrices(eigenvectors, m, d, "eigenvectors"):
        rows = xp.matmul(xp.permute_dims(wide[0], (1, 0)), matrix)
        columns = xp.matmul(matrix, wide[1])
        left.append(space.to_numpy(xp.sum(rows * rows, axis=1)))
        right.append(space.to_numpy(xp.sum(columns * columns, axis=0)))
    return Correspondence(np.stack(left, axis=1), np.stack(right, axis=1))


def eigenbasis(matrix: Array) -> tuple[np.ndarray, Array]:
    """Return all eigenvalues and eigenvectors of a small symmetric matrix, largest first.

    Parameters
    ----------
    matrix : array of shape (n, n)
        Symmetric; of an asymmetric matrix the symmetric part counts.

    Returns
    -------
    eigenvalues : ndarray of shape (n,)
        Descending, float64.
    eigenvectors : array of shape (n, n)
        Orthonormal columns, in the library, on the device and in the dtype of `matrix`. They are
        computed on the host in double precision.

    Raises
    ------
    ValueError
        If `matrix` is not square or not finite.

    Examples
    --------
    >>> values, vectors = eigenbasis(np.diag([1.0, 5.0, 2.0]))
    >>> values, abs(vectors[:, 0])
    (array([5., 2., 1.]), array([0., 1., 0.]))
    """
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        msg = f"matrix has shape {tuple(matrix.shape)}; expected (n, n)."
        raise ValueError(msg)
    space = VectorSpace.like(matrix)
    host = space.to_numpy(matrix).astype(np.float64)
    if not np.isfinite(host).all():
        msg = "matrix has entries that are not finite, so that it has no eigenvalues."
        raise ValueError(msg)
    values, vectors = np.linalg.eigh((host + host.T) / 2)
    return values[::-1].copy(), space.from_numpy(vectors[:, ::-1].copy())


def kronecker_eigenpairs(
    left: tuple[np.ndarray | None, Array],
    right: tuple[np.ndarray | None, Array],
    k: int,
    *,
    eigenvalues: np.ndarray | None = None,
) -> KroneckerEigenpairs:
    r"""Return the k largest eigenvalues of a Kronecker product with their eigenvectors.

    All products of two eigenvalues are compared; only the k eigenvectors are formed.

    Parameters
    ----------
    left, right : pair of array of shape (m,) or (d,) and array of shape (m, m) or (d, d)
        Eigenvalues and eigenvectors of the factors in any order, as `eigenbasis` returns them.
    k : int
        From 1 to m d.
    eigenvalues : array of shape (m, d), optional
        Those of the eigenvectors :math:`u_i \otimes v_j` in place of the products, for a matrix
        that shares only the eigenvectors with a Kronecker product.

    Returns
    -------
    KroneckerEigenpairs
        Among equal eigenvalues the smaller i, then the smaller j comes first.

    Raises
    ------
    ValueError
        If k is below 1 or above m d, or shapes do not fit.

    Examples
    --------
    >>> left, right = (np.array([3.0, 1.0]), np.eye(2)), (np.array([2.0, 0.5]), np.eye(2))
    >>> result = kronecker_eigenpairs(left, right, 2)
    >>> result.eigenvalues, result.pairs[1], result.eigenvectors[:, 1]
    (array([6., 2.]), array([1, 0]), array([0., 0., 1., 0.]))
    """
    (left_values, U), (right_values, V) = left, right  # noqa: N806
    shape = int(U.shape[1]), int(V.shape[1])
    if eigenvalues is None:
        eigenvalues = np.multiply.outer(np.asarray(left_values), np.asarray(right_values))
    values = np.asarray(eigenvalues, dtype=np.float64)
    if values.shape != shape:
        msg = f"eigenvalues have shape {values.shape}, the bases {shape[0]} and {shape[1]} columns."
        raise ValueError(msg)
    check_number(k, values.size)
    flat = values.ravel()
    least = np.partition(flat, values.size - k)[values.size - k]
    chosen = np.flatnonzero(flat >= least)
    chosen = chosen[np.argsort(-flat[chosen], kind="stable")][:k]
    pairs = np.stack(np.unravel_index(chosen, shape), axis=1)
    return KroneckerEigenpairs(flat[chosen], kronecker_columns(U, V, pairs), pairs)


def kronecker_columns(U: Array, V: Array, pairs: np.ndarray) -> Array:  # noqa: N803
    r"""Return the columns :math:`u_i \otimes v_j` for some pairs (i, j).

    Parameters
    ----------
    U, V : arrays of shape (m, r) and (d, s)
        Of one library, device and dtype.
    pairs : array of int of shape (k, 2)

    Returns
    -------
    array of shape (m * d, k)

    Examples
    --------
    >>> kronecker_columns(np.eye(2), np.array([[3.0], [4.0]]), np.array([[1, 0]]))[:, 0]
    array([0., 0., 3., 4.])
    """
    xp = VectorSpace.like(U).backend.xp
    left = xp.stack([U[:, int(i)] for i, _ in pairs], axis=1)  # (m, k)
    right = xp.stack([V[:, int(j)] for _, j in pairs], axis=1)  # (d, k)
    columns = left[:, None, :] * right[None, :, :]
    return xp.reshape(columns, (-1, len(pairs)))


@dataclass(frozen=True, eq=False, repr=False)
class _KroneckerDiagonal(Arithmetic):
    """A matrix with the eigenvectors u_i kron v_j."""

    space: VectorSpace
    left_basis: Array  # (m, m)
    right_basis: Array  # (d, d)
    eigenvalues: Array  # (m, d)

    def __matmul__(self, x: Array, /) -> Array:
        space, xp, U, V = self.space, self.space.backend.xp, self.left_basis, self.right_basis  # noqa: N806
        if x.shape[0] != space.dimension:
            msg = f"x has length {x.shape[0]}, {self!r} has dimension {space.dimension}."
            raise ValueError(msg)
        columns = xp.reshape(x, (*self.eigenvalues.shape, -1))
        X = xp.permute_dims(xp.astype(columns, U.dtype, copy=False), (2, 0, 1))  # noqa: N806
        inner = xp.matmul(xp.matmul(xp.permute_dims(U, (1, 0)), X), V) * self.eigenvalues
        Y = xp.matmul(xp.matmul(U, inner), xp.permute_dims(V, (1, 0)))  # noqa: N806
        return xp.astype(
            xp.reshape(xp.permute_dims(Y, (1, 2, 0)), x.shape), space.dtype, copy=False
        )

    def __repr__(self) -> str:
        return f"kronecker_diagonal({self.left_basis.shape[0]} x {self.right_basis.shape[0]})"


def kronecker_diagonal(left_basis: Array, right_basis: Array, eigenvalues: Array) -> LinearOperator:
    r"""Return the operator with given eigenvalues of the eigenvectors :math:`u_i \otimes v_j`.

    Parameters
    ----------
    left_basis, right_basis : arrays of shape (m, m) and (d, d)
        Orthonormal columns.
    eigenvalues : array of shape (m, d)
        Of the library, device and dtype of the bases.

    Returns
    -------
    LinearOperator
        Of dimension m d; a product costs four products of matrices of that size.

    Raises
    ------
    ValueError
        If the shapes do not fit.

    References
    ----------
    George, Laurent, Bouthillier, Ballas, Vincent (2018), arXiv 1806.03884, section 3.

    Examples
    --------
    >>> kronecker_diagonal(np.eye(2), np.eye(2), np.array([[1.0, 2.0], [3.0, 4.0]])) @ np.ones(4)
    array([1., 2., 3., 4.])
    """
    shape = int(left_basis.shape[0]), int(right_basis.shape[0])
    found = tuple(left_basis.shape), tuple(right_basis.shape), tuple(eigenvalues.shape)
    if found != ((shape[0],) * 2, (shape[1],) * 2, shape):
        msg = f"bases and eigenvalues have shapes {found}; expected (m, m), (d, d) and (m, d)."
        raise ValueError(msg)
    like = VectorSpace.like(left_basis)
    space = VectorSpace(shape[0] * shape[1], like.dtype, like.device, like.backend)
    return _KroneckerDiagonal(space, left_basis, right_basis, eigenvalues)


def _checked_shape(shape: tuple[int, int]) -> tuple[int, int]:
    if len(shape) != 2 or min(shape) < 1:
        msg = f"shape={shape!r} must be (m, d), the outputs and inputs of a layer."
        raise ValueError(msg)
    return int(shape[0]), int(shape[1])


def _checked_basis(name: str, basis: Array) -> Array:
    """Return the basis in double precision."""
    space = VectorSpace.like(basis)
    xp = space.backend.xp
    wide = xp.astype(basis, space.wide_dtype)
    gram = space.to_numpy(xp.matmul(xp.permute_dims(wide, (1, 0)), wide))
    deviation = float(np.abs(gram - np.eye(len(gram))).max())
    if not deviation <= space.precision**0.5:
        msg = f"{name} of shape {tuple(basis.shape)} deviates from orthonormal by {deviation:.1e}; "
        raise ValueError(msg + "pass eigenvectors, or what orthonormalize makes of them.")
    return wide


def _unit_matrices(v: Array, m: int, d: int, name: str) -> Iterator[Array]:
    """Yield every column as an (m, d) matrix of Frobenius norm 1 in double precision."""
    space = VectorSpace.like(v)
    xp = space.backend.xp
    if v.shape[0] != m * d:
        msg = f"{name} has length {v.shape[0]}; expected m * d = {m} * {d} = {m * d}."
        raise ValueError(msg)
    columns = v[:, None] if v.ndim == 1 else v
    for k in range(int(columns.shape[1])):
        column = xp.astype(columns[:, k], space.wide_dtype)
        size = float(space.to_numpy(xp.max(xp.abs(column))))
        if not (np.isfinite(size) and size > 0):
            msg = f"{name}: column {k} has largest entry {size}; expected finite and not zero."
            raise ValueError(msg)
        column = column / size  # whose squares neither overflow nor vanish
        yield xp.reshape(column / xp.linalg.vector_norm(column), (m, d))
