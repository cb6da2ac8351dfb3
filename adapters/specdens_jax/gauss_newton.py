"""The Gauss-Newton matrix of a risk, and the residual that makes it the Hessian."""

from __future__ import annotations

from collections.abc import Callable
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
        outputs, forward, rebuild = jax.linearize(
            self._outputs(constants, batch), varying, has_aux=True
        )
        backward = jax.linear_transpose(forward, varying)
        slopes = jax.grad(self._loss(batch, rebuild), has_aux=True)
        _, curvature, sums = jax.linearize(slopes, outputs, has_aux=True)
        return lambda leaves: backward(curvature(forward(leaves)))[0], sums

    def _outputs(self, constants: list[Any], batch: Batch) -> Any:
        def outputs(leaves: Leaves) -> tuple[Leaves, Callable[[Leaves], Any]]:
            params = self.parameters.merge(leaves, constants)
            return _differentiable(self.risk.predict(params, batch.inputs))

        return outputs

    def _loss(self, batch: Batch, rebuild: Callable[[Leaves], Any]) -> Any:
        def value(outputs: Leaves) -> tuple[jax.Array, jax.Array]:
            terms = terms_of(self.risk.loss, rebuild(outputs), batch.targets)
            return terms.weighted.sum(), statistics(terms)

        return value


def _differentiable(outputs: Any) -> tuple[Leaves, Callable[[Leaves], Any]]:
    """Return the real arrays among a model's outputs, and what makes the outputs of them again."""
    flat: tuple[list[Any], Any] = jax.tree.flatten(outputs)
    leaves, structure = flat
    places = [i for i, leaf in enumerate(leaves) if jnp.issubdtype(_dtype(leaf), jnp.inexact)]

    def rebuild(others: list[Any], varying: Leaves) -> Any:
        merged = list(others)
        for place, leaf in zip(places, varying, strict=True):
            merged[place] = leaf
        return structure.unflatten(merged)

    others = [None if i in places else leaf for i, leaf in enumerate(leaves)]
    return [leaves[i] for i in places], jax.tree_util.Partial(rebuild, others)


def _dtype(leaf: Any) -> Any:
    return getattr(leaf, "dtype", bool)  # what is not an array is constant


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
        found, rebuild = outputs(varying)
        slopes, sums = jax.grad(self._loss(batch, rebuild), has_aux=True)(found)

        def weighted(leaves: Leaves) -> jax.Array:
            pairs = zip(outputs(leaves)[0], slopes, strict=True)
            return jnp.asarray(sum((f * slope).sum() for f, slope in pairs))

        _, product = jax.linearize(jax.grad(weighted), varying)
        return product, sums
