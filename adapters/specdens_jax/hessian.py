"""The Hessian of a risk: the gradient is linearized once per batch and applied to every column."""

from __future__ import annotations

from typing import Any

import jax

from specdens_jax.data import Batch
from specdens_jax.linearized import Linear, RiskMatrix
from specdens_jax.risk import Leaves, statistics


class Hessian(RiskMatrix):
    r"""The Hessian :math:`\nabla^2 L(\theta)` of a risk with respect to the selected parameters.

    Each batch's gradient is linearized once, :math:`\nabla^2 L \, v` being its derivative along v
    (forward over reverse); the columns of a product share that.

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
        Names and places of the parameters; ``ravel`` and ``unravel``.
    space : VectorSpace
        Vectors of length n, in the dtype and on the devices of the parameters.

    Raises
    ------
    ValueError
        At the first product, if the risk is not one finite function (see `Risk`); or if `x` has
        another length.
    TypeError
        If `x` is not a JAX array, or has another dtype.

    Notes
    -----
    Where a loss or activation has a kink, such as ReLU, the Hessian is that of the smooth pieces.

    References
    ----------
    Pearlmutter (1994), Fast exact multiplication by the Hessian, Neural Computation 6(1), 147.
    doi:10.1162/neco.1994.6.1.147

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> from specdens_jax import SquaredError
    >>> data = jnp.array([[1.0, 0.0], [0.0, 2.0]]), jnp.ones(2)
    >>> hessian = Hessian(lambda w, x: x @ w, SquaredError(), jnp.zeros(2), data)
    >>> (hessian @ jnp.eye(2)).tolist()  # 2 / N times the Gram matrix of the inputs
    [[1.0, 0.0], [0.0, 4.0]]
    """

    _decays = True

    def _linearize(
        self, varying: Leaves, constants: list[Any], batch: Batch, operand: Any
    ) -> tuple[Linear, jax.Array]:
        def value(leaves: Leaves) -> tuple[jax.Array, jax.Array]:
            terms = self.risk.terms(leaves, constants, batch)
            return terms.weighted.sum(), statistics(terms)

        _, product, sums = jax.linearize(jax.grad(value, has_aux=True), varying, has_aux=True)
        return product, sums
