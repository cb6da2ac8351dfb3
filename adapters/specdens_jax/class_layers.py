"""Class structure of a single linear layer: its features and its backpropagated errors."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from specdens.layer_structure import LayerStructure, LayerSums, averaged
from specdens_jax import class_means
from specdens_jax.class_products import NO_PROBABILITIES, ClassPasses, ExtendedGradients
from specdens_jax.data import Batch, num_examples
from specdens_jax.layer_curvature import einsum
from specdens_jax.risk import Leaves, Risk, Totals
from specdens_jax.sharding import on_automatic_axes
from specdens_jax.tapping import Product, Tapped, tapped


@on_automatic_axes
def layer_structure(risk: Risk, name: str, weighting: str) -> LayerStructure:
    """Return the structure of the layer called `name`, from one pass over the data.

    Parameters
    ----------
    risk : Risk
    name : str
        The leaf that multiplies the layer's inputs, which is used once, on one vector for each
        example.
    weighting : {"probability", "uniform"}

    Returns
    -------
    LayerStructure

    Raises
    ------
    ValueError
        If the leaf is no such matrix, its moments do not fit `MEMORY_BUDGET`, or targets are no
        classes.
    """
    sums, totals = _LayerPass(risk, name, weighting).moments()
    if not np.isfinite(sums.pairs).all():
        raise ValueError(NO_PROBABILITIES)
    return averaged(sums, name, totals.weight if risk.divides else 1.0)


class _LayerPass(ClassPasses):
    """A pass over the data that sees what goes in and out of one layer."""

    def __init__(self, risk: Risk, name: str, weighting: str) -> None:
        super().__init__(risk.restricted(name), weighting)
        names = self.risk.parameters.names
        if names != (name,):
            msg = f"name={name!r} stands for {list(names)}; name the leaf that multiplies inputs."
            raise ValueError(msg)
        self.name = name
        self._whole = risk  # whose compiled functions and checks are used

    def moments(self) -> tuple[LayerSums, Totals]:
        """Return the sums over the data in float64, and what the risk adds up to."""
        risk = self._whole
        key = (type(self), self.weighting, self.name)
        kernel = risk.kernel(key, lambda: jax.jit(self._moments))
        total: LayerSums | None = None
        parts, examples = [], 0
        for batch in risk.batches():
            new, part = kernel(self.risk.varying, self.risk.constants, batch)
            wide = [np.asarray(array, dtype=np.float64) for array in new]
            total = LayerSums(*(wide if total is None else map(np.add, total, wide)))
            parts.append(part)
            examples += num_examples(batch) or 1
        totals = risk.added_up(parts, examples)
        assert total is not None  # or there was nothing to add up
        return total, totals

    # What follows is compiled: functions of the leaf, the constants and one batch.

    def _moments(self, varying: Leaves, constants: list[Any], batch: Batch) -> Any:
        def arrays(*arguments: Any) -> list[jax.Array]:
            logits, rest = self._terms(*arguments)
            return [logits, *rest]

        found = tapped(arrays, (varying, constants, batch), self.name)

        def run(change: jax.Array) -> Any:
            (logits, *rest), x = found.run(change)
            return logits, (rest, x)

        unchanged = jnp.zeros(found.shape, found.dtype)
        logits, pullback, ((membership, kappa, sums), x) = jax.vjp(run, unchanged, has_aux=True)
        inputs = self._checked_inputs(found, x, batch, len(logits))
        extended = self._extended(logits, membership, kappa)

        def errors_as(other: jax.Array) -> jax.Array:
            (slopes,) = pullback(_cotangents(extended, other).astype(logits.dtype))
            rows = found.product.output_rows(slopes, len(logits))
            return rows[:, 0].astype(self.risk.accumulation_dtype)

        return self._summed(extended, inputs, errors_as, found.product), sums

    def _checked_inputs(self, found: Tapped, x: jax.Array, batch: Batch, rows: int) -> jax.Array:
        """Return the inputs of the layer, (N, d), one for each row of logits."""
        m, d = found.product.places.shape
        shape = found.shape
        if num_examples(batch) != rows or np.prod(shape) != rows * m:
            msg = (
                f"name={self.name!r}: the layer returned {shape} for {rows} rows of logits; "
                "expected one vector for each."
            )
            raise ValueError(msg)
        needed, budget = 8 * (m**2 + d**2), class_means.MEMORY_BUDGET
        if needed > budget:
            msg = (
                f"name={self.name!r}: the second moments of the layer take {needed:,} bytes, more "
                f"than {budget:,} that are allowed; take another layer."
            )
            raise ValueError(msg)
        return found.product.input_rows(x, rows)[:, 0].astype(self.risk.accumulation_dtype)

    def _summed(
        self, extended: ExtendedGradients, x: jax.Array, errors_as: Any, product: Product
    ) -> LayerSums:
        members, shares = (a.astype(x.dtype) for a in (extended.members, extended.shares))

        def add(square: jax.Array, other: jax.Array) -> tuple[jax.Array, jax.Array]:
            errors = errors_as(other)
            weights = members * shares[:, other, None]
            square += einsum("na,nb->ab", weights.sum(1, keepdims=True) * errors, errors)
            return square, einsum("nc,nm->cm", weights, errors)

        m, kappa = len(product.outputs), members.sum(1, keepdims=True)
        others = jnp.arange(members.shape[1])
        square, errors = jax.lax.scan(add, jnp.zeros((m, m), x.dtype), others)
        return LayerSums(
            shares=members.sum(0),
            features=einsum("nc,nd->cd", members, x),
            feature_square=einsum("nd,ne->de", kappa * x, x),
            pairs=extended.by_pairs(jnp.ones_like(extended.shares)),
            errors=errors.swapaxes(0, 1),  # the true class first
            error_square=square,
        )


def _cotangents(extended: ExtendedGradients, other: jax.Array) -> jax.Array:
    """Return q (p - e) for every row as if its label were `other`, (N, C)."""
    p = extended.probabilities
    length = jnp.take(extended.lengths, other, axis=1)[:, None]
    return length * (p - jax.nn.one_hot(other, p.shape[1], dtype=p.dtype))
