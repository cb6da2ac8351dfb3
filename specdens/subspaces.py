r"""Comparing subspaces, and vectors with subspaces, whose bases stay on their device.

Only Gram matrices of k by l numbers, and the triangle of a QR factorization, come to the host.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from specdens.arguments import checked_integer
from specdens.backends import Array, DType, backend_of, dtype_name
from specdens.methods.columns import inner
from specdens.spaces import VectorSpace


class OverlapCurve(NamedTuple):
    """Overlaps of leading columns, and what random subspaces would give.

    Attributes
    ----------
    overlap : ndarray of shape (m,)
        Entry j - 1 compares the first j columns of both bases; m is the smaller number of columns.
    baseline : ndarray of shape (m,)
        Expected overlap of uniformly random subspaces of the same dimension, j / n.
    deviation : ndarray of shape (m,)
        Its standard deviation.
    """

    overlap: np.ndarray
    baseline: np.ndarray
    deviation: np.ndarray


class RandomOverlap(NamedTuple):
    """Mean and standard deviation of the overlap of uniformly random subspaces."""

    mean: float
    deviation: float


def subspace_overlap(U: Array, V: Array) -> float:  # noqa: N803
    r"""Return the mean squared cosine of the principal angles between two subspaces.

    .. math:: \frac{\|U^* V\|_F^2}{\min(k, l)} = \frac{\operatorname{tr} P_U P_V}{\min(k, l)},

    which is 1 if one contains the other and 0 if they are orthogonal. Compare with
    `random_overlap`.

    Parameters
    ----------
    U, V : arrays of shape (n, k) and (n, l)
        Orthonormal columns, of the same library and device; ``(n,)`` is one column. Real and
        complex, and precisions, may be mixed: inner products are accumulated in double precision.

    Returns
    -------
    float
        Between 0 and 1 up to rounding.

    Raises
    ------
    ValueError
        If a basis is not orthonormal (see `orthonormalize`), or lengths or devices differ.
    TypeError
        If the libraries differ.

    References
    ----------
    Wu, Zhu, Wu, Wang, Ge (2020), arXiv 2010.04261, section 3.
    Gur-Ari, Roberts, Dyer (2018), arXiv 1812.04754, section 2.

    Examples
    --------
    >>> subspace_overlap(np.eye(5)[:, :2], np.eye(5)[:, 1:4])
    0.5
    """
    cosines, _ = _gram(U, V)
    return float((np.abs(cosines) ** 2).sum() / min(cosines.shape))


def overlap_curve(U: Array, V: Array) -> OverlapCurve:  # noqa: N803
    """Return the overlap of the leading j columns of both bases for every j.

    One number hides where two sets of eigenvectors agree; the curve, beside its random baseline,
    shows it.

    Parameters
    ----------
    U, V : arrays of shape (n, k) and (n, l)
        As in `subspace_overlap`, ordered by eigenvalue for instance.

    Returns
    -------
    OverlapCurve

    Raises
    ------
    ValueError, TypeError
        As `subspace_overlap`.

    Examples
    --------
    >>> curve = overlap_curve(np.eye(4)[:, [0, 1, 2]], np.eye(4)[:, [1, 0, 3]])
    >>> curve.overlap.round(3), curve.baseline
    (array([0.   , 1.   , 0.667]), array([0.25, 0.5 , 0.75]))
    """
    cosines, space = _gram(U, V)
    sizes = np.arange(1, min(cosines.shape) + 1)
    squares = np.cumsum(np.cumsum(np.abs(cosines) ** 2, axis=0), axis=1)
    random = [
        random_overlap(space.dimension, int(j), int(j), is_complex=space.is_complex) for j in sizes
    ]
    baseline, deviation = np.array(random).T
    return OverlapCurve(squares[sizes - 1, sizes - 1] / sizes, baseline, deviation)


def random_overlap(n: int, k: int, l: int, *, is_complex: bool = False) -> RandomOverlap:  # noqa: E741
    r"""Return mean and standard deviation of the overlap of uniformly random subspaces.

    For a uniformly random projector P of rank k, E P = (k / n) I by invariance, so that
    E tr P Q = k l / n for every Q of rank l: divided by min(k, l), the mean is max(k, l) / n. The
    same invariance makes E P (x) P a combination of the three permutations of two real tensor
    factors (two for complex ones), and

    .. math:: \operatorname{Var} \operatorname{tr} P Q
              = \frac{2 k l (n - k)(n - l)}{n^2 (n - 1)(n + 2)} \text{ (real)}, \quad
              \frac{k l (n - k)(n - l)}{n^2 (n^2 - 1)} \text{ (complex)},

    which for k = l = 1 are the variances of Beta(1/2, (n-1)/2) and Beta(1, n-1).

    Parameters
    ----------
    n : int
        Dimension of the space.
    k, l : int
        Dimensions of the subspaces, from 1 to n. It makes no difference if only one is random.
    is_complex : bool
        Whether the space is complex.

    Returns
    -------
    RandomOverlap

    Raises
    ------
    ValueError
        If k or l does not lie between 1 and n.
    TypeError
        If one of the three is no integer.

    Examples
    --------
    >>> random_overlap(100, 5, 10).mean
    0.1
    """
    for name, value in (("k", k), ("l", l)):
        if not 1 <= checked_integer(name, value) <= checked_integer("n", n):
            msg = f"{name}={value} must lie between 1 and n={n}."
            raise ValueError(msg)
    free = k * l * (n - k) * (n - l) / n**2
    if free == 0:  # one of them is the whole space
        return RandomOverlap(max(k, l) / n, 0.0)
    variance = free / (n**2 - 1) if is_complex else 2 * free / ((n - 1) * (n + 2))
    return RandomOverlap(max(k, l) / n, float(np.sqrt(variance)) / min(k, l))


def principal_angles(U: Array, V: Array) -> np.ndarray:  # noqa: N803
    r"""Return the principal angles between two subspaces, small ones accurately too.

    The cosines are the singular values of :math:`U^* V`. A cosine near 1 says nothing about an
    angle below the square root of the precision, so angles under 45 degrees come from their sines,
    the singular values of :math:`V - U U^* V`, which is formed and factorized (QR) on the device.

    Parameters
    ----------
    U, V : arrays of shape (n, k) and (n, l)
        As in `subspace_overlap`.

    Returns
    -------
    ndarray of shape (min(k, l),)
        Radians, from 0 to pi / 2, ascending. Errors are of the order of the precision of the input.

    Raises
    ------
    ValueError, TypeError
        As `subspace_overlap`.

    Notes
    -----
    Memory on the device: about four arrays of the size of U and V, in double precision.

    References
    ----------
    Björck, Golub (1973), Math. Comp. 27, 579, section 4.
    Knyazev, Argentati (2002), SIAM J. Sci. Comput. 23(6), 2008, algorithm 3.1.

    Examples
    --------
    >>> tilted = np.array([[1.0, 0.0], [0.0, 1.0], [1e-9, 0.0]])
    >>> principal_angles(np.eye(3)[:, :2], tilted)
    array([0.e+00, 1.e-09])
    """
    gram, space = _gram(U, V)
    if gram.shape[0] < gram.shape[1]:
        U, V, gram = V, U, gram.conj().T  # noqa: N806
    xp, wide = space.backend.xp, space.wide_dtype
    basis, other = (xp.astype(_columns(x), wide) for x in (U, V))
    coefficients = space.backend.from_numpy(gram, wide, space.device)
    rest = other - xp.matmul(basis, coefficients)
    triangle = space.to_numpy(xp.linalg.qr(rest).R)
    cosines = np.linalg.svd(gram, compute_uv=False)  # descending
    sines = np.linalg.svd(triangle, compute_uv=False)
    # Fewer rows than columns leave a triangle with fewer singular values: the others are zero.
    sines = np.sort(np.pad(sines, (0, len(cosines) - len(sines))))
    small = cosines**2 > 0.5
    angles = np.where(small, np.arcsin(np.minimum(sines, 1.0)), np.arccos(np.minimum(cosines, 1.0)))
    return np.sort(angles.astype(np.float64))


def energy_in(U: Array, g: Array) -> float | np.ndarray:  # noqa: N803
    r"""Return which fraction of the squared norm of a vector lies in a subspace.

    That is :math:`\|U^* g\|^2 / \|g\|^2`, such as the part of the gradient in the leading
    eigenvectors of the Hessian.

    Parameters
    ----------
    U : array of shape (n, k)
        Orthonormal columns.
    g : array of shape (n,) or (n, c)
        One vector, or one in each column, of the library and device of `U`.

    Returns
    -------
    float or ndarray of shape (c,)

    Raises
    ------
    ValueError
        If `U` is not orthonormal, or a vector is zero or not finite.
    TypeError
        If the libraries differ.

    References
    ----------
    Gur-Ari, Roberts, Dyer (2018), arXiv 1812.04754, equation 1.

    Examples
    --------
    >>> energy_in(np.eye(3)[:, :2], np.array([3.0, 0.0, 4.0]))
    0.36
    """
    energy = energy_curve(U, g)[-1]
    return float(energy) if np.ndim(energy) == 0 else energy


def energy_curve(U: Array, g: Array) -> np.ndarray:  # noqa: N803
    """Return the fraction of the squared norm of a vector in the leading j columns, for every j.

    Parameters
    ----------
    U, g : arrays of shape (n, k) and (n,) or (n, c)
        As in `energy_in`.

    Returns
    -------
    ndarray of shape (k,) or (k, c)
        Increasing in j; its last entry is `energy_in`.

    Raises
    ------
    ValueError, TypeError
        As `energy_in`.

    Examples
    --------
    >>> energy_curve(np.eye(3)[:, :2], np.array([3.0, 4.0, 0.0]))
    array([0.36, 1.  ])
    """
    basis, vectors = _columns(U, "U"), _columns(g, "g")
    space = _common_space(basis, vectors, "g")
    _check_orthonormal(basis, "U")
    xp, wide = space.backend.xp, space.wide_dtype
    sizes = space.to_numpy(xp.max(xp.abs(vectors), axis=0)).astype(np.float64)
    if not (np.isfinite(sizes).all() and (sizes > 0).all()):
        bad = int(np.flatnonzero(~(np.isfinite(sizes) & (sizes > 0)))[0])
        msg = (
            f"g has largest entry {sizes[bad]} in column {bad}; a fraction of its energy needs a "
            "vector that is finite and not zero."
        )
        raise ValueError(msg)
    # Entries of about 1 have squares that neither overflow nor vanish.
    factors = space.backend.from_numpy(1 / sizes, wide, space.device)
    scaled = xp.astype(vectors, wide) * factors
    components = np.abs(_inner_products(basis, scaled, space)) ** 2
    norms = space.to_numpy(xp.sum(xp.abs(scaled) ** 2, axis=0)).astype(np.float64)
    curve = np.cumsum(components, axis=0) / norms
    return curve[:, 0] if g.ndim == 1 else curve


def orthonormalize(U: Array) -> Array:  # noqa: N803
    """Return orthonormal columns with the same spans: of the first, the first two, and so on.

    Parameters
    ----------
    U : array of shape (n, k)
        Linearly independent columns.

    Returns
    -------
    array of shape (n, k)
        Of the library, device and dtype of `U`, by a QR factorization in double precision.

    Raises
    ------
    ValueError
        If the columns are dependent to the precision of their dtype, or not finite.

    Examples
    --------
    >>> abs(orthonormalize(np.array([[2.0, 2.0], [0.0, 3.0]])))
    array([[1., 0.],
           [0., 1.]])
    """
    basis = _columns(U, "U")
    space = VectorSpace.like(basis)
    xp = space.backend.xp
    n, k = basis.shape
    factors = xp.linalg.qr(xp.astype(basis, space.wide_dtype))
    triangle = space.to_numpy(factors.R)
    lengths = np.linalg.norm(triangle, axis=0)[: min(n, k)]
    fresh = np.abs(np.diagonal(triangle)) / np.where(lengths > 0, lengths, 1.0)
    if k > n or not (fresh > max(n, k) * space.precision).all():
        msg = (
            f"U has {k} columns of length {n} that are linearly dependent or not finite (smallest "
            f"part of a column outside the span of its predecessors: {fresh.min():.1e}); drop some."
        )
        raise ValueError(msg)
    return xp.astype(factors.Q, space.dtype)


def _columns(x: Array, name: str = "U") -> Array:
    """Return x as (n, k)."""
    backend_of(x, name)  # raises for what is not an array
    if x.ndim not in (1, 2) or 0 in x.shape:
        msg = f"{name} has shape {tuple(x.shape)}; expected (n, k), or (n,), not empty."
        raise ValueError(msg)
    return x[:, None] if x.ndim == 1 else x


def _common_space(first: Array, second: Array, name: str) -> VectorSpace:
    """Return the space, complex if one of the two is, whose wide dtype holds both."""
    here, there = VectorSpace.like(first), VectorSpace.like(second)
    if here.backend is not there.backend:
        msg = (
            f"{name} is an array of {there.backend.name}, U of {here.backend.name}; convert one of "
            "them so that both live in one library."
        )
        raise TypeError(msg)
    for what in ("device", "dimension"):
        mine, theirs = getattr(here, what), getattr(there, what)
        if mine != theirs:
            msg = f"{name} has {what} {theirs}, U has {what} {mine}; they must be equal."
            raise ValueError(msg)
    return there if there.is_complex else here


def _inner_products(x: Array, y: Array, space: VectorSpace) -> np.ndarray:
    """Return X^* Y on the host, accumulated in double precision."""
    wide: DType = space.wide_dtype
    rows = [space.backend.xp.permute_dims(v, (1, 0)) for v in (x, y)]
    return space.to_numpy(inner(rows[0], rows[1], wide=wide))


def _gram(U: Array, V: Array) -> tuple[np.ndarray, VectorSpace]:  # noqa: N803
    """Return U^* V (k, l) on the host and the common space, both bases checked."""
    first, second = _columns(U, "U"), _columns(V, "V")
    space = _common_space(first, second, "V")
    _check_orthonormal(first, "U")
    _check_orthonormal(second, "V")
    return _inner_products(first, second, space), space


def _check_orthonormal(basis: Array, name: str) -> None:
    space = VectorSpace.like(basis)
    gram = _inner_products(basis, basis, space)
    deviation = float(np.abs(gram - np.eye(len(gram))).max())
    tolerance = space.precision**0.5
    if not deviation <= tolerance:
        msg = (
            f"{name} is not orthonormal: |{name}^* {name} - I| is {deviation:.2e}, for "
            f"{dtype_name(space.dtype)} at most {tolerance:.1e} is allowed; pass "
            f"orthonormalize({name})."
        )
        raise ValueError(msg)
