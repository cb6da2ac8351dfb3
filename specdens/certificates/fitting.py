r"""What fitting a posterior takes besides a framework: a schedule, the objective, Kronecker bases.

The adapters' `pac_bayes` are made of it. Arrays may be of any library, and traced or recorded for
derivatives; ``None`` in place of a matrix is the identity.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import array_api_compat as compat
import numpy as np
from numpy.typing import ArrayLike

from specdens.arguments import is_integer, shown
from specdens.certificates.checks import check_counts, check_positive
from specdens.certificates.gaussian import PriorGrid

#: Most examples that errors are counted on at a time.
MOST_AT_ONCE = 2048
_FIRST_SCALE = 1e-4  # of the smallest initial scale to the root mean square of the parameters


@dataclass(frozen=True)
class Schedule:
    """The epochs of an optimization: their rates, and when the basis is made anew.

    Parameters
    ----------
    epochs : int
    learning_rate : float
        That of the beginning.
    batch_size : int
        Examples for one step.
    drops : sequence of int, optional
        Epochs at which the rate falls to a tenth, by default a third and two thirds of all.
    refresh_every : int, optional
        Epochs after which the basis is made anew.

    Raises
    ------
    ValueError
        If a count is no positive integer, the rate is not positive and finite, or a drop is no
        epoch.

    Examples
    --------
    >>> schedule = Schedule(epochs=9, learning_rate=0.5, batch_size=10, refresh_every=4)
    >>> [round(schedule.rate(epoch), 12) for epoch in (0, 2, 3, 6)]
    [0.5, 0.5, 0.05, 0.005]
    >>> [epoch for epoch in range(9) if schedule.refreshes(epoch)]
    [4, 8]
    """

    epochs: int
    learning_rate: float
    batch_size: int
    drops: Sequence[int] | None = None
    refresh_every: int | None = None

    def __post_init__(self) -> None:
        every = 1 if self.refresh_every is None else self.refresh_every
        check_counts(epochs=self.epochs, batch_size=self.batch_size, refresh_every=every)
        check_positive("learning_rate", self.learning_rate)
        thirds = self.epochs // 3, 2 * self.epochs // 3
        drops = thirds if self.drops is None else self.drops
        if np.ndim(drops) != 1 or not all(is_integer(epoch) and epoch >= 0 for epoch in drops):
            msg = f"drops={shown(self.drops)} must be epochs, integers from 0."
            raise ValueError(msg)
        object.__setattr__(self, "drops", tuple(int(epoch) for epoch in drops))

    def rate(self, epoch: int) -> float:
        """Return the learning rate of an epoch."""
        tenths = (0.1 for drop in self.drops or () if epoch >= drop)
        return math.prod(tenths, start=self.learning_rate)

    def refreshes(self, epoch: int) -> bool:
        """Tell whether the basis is made anew before an epoch."""
        every = self.refresh_every
        return every is not None and epoch > 0 and epoch % every == 0

    def run(
        self, one_epoch: Callable[[float, int], ArrayLike], refresh: Callable[[], None]
    ) -> dict[str, np.ndarray]:
        """Run all epochs, and return the history of a `PacBayesResult`.

        Parameters
        ----------
        one_epoch : callable
            Takes the rate and the batch size; returns the epoch's averages of the surrogate loss,
            KL, the prior's variance and the objective.
        refresh : callable
            Makes the basis anew.

        Raises
        ------
        ValueError
            If an average is not finite.
        """
        rows: list[np.ndarray] = []
        for epoch in range(self.epochs):
            if self.refreshes(epoch):
                refresh()
            rows.append(np.asarray(one_epoch(self.rate(epoch), self.batch_size)))
            if not np.isfinite(rows[-1]).all():
                msg = (
                    f"learning_rate={self.learning_rate} makes the optimization diverge in epoch "
                    f"{epoch}; pass a smaller one."
                )
                raise ValueError(msg)
        names = ("surrogate", "kl", "prior_variance", "objective")
        return dict(zip(names, np.array(rows).T.copy(), strict=True))


@dataclass(frozen=True)
class Objective:
    r"""What is added to the surrogate loss of a Gaussian posterior, and minimized with it.

    .. math:: \sqrt{\frac{\mathrm{KL} + 2 \ln(c \ln(b/\lambda)) + \ln(\pi^2 n / (6\delta))}{2(n-1)}}

    Scales and the prior's are varied by their logarithms, :math:`\ln s_i` and
    :math:`\ln \sqrt\lambda`.

    Attributes
    ----------
    grid : PriorGrid
        With b, c and :math:`\delta`; the prior's variance :math:`\lambda` moves between its points.
    num_examples : int
        n.

    References
    ----------
    Dziugaite, Roy (2017), arXiv 1703.11008.

    Examples
    --------
    With s and the prior's scale 1/10, KL is :math:`50 \|w - w_0\|^2`.

    >>> from specdens.certificates import gaussian_kl
    >>> objective, log_scale = Objective(PriorGrid(), 1000), np.log(np.array(0.1))
    >>> w, w0 = np.array([0.1, 0.2]), np.zeros(2)
    >>> kl = objective.divergence(w, np.full(2, log_scale), log_scale, w0)
    >>> print(f"{kl:.3f} {objective.complexity(kl, log_scale):.4f}")
    2.500 0.1107
    >>> round(gaussian_kl(w, [0.1, 0.1], w0, 0.01), 9)
    2.5
    """

    grid: PriorGrid
    num_examples: int

    @property
    def largest_log_prior(self) -> float:
        """Logarithm of the prior's largest scale, whose index in the grid is 1."""
        return 0.5 * math.log(self.grid.variance(1))

    def first_log_prior(self, prior_scale: float) -> float:
        """Return the logarithm of a scale, or of the largest if that is smaller."""
        return min(math.log(prior_scale), self.largest_log_prior)

    def divergence(
        self, mean: Any, log_scales: Any, log_prior: Any, prior_mean: Any, counts: Any = 1
    ) -> Any:
        r"""Return KL of the posterior from the prior, :math:`N(w_0, \lambda I)`.

        Parameters
        ----------
        mean, prior_mean : array of shape (n,)
        log_scales : array of shape (k,)
        log_prior : array of shape ()
        counts : array of shape (k,), optional
            Number of directions that each scale stands for.

        Returns
        -------
        array of shape ()
            What `gaussian_kl` returns, differentiable.
        """
        xp = compat.array_namespace(mean)
        logs = 2 * (log_scales - log_prior)
        apart = xp.sum(xp.square(mean - prior_mean)) * xp.exp(-2 * log_prior)
        return 0.5 * (xp.sum(counts * (xp.exp(logs) - 1 - logs)) + apart)

    def complexity(self, kl: Any, log_prior: Any) -> Any:
        """Return the square root, as an array of shape ()."""
        xp, n, grid = compat.array_namespace(log_prior), self.num_examples, self.grid
        index = grid.precision * (math.log(grid.largest) - 2 * log_prior)
        cost = 2 * xp.log(index) + grid.cost(1, n)
        return xp.sqrt((kl + cost) / (2 * (n - 1)))


