r"""Block Lanczos with partial reorthogonalization: all probes of a block in one Krylov space.

With the probes' block :math:`V = Q_1 R_0`, one block product a step extends

.. math:: A Q_k = Q_{k-1} R_{k-1}^* + Q_k M_k + Q_{k+1} R_k, \qquad Q_i^* Q_j = \delta_{ij} I,

and A acts on the space as the block tridiagonal matrix T of the M and R (Golub and Underwood 1977).
Its eigenvalues are the Ritz values of the sum of all probes' Krylov spaces, which the products have
paid for: p probes of m steps give up to p m of them instead of m, repeated eigenvalues appear as
often as they are repeated (up to p), and a probe :math:`v_i = Q_1 R_0 e_i` sees each with weight
:math:`|y^* v_i|^2`, a rule that is exact at least where its own Gauss rule is (degree 2m - 1). That
Gauss rule is found from it without further products.

The basis is kept orthonormal to the square root of the precision, by orthogonalizing a new block
against stored ones where it is predicted to need it (`specdens.methods.orthogonality`). Directions
in which nothing is left are dropped.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields

import numpy as np

from specdens.backends import Array
from specdens.methods.basis import Basis
from specdens.methods.columns import Kernels, kernels, sketcher
from specdens.methods.lanczos import SKETCH_SIZE, check_finite, random_signs
from specdens.methods.orthogonality import Overlaps
from specdens.quadrature import (
    KrylovRule,
    QuadratureRule,
    gauss_rule,
    jacobi_matrix,
    resolved_nodes,
    rounding,
)
from specdens.spaces import LinearOperator, VectorSpace, multiply

_RANGE = 1e-7  # singular values of a block that one Gram matrix in double precision can tell apart


@dataclass(frozen=True)
class BlockState:
    """Everything a run needs to go on from step k. A value: a step makes a new one."""

    basis: Basis  # Q_1, ..., Q_{k+1}, each (p, n), rows orthonormal, or zero if dropped
    diagonal: np.ndarray  # (k, p, p) the M
    coupling: np.ndarray  # (k + 1, p, p) R_0, ..., R_k; rows of dropped vectors are zero
    overlaps: Overlaps  # how orthogonal the newest block is to the others


@dataclass(frozen=True)
class BlockLanczos:
    """Block Lanczos iteration of `num_steps` products, with partial reorthogonalization."""

    num_steps: int
    extendable = False

    def init(self, operator: LinearOperator, probes: Array) -> BlockState:
        """Return the state before the first product. `probes` (n, p) has unit columns."""
        space = operator.space
        do = kernels(space.backend, space.wide_dtype)
        q, r = orthonormalize(do.as_rows(probes), 16 * space.precision, space, do)
        empty = np.zeros((0, *r.shape), dtype=r.dtype)
        basis = Basis(self.num_steps).append(q)
        return BlockState(basis, empty, r[None], Overlaps.of_first_block(len(r), r.dtype))

    def step(self, operator: LinearOperator, state: BlockState) -> BlockState:
        """Return the state after one block product.

        Raises
        ------
        ValueError
            If the product has the wrong shape or is not finite.
        """
        space = operator.space
        do = kernels(space.backend, space.wide_dtype)
        q, k = state.basis[-1], len(state.diagonal)
        xp = space.backend.xp
        product = multiply(operator, xp.permute_dims(q, (1, 0)))
        new = getattr(operator, "makes_new_rows", False)
        w = xp.permute_dims(product, (1, 0)) if new else do.as_rows(product)
        del product
        with np.errstate(invalid="ignore", over="ignore"):  # told below, with advice
            m = space.to_numpy(do.inner(q, w))
        check_finite(m, "<x, A x>", k)
        m = (m + m.conj().T) / 2
        diagonal = np.concatenate([state.diagonal, m[None]])
        w, r, basis, overlaps = self._orthogonalize(w, state, diagonal, space, do)
        if k + 1 < self.num_steps:  # the last is only needed for its coefficients
            basis = basis.append(w)
        coupling = np.concatenate([state.coupling, r[None]])
        return BlockState(basis, diagonal, coupling, overlaps)

    def _orthogonalize(
        self, w: Array, state: BlockState, diagonal: np.ndarray, space: VectorSpace, do: Kernels
    ) -> tuple[Array, np.ndarray, Basis, Overlaps]:
        """Return Q_{k+1} and R_k with Q_{k+1} R_k = W, the basis it belongs to, and overlaps."""
        basis = state.basis
        components = [state.coupling[-1].conj().T, diagonal[-1]][-len(basis.newest) :]
        w, left, gram = _recur(w, basis.newest, components, space, do)
        scale = _norm(np.concatenate([diagonal, state.coupling[1:]]))
        if _overlap(left, gram) > 8 * space.precision:  # little was left of the product
            w, _, gram = _recur(w, basis.newest, left, space, do)
        w, r = orthonormalize(w, 16 * space.precision * scale, space, do, gram)
        unavoidable = 0.1 * space.precision * _norm(np.stack([diagonal[-1], r])) / len(r) ** 0.5
        rounding = max(float(np.mean(np.abs(left) ** 2)) ** 0.5, unavoidable)
        overlaps = state.overlaps.predict(diagonal, state.coupling, r, rounding)
        dirty = overlaps.to_clean(space.precision)
        if dirty.any() or overlaps.touches_neighbors(space.precision):
            overlaps = overlaps.after_cleaning(dirty, r, space.precision)
            w, basis = basis.clean(w, do, dirty)
            # A vector of which less than half is left was rounding error.
            w, again = orthonormalize(w, 0.5, space, do)
            r = again @ r
        return w, r, basis, overlaps

    def steps_taken(self, state: BlockState) -> int:
        """Return the number of products so far."""
        return len(state.diagonal)

    def truncate(self, state: BlockState, steps: int) -> BlockState:
        """Return what of an earlier state `finish` needs, after `steps` products at most."""
        steps = min(steps, len(state.diagonal))
        basis, coupling = state.basis.first(steps + 1), state.coupling[: steps + 1]
        return BlockState(basis, state.diagonal[:steps], coupling, state.overlaps)

    def done(self, state: BlockState) -> bool:
        """Tell whether all steps are taken, or the Krylov space is exhausted."""
        steps = len(state.diagonal)
        return steps == self.num_steps or not state.coupling[-1].any()

    def finish(self, operator: LinearOperator, state: BlockState) -> KrylovRule:
        """Return the rule of the common space, and every probe's own Gauss rule."""
        precision = operator.space.precision
        theta, vectors, active = self.ritz(state)
        first = active[0].sum()
        amplitudes = vectors[:first].conj().T @ state.coupling[0][active[0]]  # (N, p)
        weights = np.abs(amplitudes.T) ** 2
        last = active[len(state.diagonal) - 1].sum()
        outer = state.coupling[-1][:, active[len(state.diagonal) - 1]]
        tails = outer @ vectors[-last:]
        residuals = np.linalg.norm(tails, axis=0)
        p = weights.shape[0]
        shared = QuadratureRule(np.tile(theta, (p, 1)), weights, np.tile(residuals, (p, 1)))
        resolution = rounding(precision, theta)
        jacobi = [
            jacobi_matrix(theta, amplitudes[:, i], tails, self.num_steps, resolution)
            for i in range(p)
        ]
        gauss, _ = gauss_rule(*zip(*jacobi, strict=True))
        exact = resolved_nodes(theta, residuals, resolution)
        bulk = self._bulk_rule(theta, amplitudes, tails, exact, resolution)
        if p > 1:  # the common space counts multiplicities
            sketches = np.zeros((p, len(theta), 0), dtype=np.float32)
        else:
            sketches = (vectors.T @ self._sketches(operator.space, state))[None]
        blocks = np.zeros(p, dtype=int)
        return KrylovRule(shared, gauss.padded(self.num_steps), bulk, blocks, sketches, resolution)

    def _bulk_rule(
        self,
        theta: np.ndarray,
        amplitudes: np.ndarray,
        tails: np.ndarray,
        exact: np.ndarray,
        floor: float,
    ) -> QuadratureRule:
        """Return every probe's Gauss rule for what it sees beside the resolved Ritz vectors.

        The Krylov space of a probe without its components in invariant directions lies in the
        common space, so this too needs no product. It ends where products of its vectors leave the
        common space: resolved vectors take dimensions away. Its weights sum to the mass that is
        not resolved.
        """
        p = amplitudes.shape[1]
        masses = np.linalg.norm(amplitudes[~exact], axis=0) ** 2
        coefficients = [
            jacobi_matrix(
                theta[~exact], amplitudes[~exact, i], tails[:, ~exact], self.num_steps, floor
            )
            if masses[i] > 0
            else (np.zeros(self.num_steps), np.zeros(self.num_steps))
            for i in range(p)
        ]
        rule, _ = gauss_rule(*zip(*coefficients, strict=True))
        rule = rule.padded(self.num_steps)
        return QuadratureRule(rule.nodes, rule.weights * masses[:, None], rule.residuals)

    def _sketches(self, space: VectorSpace, state: BlockState) -> np.ndarray:
        """Return random projections (k, s) of the Lanczos vectors of a single probe."""
        sketch = sketcher(space.backend, min(SKETCH_SIZE, space.dimension))
        signs, xp = random_signs(space), space.backend.xp
        parts = [
            space.to_numpy(sketch(xp.permute_dims(rows, (1, 0)), signs)).T
            for rows in state.basis.first(len(state.diagonal)).rows()
        ]
        return np.concatenate(parts)

    def ritz(self, state: BlockState) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return eigenvalues and eigenvectors of T without dropped vectors; which are left."""
        k, p, _ = state.diagonal.shape
        active = np.abs(state.coupling[:k]).max(axis=2) > 0
        t = np.zeros((k * p, k * p), dtype=state.diagonal.dtype)
        for j in range(k):
            here, below = slice(j * p, (j + 1) * p), slice((j + 1) * p, (j + 2) * p)
            t[here, here] = state.diagonal[j]
            if j + 1 < k:
                t[below, here] = state.coupling[j + 1]
                t[here, below] = state.coupling[j + 1].conj().T
        kept = np.flatnonzero(active.ravel())
        theta, vectors = np.linalg.eigh(t[np.ix_(kept, kept)])
        return theta, vectors, active

    def memory(self, space: VectorSpace) -> int:
        """Return the bytes that one probe of a block needs, the operator's own not counted."""
        return (4 + self.num_steps) * space.vector_bytes

    def to_arrays(self, space: VectorSpace, state: BlockState) -> dict[str, np.ndarray]:
        """Return the state as host arrays, for a checkpoint."""
        blocks = {f"basis{i}": space.to_numpy(q) for i, q in enumerate(state.basis)}
        overlaps = {f"overlaps_{name}": value for name, value in vars(state.overlaps).items()}
        return blocks | overlaps | {"diagonal": state.diagonal, "coupling": state.coupling}

    def from_arrays(self, space: VectorSpace, arrays: Mapping[str, np.ndarray]) -> BlockState:
        """Return the state that `to_arrays` took apart."""
        count = sum(name.startswith("basis") for name in arrays)
        basis = Basis(self.num_steps)
        for i in range(count):
            basis = basis.append(space.from_numpy(arrays[f"basis{i}"]))
        overlaps = Overlaps(*(arrays[f"overlaps_{field.name}"] for field in fields(Overlaps)))
        return BlockState(basis, arrays["diagonal"], arrays["coupling"], overlaps)


