r"""The Lanczos recurrence for many probes at once, each by itself, in two vectors of memory.

From each unit column :math:`q_1` one product a step extends

.. math:: A q_j = \beta_{j-1} q_{j-1} + \alpha_j q_j + \beta_j q_{j+1},

whose coefficients form a Jacobi matrix; its Gauss rule (`specdens.quadrature.gauss_rule`)
integrates polynomials up to degree 2m - 1 exactly against the measure that the probe sees. Nothing
is reorthogonalized: converged eigenvalues come back as copies (ghosts), whose weights still add up
(Greenbaum 1989). `specdens.methods.block` is the method that keeps all vectors.

Vectors stay on the device, coefficients go home as float64. At most four vectors per probe exist at
any time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from specdens.backends import Array
from specdens.methods.columns import Kernels, kernels, sketcher
from specdens.probes import generator
from specdens.quadrature import KrylovRule, gauss_rule, rounding
from specdens.spaces import LinearOperator, VectorSpace, multiply

SKETCH_SIZE = 64  # numbers kept of every Lanczos vector, to compare Ritz vectors of other probes
_SKETCH_STREAM = 2**63  # a Philox stream that no probe index reaches


@dataclass(frozen=True)
class LanczosState:
    """Everything a run needs to go on from step j. A value: a step makes a new one."""

    q: Array  # (n, p) current Lanczos vectors, one column per probe; zero where a column has ended
    q_prev: Array  # (n, p)
    signs: Array  # (n,) int8 random signs of the sketches
    alphas: np.ndarray  # (p, j) float64
    betas: np.ndarray  # (p, j) float64
    sketches: np.ndarray  # (p, j, s) single-precision random projections of the Lanczos vectors


@dataclass(frozen=True)
class Lanczos:
    """Lanczos iteration of `num_steps` products for every column, without reorthogonalization."""

    num_steps: int
    extendable = False

    def init(self, operator: LinearOperator, probes: Array) -> LanczosState:
        """Return the state before the first product. `probes` (n, p) has unit columns."""
        space = operator.space
        empty = np.zeros((probes.shape[1], 0))
        kind = np.complex64 if space.is_complex else np.float32
        sketches = np.zeros((*empty.shape, min(SKETCH_SIZE, space.dimension)), dtype=kind)
        before = space.backend.xp.zeros_like(probes)
        return LanczosState(probes, before, random_signs(space), empty, empty, sketches)

    def step(self, operator: LinearOperator, state: LanczosState) -> LanczosState:
        """Return the state after one product with all columns.

        Raises
        ------
        ValueError
            If the product has the wrong shape or is not finite.
        """
        space = operator.space
        do = kernels(space.backend, space.wide_dtype)
        sketch = sketcher(space.backend, state.sketches.shape[2])
        projected = space.to_numpy(sketch(state.q, state.signs)).T
        p, j = state.alphas.shape
        last_beta = state.betas[:, -1] if j else np.zeros(p)

        w, alpha = _three_term(operator, state, space.from_numpy(last_beta), do)
        alpha = space.to_numpy(alpha).astype(np.float64)
        check_finite(alpha, "<x, A x>", j)
        w, norm = do.subtract(w, state.q, space.from_numpy(alpha))
        norm = space.to_numpy(norm).astype(np.float64)
        check_finite(norm, "the norm of A x", j)

        alphas = np.concatenate([state.alphas, alpha[:, None]], axis=1)
        size = np.abs(np.concatenate([alphas, state.betas], axis=1)).max(axis=1)
        beta = np.where(norm > 16 * space.precision * size, norm, 0.0)
        inverse = np.divide(1.0, beta, out=np.zeros_like(beta), where=beta > 0)
        q = do.scale(w, space.from_numpy(inverse))
        betas = np.concatenate([state.betas, beta[:, None]], axis=1)
        projected = projected[:, None, :].astype(state.sketches.dtype)
        sketches = np.concatenate([state.sketches, projected], axis=1)
        return LanczosState(q, state.q, state.signs, alphas, betas, sketches)

    def steps_taken(self, state: LanczosState) -> int:
        """Return the number of products so far."""
        return state.alphas.shape[1]

    def truncate(self, state: LanczosState, steps: int) -> LanczosState:
        """Return what of an earlier state `finish` needs, after `steps` products at most."""
        kept = {name: getattr(state, name)[:, :steps] for name in ("alphas", "betas", "sketches")}
        return replace(state, **kept)

    def done(self, state: LanczosState) -> bool:
        """Tell whether all steps are taken, or every column has exhausted its Krylov space."""
        steps = state.alphas.shape[1]
        return steps == self.num_steps or (steps > 0 and not state.betas[:, -1].any())

    def finish(self, operator: LinearOperator, state: LanczosState) -> KrylovRule:
        """Return the Gauss rule of every column; each probe has a Krylov space of its own."""
        rule, vectors = gauss_rule(state.alphas, state.betas)
        shape = (*rule.nodes.shape, state.sketches.shape[2])
        sketches = np.zeros(shape, dtype=state.sketches.dtype)
        for i, s in enumerate(vectors):
            sketches[i, : len(s)] = s.T @ state.sketches[i, : len(s)]
        rule = rule.padded(self.num_steps)
        sketches = np.pad(sketches, ((0, 0), (0, self.num_steps - sketches.shape[1]), (0, 0)))
        resolution = rounding(operator.space.precision, rule.nodes) * self.num_steps**0.5
        return KrylovRule(rule, rule, None, np.arange(len(vectors)), sketches, resolution)

    def memory(self, space: VectorSpace) -> int:
        """Return the bytes that one probe of a block needs, the operator's own not counted."""
        return 4 * space.vector_bytes

    def to_arrays(self, space: VectorSpace, state: LanczosState) -> dict[str, np.ndarray]:
        """Return the state as host arrays, for a checkpoint."""
        arrays = {name: getattr(state, name) for name in ("alphas", "betas", "sketches")}
        return arrays | {name: space.to_numpy(getattr(state, name)) for name in ("q", "q_prev")}

    def from_arrays(self, space: VectorSpace, arrays: Mapping[str, np.ndarray]) -> LanczosState:
        """Return the state that `to_arrays` took apart."""
        vectors = {name: space.from_numpy(arrays[name]) for name in ("q", "q_prev")}
        coefficients = {name: arrays[name] for name in ("alphas", "betas", "sketches")}
        return LanczosState(signs=random_signs(space), **vectors, **coefficients)


