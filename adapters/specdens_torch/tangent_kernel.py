"""The tangent kernel of a model: inner products of the gradients of its outputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from specdens import Arithmetic, VectorSpace
from specdens_torch.evaluation import Evaluation, accumulate, twice_differentiable
from specdens_torch.gauss_newton import loss_gradients
from specdens_torch.guards import Totals
from specdens_torch.jacobian import Jacobian
from specdens_torch.linearized import check_vectors, columns_of
from specdens_torch.parameters import FlatParameters
from specdens_torch.processes import Share
from specdens_torch.risk import Risk, as_risk
from specdens_torch.selection import Selection, widest
from specdens_torch.state import Fingerprint


class TangentKernel(Arithmetic):
    r"""The tangent kernel :math:`J J^\top` of a model on the examples of a risk.

    :math:`J` is the Jacobian of all outputs of all examples, (n C, p) for n examples of C outputs
    and p parameters. The kernel is unweighted and does not depend on the loss; it has the nonzero
    eigenvalues of :math:`J^\top J`. A product is one pass over the data for :math:`v = J^\top x`
    and one for :math:`J v`.

    Parameters
    ----------
    risk : Risk or torch.nn.Module
        A risk, or a model followed by `loss`, `data`, `parameters` and the options of `Risk`.
    loss, data, parameters, **options
        As in `Risk`, if `risk` is a model.

    Attributes
    ----------
    risk : Risk
    parameters : FlatParameters
        The parameters that the outputs are differentiated for.
    space : VectorSpace
        Vectors of length n C: the outputs of the first example, those of the second, and so on.
        Known after one pass over the data.

    Raises
    ------
    ValueError
        At the first use, if the risk is not one finite, repeatable function (see `Risk`), or the
        outputs have no common axis of examples; or if `x` does not fit.
    TypeError
        If `x` is not a tensor or has another dtype, or the outputs cannot be taken apart.

    Notes
    -----
    Outputs are the tensors that the loss depends on. The examples keep the order of the data.

    References
    ----------
    Jacot, Gabriel, Hongler (2018), Neural tangent kernel. arXiv:1806.07572

    Examples
    --------
    >>> inputs = torch.tensor([[1.0, 0.0], [1.0, 2.0]])
    >>> model = nn.Linear(2, 1, bias=False)
    >>> kernel = TangentKernel(model, nn.MSELoss(), (inputs, torch.zeros(2, 1)))
    >>> kernel @ torch.eye(2)  # of a linear model the Gram matrix of the inputs
    tensor([[1., 1.],
            [1., 5.]])
    """

    def __init__(
        self,
        risk: Risk | nn.Module,
        loss: Any = None,
        data: Any = None,
        parameters: Selection = None,
        **options: Any,
    ) -> None:
        self.risk: Risk = as_risk(risk, loss, data, parameters, options)
        self._kept: _Kept | None = None
        self._space: VectorSpace | None = None
        self._first = 0  # place of this process's first output among those of all

    @property
    def parameters(self) -> FlatParameters:
        """The parameters that the outputs are differentiated for."""
        return self.risk.parameters

    @property
    def space(self) -> VectorSpace:
        """The vectors over all outputs of all examples."""
        if self._space is None:
            dtypes = set[torch.dtype]()

            def count() -> tuple[int, Totals]:
                rows = 0

                def add(evaluation: Evaluation) -> None:
                    nonlocal rows
                    outputs = _outputs(evaluation)
                    rows += sum(o.numel() for o in outputs)
                    dtypes.update(o.dtype for o in outputs)

                totals = self.risk.passes.sweep(add, cuts=True)
                return rows, totals

            self._first, number = self.risk.places("outputs", count)
            if not number:
                msg = (
                    "the loss depends on no output that the selected parameters change; select "
                    "others with parameters=."
                )
                raise ValueError(msg)
            own = self.parameters.space
            # A process without data knows no outputs; they are as wide as the parameters.
            self._space = VectorSpace(
                number, widest(dtypes or {own.dtype}), own.device, own.backend
            )
        return self._space

    def release(self) -> None:
        """Free the graphs kept between products; the next product makes them again."""
        self._kept = None
        self.risk.passes.forget_combined()

    def __matmul__(self, x: Tensor, /) -> Tensor:
        space = self.space
        with twice_differentiable(self.risk.model), torch.no_grad():
            inner = self.risk.combined("transposed Jacobian", lambda: self._gathered(x, space))
            vectors = inner.vector.to(self.parameters.space.dtype)
            result = self.risk.combined("Jacobian", lambda: self._spread(vectors, space)).vector
            result = result.to(x.dtype)
        return result[0] if x.ndim == 1 else result.t()

    def _gathered(self, x: Tensor, space: VectorSpace) -> Share:
        """Return the product with the transposed Jacobian, (k, p), of the data of this process."""
        check_vectors(x, space)
        x = x.detach().clone() if x.is_inference() else x.detach()
        rows = (x.reshape(1, -1) if x.ndim == 1 else x.t()).contiguous()
        total = torch.zeros(
            (len(rows), self.parameters.size),
            dtype=self.risk.accumulation_dtype,
            device=space.device,
        )
        place = self._first

        def visit(chunk: _Chunk) -> None:
            nonlocal place
            chunk.add_transposed(rows[:, place : place + chunk.size], self.parameters, total)
            place += chunk.size

        return Share(self._visit(visit), total, rows)

    def _spread(self, vectors: Tensor, space: VectorSpace) -> Share:
        """Return the product with the Jacobian, (k, n C), zero for the data of other processes."""
        total = vectors.new_zeros(len(vectors), space.dimension, dtype=space.working_dtype)
        place = self._first

        def visit(chunk: _Chunk) -> None:
            nonlocal place
            total[:, place : place + chunk.size] = chunk.multiplied(self.parameters, vectors)
            place += chunk.size

        return Share(self._visit(visit), total)

    def _visit(self, visit: Callable[[_Chunk], None]) -> Totals:
        """Hand every chunk to `visit`, from the kept graphs or from a pass over the data."""
        passes = self.risk.passes
        fingerprint = passes.fingerprint()
        if self._kept is None or self._kept.fingerprint != fingerprint:
            self._kept = None
            if not passes.plan().keeps_graphs:
                return passes.sweep(lambda e: visit(_Chunk.of(e)), cuts=True)
            chunks: list[_Chunk] = []
            totals = passes.sweep(lambda e: chunks.append(_Chunk.of(e)), cuts=True)
            self._kept = _Kept(fingerprint, chunks, totals)
        for chunk in self._kept.chunks:
            visit(chunk)
        return self._kept.totals

    def __repr__(self) -> str:
        size = "not known yet" if self._space is None else f"{self._space.dimension:,}"
        return f"TangentKernel(n={size}, {self.risk!r})"


@dataclass(frozen=True)
class _Kept:
    fingerprint: Fingerprint
    chunks: list[_Chunk]
    totals: Totals


def _outputs(evaluation: Evaluation) -> list[Tensor]:
    """Return the outputs that the loss depends on, in the model's graph.

    Raises
    ------
    ValueError
        If they do not share a first axis.
    """
    attached, _, slopes = loss_gradients(evaluation, create_graph=False)
    outputs = [o for o, slope in zip(attached, slopes, strict=True) if slope is not None]
    axes = {o.shape[:1] for o in outputs}
    if len(axes) > 1 or torch.Size() in axes:
        shapes = [tuple(o.shape) for o in outputs]
        msg = f"the outputs have shapes {shapes}; expected one first axis, that of the examples."
        raise ValueError(msg)
    return outputs


@dataclass(frozen=True)
class _Chunk:
    """The Jacobian of one chunk's outputs, and how they lie in a vector over all outputs."""

    jacobian: Jacobian

    @classmethod
    def of(cls, evaluation: Evaluation) -> _Chunk:
        return cls(Jacobian(evaluation.leaves, _outputs(evaluation)))

    @property
    def size(self) -> int:
        """The number of outputs of all examples."""
        return sum(row.numel() for row in self.jacobian.rows)

    def add_transposed(self, rows: Tensor, parameters: FlatParameters, total: Tensor) -> None:
        """Add the product of the transposed Jacobian with every row, (k, size), to `total`."""
        every, like = range(len(parameters)), self.jacobian.rows
        if not like:
            return
        examples = like[0].shape[0]
        widths = [row.numel() // max(examples, 1) for row in like]
        for column, target in zip(rows, total, strict=True):
            parts = column.reshape(examples, sum(widths)).split(widths, dim=1)
            cotangents = [
                part.reshape(row.shape).to(row) for part, row in zip(parts, like, strict=True)
            ]
            blocks = list(parameters.unravel(target).values())
            accumulate(blocks, self.jacobian.transposed(cotangents, every))

    def multiplied(self, parameters: FlatParameters, vectors: Tensor) -> Tensor:
        """Return the product with every row of `vectors`, (k, size)."""
        every = range(len(parameters))
        columns = []
        for blocks in columns_of(parameters, vectors):
            parts = self.jacobian(blocks, every)
            flat = [part.reshape(len(part), -1).to(vectors.device) for part in parts]
            columns.append(torch.cat(flat, dim=1).flatten() if flat else vectors.new_zeros(0))
        return torch.stack(columns)
