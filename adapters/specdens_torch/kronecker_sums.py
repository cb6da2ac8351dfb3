"""Sums over the data of a layer's Kronecker factors, chunk by chunk in double precision."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from specdens.kronecker_structure import eigenbasis
from specdens_torch.layer_passes import Column, LayerChunk
from specdens_torch.state import wide_dtype

_Basis: TypeAlias = tuple[np.ndarray, Tensor]  # eigenvalues, descending, and eigenvectors


@dataclass(frozen=True)
class Factors:
    """Averages over the data: of every class if these are taken apart, else C is 1."""

    lefts: Tensor  # (C, m, m), they add up to E[M]
    rights: Tensor  # (C, d, d), each an average
    shares: Tensor  # (C,), what the classes weigh, adding up to 1

    @classmethod
    def of(cls, sums: Tensor, shape: tuple[int, int], divisor: float) -> Factors:
        """Return what the vector of a `FactorSums` averages to; `divisor` is that of the risk."""
        m, d = shape
        parts = sums.reshape(-1, m * m + d * d + 1)
        weights = parts[:, -1]
        lefts = parts[:, : m * m].reshape(-1, m, m) / divisor
        rights = parts[:, m * m : -1].reshape(-1, d, d)
        rights = rights / torch.where(weights != 0, weights, 1)[:, None, None]
        return cls((lefts + lefts.mT) / 2, rights, weights / (float(weights.sum()) or 1.0))

    @cached_property
    def left(self) -> Tensor:
        """E[M]."""
        return self.lefts.sum(0)

    @cached_property
    def right(self) -> Tensor:
        """E[x x^T]."""
        return torch.tensordot(self.shares, self.rights, dims=1)

    @cached_property
    def on_host(self) -> tuple[np.ndarray, np.ndarray]:
        """Both averages as arrays that users see."""
        return host(self.left), host(self.right)

    @cached_property
    def bases(self) -> tuple[_Basis, _Basis]:
        """Eigenvalues and eigenvectors of both."""
        return eigenbasis(self.left), eigenbasis(self.right)


def host(numbers: Tensor) -> np.ndarray:
    """Return numbers as a float64 array of their own on the host."""
    return np.array(numbers.detach().cpu().numpy(), dtype=np.float64)


class FactorSums:
    """Adds up both factors and the weights, of every class or of all, in one vector.

    Parameters
    ----------
    shape : tuple of int
        Outputs m and inputs d of the layer.
    device : torch.device
    reduce : bool
        Whether the positions of an example are added up before products are taken.
    budget : int
        Bytes that the factors of all classes may take.

    Attributes
    ----------
    vector : tensor
        All sums, class by class, as they are added up over processes.
    """

    def __init__(
        self, shape: tuple[int, int], device: torch.device, *, reduce: bool, budget: int
    ) -> None:
        self._shape, self._reduce, self._budget = shape, reduce, budget
        self._size = shape[0] ** 2 + shape[1] ** 2 + 1
        self.vector = torch.zeros(self._size, dtype=wide_dtype(device), device=device)

    def _parts(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return views: sums of M, of x x^T, and of the weights."""
        m, d = self._shape
        own = self.vector.reshape(-1, self._size)[index]
        return own[: m * m].view(m, m), own[m * m : -1].view(d, d), own[-1]

    def add(self, chunk: LayerChunk) -> None:
        """Add a chunk, all examples together."""
        self._add_inputs(0, chunk, chunk.weights.sum(1).to(self.vector))
        left = self._parts(0)[0]
        for column in chunk.columns():
            a, b = self._combined(column)
            own = b * column.weights[:, None, None]
            left.addmm_(a.flatten(0, 1).mT, own.flatten(0, 1))

    def add_by_class(self, chunk: LayerChunk) -> None:
        """Add a chunk, every example to its class.

        Raises
        ------
        ValueError
            If there are no classes, or their factors do not fit into the budget.
        """
        members, weights = chunk.memberships()  # (N, T, C), (N, C)
        self._make_room(members.shape[-1])
        for c in weights.any(0).nonzero().flatten().tolist():
            self._add_inputs(c, chunk, weights[:, c])
        groups = [_groups(row) for row in members.unbind(1)]
        for column in chunk.columns():
            a, b = self._combined(column)
            for c, some, shares in groups[column.row or 0]:
                own = b[some] * (shares * column.weights[some])[:, None, None]
                self._parts(c)[0].addmm_(a[some].flatten(0, 1).mT, own.flatten(0, 1))

    def _make_room(self, classes: int) -> None:
        size = classes * self._size
        if size * self.vector.element_size() > self._budget:
            msg = (
                f"per_class=True: the factors of {classes} classes, {self._shape[0]}^2 + "
                f"{self._shape[1]}^2 numbers each, exceed the risk's memory_budget of "
                f"{self._budget:,} bytes; raise it, or take the factors of all classes together."
            )
            raise ValueError(msg)
        if len(self.vector) < size:
            self.vector = self.vector.new_zeros(size)

    def _combined(self, column: Column) -> tuple[Tensor, Tensor]:
        if not self._reduce:
            return column.a, column.b
        return column.a.sum(1, keepdim=True), column.b.sum(1, keepdim=True)

    def _add_inputs(self, index: int, chunk: LayerChunk, weights: Tensor) -> None:
        _, right, total = self._parts(index)
        total += weights.sum()
        positions = chunk.num_positions
        for some in chunk.blocks(positions * self._shape[1]):
            x = chunk.inputs(some)
            x = x.mean(1, keepdim=True) if self._reduce else x
            scaled = x * (weights[some] / x.shape[1])[:, None, None]
            right.addmm_(x.flatten(0, 1).mT, scaled.flatten(0, 1))


def _groups(members: Tensor) -> list[tuple[int, Tensor, Tensor]]:
    """Return for every class that is there which rows of (N, C) belong to it, and how much."""
    found = []
    for c in members.any(0).nonzero().flatten().tolist():
        some = members[:, c].nonzero().flatten()
        found.append((c, some, members[some, c]))
    return found


def add_squares(total: Tensor, chunk: LayerChunk, U: Tensor, V: Tensor) -> None:  # noqa: N803
    """Add the diagonal of the exact block of a chunk in the basis of U and V."""
    (m, d), positions = total.shape, chunk.num_positions
    blocks = list(chunk.blocks(max(positions * d, m * d if positions > 1 else 0)))
    if positions == 1:  # the square of a product is the product of squares
        squares = torch.cat([(chunk.inputs(some)[:, 0] @ V).square() for some in blocks])
        for column in chunk.columns():
            own = (column.a @ U) * (column.b @ U) * column.weights[:, None, None]
            total.addmm_(own[:, 0].mT, squares)
        return
    for column in chunk.columns():
        for some in blocks:
            a, b, x = column.a[some] @ U, column.b[some] @ U, chunk.inputs(some)
            first = (a.mT @ x) @ V  # gradients of the weight, rotated, example by example
            second = first if column.a is column.b else (b.mT @ x) @ V
            total += torch.einsum("n,nij,nij->ij", column.weights[some], first, second)
