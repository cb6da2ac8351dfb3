"""What both adapters do with class structure and Kronecker factors that they have measured."""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import reduce
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from specdens.algebra import project_out
from specdens.arguments import checked_choice
from specdens.backends import Array
from specdens.eigenpairs import eigsh
from specdens.gram import Attribution, attributed
from specdens.kronecker_structure import KroneckerEigenpairs
from specdens.operators import Arithmetic, aslinearoperator
from specdens.spaces import LinearOperator
from specdens.structured import kronecker
from specdens.subspaces import energy_in

_SHARING = ("expand", "reduce")


def without_part(
    matrix: Any, part: Arithmetic, basis: Callable[[], Array], how: str
) -> LinearOperator:
    """Return an operator without a part of the class structure.

    Parameters
    ----------
    matrix : LinearOperator or array of shape (p, p)
    part : Arithmetic
        What is subtracted.
    basis : callable
        Returns an orthonormal basis of its range, (p, r); called only to project.
    how : {"project", "subtract"}

    Returns
    -------
    LinearOperator

    Raises
    ------
    ValueError
        If `how` is unknown.
    TypeError
        If `how` is no word.

    References
    ----------
    Papyan (2020), JMLR 21(252), Definitions 3.1-3.3. arXiv:2008.11865

    Examples
    --------
    >>> matrix, part = np.array([[2.0, 1.0], [1.0, 3.0]]), aslinearoperator(np.diag([2.0, 0.0]))
    >>> without_part(matrix, part, lambda: np.eye(2)[:, :1], "project") @ np.ones(2)
    array([0., 3.])
    >>> without_part(matrix, part, lambda: np.eye(2)[:, :1], "subtract") @ np.ones(2)
    array([1., 4.])
    """
    checked_choice("how", how, ("project", "subtract"))
    whole = aslinearoperator(matrix)
    if how == "subtract":
        return whole - part
    columns = basis()
    return project_out(whole, columns) if columns.shape[1] else whole


def attribution(basis: Array, eigenvalues: ArrayLike, eigenvectors: Array) -> Attribution:
    """Return which share of given eigenpairs lies in the range of a part.

    Parameters
    ----------
    basis : array of shape (p, r)
        Orthonormal; r may be 0.
    eigenvalues : array of shape (k,)
        On the host.
    eigenvectors : array of shape (p, k)
        Of any length but zero; ``(p,)`` is one.

    Returns
    -------
    Attribution

    Raises
    ------
    ValueError
        If the shapes do not fit.

    Examples
    --------
    >>> attribution(np.eye(4)[:, :1], [3.0, -1.0], np.eye(4)[:, :2])
    Attribution(share=0.75, baseline=0.25)
    """
    dimension, rank = basis.shape
    vectors = eigenvectors[:, None] if eigenvectors.ndim == 1 else eigenvectors
    energies = np.zeros(vectors.shape[1])
    if rank:
        energies = np.atleast_1d(np.asarray(energy_in(basis, vectors)))
    values = np.atleast_1d(np.asarray(eigenvalues, dtype=np.float64))
    return attributed(values, energies, rank, dimension)


def check_weight_sharing(weight_sharing: str) -> None:
    """Refuse what says nothing of several positions of an example.

    Raises
    ------
    ValueError
        If it is neither ``"expand"`` nor ``"reduce"``.

    References
    ----------
    Eschenhagen, Immer, Turner, Schneider, Hennig (2023), arXiv 2311.00636, section 3.

    Examples
    --------
    >>> check_weight_sharing("expand")
    """
    if weight_sharing not in _SHARING:
        msg = f"weight_sharing={weight_sharing!r} must be one of {', '.join(_SHARING)}."
        raise ValueError(msg)


def kronecker_sum(
    shares: np.ndarray,
    lefts: Array,
    rights: Array,
    convert: Callable[[Array], Array],
) -> LinearOperator:
    r"""Return the sum over classes of the Kronecker products of their factors.

    Parameters
    ----------
    shares : ndarray of shape (C,)
        Classes of share zero are left out.
    lefts, rights : arrays of shape (C, m, m) and (C, d, d)
        :math:`\pi_c E_c[M]` and :math:`E_c[x x^\top]`.
    convert : callable
        Makes each factor an array of the operator's library, device and dtype.

    Returns
    -------
    LinearOperator
        Of dimension m d, rows first.

    References
    ----------
    Wu, Zhu, Wu, Wang, Ge (2020), arXiv 2010.04261, section 3.
    Papyan (2020), arXiv 2008.11865, definitions 7.1 and 7.2.

    Examples
    --------
    >>> factors = np.array([[[3.0]], [[5.0]]]), np.array([[[1.0]], [[2.0]]])
    >>> kronecker_sum(np.array([0.5, 0.5]), *factors, convert=np.asarray) @ np.ones(1)
    array([13.])
    """
    own = np.flatnonzero(shares).tolist() or [0]  # all is zero without weights
    products = [kronecker(convert(lefts[c]), convert(rights[c])) for c in own]
    return reduce(operator.add, products)


def largest_eigenpairs(matrix: LinearOperator, k: int, **options: Any) -> KroneckerEigenpairs:
    """Return the k largest eigenvalues of a sum of Kronecker products, with eigenvectors.

    Parameters
    ----------
    matrix : LinearOperator
    k : int
    **options
        Of `specdens.eigsh`.

    Returns
    -------
    KroneckerEigenpairs
        Descending, without pairs.

    Examples
    --------
    >>> largest_eigenpairs(aslinearoperator(np.diag([1.0, 3.0, 2.0])), 2).eigenvalues.round(9)
    array([3., 2.])
    """
    found = eigsh(matrix, k, **options)
    vectors = matrix.space.backend.xp.flip(found.eigenvectors, axis=1)
    return KroneckerEigenpairs(found.eigenvalues[::-1].copy(), vectors, None)


def factors_repr(layer: str, per_class: bool, bias: bool, weight_shape: tuple[int, ...]) -> str:
    """Return how Kronecker factors show themselves.

    Examples
    --------
    >>> factors_repr("fc", True, False, (20, 784))
    "KroneckerFactors('fc', per class, 20 x 784)"
    """
    kind = ("per class, " if per_class else "") + ("with bias, " if bias else "")
    return f"KroneckerFactors({layer!r}, {kind}{' x '.join(map(str, weight_shape))})"
