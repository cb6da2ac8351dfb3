"""One batch as one layer sees it: its inputs, and the loss's curvature in its outputs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from specdens_jax.class_products import softmax_rows
from specdens_jax.data import Batch, num_examples
from specdens_jax.losses import CrossEntropy, next_token_loss, terms_of, token_loss
from specdens_jax.risk import Leaves, Risk, statistics
from specdens_jax.tapping import Product, tapped

# A column of a root of a Hessian, twice, for every example, and how much it belongs to each class.
Column: TypeAlias = tuple[jax.Array, jax.Array, jax.Array]
Rebuild: TypeAlias = Callable[[list[jax.Array]], Any]


@dataclass(frozen=True, eq=False)
class LayerBatch:
    r"""The curvature :math:`M = U^\top A U` of N examples at S places each, in columns.

    Attributes
    ----------
    product : Product
    x : array of shape (N, S, d)
        What the layer multiplies.
    weights : array of shape (N, G)
        Of the examples, by class, or in one group.
    mixed : array of shape ()
        Whether the model's outputs at one half of the examples depend on those of the layer at the
        other half.
    sums : array
        The `statistics` of the batch.
    """

    product: Product
    x: jax.Array
    weights: jax.Array
    mixed: jax.Array
    sums: jax.Array
    num_columns: int
    _column: Callable[[jax.Array], Column]
    _pull: Callable[[jax.Array], jax.Array]

    def column(self, number: jax.Array) -> Column:
        """Return column `number` of a root of M twice, (N, S, m), and its classes, (N, G).

        M is the sum over columns of the products of the first and the second.
        """
        first, second, members = self._column(number)
        pulled = self._pull(first)
        again = pulled if second is first else self._pull(second)
        return pulled, again, members.astype(pulled.dtype)


class _Loss(NamedTuple):
    """The loss of one batch in terms of K numbers for each of its N examples."""

    values: Callable[[list[jax.Array]], jax.Array]  # from the model's outputs, (N, K)
    column: Callable[[list[jax.Array]], Callable[[jax.Array], Column]]  # number k of a root
    members: Callable[[list[jax.Array]], jax.Array]  # of the terms in classes, (N, T, G)


def layer_batch(
    risk: Risk,
    arguments: tuple[Leaves, list[Any], Batch],
    *,
    bias: bool,
    per_class: bool,
) -> LayerBatch:
    """Linearize a model in the outputs of one layer, and its loss in those of the model.

    Parameters
    ----------
    risk : Risk
        With the layer's leaf alone as what varies.
    arguments : tuple
        The leaf in a list, the other leaves, and a batch.
    bias : bool
        Append 1 to what the layer multiplies.
    per_class : bool
        Whether groups are classes.

    Returns
    -------
    LayerBatch

    Raises
    ------
    ValueError
        If the leaf is not used in one product with a matrix (see `tapped`), or the arrays of the
        batch share no first axis.
    """
    varying, constants, batch = arguments
    examples = num_examples(batch)
    if examples is None:
        shapes = [leaf.shape for leaf in jax.tree.leaves(batch)]
        msg = f"a batch has arrays of shapes {shapes}; give all the first axis of the examples."
        raise ValueError(msg)
    rebuilt: list[Rebuild] = []

    def arrays(varying: Leaves, constants: list[Any], inputs: Any) -> list[jax.Array]:
        found, rebuild = _arrays(risk.predict(risk.parameters.merge(varying, constants), inputs))
        rebuilt.append(rebuild)
        return found

    found = tapped(arrays, (varying, constants, batch.inputs), risk.parameters.names[0])
    make = _softmax if is_softmax(risk.loss) else _general
    loss = make(risk.loss, rebuilt[0], batch.targets, examples)

    def values(change: jax.Array) -> tuple[jax.Array, Any]:
        outputs, x = found.run(change)
        return loss.values(outputs), (outputs, x)

    unchanged = jnp.zeros(found.shape, found.dtype)
    primal, pullback, (outputs, x) = jax.vjp(values, unchanged, has_aux=True)
    terms = terms_of(risk.loss, rebuilt[0](outputs), batch.targets)
    dtype = risk.accumulation_dtype

    def pull(cotangents: jax.Array) -> jax.Array:
        (slopes,) = pullback(cotangents.astype(primal.dtype))
        return found.product.output_rows(slopes, examples).astype(dtype)

    of_loss = loss.column(outputs)

    def column(number: jax.Array) -> Column:
        first, second, members = of_loss(number)
        return first, second, members if per_class else jnp.ones_like(members[:, :1])

    rows = found.product.input_rows(x, examples).astype(dtype)
    if bias:
        rows = jnp.concatenate([rows, jnp.ones_like(rows[..., :1])], axis=-1)
    weights = terms.weights.reshape(examples, -1).astype(dtype)
    if per_class:
        weights = einsum("nt,ntg->ng", weights, loss.members(outputs).astype(dtype))
    else:
        weights = weights.sum(axis=1, keepdims=True)
    return LayerBatch(
        product=found.product,
        x=rows,
        weights=weights,
        mixed=_mixed(pull, primal),
        sums=statistics(terms),
        num_columns=primal.shape[1],
        _column=column,
        _pull=pull,
    )


def einsum(formula: str, *operands: jax.Array) -> jax.Array:
    """Return a sum of products in the full precision of its operands."""
    return jnp.einsum(formula, *operands, precision=jax.lax.Precision.HIGHEST)


def is_softmax(loss: Any) -> bool:
    """Return whether a loss is known to be softmax cross-entropy."""
    return isinstance(loss, CrossEntropy) or loss is token_loss or loss is next_token_loss


def _softmax(loss: Any, rebuild: Rebuild, targets: Any, examples: int) -> _Loss:
    r"""Columns :math:`\sqrt{\kappa p_c} (e_c - p)` for every row of logits and class c."""

    def values(outputs: list[jax.Array]) -> jax.Array:
        return softmax_rows(loss, rebuild(outputs), targets).logits.reshape(examples, -1)

    def members(outputs: list[jax.Array]) -> jax.Array:
        found = softmax_rows(loss, rebuild(outputs), targets).membership
        return found.reshape(examples, -1, found.shape[-1])

    def column(outputs: list[jax.Array]) -> Callable[[jax.Array], Column]:
        found = softmax_rows(loss, rebuild(outputs), targets)
        weights = terms_of(loss, rebuild(outputs), targets).weights
        kappa = (weights.reshape(-1) * found.factor).reshape(examples, -1)
        classes = found.logits.shape[-1]
        wide = jnp.promote_types(found.logits.dtype, jnp.float32)
        p = jax.nn.softmax(found.logits.astype(wide), axis=-1).reshape(examples, -1, classes)
        classified = members(outputs)

        def one(number: jax.Array) -> Column:
            t, c = number // classes, number % classes
            slopes = jax.nn.one_hot(c, classes, dtype=wide) - p[:, t]
            slopes = jnp.sqrt(kappa[:, t] * p[:, t, c])[:, None] * slopes
            column = jnp.zeros_like(p).at[:, t].set(slopes).reshape(examples, -1)
            return column, column, classified[:, t]

        return one

    return _Loss(values, column, members)


def _general(loss: Any, rebuild: Rebuild, targets: Any, examples: int) -> _Loss:
    """Columns of the identity, and of the Hessian of the loss in the outputs."""

    def values(outputs: list[jax.Array]) -> jax.Array:
        real = [leaf for leaf in outputs if _is_real(leaf)]
        for leaf in real:
            if leaf.ndim == 0 or leaf.shape[0] % examples:
                msg = (
                    f"predict returned an array of shape {leaf.shape} for {examples} examples; "
                    "return outputs with the examples along the first axis."
                )
                raise ValueError(msg)
        return jnp.concatenate([leaf.reshape(examples, -1) for leaf in real], axis=1)

    def column(outputs: list[jax.Array]) -> Callable[[jax.Array], Column]:
        def value(flat: jax.Array) -> jax.Array:
            replaced, start = list(outputs), 0
            for i, leaf in enumerate(outputs):
                if _is_real(leaf):
                    stop = start + math.prod(leaf.shape) // examples
                    own = flat[:, start:stop].reshape(leaf.shape)
                    replaced[i], start = own.astype(leaf.dtype), stop
            return terms_of(loss, rebuild(replaced), targets).weighted.sum()

        flat, own = values(outputs), members(outputs)[:, 0]
        _, curvature = jax.linearize(jax.grad(value), flat)

        def one(number: jax.Array) -> Column:
            unit = jnp.zeros_like(flat).at[:, number].set(1)
            return unit, curvature(unit), own

        return one

    def members(outputs: list[jax.Array]) -> jax.Array:
        return jnp.ones((examples, 1, 1))

    return _Loss(values, column, members)


def _mixed(pull: Callable[[jax.Array], jax.Array], values: jax.Array) -> jax.Array:
    """Return whether outputs at the first half of the examples depend on the layer at the rest."""
    half = len(values) // 2
    some = jax.random.normal(jax.random.key(0), values.shape, values.dtype).at[half:].set(0)
    return (pull(some)[half:] != 0).any() if half else jnp.zeros((), bool)


def _is_real(leaf: jax.Array) -> bool:
    return bool(jnp.issubdtype(leaf.dtype, jnp.floating))


def _arrays(outputs: Any) -> tuple[list[jax.Array], Rebuild]:
    """Return the arrays among a model's outputs, and what makes the outputs of them again."""
    flat: tuple[list[Any], Any] = jax.tree.flatten(outputs)
    leaves, structure = flat
    places = [i for i, leaf in enumerate(leaves) if hasattr(leaf, "dtype")]

    def rebuild(arrays: list[jax.Array]) -> Any:
        merged = list(leaves)
        for place, array in zip(places, arrays, strict=True):
            merged[place] = array
        return structure.unflatten(merged)

    return [leaves[i] for i in places], rebuild
