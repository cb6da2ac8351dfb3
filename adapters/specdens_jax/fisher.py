"""The Fisher information matrix of a model, from targets drawn from its own predictions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from specdens import uniforms
from specdens.arguments import checked_count, checked_seed
from specdens_jax.data import Batch
from specdens_jax.linearized import Linear, RiskMatrix
from specdens_jax.parameters import PyTree, Selection
from specdens_jax.risk import Leaves, Risk, statistics
from specdens_jax.second_moment import outer_products


class Fisher(RiskMatrix):
    r"""The sampled Fisher matrix :math:`\sum_i w_i \frac1S \sum_s g_{is} g_{is}^\top / \sum_i w_i`.

    :math:`g_{is}` is the gradient of the loss of term i, not multiplied by its weight, at the s-th
    target drawn from the model's own predictive distribution. Its expectation is the Gauss-Newton
    matrix.

    Parameters
    ----------
    risk : Risk or callable
        A risk, or a function ``predict(params, inputs)`` followed by `loss`, `params`, `data`,
        `parameters` and the options of `Risk`. The loss must be able to draw targets:
        `CrossEntropy`, `SquaredError`, `BinaryCrossEntropy`, or one with their methods ``draws``,
        ``sampler`` and ``resampled``.
    loss, params, data, parameters
        As in `Risk`, if `risk` is a function.
    num_samples : int
        The number S of targets drawn for each term.
    seed : int
        Determines the samples, with the place of a term in the data: they are the same in every
        product, for every split into batches, and in `specdens_torch`.
    **options
        As in `Risk`, if `risk` is a function.

    Attributes
    ----------
    risk : Risk
    num_samples, seed : int
    parameters : FlatParameters
    space : VectorSpace

    Raises
    ------
    ValueError
        If `num_samples` or `seed` is out of range, or the loss cannot draw targets; and as
        `Hessian`.
    TypeError
        As `Hessian`.

    References
    ----------
    Martens (2020), New insights and perspectives on the natural gradient method, JMLR 21(146).
    arXiv:1412.1193

    Examples
    --------
    >>> from specdens_jax import CrossEntropy
    >>> data = jnp.ones((3, 1)), jnp.zeros(3, dtype=int)  # probabilities 1/2
    >>> fisher = Fisher(lambda w, x: x @ w, CrossEntropy(), jnp.zeros((1, 2)), data)
    >>> (fisher @ jnp.eye(2)).tolist()  # gradients +-(1/2, -1/2)
    [[0.25, -0.25], [-0.25, 0.25]]
    """

    def __init__(
        self,
        risk: Risk | Callable[..., Any],
        loss: Any = None,
        params: PyTree = None,
        data: Any = None,
        parameters: Selection = None,
        *,
        num_samples: int = 1,
        seed: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(risk, loss, params, data, parameters, **options)
        num_samples, seed = checked_count("num_samples", num_samples), checked_seed(seed)
        if not all(hasattr(self.risk.loss, name) for name in ("draws", "sampler", "resampled")):
            name = getattr(self.risk.loss, "__name__", type(self.risk.loss).__name__)
            msg = (
                f"loss={name} has no methods draws, sampler and resampled, so no targets can be "
                "drawn; CrossEntropy, SquaredError and BinaryCrossEntropy have, GaussNewton needs "
                "none."
            )
            raise ValueError(msg)
        self.num_samples, self.seed = num_samples, seed

    def _key(self) -> Any:
        return type(self), self.num_samples

    def _operands(self) -> Iterator[tuple[Batch, Any]]:
        """Yield the batches with the uniform numbers of their samples, (S, ...)."""
        place = 0
        for batch in self.risk.batches():
            shape = self._draws(batch)
            count = int(np.prod(shape))
            numbers = [
                uniforms(self.seed, sample, place, count).reshape(shape)
                for sample in range(self.num_samples)
            ]
            place += count
            # In float32 the largest would be rounded to one.
            below = np.nextafter(np.float32(1), np.float32(0))
            wide = jax.dtypes.canonicalize_dtype(np.float64)
            stacked = np.stack(numbers) if wide == np.float64 else np.minimum(numbers, below)
            yield batch, jnp.asarray(stacked, dtype=wide)

    def _draws(self, batch: Batch) -> tuple[int, ...]:
        """Return the shape of one sample's uniform numbers, without computing anything."""
        risk = self.risk

        def look(varying: Leaves, constants: list[Any], batch: Batch) -> jax.Array:
            outputs = risk.predict(risk.parameters.merge(varying, constants), batch.inputs)
            return jnp.zeros(risk.loss.draws(outputs, batch.targets), bool)

        traced = risk.kernel("draws", lambda: jax.jit(look))  # once for every shape of a batch
        return tuple(jax.eval_shape(traced, risk.varying, risk.constants, batch).shape)

    def _linearize(
        self, varying: Leaves, constants: list[Any], batch: Batch, operand: Any
    ) -> tuple[Linear, jax.Array]:
        risk = self.risk

        def losses(leaves: Leaves) -> tuple[jax.Array, Any]:
            outputs = risk.predict(risk.parameters.merge(leaves, constants), batch.inputs)
            fixed = jax.lax.stop_gradient(outputs)

            def one(numbers: jax.Array) -> jax.Array:
                sampled = risk.loss.sampler(fixed, batch.targets, numbers)
                return risk.loss.resampled(outputs, batch.targets, sampled)

            terms = risk.terms(varying, constants, batch)
            return jax.vmap(one)(operand), (terms.weights, statistics(terms))

        _, forward, (weights, sums) = jax.linearize(losses, varying, has_aux=True)
        return outer_products(forward, weights / self.num_samples, varying), sums
