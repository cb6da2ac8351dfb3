"""Passes over the data that the Kronecker factors of one layer are computed by."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from specdens_jax.data import Batch, num_examples
from specdens_jax.layer_curvature import LayerBatch, einsum, layer_batch
from specdens_jax.risk import Leaves, Risk
from specdens_jax.sharding import on_automatic_axes


class LayerPasses:
    """Sums over the data of a risk for one layer, not divided by the sum of weights.

    Compiled once for every shape of a batch, and shared with the risk at other parameters.

    Parameters
    ----------
    risk : Risk
    layer : str
        The leaf that multiplies the layer's inputs.
    bias : bool
        Append 1 to the inputs.
    per_class : bool
        Take the sums of each class apart.
    reduced : bool
        Add z and average x over the places of an example before anything else.

    Attributes
    ----------
    risk : Risk
        With the leaf alone as what varies.

    Raises
    ------
    ValueError
        If `layer` is not the name of one leaf.
    """

    def __init__(
        self, risk: Risk, layer: str, *, bias: bool, per_class: bool, reduced: bool
    ) -> None:
        self.risk: Risk = risk.restricted(layer)
        names = self.risk.parameters.names
        if names != (layer,):
            msg = f"layer={layer!r} stands for {list(names)}; name the leaf that multiplies inputs."
            raise ValueError(msg)
        self.layer, self.bias, self.per_class, self.reduced = layer, bias, per_class, reduced
        self._whole = risk  # whose compiled functions and checks are used

    @cached_property
    @on_automatic_axes
    def places(self) -> np.ndarray:
        """The place of every output and input in flat vectors, (m, d); from a trace of a batch."""
        found: list[np.ndarray] = []

        def look(*arguments: Any) -> None:
            found.append(self._layer(*arguments).product.places)

        batch = next(iter(self._whole.batches()))
        jax.eval_shape(look, self.risk.varying, self.risk.constants, batch)
        (places,) = found
        if self.bias:
            after = np.arange(places.size, places.size + len(places))
            places = np.concatenate([places, after[:, None]], axis=1)
        return places

    def factors(self) -> tuple[list[np.ndarray], float]:
        """Return the sums of M, of x x^T and of weights by class, and the sum of all weights."""
        return self._added_up("factors", self._add_factors, None)

    @on_automatic_axes
    def diagonal(self, U: np.ndarray, V: np.ndarray) -> tuple[list[np.ndarray], float]:  # noqa: N803
        """Return the diagonal of the block in a basis u_i kron v_j, and the sum of weights."""
        bases = [jnp.asarray(basis, self.risk.accumulation_dtype) for basis in (U, V)]
        return self._added_up("diagonal", self._add_squares, bases)

    @on_automatic_axes
    def _added_up(
        self, name: str, function: Callable[..., Any], operand: Any
    ) -> tuple[list[np.ndarray], float]:
        """Return the sums over the data of what `function` gives, and the sum of weights."""
        risk = self._whole
        key = ("kronecker", name, self.layer, self.bias, self.per_class, self.reduced)
        kernel = risk.kernel(key, lambda: jax.jit(function))
        total: list[Any] = []
        parts, examples, mixed = [], 0, False
        for batch in risk.batches():
            new, apart, part = kernel(self.risk.varying, self.risk.constants, batch, operand)
            wide = [np.asarray(array, dtype=np.float64) for array in new]
            total = [a + b for a, b in zip(total, wide, strict=True)] if total else wide
            mixed = mixed or bool(apart)
            parts.append(part)
            examples += num_examples(batch) or 1
        totals = risk.added_up(parts, examples)
        if mixed:
            msg = (
                f"layer={self.layer!r}: outputs of some examples depend on what the layer does for "
                "others; keep examples on the first axis up to this layer, and use running "
                "statistics in batch norm."
            )
            raise ValueError(msg)
        return total, totals.weight

    # What follows is compiled: functions of the leaf, the constants and one batch.

    def _layer(self, varying: Leaves, constants: list[Any], batch: Batch) -> LayerBatch:
        options = {"bias": self.bias, "per_class": self.per_class}
        return layer_batch(self.risk, (varying, constants, batch), **options)

    def _add_factors(
        self, varying: Leaves, constants: list[Any], batch: Batch, operand: None
    ) -> tuple[tuple[jax.Array, ...], jax.Array, jax.Array]:
        """Return the sums of M, of x x^T and of weights, all by class."""
        layer = self._layer(varying, constants, batch)
        x = layer.x.mean(axis=1, keepdims=True) if self.reduced else layer.x
        right = einsum("ng,nsd,nse->gde", layer.weights / x.shape[1], x, x)

        def add(left: jax.Array, number: jax.Array) -> tuple[jax.Array, None]:
            first, second, members = layer.column(number)
            if self.reduced:
                first, second = (part.sum(axis=1, keepdims=True) for part in (first, second))
            return left + einsum("ng,nsa,nsb->gab", members, first, second), None

        m = len(layer.product.outputs)
        left = jnp.zeros((layer.weights.shape[1], m, m), x.dtype)
        left, _ = jax.lax.scan(add, left, jnp.arange(layer.num_columns))
        return (left, right, layer.weights.sum(axis=0)), layer.mixed, layer.sums

    def _add_squares(
        self, varying: Leaves, constants: list[Any], batch: Batch, bases: list[jax.Array]
    ) -> tuple[tuple[jax.Array, ...], jax.Array, jax.Array]:
        """Return the sum of the diagonals of the exact blocks in a basis, (m, d)."""
        layer = self._layer(varying, constants, batch)
        U, V = bases  # noqa: N806
        x = einsum("nsd,de->nse", layer.x, V)

        def add(total: jax.Array, number: jax.Array) -> tuple[jax.Array, None]:
            first, second, _ = layer.column(number)
            first, second = (einsum("nsm,ma->nsa", part, U) for part in (first, second))
            return total + _squares(first, second, x), None

        zero = jnp.zeros((U.shape[1], V.shape[1]), x.dtype)
        total, _ = jax.lax.scan(add, zero, jnp.arange(layer.num_columns))
        return (total,), layer.mixed, layer.sums


def _squares(first: jax.Array, second: jax.Array, x: jax.Array) -> jax.Array:
    """Return the sum over examples of (sum_s first_s x_s^T) (sum_s second_s x_s^T) by entry."""
    if x.shape[1] == 1:
        return einsum("na,nb->ab", (first * second)[:, 0], jnp.square(x[:, 0]))

    def add(total: jax.Array, one: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        a, b, own = one
        return total + einsum("sa,sb->ab", a, own) * einsum("sa,sb->ab", b, own), None

    zero = jnp.zeros((first.shape[2], x.shape[2]), x.dtype)
    return jax.lax.scan(add, zero, (first, second, x))[0]
