"""The tangent kernel of a model: inner products of the gradients of its outputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from specdens import Arithmetic, VectorSpace
from specdens_jax.accumulation import accumulated, finished
from specdens_jax.data import Batch, num_examples
from specdens_jax.linearized import as_risk, check_vectors
from specdens_jax.parameters import FlatParameters, PyTree, Selection
from specdens_jax.risk import Leaves, Risk, new_total
from specdens_jax.sharding import fitted, in_context, on_automatic_axes


class TangentKernel(Arithmetic):
    r"""The tangent kernel :math:`J J^\top` of a model on the examples of a risk.

    :math:`J` is the Jacobian of all outputs of all examples, (n C, p) for n examples of C outputs
    and p parameters. The kernel is unweighted and does not depend on the loss. A product is one
    pass over the data for :math:`v = J^\top x` and one for :math:`J v`.

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
        The parameters that the outputs are differentiated for.
    space : VectorSpace
        Vectors of length n C: the outputs of the first example, those of the second, and so on.

    Raises
    ------
    ValueError
        If the outputs have no common axis of examples, or `x` does not fit.
    TypeError
        If `x` is not a JAX array, or has another dtype.

    References
    ----------
    Jacot, Gabriel, Hongler (2018), Neural tangent kernel. arXiv:1806.07572

    Examples
    --------
    >>> from specdens_jax import SquaredError
    >>> data = jnp.array([[1.0, 0.0], [1.0, 2.0]]), jnp.zeros(2)
    >>> kernel = TangentKernel(lambda w, x: x @ w, SquaredError(), jnp.zeros(2), data)
    >>> (kernel @ jnp.eye(2)).tolist()  # of a linear model the Gram matrix of the inputs
    [[1.0, 1.0], [1.0, 5.0]]
    """

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
        self._space: VectorSpace | None = None

    @property
    def parameters(self) -> FlatParameters:
        """The parameters that the outputs are differentiated for."""
        return self.risk.parameters

    @property
    def space(self) -> VectorSpace:
        """The vectors over all outputs of all examples."""
        if self._space is None:
            self._space = self._found_space()
        return replace(self._space, device=in_context(self._space.device))

    @on_automatic_axes
    def _found_space(self) -> VectorSpace:
        rows, dtypes = 0, set()
        for batch in self.risk.batches():
            found = self._outline(batch)
            rows += found.size
            dtypes.add(found.dtype)
        own = self.parameters.space
        return VectorSpace(rows, jnp.result_type(*dtypes), fitted(own.device, (rows,)), own.backend)

    @on_automatic_axes
    def __matmul__(self, x: jax.Array, /) -> jax.Array:
        check_vectors(x, self.space)
        rows = x[None] if x.ndim == 1 else x.T
        inner = finished(self._gathered(rows)).astype(self.parameters.space.dtype)
        result = jnp.concatenate(self._spread(inner), axis=1).astype(x.dtype)
        result = result[0] if x.ndim == 1 else result.T
        return jax.device_put(result, fitted(self.space.device, result.shape))

    def _gathered(self, rows: jax.Array) -> Any:
        """Return the product of rows (k, n C) with the transposed Jacobian, (k, p)."""
        risk = self.risk
        kernel = risk.kernel("transposed", lambda: jax.jit(self._add, donate_argnums=4))
        total, place = new_total(risk, len(rows)), 0
        for batch in risk.batches():
            size = self._outline(batch).size
            part = rows[:, place : place + size]
            total = kernel(risk.varying, risk.constants, batch, part, total)
            place += size
        return total

    def _spread(self, inner: jax.Array) -> list[jax.Array]:
        risk = self.risk
        kernel = risk.kernel("forward", lambda: jax.jit(self._forward))
        return [kernel(risk.varying, risk.constants, batch, inner) for batch in risk.batches()]

    def _outline(self, batch: Batch) -> Any:
        """Return shape and dtype of a batch's outputs; traced once for every shape of a batch."""
        risk = self.risk
        traced = risk.kernel("outputs", lambda: jax.jit(self._outputs))
        return jax.eval_shape(traced, risk.varying, risk.constants, batch)

    def _outputs(self, varying: Leaves, constants: list[Any], batch: Batch) -> jax.Array:
        """Return all outputs of a batch in a row, those of the first example first."""
        risk, examples = self.risk, num_examples(batch)
        outputs = risk.predict(risk.parameters.merge(varying, constants), batch.inputs)
        leaves = [
            leaf
            for leaf in jax.tree.leaves(outputs)
            if hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating)
        ]
        axes = {leaf.shape[:1] for leaf in leaves}
        if len(axes) != 1 or () in axes or (examples is not None and axes != {(examples,)}):
            shapes = [leaf.shape for leaf in leaves]
            msg = f"outputs have shapes {shapes}; expected one first axis, that of the examples."
            raise ValueError(msg)
        return jnp.concatenate(
            [leaf.reshape(leaf.shape[0], -1) for leaf in leaves], axis=1
        ).reshape(-1)

    def _add(
        self, varying: Leaves, constants: list[Any], batch: Batch, rows: jax.Array, total: Any
    ) -> Any:
        outputs, backward = jax.vjp(lambda v: self._outputs(v, constants, batch), varying)
        blocks = jax.lax.map(lambda row: backward(row.astype(outputs.dtype))[0], rows)
        return accumulated(total, self.parameters.rows(blocks, self.risk.accumulation_dtype))

    def _forward(
        self, varying: Leaves, constants: list[Any], batch: Batch, rows: jax.Array
    ) -> jax.Array:
        _, forward = jax.linearize(lambda v: self._outputs(v, constants, batch), varying)
        return jax.lax.map(forward, self.parameters.blocks(rows))

    def __repr__(self) -> str:
        size = "not known yet" if self._space is None else f"{self._space.dimension:,}"
        return f"TangentKernel(n={size}, {self.risk!r})"
