"""What all matrices of a risk share: linearize a chunk once, multiply every column, keep it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor, nn

from specdens import Arithmetic, VectorSpace
from specdens_torch.columns import Columns, blocks_of
from specdens_torch.evaluation import Evaluation, twice_differentiable
from specdens_torch.guards import Totals
from specdens_torch.parameters import FlatParameters
from specdens_torch.processes import Share
from specdens_torch.risk import Risk, as_risk
from specdens_torch.selection import Selection
from specdens_torch.state import Fingerprint

# One chunk's share of a matrix, not yet divided by the sum of weights: from the blocks of a vector
# to those of its product, both on the chosen parameters only (their indices). None means zeros.
Linearized: TypeAlias = Callable[[Sequence[Tensor], Sequence[int]], Sequence[Tensor | None]]


@dataclass(frozen=True)
class _Kept:
    fingerprint: Fingerprint
    chunks: list[Linearized]
    totals: Totals


class RiskMatrix(Arithmetic, ABC):
    """A symmetric matrix of a risk over its flat parameters, known through its products.

    A subclass says how one chunk is linearized. The linearizations of all chunks are kept between
    products if the risk's memory budget allows it, until parameters, buffers or data change;
    otherwise each is made, applied to every column and freed.
    """

    makes_new_rows: ClassVar[bool] = True  # products are new, each vector end to end in memory
    _cuts: ClassVar[bool] = False  # whether model and loss are differentiated apart
    _decays: ClassVar[bool] = False  # whether the risk's weight decay is a part of the matrix

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
        self._together = True  # until vmap proves unable to push columns together

    @abstractmethod
    def _linearize(self, evaluation: Evaluation) -> Linearized:
        """Return the function that multiplies with this chunk's share of the matrix."""

    @property
    def parameters(self) -> FlatParameters:
        """Names and places of the parameters; ``ravel`` and ``unravel``."""
        return self.risk.parameters

    @property
    def space(self) -> VectorSpace:
        """The flat vectors: length n, dtype and device of the parameters."""
        return self.risk.parameters.space

    def release(self) -> None:
        """Free the graphs kept between products; the next product makes them again."""
        self._kept = None
        self.risk.passes.forget_combined()

    def __matmul__(self, x: Tensor, /) -> Tensor:
        return self.product(x, self.parameters, range(len(self.parameters)))

    def product(self, x: Tensor, part: FlatParameters, chosen: Sequence[int]) -> Tensor:
        """Return the product with the diagonal block of the parameters at the places `chosen`.

        Parameters
        ----------
        x : tensor of shape (m,) or (m, k)
            Vectors over `part`.
        part : FlatParameters
            The chosen parameters alone.
        chosen : sequence of int
            Their places among all parameters of the risk, ascending.

        Returns
        -------
        tensor of the shape of `x`

        Raises
        ------
        ValueError, TypeError
            As the product with the whole matrix.
        """

        def compute() -> Share:
            check_vectors(x, part.space)
            own = x.detach().clone() if x.is_inference() else x.detach()
            rows = (own.reshape(1, -1) if own.ndim == 1 else own.t()).contiguous()
            total = torch.zeros_like(rows, dtype=self.risk.accumulation_dtype)
            columns = Columns(_own_blocks(part, rows), blocks_of(part, total))
            return Share(self._multiply(columns, chosen), total, rows)

        with twice_differentiable(self.risk.model), torch.no_grad():
            operation = f"product with {type(self).__name__}"
            totals, total, rows = self.risk.combined(operation, compute, part)
            if self.risk.divides:
                total /= totals.weight
            self._complete(total, rows, part, totals)
            total = total.to(x.dtype)
        return total[0] if x.ndim == 1 else total.t()

    def _complete(self, total: Tensor, rows: Tensor, part: FlatParameters, totals: Totals) -> None:
        """Add what is not a sum over the data to the finished products `total` with `rows`."""
        if self._decays and self.risk.weight_decay:
            total.add_(rows, alpha=self.risk.weight_decay)

    def _multiply(self, columns: Columns, chosen: Sequence[int]) -> Totals:
        """Add the product with every vector to its target, and return the sum of weights."""
        passes = self.risk.passes
        at_once = passes.plan().columns_at_once

        def apply_to_columns(chunk: Linearized) -> None:
            most = at_once if self._together else 1
            self._together &= columns.add(lambda blocks: chunk(blocks, chosen), most)

        fingerprint = passes.fingerprint()
        if self._kept is None or self._kept.fingerprint != fingerprint:
            self._kept = None  # free the old graphs before new ones are made

            def apply(evaluation: Evaluation) -> None:
                chunk = self._linearize(evaluation)
                del evaluation  # outputs and losses, which the products may not need
                apply_to_columns(chunk)

            if not passes.plan().keeps_graphs:
                return passes.sweep(apply, cuts=self._cuts)
            chunks: list[Linearized] = []
            totals = passes.sweep(lambda e: chunks.append(self._linearize(e)), cuts=self._cuts)
            self._kept = _Kept(fingerprint, chunks, totals)
        for chunk in self._kept.chunks:
            apply_to_columns(chunk)
        return self._kept.totals

    def __repr__(self) -> str:
        return f"{type(self).__name__}(n={self.space.dimension:,}, {self.risk!r})"


def check_vectors(x: Any, space: VectorSpace) -> None:
    """Refuse what is not a tensor of vectors of `space`.

    Raises
    ------
    TypeError
        If `x` is not a tensor, or has another dtype.
    ValueError
        If it has another length or is on another device.
    """
    if not isinstance(x, Tensor):
        msg = f"x has type {type(x).__qualname__}; expected a torch.Tensor."
        raise TypeError(msg)
    if x.ndim not in (1, 2) or x.shape[0] != space.dimension:
        n = space.dimension
        msg = f"x has shape {tuple(x.shape)}; expected ({n},) or ({n}, k) for n = {n} parameters."
        raise ValueError(msg)
    if x.dtype not in (space.dtype, space.working_dtype):
        msg = f"x has dtype {x.dtype}; the operator has {space.dtype}, pass x.to({space.dtype})."
        raise TypeError(msg)
    if x.device != space.device:
        msg = f"x is on {x.device}; the operator's device is {space.device}, move x there."
        raise ValueError(msg)


def columns_of(part: FlatParameters, rows: Tensor) -> list[list[Tensor]]:
    """Return the blocks of every row, in the dtype and on the device of their parameters."""
    blocks = _own_blocks(part, rows)
    return [[block[i] for block in blocks] for i in range(len(rows))]


def _own_blocks(part: FlatParameters, rows: Tensor) -> list[Tensor]:
    """Return the blocks of all rows, (k, *shape), as their parameters are kept."""
    own = part.tensors.values()
    views = blocks_of(part, rows)
    return [v.to(device=p.device, dtype=p.dtype) for v, p in zip(views, own, strict=True)]
