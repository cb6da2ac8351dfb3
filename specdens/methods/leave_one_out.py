r"""Trace and diagonal estimators that deflate with probes and correct with probes.

All deflate with a subspace that products have made, and estimate what is left with random vectors:

.. math:: \operatorname{tr} B = \operatorname{tr} Q^* B Q
          + \mathbb{E}\, c\, v^* (I - Q Q^*) B (I - Q Q^*) v .

Hutch++ (Meyer, Musco, Musco, Woodruff 2021, algorithm 1) takes different probes for the two parts.
XTrace, XNysTrace and XDiag (Epperly, Tropp, Webber 2024) take every probe for both: the subspace
:math:`Q_{(i)}` is made of all probes but i, and corrected with probe i. The samples of all i are
exchangeable, each is unbiased; their mean is the estimate.

Probes have unit norm here. Where they are uniform on the sphere, what is left of one is uniform on
the sphere of what is left of the space, and its norm is noise: with `resphere` it is divided out
(their section 2.3), otherwise c = n.

B enters as any operator, f(A) too. Nothing is assumed of its rank: directions that are lost in
rounding are dropped from Q.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from specdens.backends import Array
from specdens.methods.block import orthonormalize
from specdens.methods.columns import Kernels, kernels
from specdens.methods.lanczos import check_finite
from specdens.spaces import LinearOperator, VectorSpace, multiply

_ROUNDING = 1e-12  # a leverage score this close to one is one


def hutchinson(operator: LinearOperator, probes: Array) -> np.ndarray:
    """Return a sample n v^* B v of the trace for every unit column v of `probes` (n, p)."""
    space = operator.space
    v = _rows(probes, space)
    return space.dimension * _quadratic(v, _product(operator, v), space)


def hutch_plus_plus(
    operator: LinearOperator, sketched: Array, probes: Array, *, resphere: bool
) -> np.ndarray:
    """Return a sample of the trace for every column of `probes`, deflated by B times `sketched`.

    Given the sketch the samples are independent. Takes as many products as both have columns, and
    one for each dimension of the deflated space.
    """
    space = operator.space
    do = _kernels(space)
    v = _rows(probes, space)
    q, r, _ = _range(_product(operator, _rows(sketched, space)), space)
    kept = 0.0
    if len(r):  # B is not zero on all that was sketched
        kept = float(_quadratic(q, _product(operator, q), space).sum())
        v, _ = do.remove(_copy(v, space), q)
        v, _ = do.remove(v, q)
    left = _squares(v, space)
    rest = _quadratic(v, _product(operator, v), space)
    return kept + _complement(space.dimension, len(r), left, resphere) * rest


def xtrace(operator: LinearOperator, probes: Array, *, resphere: bool) -> np.ndarray:
    """Return a sample of the trace for every column of `probes`, deflated by all others.

    Takes two products for every column.
    """
    space = operator.space
    do = _kernels(space)
    v = _rows(probes, space)
    y = _product(operator, v)
    quadratic = _quadratic(v, y, space)
    q, r, floor = _range(y, space)
    if not len(r):  # B v = 0 for all v
        return space.dimension * quadratic
    z = _product(operator, q)
    h, w = _pair(q, z, space, do), _pair(q, v, space, do)
    s = left_out_directions(r, floor)
    # (I - Q_(i) Q_(i)^*) v_i = v_i - Q u_i, and Q^* B v_i = r_i.
    u = w - s * _columnwise(s, w)
    rest = quadratic + (_columnwise(u, h @ u) - 2 * _columnwise(u, r)).real
    kept = np.trace(h).real - _columnwise(s, h @ s).real
    rank = len(r) - np.any(s != 0, axis=0)
    left = 1 - _columnwise(u, u).real
    return kept + _complement(space.dimension, rank, left, resphere) * rest


def xnystrace(
    operator: LinearOperator, probes: Array, *, resphere: bool
) -> tuple[np.ndarray, np.ndarray]:
    r"""Return samples of the trace of a positive semidefinite B, one for every column of `probes`.

    Deflation is by the Nystrom approximation :math:`B \Omega (\Omega^* B \Omega)^+ \Omega^* B` of
    all other columns, at one product for every column.

    The samples share most of their deflation and with it most of its error, which their spread
    does not show. So there is a second array (p,): the estimates, means of samples, that would have
    been made without one of the columns, for a jackknife.

    Raises
    ------
    ValueError
        If a Ritz value of B on the probes is negative beyond rounding.
    """
    space = operator.space
    n, do = space.dimension, _kernels(space)
    v = _rows(probes, space)
    # Products with an orthonormal basis X of the columns, Omega = X C, are less noisy.
    basis, c, _ = _range(v, space)
    y = _product(operator, basis)
    h = _pair(basis, y, space, do)
    theta, x = np.linalg.eigh((h + h.conj().T) / 2)
    floor = 16 * space.precision * float(np.sqrt(_squares(y, space).sum()))
    _refuse_negative(theta, floor * n**0.5)
    used = theta > floor
    if not used.any():
        return n * _columnwise(c, h @ c).real, np.zeros(c.shape[1])
    r = np.sqrt(theta[used])[:, None] * (x[:, used].conj().T @ c)  # r^* r = Omega^* B Omega
    z = do.combine(y, space.from_numpy(x[:, used] / np.sqrt(theta[used])))
    deflated = _pair(z, z, space, do)  # the approximation is Z Z^*
    s = left_out_directions(r, floor**0.5)
    kept = np.trace(deflated).real - _columnwise(s, deflated @ s).real
    rest = np.abs(_columnwise(s, r)) ** 2
    # The approximation has no error on the other probes: what is left of v_i beside them counts.
    inverse = np.linalg.pinv(c)
    outside = inverse @ inverse.conj().T  # of Omega^* Omega, the inverse
    left = 1 / np.diagonal(outside).real
    samples = kept + _complement(n, v.shape[0] - 1, left, resphere) * rest
    if v.shape[0] == 1:
        return samples, np.full(1, np.nan)
    inverse = inverse @ (x[:, used] / np.sqrt(theta[used]))
    counts = np.any(s != 0, axis=0)  # without another column nothing changes
    replicates = _without_one(deflated, inverse, outside, counts, n, resphere)
    return samples, np.where(counts, replicates, samples.mean())


def _without_one(
    deflated: np.ndarray,
    inverse: np.ndarray,
    outside: np.ndarray,
    counts: np.ndarray,
    n: int,
    resphere: bool,
) -> np.ndarray:
    r"""Return the XNysTrace estimates (p,) of all columns but one.

    Without column i, the inverses K of :math:`\Omega^* B \Omega` and `outside` of
    :math:`\Omega^* \Omega` lose :math:`K e_i e_i^* K / K_{ii}`; the sample of column j then is made
    of these and of :math:`K \Omega^* B^2 \Omega K`. Entry (i, j) is of column j without i. Columns
    that do not count have no direction of their own to lose.
    """
    p = len(inverse)
    k, m = inverse @ inverse.conj().T, inverse @ deflated @ inverse.conj().T
    size, energy = np.maximum(np.diagonal(k).real, np.finfo(float).tiny), np.diagonal(m).real
    overlap = np.abs(k) ** 2 / size[:, None]
    remaining = size - overlap  # (p, p) diagonal of K without i
    cross = (k.conj() * m).real / size[:, None]
    removed = energy - 2 * cross + overlap * (energy / size)[:, None]
    basis = np.diagonal(outside).real
    left = 1 / np.maximum(basis - np.abs(outside) ** 2 / basis[:, None], 1.0)
    there = counts & (remaining > _ROUNDING * size)  # without i, j has a direction of its own
    divisor = np.where(there, remaining, 1.0)
    correction = (_complement(n, p - 2, left, resphere) - removed) / divisor
    correction = np.where(there & ~np.eye(p, dtype=bool), correction, 0.0)
    return np.trace(deflated).real - energy / size + correction.sum(axis=1) / (p - 1)


def diagonal_hutchinson(operator: LinearOperator, probes: Array) -> Array:
    """Return a sample (p, n) of the diagonal of B for every unit column of `probes` (n, p)."""
    space = operator.space
    v = _rows(probes, space)
    return space.dimension * _real(_conj(v, space) * _product(operator, v), space)


def xdiag(operator: LinearOperator, probes: Array) -> Array:
    """Return a sample (p, n) of the diagonal of B for every column of `probes` (n, p).

    The sample is diag(Q_(i) Q_(i)^* B) + n conj(v_i) (I - Q_(i) Q_(i)^*) B v_i, entry by entry.
    Takes two products for every column.
    """
    space = operator.space
    n, do, xp = space.dimension, _kernels(space), space.backend.xp
    v = _rows(probes, space)
    q, r, floor = _range(_product(operator, v), space)
    if not len(r):
        return xp.zeros_like(_real(v, space))
    z = _product(operator, q)
    s = left_out_directions(r, floor)
    lost, lost_z = do.combine(q, space.from_numpy(s)), do.combine(z, space.from_numpy(s))
    kept = xp.sum(_real(q * _conj(z, space), space), axis=0)
    # B v_i = Q r_i, and what Q_(i) leaves of it is along s_i.
    rest = lost * space.from_numpy(_columnwise(s, r)[:, None])
    return (
        kept - _real(lost * _conj(lost_z, space), space) + n * _real(_conj(v, space) * rest, space)
    )


def left_out_directions(r: np.ndarray, floor: float) -> np.ndarray:
    """Return, for every column i of R, the direction that the range of R loses without it.

    Unit vectors in the columns of an array shaped like `r` (k, p), orthogonal to all columns of R
    but i; zero where the others span the range too. R has full row rank. A direction in which the
    other columns have no singular value above `floor` counts as lost.
    """
    u, sigma, rows = np.linalg.svd(r, full_matrices=False)
    g = (u / sigma) @ rows  # the columns of (R^+)^*
    size = np.sum(np.abs(g) ** 2, axis=0)
    # R R^* - r_i r_i^* has the smallest eigenvalue (1 - l_i) / |g_i|^2, by Sherman and Morrison.
    redundancy = 1 - np.sum(np.abs(rows) ** 2, axis=0)
    lost = redundancy <= np.maximum(_ROUNDING, size * floor**2)
    return np.where(lost, g / np.sqrt(np.where(size > 0, size, 1)), 0)


def _complement(dimension: int, rank: Any, left: np.ndarray, resphere: bool) -> Any:
    """Return the factor c, for squared norms `left` of what is left of unit probes."""
    if not resphere:
        return float(dimension)
    return (dimension - rank) / np.maximum(left, np.finfo(np.float64).tiny)


def _range(y: Array, space: VectorSpace) -> tuple[Array, np.ndarray, float]:
    """Return orthonormal Q (k, n) and R (k, p) with Y = Q R, and the roundoff they leave out."""
    floor = 16 * space.precision * float(np.sqrt(_squares(y, space).sum()))
    q, r = orthonormalize(_copy(y, space), floor, space, _kernels(space))
    rank = int(np.sum(np.abs(r).max(axis=1) > 0))  # dropped rows are the last
    return q[:rank, :], r[:rank], floor


def _refuse_negative(theta: np.ndarray, rounding: float) -> None:
    if theta[0] < -rounding:
        msg = (
            f"operator is not positive semidefinite: it has the Ritz value {theta[0]:.6g} (the "
            f"largest is {theta[-1]:.6g}), and method='xnystrace' needs all to be 0 or above; use "
            "method='xtrace'."
        )
        raise ValueError(msg)


def _product(operator: LinearOperator, rows: Array) -> Array:
    """Return B times the vectors in rows (p, n), as rows. Not to be written to."""
    xp = operator.space.backend.xp
    return xp.permute_dims(multiply(operator, xp.permute_dims(rows, (1, 0))), (1, 0))


def _rows(columns: Array, space: VectorSpace) -> Array:
    return space.backend.xp.permute_dims(columns, (1, 0))


def _copy(x: Array, space: VectorSpace) -> Array:
    return space.backend.xp.asarray(x, copy=True)


def _kernels(space: VectorSpace) -> Kernels:
    return kernels(space.backend, space.wide_dtype)


def _pair(x: Array, y: Array, space: VectorSpace, do: Kernels) -> np.ndarray:
    """Return the inner products <x_i, y_j> of vectors in rows, on the host."""
    values = space.to_numpy(do.inner(x, y))
    check_finite(values, "an inner product of A x")
    return values


def _quadratic(x: Array, y: Array, space: VectorSpace) -> np.ndarray:
    """Return Re <x_i, y_i> of vectors in rows, on the host."""
    xp = space.backend.xp
    x, y = (xp.astype(a, space.wide_dtype) for a in (x, y))
    values = space.to_numpy(_real(xp.sum(_conj(x, space) * y, axis=1), space)).astype(np.float64)
    check_finite(values, "an inner product of A x")
    return values


def _squares(x: Array, space: VectorSpace) -> np.ndarray:
    return _quadratic(x, x, space)


def _columnwise(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return <x_i, y_i> of the columns of small host matrices."""
    return np.sum(x.conj() * y, axis=0)


def _conj(x: Array, space: VectorSpace) -> Array:
    return space.backend.xp.conj(x) if space.is_complex else x


def _real(x: Array, space: VectorSpace) -> Array:
    return space.backend.xp.real(x) if space.is_complex else x