def smallest_scale(root_mean_square: float) -> float:
    """Return the least scale to begin with, for parameters of that root mean square.

    Examples
    --------
    >>> smallest_scale(2.0), smallest_scale(0.0)
    (0.0002, 0.0001)
    """
    return _FIRST_SCALE * (root_mean_square or 1.0)


def matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    """Return the shape of the matrix that a parameter's tensor is seen as, first axis first.

    Examples
    --------
    >>> matrix_shape((8, 3, 5, 5)), matrix_shape((8,)), matrix_shape(())
    ((8, 75), (8, 1), (1, 1))
    """
    return (shape[0] if len(shape) else 1), math.prod(shape[1:])


def between(left: Any, x: Any, right: Any) -> Any:
    r"""Return ``left @ x @ right.T``, which is :math:`U \otimes V` times x flattened by rows.

    Parameters
    ----------
    left, right : matrix or None
        U and V.
    x : matrix
    """
    if left is not None:
        x = left @ x
    return x if right is None else x @ right.T


def squared_overlap(new: Any, old: Any) -> Any:
    """Return the squares of the entries of ``new.T @ old``; None where both are.

    They take variances along the columns of `old` to those along the columns of `new`.

    Examples
    --------
    >>> rotation = np.array([[0.6, -0.8], [0.8, 0.6]])
    >>> squared_overlap(rotation, None).round(2) @ [1.0, 0.0]
    array([0.36, 0.64])
    """
    if new is None:
        return None if old is None else old * old
    product = new.T if old is None else new.T @ old
    return product * product
