"""The Gauss-Newton matrix of a risk, and the residual that makes it the Hessian."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from specdens_jax.data import Batch
from specdens_jax.linearized import Linear, RiskMatrix
from specdens_jax.losses import terms_of
from specdens_jax.risk import Leaves, statistics


class GaussNewton(RiskMatrix):
    r"""The Gauss-Newton matrix :math:`G = \sum_i w_i J_i^\top A_i J_i / \sum_i w_i` of a risk.

    :math:`J_i` is the Jacobian of the model's outputs for example i, :math:`A_i` the Hessian of its
    loss with respect to these outputs. For a loss that is convex in the outputs :math:`G` is
    positive semidefinite; for softmax cross-entropy it is the Fisher information.

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
    All real arrays of the outputs count as outputs, whatever pytree holds them. Weight decay of
    the risk adds its multiple of the identity.

    References
    ----------
    Schraudolph (2002), Fast curvature matrix-vector products for second-order gradient descent,
    Neural Computation 14(7). doi:10.1162/08997660260028683

    Examples
    --------
    >>> from specdens_jax import SquaredError
    >>> data = jnp.array([[1.0, 0.0], [0.0, 2.0]]), jnp.ones(2)
    >>> matrix = GaussNewton(lambda w, x: x @ w, SquaredError(), jnp.zeros(2), data)
    >>> (matrix @ jnp.eye(2)).tolist()  # of a linear model it is the Hessian
    [[1.0, 0.0], [0.0, 4.0]]
    """

    _decays = True

    def _linearize(
        self, varying: Leaves, constants: list[Any], batch: Batch, operand: Any
    ) -> tuple[Linear, jax.Array]:
        outputs, forward = jax.linearize(self._outputs(constants, batch), varying)
        backward = jax.linear_transpose(forward, varying)
        _, curvature, sums = jax.linearize(
            jax.grad(self._loss(batch), has_aux=True), outputs, has_aux=True
        )
        return lambda leaves: backward(curvature(forward(leaves)))[0], sums

    def _outputs(self, constants: list[Any], batch: Batch) -> Any:
        def outputs(leaves: Leaves) -> Any:
            return self.risk.predict(self.parameters.merge(leaves, constants), batch.inputs)

        return outputs

    def _loss(self, batch: Batch) -> Any:
        def value(outputs: Any) -> tuple[jax.Array, jax.Array]:
            terms = terms_of(self.risk.loss, outputs, batch.targets)
            return terms.weighted.sum(), statistics(terms)

        return value


class Residual(GaussNewton):
    r"""The Hessian less the Gauss-Newton matrix, :math:`\sum_k \partial_k \ell \, \nabla^2 f_k`.

    The part of the Hessian that comes from the curvature of the model's outputs f, weighted by the
    derivative of the loss in each, in one pass. Weight decay has no part in it.

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

    References
    ----------
    Papyan (2019), The full spectrum of deepnet Hessians at scale. arXiv:1811.07062

    Examples
    --------
    >>> from specdens_jax import SquaredError
    >>> data = jnp.eye(2), jnp.ones(2)
    >>> matrix = Residual(lambda w, x: x @ w, SquaredError(), jnp.zeros(2), data)
    >>> (matrix @ jnp.ones(2)).tolist()  # linear models have none
    [0.0, 0.0]
    """

    _decays = False

    def _linearize(
        self, varying: Leaves, constants: list[Any], batch: Batch, operand: Any
    ) -> tuple[Linear, jax.Array]:
        outputs = self._outputs(constants, batch)
        slopes, sums = jax.grad(self._loss(batch), has_aux=True)(outputs(varying))

        def weighted(leaves: Leaves) -> jax.Array:
            products = jax.tree.map(lambda f, slope: (f * slope).sum(), outputs(leaves), slopes)
            return jnp.asarray(sum(jax.tree.leaves(products)))

        _, product = jax.linearize(jax.grad(weighted), varying)
        return product, sums