def _three_term(
    operator: LinearOperator, state: LanczosState, beta: Array, do: Kernels
) -> tuple[Array, Array]:
    """Return A q - beta q_prev and its inner products with q, with as few sweeps as there can be.

    Three vectors and blocks of rows are all that is left when it returns.
    """
    fused = getattr(operator, "three_term", None)
    if fused is not None:
        result = fused(state.q, state.q_prev, beta)
        if result is not NotImplemented:
            return result
    product = multiply(operator, state.q)
    in_place = getattr(operator, "makes_new_arrays", False)
    three_term = do.three_term_into if in_place else do.three_term
    return three_term(product, state.q, state.q_prev, beta)


def check_finite(values: np.ndarray, name: str, step: int | None = None) -> None:
    """Raise a ValueError that explains it if a number that a product gave is not finite."""
    if not np.isfinite(values).all():
        found = values[~np.isfinite(values)][0]
        when = "" if step is None else f" of step {step + 1}"
        msg = (
            f"operator @ x is not finite: {name}{when} is {found}. Look for NaN or "
            "Inf in the matrix, or for overflow in its dtype."
        )
        raise ValueError(msg)


def random_signs(space: VectorSpace) -> Array:
    """Return the fixed random signs (n,), int8, of the sketches: the same for every run."""
    bits = generator(0, _SKETCH_STREAM).integers(0, 2, space.dimension, dtype=np.int8)
    return space.backend.from_numpy(2 * bits - 1, space.backend.xp.int8, space.device)
