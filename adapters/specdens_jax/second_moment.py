"""Second moments of the gradients of single examples, uncentered and centered."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from specdens_jax.data import Batch
from specdens_jax.linearized import Linear, RiskMatrix
from specdens_jax.risk import Leaves, Totals, statistics, summed_gradient


class GradientSecondMoment(RiskMatrix):
    r"""The second moment :math:`\sum_i w_i g_i g_i^\top / \sum_i w_i` of the examples' gradients.

    :math:`g_i` is the gradient of the loss of example i, not multiplied by its weight. No gradient
    of a single example is ever formed: a product is one pass each way through the linearized
    vector of losses. Also called empirical Fisher matrix, though it is not a Fisher information.

    Parameters
    ----------
    risk : Risk or callable
        A risk, or a function ``predict(params, inputs)`` followed by `loss`, `params`, `data`,
        `parameters` and the options of `Risk`.
    loss, params, data, parameters, **options
        As in `Risk`, if `risk` is a function.

    Attributes
    ----------
    risk : Risk
    parameters : FlatParameters
    space : VectorSpace

    Raises
    ------
    ValueError, TypeError
        As `Hessian`.

    Notes
    -----
    An example is an entry of the first axis of the losses. Where it has several terms, its loss is
    their weighted mean and its weight the sum of theirs. With ``reduction="sum"`` nothing is
    divided. Weight decay has no part in it.

    References
    ----------
    Kunstner, Balles, Hennig (2019), Limitations of the empirical Fisher approximation.
    arXiv:1905.12558

    Examples
    --------
    >>> from specdens_jax import SquaredError
    >>> data = jnp.eye(2), jnp.array([0.0, 3.0])  # residuals 1 and -2, gradients 2 r x
    >>> matrix = GradientSecondMoment(lambda w, x: x @ w, SquaredError(), jnp.ones(2), data)
    >>> (matrix @ jnp.eye(2)).tolist()
    [[2.0, 0.0], [0.0, 8.0]]
    """

    def _linearize(
        self, varying: Leaves, constants: list[Any], batch: Batch, operand: Any
    ) -> tuple[Linear, jax.Array]:
        def losses(leaves: Leaves) -> tuple[jax.Array, Any]:
            terms = self.risk.terms(leaves, constants, batch)
            weights = _by_example(terms.weights)
            return _by_example(terms.weighted), (weights, statistics(terms))

        _, forward, (weights, sums) = jax.linearize(losses, varying, has_aux=True)
        inverse = jnp.where(weights == 0, 0, 1 / jnp.where(weights == 0, 1, weights))
        return outer_products(forward, inverse, varying), sums


def outer_products(forward: Any, scale: jax.Array, varying: Leaves) -> Linear:
    """Return the product with the sum of scaled outer products of the rows of a Jacobian."""
    backward = jax.linear_transpose(forward, varying)
    return lambda leaves: backward(scale * forward(leaves))[0]


def _by_example(terms: jax.Array) -> jax.Array:
    return terms.reshape(terms.shape[0], -1).sum(axis=1)


class GradientCovariance(GradientSecondMoment):
    r"""The covariance :math:`\sum_i w_i (g_i - g)(g_i - g)^\top / \sum_i w_i` of the gradients.

    The second moment of the examples' gradients about their mean, the gradient of the risk. See
    `GradientSecondMoment` for what an example is.

    Parameters
    ----------
    risk : Risk or callable
        A risk, or a function ``predict(params, inputs)`` followed by `loss`, `params`, `data`,
        `parameters` and the options of `Risk`.
    loss, params, data, parameters, **options
        As in `Risk`, if `risk` is a function.

    Attributes
    ----------
    risk : Risk
    parameters : FlatParameters
    space : VectorSpace

    Raises
    ------
    ValueError, TypeError
        As `Hessian`.

    Notes
    -----
    The mean takes one more pass over the data, before the first product.

    Examples
    --------
    >>> from specdens_jax import SquaredError
    >>> data = jnp.eye(2), jnp.array([0.0, 3.0])  # gradients (2, 0) and (0, -4)
    >>> matrix = GradientCovariance(lambda w, x: x @ w, SquaredError(), jnp.ones(2), data)
    >>> (matrix @ jnp.eye(2)).tolist()
    [[1.0, 2.0], [2.0, 4.0]]
    """

    _mean: jax.Array | None = None

    def release(self) -> None:
        """Forget the mean."""
        self._mean = None

    def _key(self) -> Any:
        return GradientSecondMoment  # the sum over the data is the same

    def _completed(self, total: jax.Array, rows: jax.Array, totals: Totals) -> jax.Array:
        if self._mean is None:
            gradient, sums = summed_gradient(self.risk)
            self._mean = gradient / (sums.weight or 1.0)
        mass = 1.0 if self.risk.divides else totals.weight
        slopes = rows.astype(self._mean.dtype) @ self._mean
        return total - mass * slopes[:, None] * self._mean
