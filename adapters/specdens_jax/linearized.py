"""What all matrices of a risk share: one compiled function per shape of batch, for all columns."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, TypeAlias

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from specdens import Arithmetic, VectorSpace
from specdens_jax.accumulation import accumulated, finished
from specdens_jax.data import Batch, num_examples
from specdens_jax.parameters import FlatParameters, PyTree, Selection
from specdens_jax.risk import Leaves, Risk, Totals, new_total
from specdens_jax.sharding import num_parts, on_automatic_axes

# One batch's share of a matrix, not yet divided by the sum of weights: from leaves to leaves.
Linear: TypeAlias = Callable[[Leaves], Leaves]


class RiskMatrix(Arithmetic, ABC):
    """A symmetric matrix of a risk over its flat parameters, known through its products.

    A subclass says how one batch is linearized. That happens once for each batch of a product,
    inside one compiled function, which then goes through the columns.
    """

    _decays: ClassVar[bool] = False  # whether the risk's weight decay is a part of the matrix

    def __init__(
        self,
        risk: Risk | Callable[..., Any],
        loss: Any = None,
        params: PyTree = None,
        data: Any = None,
        parameters: Selection = None,
        **options: Any,
    ) -> None:
        self.risk: Risk = as_risk(risk, loss, params, data, parameters, options)

    @abstractmethod
    def _linearize(
        self, varying: Leaves, constants: list[Any], batch: Batch, operand: Any
    ) -> tuple[Linear, jax.Array]:
        """Return the product with this batch's share of the matrix, and the batch's statistics.

        A pure function; `operand` is what `_operands` gave with this batch.
        """

    def _operands(self) -> Iterator[tuple[Batch, Any]]:
        """Yield the batches of one pass, each with an array or None that comes from outside."""
        for batch in self.risk.batches():
            yield batch, None

    @property
    def parameters(self) -> FlatParameters:
        """Names and places of the parameters; ``ravel`` and ``unravel``."""
        return self.risk.parameters

    @property
    def space(self) -> VectorSpace:
        """The flat vectors: length n, dtype and device of the parameters."""
        return self.risk.parameters.space

    @on_automatic_axes
    def __matmul__(self, x: jax.Array, /) -> jax.Array:
        check_vectors(x, self.space)
        rows = x[None] if x.ndim == 1 else x.T
        rows = jax.device_put(rows, self.parameters.rows_layout(len(rows)))
        total, totals = self._multiplied(rows)
        total = finished(total)
        if self.risk.divides:
            total = total / totals.weight
        total = self._completed(total, rows, totals).astype(x.dtype)
        return self.parameters.placed(total[0] if x.ndim == 1 else total.T)

    def _multiplied(self, rows: jax.Array) -> tuple[Any, Totals]:
        """Return the sum over the data of the products with rows (k, n)."""
        risk = self.risk
        kernel = risk.kernel(self._key(), lambda: jax.jit(self._add_products, donate_argnums=5))
        total, sums, examples = new_total(risk, len(rows)), [], 0
        for batch, operand in self._operands():
            total, part = kernel(risk.varying, risk.constants, batch, operand, rows, total)
            sums.append(part)
            examples += num_examples(batch) or 1
        return total, risk.added_up(sums, examples)

    def release(self) -> None:
        """Forget what was computed for the risk that this matrix had before."""

    def _key(self) -> Any:
        """Return what the compiled function depends on, arrays apart."""
        return type(self)

    def _add_products(
        self,
        varying: Leaves,
        constants: list[Any],
        batch: Batch,
        operand: Any,
        rows: jax.Array,
        total: Any,
    ) -> tuple[Any, jax.Array]:
        product, sums = self._linearize(varying, constants, batch, operand)
        new = _by_columns(product, rows, self.parameters, self.risk.accumulation_dtype)
        return accumulated(total, new), sums

    def _completed(self, total: jax.Array, rows: jax.Array, totals: Totals) -> jax.Array:
        """Add what is not a sum over the data to the finished products `total` with `rows`."""
        if self._decays and self.risk.weight_decay:
            return total + self.risk.weight_decay * rows
        return total

    def __repr__(self) -> str:
        return f"{type(self).__name__}(n={self.space.dimension:,}, {self.risk!r})"


def _by_columns(
    product: Linear, rows: jax.Array, parameters: FlatParameters, dtype: Any
) -> jax.Array:
    """Return the products with rows (k, n), one after the other."""
    layout = parameters.rows_layout(len(rows))
    if not isinstance(layout, NamedSharding):
        return parameters.rows(jax.lax.map(product, parameters.blocks(rows)), dtype)

    def one(row: jax.Array) -> jax.Array:  # no more than one row at a time is whole anywhere
        blocks = product([block[0] for block in parameters.blocks(row[None])])
        return parameters.rows([block[None] for block in blocks], dtype)[0]

    axes = layout.spec[0]
    if num_parts(layout, axes) == 1:
        return jax.lax.map(one, rows)
    # The rows of one device come one after the other, those of different devices at once.
    groups = rows.reshape(num_parts(layout, axes), -1, rows.shape[1]).swapaxes(0, 1)
    new = jax.lax.map(jax.vmap(one, spmd_axis_name=axes), groups)
    return new.swapaxes(0, 1).reshape(rows.shape)


def as_risk(
    risk: Risk | Callable[..., Any],
    loss: Any,
    params: PyTree,
    data: Any,
    parameters: Selection,
    options: dict[str, Any],
) -> Risk:
    """Return the risk that the arguments of a matrix stand for: a `Risk`, or what makes one.

    Raises
    ------
    TypeError
        If a risk comes with more arguments, or a function without loss, parameters and data.
    """
    if isinstance(risk, Risk):
        if not (loss is None and params is None and data is None and parameters is None) or options:
            msg = (
                "risk has its loss, parameters and data already; pass either a Risk or (predict, "
                "loss, params, data)."
            )
            raise TypeError(msg)
        return risk
    if loss is None or data is None:
        msg = (
            f"risk has type {type(risk).__qualname__} and comes without loss and data; pass a "
            "Risk or (predict, loss, params, data)."
        )
        raise TypeError(msg)
    return Risk(risk, loss, params, data, parameters, **options)


def check_vectors(x: Any, space: VectorSpace) -> None:
    """Refuse what is not an array of vectors of `space`.

    Raises
    ------
    TypeError
        If `x` is not a JAX array, or has another dtype.
    ValueError
        If it has another length, or no columns.
    """
    if not isinstance(x, jax.Array):
        msg = f"x has type {type(x).__qualname__}; expected a jax.Array."
        raise TypeError(msg)
    if x.ndim not in (1, 2) or x.shape[0] != space.dimension or x.shape[-1] == 0:
        n = space.dimension
        msg = f"x has shape {x.shape}; expected ({n},) or ({n}, k) for n = {n} parameters."
        raise ValueError(msg)
    if x.dtype not in (space.dtype, space.working_dtype):
        msg = (
            f"x has dtype {x.dtype}; the operator has {jnp.dtype(space.dtype)}, pass "
            f"x.astype({str(jnp.dtype(space.dtype))!r})."
        )
        raise TypeError(msg)
