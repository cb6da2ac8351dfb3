r"""Chebyshev moments of many probes, two from every product, in three vectors of memory.

With :math:`\tilde A = (A - c) / d` and the interval :math:`[c - d, c + d]` around the spectrum,

.. math:: t_0 = v, \quad t_1 = \tilde A v, \quad t_{r+1} = 2 \tilde A t_r - t_{r-1}

are the vectors :math:`T_r(\tilde A) v`. Because :math:`2 T_r T_s = T_{r+s} + T_{|r-s|}`, they give
the moments :math:`\mu_r = v^* T_r(\tilde A) v` two at a time,

.. math:: \mu_{2r} = 2 \langle t_r, t_r \rangle - \mu_0, \qquad
          \mu_{2r+1} = 2 \langle t_{r+1}, t_r \rangle - \mu_1

(Weisse, Wellein, Alvermann, Fehske 2006, Rev. Mod. Phys. 78, 275, eqs. 33-37). No inner product
is needed for the next vector: nothing waits for the host.

The moments also hold a check of the interval. The vectors' Gram matrix and that of :math:`\tilde A`
between them are sums of two moments, and so give the Ritz values of the Krylov space; one outside
[-1, 1] proves an eigenvalue outside the interval.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import scipy.linalg

from specdens.backends import Array
from specdens.methods.columns import kernels
from specdens.methods.lanczos import check_finite
from specdens.quadrature import MomentRule, rounding
from specdens.spaces import LinearOperator, VectorSpace, multiply


@dataclass(frozen=True)
class MomentState:
    """Everything a run needs to go on from t_r. A value: a step makes a new one."""

    t: Array  # (n, p) t_r
    t_prev: Array  # (n, p) t_{r-1}; zero for r = 0
    moments: np.ndarray  # (p, 2r + 1) float64


@dataclass(frozen=True)
class ChebyshevMoments:
    """Chebyshev iteration that collects `num_moments` moments of every column."""

    num_moments: int
    interval: tuple[float, float]
    extendable = True  # the last state of a run can be taken further

    @property
    def num_steps(self) -> int:
        """Products of one block of probes."""
        return self.num_moments // 2

    def init(self, operator: LinearOperator, probes: Array) -> MomentState:
        """Return the state before the first product. `probes` (n, p) has unit columns."""
        before = operator.space.backend.xp.zeros_like(probes)
        return MomentState(probes, before, np.ones((probes.shape[1], 1)))

    def step(self, operator: LinearOperator, state: MomentState) -> MomentState:
        """Return the state after one product with all columns.

        Raises
        ------
        ValueError
            If the product has the wrong shape or is not finite, or the vectors grow: some
            eigenvalue lies outside the interval.
        """
        space = operator.space
        do = kernels(space.backend, space.wide_dtype)
        low, high = self.interval
        center, half = (low + high) / 2, (high - low) / 2
        first = state.moments.shape[1] == 1
        factor = (1 if first else 2) / half
        coefficients = space.from_numpy(np.array([factor, -factor * center, 0 if first else -1]))
        product = multiply(operator, state.t)
        t, cross, square = do.chebyshev(product, state.t, state.t_prev, coefficients)
        cross, square = (space.to_numpy(x).astype(np.float64) for x in (cross, square))
        check_finite(cross, "a moment", state.moments.shape[1] // 2)
        if square.max() > 2:
            raise ValueError(self._missed("the Chebyshev vectors grow"))
        odd = cross if first else 2 * cross - state.moments[:, 1]
        pair = np.stack([odd, 2 * square - 1], axis=1)
        return MomentState(t, state.t, np.concatenate([state.moments, pair], axis=1))

    def steps_taken(self, state: MomentState) -> int:
        """Return the number of products so far."""
        return state.moments.shape[1] // 2

    def done(self, state: MomentState) -> bool:
        """Tell whether all moments are there."""
        return state.moments.shape[1] >= self.num_moments

    def finish(self, operator: LinearOperator, state: MomentState) -> MomentRule:
        """Return the moments.

        Raises
        ------
        ValueError
            If the moments prove that an eigenvalue lies outside the interval.
        """
        low, high = self.interval
        center, half = (low + high) / 2, (high - low) / 2
        precision = operator.space.precision
        for moments in state.moments:
            extremes = ritz_extremes(moments, precision)
            if np.abs(extremes).max() > 1 + 10 * precision**0.5:
                outside = center + half * extremes[np.abs(extremes).argmax()]
                raise ValueError(self._missed(f"there is an eigenvalue near {outside:.6g}"))
        ends = np.array(self.interval)
        kept = state.moments[:, : self.num_moments]
        return MomentRule(kept, ends, rounding(precision, ends))

    def _missed(self, why: str) -> str:
        low, high = self.interval
        return (
            f"interval=({low:.6g}, {high:.6g}) misses part of the spectrum: {why}. Widen it, or "
            "leave it out to have it found."
        )

    def memory(self, space: VectorSpace) -> int:
        """Return the bytes that one probe of a block needs, the operator's own not counted."""
        return 4 * space.vector_bytes

    def to_arrays(self, space: VectorSpace, state: MomentState) -> dict[str, np.ndarray]:
        """Return the state as host arrays, for a checkpoint."""
        vectors = {name: space.to_numpy(getattr(state, name)) for name in ("t", "t_prev")}
        return vectors | {"moments": state.moments}

    def from_arrays(self, space: VectorSpace, arrays: Mapping[str, np.ndarray]) -> MomentState:
        """Return the state that `to_arrays` took apart."""
        t, t_prev = (space.from_numpy(arrays[name]) for name in ("t", "t_prev"))
        return MomentState(t, t_prev, arrays["moments"])


def ritz_extremes(moments: np.ndarray, precision: float) -> np.ndarray:
    r"""Return the smallest and the largest Ritz value of :math:`\tilde A`, from one row of moments.

    Rayleigh-Ritz in the basis :math:`t_0, ..., t_{m-1}`, without its directions that rounding has
    touched.
    """
    size = (len(moments) - 1) // 2
    if size < 1:
        return moments[:1] * 0
    i, j = np.ogrid[: size + 1, : size + 1]
    products = (moments[np.minimum(i + j, len(moments) - 1)] + moments[np.abs(i - j)]) / 2
    gram = products[:size, :size]  # <t_i, t_j>
    # x T_j is the mean of T_{j+1} and T_{|j-1|}.
    projected = (products[:size, 1:] + products[:size, np.abs(np.arange(-1, size - 1))]) / 2
    squares, vectors = np.linalg.eigh(gram)
    kept = squares > precision**0.5 * squares[-1]
    white = vectors[:, kept] / np.sqrt(squares[kept])
    theta = scipy.linalg.eigvalsh(white.T @ projected @ white)
    return theta[[0, -1]]