def _recur(
    w: Array,
    previous: tuple[Array, ...],
    components: Iterable[np.ndarray],
    space: VectorSpace,
    do: Kernels,
) -> tuple[Array, np.ndarray, np.ndarray]:
    """Return W without `components` of `previous` blocks, what is left of these, and <W, W>."""
    w, left, gram = do.recur(w, previous, tuple(space.from_numpy(c) for c in components))
    gram = space.to_numpy(gram)
    check_finite(gram, "an inner product of A x")
    return w, np.stack([space.to_numpy(c) for c in left]), gram


def _overlap(components: np.ndarray, gram: np.ndarray) -> float:
    """Return the largest component of W along old vectors once W, with <W, W>, is orthonormal."""
    squares, u = np.linalg.eigh(gram)
    tiny = np.finfo(np.float64).tiny
    return float((np.abs(components @ u) / np.sqrt(np.maximum(squares, tiny))).max())


def orthonormalize(
    w: Array, floor: float, space: VectorSpace, do: Kernels, gram: np.ndarray | None = None
) -> tuple[Array, np.ndarray]:
    """Return Q and R with Q R = W, Q orthonormal or zero in each vector; `gram` is <W, W>.

    Vectors are rows of `w`, which is overwritten where that is possible, and of the Q returned,
    (p, n). From Gram matrices in double precision,
    repeated with a shift until Q is orthonormal (shifted Cholesky QR, Fukaya et al. 2020, with
    eigenvectors in place of Cholesky factors). Directions with singular value sigma up to `floor`
    are dropped: their vectors of Q and rows of R are zero.
    """
    r = np.eye(w.shape[0])
    for _ in range(4):
        squares, u = np.linalg.eigh(space.to_numpy(do.inner(w, w)) if gram is None else gram)
        gram = None
        check_finite(squares, "an inner product of A x")
        sigma = np.sqrt(np.maximum(squares, 0.0))
        if sigma[-1] == 0:
            return w, 0 * r
        shifted = np.maximum(sigma, max(_RANGE * sigma[-1], np.finfo(np.float64).tiny))
        w = do.transform(w, space.from_numpy(u / shifted))
        r = shifted[:, None] * (u.conj().T @ r)
        if sigma[0] > 0.5 * sigma[-1]:  # nothing was lost in rounding
            break
    left, sigma, right = np.linalg.svd(r)
    if sigma[-1] > floor:
        return w, r
    kept = sigma > floor
    w = do.transform(w, space.from_numpy(left * kept))
    return w, (sigma * kept)[:, None] * right


def _norm(blocks: np.ndarray) -> float:
    """Return the largest norm of a column of some blocks of T, a lower bound of the operator's."""
    return float(np.sqrt((np.abs(blocks) ** 2).sum(axis=1).max()))
