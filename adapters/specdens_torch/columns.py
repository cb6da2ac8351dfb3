"""Pushes a block of vectors through a linearized chunk: column by column, or together by vmap."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from specdens_torch.evaluation import accumulate
from specdens_torch.parameters import FlatParameters

# From the blocks of one vector to those of its product; None means zeros.
Product = Callable[[Sequence[Tensor]], Sequence[Tensor | None]]


def blocks_of(part: FlatParameters, rows: Tensor) -> list[Tensor]:
    """Return views of the flat vectors `rows`, (k, n), by parameter, each (k, *shape)."""
    return [rows[:, part.slices[n]].view(len(rows), *part.shapes[n]) for n in part.names]


class Columns(NamedTuple):
    """k vectors and what their products are added to, by parameter, each (k, *shape)."""

    vectors: list[Tensor]
    targets: list[Tensor]

    def add(self, product: Product, columns_at_once: int) -> bool:
        """Add the products of all vectors to their targets.

        An accelerator is told as much for one column as for many, and waits between orders if
        they are small; a CPU is faster column by column.

        Returns
        -------
        bool
            False if columns were to go together and could not, because a layer's own backward
            pass has no rule for it or memory ran out; they went one by one then.
        """
        count, together = len(self.vectors[0]), True
        start = 0
        while start < count:
            stop = min(start + columns_at_once, count) if together else start + 1
            vectors = [block[start:stop] for block in self.vectors]
            if stop == start + 1:
                pieces = product([block[0] for block in vectors])
                accumulate([block[start] for block in self.targets], pieces)
            else:
                found = _together(product, vectors)
                if found is None:
                    together = False
                    continue
                accumulate([block[start:stop] for block in self.targets], found)
            start = stop
        return together


def _together(product: Product, vectors: Sequence[Tensor]) -> list[Tensor | None] | None:
    """Return the products of all vectors at once, or None where that does not work."""
    live: list[int] = []

    def of_one(*blocks: Tensor) -> tuple[Tensor, ...]:
        pieces = product(blocks)
        live[:] = [i for i, piece in enumerate(pieces) if piece is not None]
        return tuple(piece for piece in pieces if piece is not None)

    try:
        with warnings.catch_warnings():  # of operations that vmap takes one by one
            warnings.filterwarnings("ignore", "There is a performance drop", UserWarning)
            found = torch.func.vmap(of_one)(*vectors)
    except (RuntimeError, NotImplementedError):  # what is really wrong is so one by one, too
        return None
    pieces: list[Tensor | None] = [None] * len(vectors)
    for i, piece in zip(live, found, strict=True):
        pieces[i] = piece
    return pieces
