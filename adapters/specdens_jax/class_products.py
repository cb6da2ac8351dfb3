"""Passes over the data that the class structure of softmax cross-entropy is computed by."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from specdens_jax.accumulation import accumulated, finished
from specdens_jax.data import Batch, num_examples
from specdens_jax.losses import CrossEntropy, logits_of, next_token_loss, terms_of, token_loss
from specdens_jax.risk import Leaves, Risk, Totals, new_total, statistics

# What a batch is linearized to: its extended gradients, forward and backward, its statistics.
Linearized: TypeAlias = tuple["ExtendedGradients", Callable[..., Any], Callable[..., Any], Any]


NO_PROBABILITIES = (
    "targets has rows of class probabilities that are negative; expected probabilities, so that "
    "every example belongs to some classes."
)


class SoftmaxRows(NamedTuple):
    """Softmax cross-entropy by terms, one row of logits for each."""

    logits: jax.Array  # (N, C)
    membership: jax.Array  # (N, C), how much of a term belongs to each class
    factor: jax.Array  # (N,), the loss has the Hessian factor * (diag p - p p^T) in the logits


def softmax_rows(loss: Any, outputs: Any, targets: Any) -> SoftmaxRows:
    """Return the rows that a softmax cross-entropy consists of.

    A term belongs to the class of its label, smoothed or not; with probabilities as targets to all
    classes in their proportion, which is nan if one is negative.

    Raises
    ------
    ValueError
        If `loss` is not known to be softmax cross-entropy.
    """
    check_softmax(loss)
    logits, targets = logits_of(outputs), jnp.asarray(targets)
    if loss is next_token_loss:
        logits, targets = logits[:, :-1], targets[:, 1:]
    own = loss if isinstance(loss, CrossEntropy) else CrossEntropy()
    classes = logits.shape[-1]
    if jnp.issubdtype(targets.dtype, jnp.floating):
        total = targets.sum(-1, keepdims=True)
        even = jnp.full_like(targets, 1 / classes)
        membership = jnp.where(total == 0, even, targets / jnp.where(total == 0, 1, total))
        no_probability = (targets < 0).any(-1, keepdims=True)
        membership = jnp.where(no_probability, jnp.nan, membership)  # for the host to refuse
    else:
        membership = jax.nn.one_hot(targets, classes)
    factor = own.curvature_factor(logits, targets)
    return SoftmaxRows(
        logits.reshape(-1, classes), membership.reshape(-1, classes), factor.reshape(-1)
    )


def check_softmax(loss: Any) -> None:
    """Refuse losses that are not known to be softmax cross-entropy.

    Raises
    ------
    ValueError
        If `loss` is another.
    """
    if not (isinstance(loss, CrossEntropy) or loss is token_loss or loss is next_token_loss):
        name = getattr(loss, "__name__", type(loss).__name__)
        msg = (
            f"loss={name} is not known to be softmax cross-entropy, whose classes are meant here; "
            "pass a Risk with CrossEntropy(), token_loss or next_token_loss as its loss."
        )
        raise ValueError(msg)


class ExtendedGradients(NamedTuple):
    r"""Extended gradients :math:`h_{icc'} = q_{ic'} J_i^\top (p_i - e_{c'})` of one batch.

    Their weights are :math:`\kappa_i y_{ic} r_{ic'}`, not yet divided by those of the risk, and
    :math:`r q^2 = p`. The vectors do not depend on c, the weights do.
    """

    probabilities: jax.Array  # p, (N, C)
    members: jax.Array  # kappa y, (N, C)
    shares: jax.Array  # r, (N, C)
    lengths: jax.Array  # q, (N, C)

    def slopes(self, tangents: jax.Array) -> jax.Array:
        """Return h^T v, (N, C), from the derivatives J_i v of the logits."""
        p, t = self.probabilities, tangents.astype(self.probabilities.dtype)
        return self.lengths * ((p * t).sum(-1, keepdims=True) - t)

    def by_pairs(self, slopes: jax.Array) -> jax.Array:
        """Return the weighted sums of `slopes` over the terms for every pair of classes, (C, C)."""
        return jnp.matmul(self.members.T, self.shares * slopes, precision="highest")

    def spread(self, table: jax.Array) -> jax.Array:
        """Return the sums over c of kappa y_ic times row c of a table (C, C), (N, C)."""
        return jnp.matmul(self.members, table.astype(self.members.dtype), precision="highest")

    def cotangents(self, factors: jax.Array) -> jax.Array:
        """Return the cotangents of the logits that pull back to the sum of factors r h."""
        weighted = self.shares * self.lengths * factors
        return self.probabilities * weighted.sum(-1, keepdims=True) - weighted


class ClassPasses:
    """Sums over the data of a risk for pairs of classes, not divided by the sum of weights.

    Every method is one pass, compiled once for every shape of a batch and number of vectors, and
    shared with the risk at other parameters.
    """

    def __init__(self, risk: Risk, weighting: str) -> None:
        self.risk, self.weighting = risk, weighting

    def num_classes(self) -> int:
        """Return the number of logits; nothing is computed."""
        risk = self.risk
        traced = self._kernel("logits", self._logits)
        batch = next(risk.batches())
        return int(jax.eval_shape(traced, risk.varying, risk.constants, batch).shape[-1])

    def weights(self) -> tuple[np.ndarray, Totals]:
        """Return the sums of the pairs' weights, (C, C), and what the risk adds up to."""
        kernel, sums = self._kernel("weights", self._weights), _Sums(self.risk)
        total: Any = 0.0
        for arguments in sums.arguments():
            new, part = kernel(*arguments)
            total = total + np.asarray(new, dtype=np.float64)
            sums.parts.append(part)
        return total, sums.totals()

    def products(self, rows: jax.Array) -> np.ndarray:
        """Return the weighted sums of h^T v for every pair and row v of (k, n), (k, C, C)."""
        kernel, sums = self._kernel("products", self._products), _Sums(self.risk)
        total: Any = 0.0
        for arguments in sums.arguments():
            new, part = kernel(*arguments, rows)
            total = total + np.asarray(new, dtype=np.float64)
            sums.parts.append(part)
        sums.totals()
        return np.asarray(total)

    def vectors(self, classes: np.ndarray, others: np.ndarray) -> jax.Array:
        """Return weighted sums of h as rows (k, n): of c = classes[j], c' where others[j] is 1.

        A class without examples in a batch costs nothing there.
        """
        kernel = self._kernel("vectors", self._vectors, donate=5)
        return self._added(kernel, len(classes), jnp.asarray(classes), jnp.asarray(others))

    def combinations(self, tables: np.ndarray, rows: jax.Array | None = None) -> jax.Array:
        """Return the sums of h times weights and tables (k, C, C), and times h^T v if `rows`."""
        wide = jax.dtypes.canonicalize_dtype(np.float64)
        kernel = self._kernel(("combinations", rows is None), self._combinations, donate=5)
        return self._added(kernel, len(tables), jnp.asarray(tables, dtype=wide), rows)

    def _added(self, kernel: Callable[..., Any], count: int, *operands: Any) -> jax.Array:
        total, sums = new_total(self.risk, count), _Sums(self.risk)
        for arguments in sums.arguments():
            total, part = kernel(*arguments, *operands, total)
            sums.parts.append(part)
        sums.totals()
        return finished(total)

    def _kernel(
        self, name: Any, function: Callable[..., Any], donate: int | None = None
    ) -> Callable[..., Any]:
        key = (type(self), self.weighting, name)
        return self.risk.kernel(key, lambda: jax.jit(function, donate_argnums=donate))

    # What follows is compiled: functions of the leaves, the constants and one batch.

    def _terms(
        self, varying: Leaves, constants: list[Any], batch: Batch
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array]]:
        risk = self.risk
        outputs = risk.predict(risk.parameters.merge(varying, constants), batch.inputs)
        rows = softmax_rows(risk.loss, outputs, batch.targets)
        terms = terms_of(risk.loss, outputs, batch.targets)
        kappa = terms.weights.reshape(-1) * rows.factor
        return rows.logits, (rows.membership, kappa, statistics(terms))

    def _logits(self, varying: Leaves, constants: list[Any], batch: Batch) -> jax.Array:
        return self._terms(varying, constants, batch)[0]

    def _extended(
        self, logits: jax.Array, membership: jax.Array, kappa: jax.Array
    ) -> ExtendedGradients:
        wide = jnp.promote_types(logits.dtype, jnp.float32)
        p = jax.nn.softmax(logits.astype(wide), axis=-1)
        members = kappa.astype(wide)[:, None] * membership.astype(wide)
        one = jnp.ones_like(p)
        if self.weighting == "uniform":
            return ExtendedGradients(p, members, one, jnp.sqrt(p))
        return ExtendedGradients(p, members, p, one)

    def _weights(self, varying: Leaves, constants: list[Any], batch: Batch) -> Any:
        logits, (membership, kappa, sums) = self._terms(varying, constants, batch)
        extended = self._extended(logits, membership, kappa)
        return extended.by_pairs(jnp.ones_like(extended.shares)), sums

    def _linearized(self, varying: Leaves, constants: list[Any], batch: Batch) -> Linearized:
        logits, forward, (membership, kappa, sums) = jax.linearize(
            lambda leaves: self._terms(leaves, constants, batch), varying, has_aux=True
        )
        transposed = jax.linear_transpose(forward, varying)

        def backward(cotangents: jax.Array) -> Leaves:
            return transposed(cotangents.astype(logits.dtype))[0]

        return self._extended(logits, membership, kappa), forward, backward, sums

    def _products(
        self, varying: Leaves, constants: list[Any], batch: Batch, rows: jax.Array
    ) -> Any:
        extended, forward, _, sums = self._linearized(varying, constants, batch)
        blocks = self.risk.parameters.blocks(rows)
        tables = jax.lax.map(lambda v: extended.by_pairs(extended.slopes(forward(v))), blocks)
        return tables, sums

    def _vectors(
        self,
        varying: Leaves,
        constants: list[Any],
        batch: Batch,
        classes: jax.Array,
        others: jax.Array,
        total: Any,
    ) -> Any:
        extended, _, backward, sums = self._linearized(varying, constants, batch)

        def one(pair: tuple[jax.Array, jax.Array]) -> Leaves:
            mine = jnp.take(extended.members, pair[0], axis=1)[:, None]
            factors = mine * pair[1].astype(mine.dtype)
            return jax.lax.cond(
                (mine != 0).any(),
                lambda: backward(extended.cotangents(factors)),
                lambda: [jnp.zeros_like(leaf) for leaf in varying],
            )

        blocks = jax.lax.map(one, (classes, others))
        rows = self.risk.parameters.rows(blocks, self.risk.accumulation_dtype)
        return accumulated(total, rows), sums

    def _combinations(
        self,
        varying: Leaves,
        constants: list[Any],
        batch: Batch,
        tables: jax.Array,
        rows: jax.Array | None,
        total: Any,
    ) -> Any:
        extended, forward, backward, sums = self._linearized(varying, constants, batch)
        parameters = self.risk.parameters
        blocks = None if rows is None else parameters.blocks(rows)

        def one(pair: tuple[jax.Array, Any]) -> Leaves:
            factors = extended.spread(pair[0])
            if rows is not None:
                kappa = extended.members.sum(-1, keepdims=True)
                factors = factors + kappa * extended.slopes(forward(pair[1]))
            return backward(extended.cotangents(factors))

        new = jax.lax.map(one, (tables, blocks))
        return accumulated(total, parameters.rows(new, self.risk.accumulation_dtype)), sums


class _Sums:
    """What a pass hands to the compiled function, and the statistics that come back."""

    def __init__(self, risk: Risk) -> None:
        self.risk, self.examples = risk, 0
        self.parts: list[jax.Array] = []

    def arguments(self) -> Iterator[tuple[Leaves, list[Any], Batch]]:
        for batch in self.risk.batches():
            self.examples += num_examples(batch) or 1
            yield self.risk.varying, self.risk.constants, batch

    def totals(self) -> Totals:
        return self.risk.added_up(self.parts, self.examples)
