r"""Thick-restart block Lanczos: a basis of bounded size that holds the best Ritz vectors so far.

The vectors :math:`Z = [V, F]` are orthonormal; those of V have been multiplied, those of F wait:

.. math:: A V = Z G, \qquad G = Z^* A V.

Multiplying some of F and orthogonalizing the products against all of Z, twice, adds columns to G
and new vectors to F. Eigenpairs :math:`T s = \theta s` of the Hermitian part T of the rows of G
that belong to V are Ritz pairs, and :math:`\|A V s - \theta V s\| = \|G s - \theta (s, 0)\|` is the
true residual norm, but for rounding. A restart puts a few Ritz vectors in the place of V (Wu and
Simon 2000), after which :math:`A V = Z G` still holds, but for the part of G that is not Hermitian:
rounding, again, if A is.

Locked vectors are a third kind: products are orthogonalized against them too, but they take no part
in the Ritz problem.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import array_api_extra as xpx
import numpy as np

from specdens.backends import Array
from specdens.methods.block import orthonormalize
from specdens.methods.columns import kernels
from specdens.methods.lanczos import check_finite
from specdens.spaces import LinearOperator, VectorSpace, multiply

_ROWS = 16  # sizes of the basis are rounded up to this, so that few shapes need compiling


@dataclass(frozen=True)
class Decomposition:
    """A V = Z G, the vectors being rows of `basis`: locked ones, then V, then F, then zeros.

    A step overwrites `basis` where the library can: the decomposition it came from is used up.
    """

    space: VectorSpace
    basis: Array  # (capacity, n)
    num_locked: int
    num_multiplied: int
    num_pending: int
    matrix: np.ndarray  # (locked + multiplied + pending, multiplied) G
    norm: float  # largest |Ritz value| so far, a lower bound of the operator's norm

    @classmethod
    def empty(cls, space: VectorSpace, capacity: int) -> Decomposition:
        """Return the decomposition without any vectors, with room for `capacity`."""
        xp, shape = space.backend.xp, (capacity, space.dimension)
        basis = xp.zeros(shape, dtype=space.working_dtype, device=space.device)
        kind = np.complex128 if space.is_complex else np.float64
        return cls(space, basis, 0, 0, 0, np.zeros((0, 0), dtype=kind), 0.0)

    @property
    def size(self) -> int:
        """Number of vectors of every kind."""
        return self.num_locked + self.num_multiplied + self.num_pending

    @property
    def room(self) -> int:
        """Number of vectors that can be added."""
        return int(self.basis.shape[0]) - self.size

    @property
    def multiplied(self) -> slice:
        """Rows of V."""
        return slice(self.num_locked, self.num_locked + self.num_multiplied)

    @property
    def pending(self) -> slice:
        """Rows of F."""
        return slice(self.size - self.num_pending, self.size)


@dataclass(frozen=True)
class RitzPairs:
    """Eigenpairs of the projection of A onto V."""

    values: np.ndarray  # (m,) ascending
    vectors: np.ndarray  # (m, m) coefficients in V, one column per pair
    residuals: np.ndarray  # (m,) |A u - theta u|
    coupling: np.ndarray  # (pending, m) <F, A u>


@dataclass(frozen=True)
class Targets:
    """Places at and beyond which a run proves that nothing is left, for an end of the spectrum."""

    signs: np.ndarray  # (q,) 1 for the high end, -1 for the low end
    values: np.ndarray  # (q,) multiplied with the signs: greater is further out
    seen: np.ndarray  # (q, size, b) the run's random vectors, as an eigenvector there sees them

    def after_step(self, size: int) -> Targets:
        """Return the targets for a decomposition that has grown to `size`."""
        grown = np.pad(self.seen, ((0, 0), (0, size - self.seen.shape[1]), (0, 0)))
        return replace(self, seen=grown)

    def after_restart(self, state: Decomposition, pairs: RitzPairs, kept: np.ndarray) -> Targets:
        """Return the targets for the decomposition that `restart` makes of `state`.

        What an eigenvector sees of a discarded Ritz vector, it sees in F.
        """
        dropped = np.setdiff1d(np.arange(len(pairs.values)), kept)
        seen = []
        for sign, value, old in zip(self.signs, self.values, self.seen, strict=True):
            inside = pairs.vectors.conj().T @ old[state.multiplied]
            distance = sign * value - pairs.values[dropped]
            left = pairs.coupling[:, dropped] @ (inside[dropped] / distance[:, None])
            locked = np.zeros((state.num_locked, old.shape[1]))
            seen.append(np.concatenate([locked, inside[kept], old[state.pending] + left]))
        return replace(self, seen=np.array(seen))

    def left(self, state: Decomposition, pairs: RitzPairs) -> list[np.ndarray]:
        """Return (pending, b) for each target: what an eigenvector there sees of F stands for.

        If it sees w of F, it has w @ left of the random vectors, the Ritz vectors at and beyond the
        target being known.
        """
        parts = []
        for sign, value, seen in zip(self.signs, self.values, self.seen, strict=True):
            distance = value - sign * pairs.values
            inner = distance > 0
            inside = (pairs.vectors.conj().T @ seen[state.multiplied])[inner]
            outside = pairs.coupling[:, inner] @ (inside * (sign / distance[inner])[:, None])
            parts.append(outside + seen[state.pending])
        return parts

    def missed(self, state: Decomposition, pairs: RitzPairs, done: np.ndarray) -> np.ndarray:
        """Return (q,) the largest part of the random vectors that an eigenvector could have.

        An eigenvector at or beyond the target, that is, which is none of the Ritz vectors `done`.
        """
        bounds = []
        places = zip(self.signs, self.values, strict=True)
        for (sign, value), left in zip(places, self.left(state, pairs), strict=True):
            unknown = (sign * pairs.values >= value) & ~done
            size = float(np.linalg.norm(left, 2)) if left.size else 0.0
            bounds.append(np.inf if unknown.any() else size)
        return np.array(bounds)


def append(state: Decomposition, vectors: Array) -> Decomposition:
    """Return the decomposition with the span of `vectors` (n, p) added to F."""
    rows = kernels(state.space.backend, state.space.wide_dtype).as_rows(vectors)
    rows, *_ = _orthogonalize(state, rows, 1e3 * roundoff(state.space))
    return _with_pending(state, rows)


def expand(operator: LinearOperator, state: Decomposition, count: int) -> Decomposition:
    """Return the decomposition after the first `count` vectors of F have been multiplied.

    Raises
    ------
    ValueError
        If the product has the wrong shape or is not finite.
    """
    space, xp, size = state.space, state.space.backend.xp, state.size
    first = state.pending.start
    q = xp.permute_dims(state.basis[first : first + count, :], (1, 0))
    product = multiply(operator, q)
    w = kernels(space.backend, space.wide_dtype).as_rows(product)
    w, inner, outer = _orthogonalize(state, w, 16 * roundoff(space) * state.norm)
    columns = np.concatenate([state.matrix, inner], axis=1)
    state = replace(
        state,
        num_multiplied=state.num_multiplied + count,
        num_pending=state.num_pending - count,
        matrix=columns,
    )
    state = _with_pending(state, w)
    state.matrix[size:, -count:] = outer
    diagonal = inner[first : first + count]
    largest = float(np.abs(np.linalg.eigvalsh((diagonal + diagonal.conj().T) / 2)).max())
    return replace(state, norm=max(state.norm, largest))


def ritz_pairs(state: Decomposition) -> RitzPairs:
    """Return the Ritz pairs of V, with the norms of their residuals."""
    inside = state.matrix[state.multiplied]
    theta, s = np.linalg.eigh((inside + inside.conj().T) / 2)
    residuals = state.matrix @ s
    residuals[state.multiplied] -= theta * s
    return RitzPairs(theta, s, np.linalg.norm(residuals, axis=0), residuals[state.pending])


def steer(state: Decomposition, rotation: np.ndarray) -> Decomposition:
    """Return the decomposition with F replaced by ``F @ rotation``."""
    space, rows = state.space, state.pending
    do = kernels(space.backend, space.wide_dtype)
    turned = do.combine(state.basis[rows, :], space.from_numpy(rotation))
    matrix = state.matrix.copy()
    matrix[rows] = rotation.conj().T @ matrix[rows]
    return replace(state, basis=xpx.at(state.basis)[rows, :].set(turned), matrix=matrix)


def restart(state: Decomposition, vectors: np.ndarray) -> Decomposition:
    """Return the decomposition with V replaced by Ritz vectors, given by their coefficients."""
    parts = [
        (slice(0, state.num_locked), np.eye(state.num_locked)),
        (state.multiplied, vectors),
        (state.pending, np.eye(state.num_pending)),
    ]
    matrix = state.matrix @ vectors
    matrix = np.concatenate([mixing.conj().T @ matrix[rows] for rows, mixing in parts])
    count = vectors.shape[1]
    return replace(state, basis=_mix(state, parts), num_multiplied=count, matrix=matrix)


def lock(state: Decomposition, vectors: np.ndarray, kept: np.ndarray) -> Decomposition:
    """Return locked vectors only: those `kept`, and the Ritz vectors given by coefficients."""
    size = len(kept) + vectors.shape[1]
    parts = [
        (slice(0, state.num_locked), np.eye(state.num_locked)[:, kept]),
        (state.multiplied, vectors),
    ]
    nothing = np.zeros((size, 0), dtype=state.matrix.dtype)
    return replace(
        state,
        basis=_mix(state, parts),
        num_locked=size,
        num_multiplied=0,
        num_pending=0,
        matrix=nothing,
    )


def combine(state: Decomposition, coefficients: np.ndarray) -> Array:
    """Return the combinations (n, p) of all vectors with coefficients (size, p)."""
    do = kernels(state.space.backend, state.space.wide_dtype)
    padded = np.zeros((state.basis.shape[0], coefficients.shape[1]), dtype=coefficients.dtype)
    padded[: state.size] = coefficients
    rows = do.combine(state.basis, state.space.from_numpy(padded))
    return state.space.backend.xp.permute_dims(rows, (1, 0))


def _mix(state: Decomposition, parts: list[tuple[slice, np.ndarray]]) -> Array:
    """Return the basis with rows replaced by their combinations, part after part, then zeros."""
    space, capacity = state.space, int(state.basis.shape[0])
    do = kernels(space.backend, space.wide_dtype)
    whole = np.zeros((capacity, capacity), dtype=state.matrix.dtype)
    start = 0
    for rows, mixing in parts:
        stop = start + mixing.shape[1]
        whole[rows, start:stop] = mixing
        start = stop
    return do.transform(state.basis, space.from_numpy(whole))


def _orthogonalize(
    state: Decomposition, w: Array, floor: float
) -> tuple[Array, np.ndarray, np.ndarray]:
    """Return Q, C, R with W = Z C + Q R and Q orthonormal and orthogonal to Z, vectors in rows.

    Directions that are smaller than `floor`, or were rounding error, are missing in Q.
    """
    space = state.space
    do = kernels(space.backend, space.wide_dtype)
    filled = min(-(-state.size // _ROWS) * _ROWS, int(state.basis.shape[0]))
    z = state.basis[:filled, :]

    w, first = do.remove(w, z)
    first = space.to_numpy(first)
    with np.errstate(invalid="ignore", over="ignore"):
        check_finite(first, "an inner product of A x", state.num_multiplied)
    w, r = orthonormalize(w, floor, space, do)
    w, second = do.remove(w, z)
    # A vector of which less than half is left was rounding error.
    w, again = orthonormalize(w, 0.5, space, do)
    kept = np.flatnonzero(np.abs(again @ r).max(axis=1) > 0)
    inner = first + space.to_numpy(second).astype(state.matrix.dtype) @ r
    if len(kept) < len(r):
        select = np.eye(len(r))[:, kept]
        w = do.combine(w, space.from_numpy(select))
    return w, inner[: state.size], (again @ r)[kept]


def _with_pending(state: Decomposition, rows: Array) -> Decomposition:
    """Return the decomposition with orthonormal `rows` added to F, their coefficients zero."""
    count, size = int(rows.shape[0]), state.size
    basis = state.basis
    if count:
        basis = xpx.at(basis)[size : size + count, :].set(rows)
    matrix = np.concatenate(
        [state.matrix, np.zeros((count, state.matrix.shape[1]), dtype=state.matrix.dtype)]
    )
    return replace(state, basis=basis, num_pending=state.num_pending + count, matrix=matrix)


def roundoff(space: VectorSpace) -> float:
    """Return the unit roundoff of vectors, which may be finer than that of products."""
    return float(space.backend.xp.finfo(space.working_dtype).eps)


def hideable(
    distances: np.ndarray, residuals: np.ndarray, least: float, limit: int
) -> tuple[np.ndarray, np.ndarray]:
    r"""Return which Ritz vectors a search may be kept orthogonal to, and what that costs it.

    With residuals :math:`F c_i` an eigenvector z of :math:`\lambda` has components :math:`z^* y_i =
    (z^* F) c_i / (\lambda - \theta_i)` along Ritz vectors :math:`y_i`. Without those its Rayleigh
    quotient is lower by at most :math:`\sum_i |c_i|^2 / (\lambda - \theta_i)`. That much further in
    a search has to look: a tenth of the way to the next Ritz value, or `least`, is worth it.

    Parameters
    ----------
    distances : ndarray of shape (q, m)
        From the places of a search inwards to m Ritz values.
    residuals : ndarray of shape (m,)
        Their residual norms.
    least : float
        What is always worth it.
    limit : int
        Vectors at most.

    Returns
    -------
    picked : ndarray of int
    hidden : ndarray of shape (q,)
        The sums above.
    """
    inside = np.flatnonzero((distances > 0).all(axis=0))
    losses = residuals[inside] ** 2 / distances[:, inside]
    worst, nearest = losses.max(axis=0, initial=0.0), distances[:, inside].min(initial=np.inf)
    order = np.argsort(worst, kind="stable")
    fits = np.cumsum(worst[order]) <= max(least, 0.1 * nearest)
    picked = order[fits][:limit]
    return inside[picked], losses[:, picked].sum(axis=1)


def component_density(dimension: int, count: int = 1) -> float:
    r"""Return c with :math:`P(\|Z^* X\| \le \epsilon) \le c \epsilon` for random unit vectors X.

    Z spans what is left of an eigenspace of which `count` - 1 copies are known, and X are `count`
    vectors. With one: the density of a component of a point on the sphere. With more the norm is at
    least the smallest singular value of X in a part of the eigenspace of dimension `count`, whose
    entries are Gaussian but for terms of order 1 / n (Sankar, Spielman, Teng 2006, SIAM J. Matrix
    Anal. Appl. 28(2), 446, theorem 3.3).
    """
    if count == 1:
        return (2 * dimension / np.pi) ** 0.5
    return 2.35 * (count * dimension) ** 0.5


def least_tol(space: VectorSpace) -> float:
    """Return the residual, relative to the norm, that rounding lets every pair reach."""
    return max(16 * roundoff(space), 2 * space.precision)
