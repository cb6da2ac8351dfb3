"""What all matrices of a risk share: linearize a chunk once, multiply every column, keep it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from specdens import Arithmetic, VectorSpace
from specdens_torch.evaluation import Evaluation, accumulate, twice_differentiable
from specdens_torch.guards import Totals
from specdens_torch.parameters import FlatParameters
from specdens_torch.risk import Risk, as_risk
from specdens_torch.selection import Selection
from specdens_torch.state import Fingerprint

# One chunk's share of a matrix, not yet divided by the sum of weights: from blocks to blocks.
Linearized: TypeAlias = Callable[[Sequence[Tensor]], Sequence[Tensor | None]]


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

    def __matmul__(self, x: Tensor, /) -> Tensor:
        self._check(x)
        with twice_differentiable(), torch.no_grad():
            x = x.detach().clone() if x.is_inference() else x.detach()
            rows = x.reshape(1, -1) if x.ndim == 1 else x.t()
            rows = rows.contiguous()
            total = torch.zeros_like(rows, dtype=self.space.working_dtype)
            totals = self._multiply(self._columns(rows), self._targets(total))
            if self.risk.divides:
                total /= totals.weight
            total = total.to(x.dtype)
        return total[0] if x.ndim == 1 else total.t()

    def _multiply(self, columns: list[list[Tensor]], targets: list[list[Tensor]]) -> Totals:
        """Add the product with every column to its target, and return the sum of weights."""
        passes = self.risk.passes
        fingerprint = passes.fingerprint()
        if self._kept is None or self._kept.fingerprint != fingerprint:
            self._kept = None  # free the old graphs before new ones are made
            if not passes.plan().keeps_graphs:
                return passes.sweep(lambda e: _apply(self._linearize(e), columns, targets))
            chunks: list[Linearized] = []
            totals = passes.sweep(lambda e: chunks.append(self._linearize(e)))
            self._kept = _Kept(fingerprint, chunks, totals)
        for chunk in self._kept.chunks:
            _apply(chunk, columns, targets)
        return self._kept.totals

    def _columns(self, rows: Tensor) -> list[list[Tensor]]:
        """Return the blocks of every row, in the dtype and on the device of their parameters."""
        own = self.parameters.tensors.values()
        return [
            [
                block.to(device=p.device, dtype=p.dtype)
                for block, p in zip(self.parameters.unravel(row).values(), own, strict=True)
            ]
            for row in rows
        ]

    def _targets(self, total: Tensor) -> list[list[Tensor]]:
        return [list(self.parameters.unravel(row).values()) for row in total]

    def _check(self, x: Any) -> None:
        space = self.space
        if not isinstance(x, Tensor):
            msg = f"x has type {type(x).__qualname__}; expected a torch.Tensor."
            raise TypeError(msg)
        if x.ndim not in (1, 2) or x.shape[0] != space.dimension:
            n = space.dimension
            msg = (
                f"x has shape {tuple(x.shape)}; expected ({n},) or ({n}, k) for n = {n} parameters."
            )
            raise ValueError(msg)
        if x.dtype not in (space.dtype, space.working_dtype):
            msg = (
                f"x has dtype {x.dtype}; the operator has {space.dtype}, pass x.to({space.dtype})."
            )
            raise TypeError(msg)
        if x.device != space.device:
            msg = f"x is on {x.device}; the operator's device is {space.device}, move x there."
            raise ValueError(msg)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(n={self.space.dimension:,}, {self.risk!r})"


def _apply(
    chunk: Linearized, columns: Sequence[Sequence[Tensor]], targets: Sequence[Sequence[Tensor]]
) -> None:
    for column, target in zip(columns, targets, strict=True):
        accumulate(target, chunk(column))
