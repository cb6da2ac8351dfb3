r"""Partial reorthogonalization: which old blocks a new Lanczos block must be cleaned of, and when.

Rounding makes new blocks lose their orthogonality to old ones gradually, and in a way that the
coefficients foretell (Simon 1984; for blocks Grimes, Lewis and Simon 1994). From

.. math:: A Q_k = Q_{k-1} R_{k-1}^* + Q_k M_k + Q_{k+1} R_k + F_k, \qquad \Omega_{jk} = Q_j^* Q_k,

multiplied by :math:`Q_j^*`, less the same with j and k exchanged, follows

.. math:: \Omega_{j,k+1} R_k = R_{j-1} \Omega_{j-1,k} + M_j \Omega_{jk} + R_j^* \Omega_{j+1,k}
          - \Omega_{j,k-1} R_{k-1}^* - \Omega_{jk} M_k + F_j^* Q_k - Q_j^* F_k,

which costs :math:`O(k p^3)` on the host and reads no vector. The size of the rounding F, whatever
the arithmetic of the operator, is measured in every step: it is what is left of A Q_k along
Q_{k-1} and Q_k when nothing should be.

A block that is cleaned takes its predecessor with it, in the same sweep over the old ones: the
recurrence has two terms, and brings back in one step what either has (Simon 1984). Old blocks are
read half as often as if the next block were cleaned, too. That the predecessor has been multiplied
before does not matter. What leaves it lies in the span of old blocks, and so does A times that, up
to the newest block, to which all of them are orthogonal by then.

While the basis is orthonormal to the square root of the precision, T is the projection of A to full
precision (Simon 1984): no ghosts, no shift of a Ritz value that could be seen. Neighbors are kept
orthogonal to the precision itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Overlaps:
    """Estimates of how far the two newest blocks, k and k - 1, are from orthogonal to the others.

    A value, like the state of the iteration it belongs to.
    """

    older: np.ndarray  # (k - 1, p, p) Omega_{j, k-1}
    newer: np.ndarray  # (k, p, p) Omega_{j, k}
    rounding: np.ndarray  # (k,) root mean square entry of Q_j^* F

    @classmethod
    def of_first_block(cls, p: int, dtype: np.dtype) -> Overlaps:
        """Return the overlaps of a block that has none before it."""
        empty = np.zeros((0, p, p), dtype=dtype)
        return cls(empty, empty, np.zeros(0))

    def predict(
        self, diagonal: np.ndarray, coupling: np.ndarray, factor: np.ndarray, rounding: float
    ) -> Overlaps:
        """Return the overlaps of the next block, which only its two predecessors were taken from.

        Parameters
        ----------
        diagonal, coupling : numpy.ndarray
            ``(k + 1, p, p)`` M_0, ..., M_k, and R_{-1}, ..., R_{k-1} with R_{-1} of the probes.
        factor : numpy.ndarray
            ``(p, p)`` R_k. Rows of dropped vectors are zero.
        rounding : float
            Root mean square entry of Q_j^* F_k.
        """
        k = len(self.newer)
        total = np.zeros((k + 1, *factor.shape), dtype=factor.dtype)
        if k > 1:
            old, below = total[: k - 1], coupling[1:k]
            old += diagonal[: k - 1] @ self.newer[:-1] - self.newer[:-1] @ diagonal[k]
            old += below.conj().swapaxes(1, 2) @ self.newer[1:]
            old -= self.older @ coupling[k].conj().T
            old[1:] += below[:-1] @ self.newer[:-2]
        all_rounding = np.append(self.rounding, rounding)
        size = np.abs(total)
        phase = np.divide(total, size, out=np.ones_like(total), where=size > 0)
        # Rounding is taken to add to what is there: an estimate on the safe side.
        total += np.hypot(all_rounding, rounding)[:, None, None] * phase
        newer = total @ np.linalg.pinv(factor)
        return Overlaps(self.newer, newer, all_rounding)

    def to_clean(self, precision: float) -> np.ndarray:
        """Return of which old blocks (k - 2,) the newest and its predecessor must be cleaned.

        None, while every vector of the newest is orthogonal to the span of all old ones to the
        square root of the precision; otherwise every block up to the last that can be seen in it:
        what comes back are converged Ritz vectors, which are made of the first blocks.
        """
        largest = np.abs(self.newer[:-2]).max(axis=(1, 2), initial=0.0)
        drift = np.sqrt((np.abs(self.newer) ** 2).sum(axis=(0, 1)))
        seen = np.flatnonzero(largest > precision**0.75)
        if drift.max() <= precision**0.5 or not seen.size:
            return np.zeros(len(largest), dtype=bool)
        return np.arange(len(largest)) <= seen.max()

    def touches_neighbors(self, precision: float) -> bool:
        """Tell whether the newest block must be cleaned of its two predecessors.

        T feels these overlaps to first order, so they are kept to a few roundings. They exceed that
        if little was left of the product.
        """
        return bool(np.abs(self.newer[-2:]).max() > 16 * precision)

    def after_cleaning(self, cleaned: np.ndarray, factor: np.ndarray, precision: float) -> Overlaps:
        """Return the overlaps when both newest blocks have been cleaned of old ones.

        And the newest of its two predecessors.
        """
        fresh = self.rounding[-1] * np.abs(np.linalg.pinv(factor)).max(axis=0)
        neighbors = len(self.newer) - len(cleaned)
        every = np.append(cleaned, np.ones(neighbors, dtype=bool))
        newer = np.where(every[:, None, None], fresh, self.newer)
        others = np.append(cleaned, np.zeros(len(self.older) - len(cleaned), dtype=bool))
        older = np.where(others[:, None, None], precision, self.older)
        return Overlaps(older, newer, self.rounding)
