r"""The orthonormal basis of a Krylov space: blocks of rows, several to one array.

Cleaning a block W of old ones, :math:`W - Q (Q^* W)`, reads the old ones twice and is bound by
memory and by the number of products. Rows of several blocks lie end to end, so that few large
products do it. Where the library cannot write into arrays (JAX), blocks are joined when there are
enough for a large one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import overload

import array_api_compat as compat
import array_api_extra as xpx
import numpy as np

from specdens.backends import Array
from specdens.methods.columns import Kernels

_ROWS = 64  # vectors for which one product is about as fast as it gets
_BYTES = 2**24  # of one array: memory of larger ones comes fresh from the system every time
_JOINED_BYTES = 2**28  # of one array that is joined, and for a moment in memory twice


class _Slab:
    """An array with room for `capacity` blocks. Those that have been written never change."""

    def __init__(self, block: Array, capacity: int) -> None:
        self.width, self.capacity, self.used = block.shape[0], capacity, 1
        self.rows = block
        if capacity > 1:
            xp, device = compat.array_namespace(block), compat.device(block)
            shape = (capacity * self.width, block.shape[1])
            rows = xp.empty(shape, dtype=block.dtype, device=device)
            self.rows = xpx.at(rows)[: self.width, :].set(block)

    @classmethod
    def joined(cls, blocks: Sequence[Array]) -> _Slab:
        """Return a full one of blocks that lie in arrays by themselves."""
        slab = cls(blocks[0], 1)
        slab.capacity = slab.used = len(blocks)
        slab.rows = compat.array_namespace(*blocks).concat(blocks)
        return slab

    def append(self, block: Array) -> None:
        """Write the next block."""
        rows = slice(self.used * self.width, (self.used + 1) * self.width)
        self.rows = xpx.at(self.rows)[rows, :].set(block)
        self.used += 1

    def copy(self, count: int) -> _Slab:
        """Return an array of its own with the first `count` blocks."""
        new = _Slab(self.between(0, 1), self.capacity)
        for j in range(1, count):
            new.append(self.between(j, j + 1))
        return new

    def between(self, first: int, stop: int) -> Array:
        """Return the rows of the blocks ``first, ..., stop - 1``."""
        if stop - first == self.capacity:
            return self.rows
        return self.rows[first * self.width : stop * self.width, :]


@dataclass(frozen=True)
class Basis(Sequence[Array]):
    """Blocks (p, n) of orthonormal rows, or zero where dropped.

    A value: `append` makes a new one. Values share arrays, and each knows how many blocks are its
    own. The two newest are arrays by themselves, because `clean` changes one of them.
    """

    limit: int  # blocks that are expected
    slabs: tuple[_Slab, ...] = ()
    counts: tuple[int, ...] = ()
    newest: tuple[Array, ...] = ()

    def append(self, block: Array) -> Basis:
        """Return the basis with one more block."""
        newest = (*self.newest, block)
        if len(newest) <= 2:
            return replace(self, newest=newest)
        return replace(self._with_old(newest[0]), newest=newest[1:])

    def _with_old(self, block: Array) -> Basis:
        """Return the basis with one more block in its slabs."""
        if not compat.is_writeable_array(block):
            return self._with_joined(block)
        if not self.slabs or self.counts[-1] == self.slabs[-1].capacity:
            slab = _Slab(block, max(1, min(_room(block), self.limit - 2 - sum(self.counts))))
            return replace(self, slabs=(*self.slabs, slab), counts=(*self.counts, 1))
        *full, last = self.slabs
        count = self.counts[-1]
        # Another value has gone on from here: blocks must lie in the same arrays with every value,
        # or products would be rounded differently.
        slab = last if last.used == count else last.copy(count)
        slab.append(block)
        return replace(self, slabs=(*full, slab), counts=(*self.counts[:-1], count + 1))

    def _with_joined(self, block: Array) -> Basis:
        """Return the basis with one more block, joined with those before it if they are enough."""
        slabs, counts = (*self.slabs, _Slab(block, 1)), (*self.counts, 1)
        room = _room(block)
        if room > 1 and len(slabs) >= room and all(slab.capacity == 1 for slab in slabs[-room:]):
            joined = _Slab.joined([slab.rows for slab in slabs[-room:]])
            slabs, counts = (*slabs[:-room], joined), (*counts[:-room], room)
        return replace(self, slabs=slabs, counts=counts)

    def first(self, number: int) -> Basis:
        """Return the basis without the blocks after the first `number`."""
        if number >= len(self):
            return self
        old = max(number - 2, 0)
        counts = np.clip(old - np.cumsum([0, *self.counts])[:-1], 0, self.counts)
        kept = int((counts > 0).sum())
        whole = tuple(int(count) for count in counts[:kept])
        return Basis(self.limit, self.slabs[:kept], whole, self[old:number])

    def rows(self, wanted: np.ndarray | None = None) -> Iterator[Array]:
        """Yield arrays (k, n) of all rows, or of the blocks that `wanted` marks.

        The two newest cannot be marked. Blocks between two that are wanted come with them where
        they lie in one array, and others of an array that has been joined: what is compiled is
        compiled for arrays of one shape.
        """
        start = 0
        for slab, count in zip(self.slabs, self.counts, strict=True):
            needed = np.arange(count)
            if wanted is not None:
                needed = np.flatnonzero(wanted[start : start + count])
                if needed.size and not compat.is_writeable_array(slab.rows):
                    needed = np.arange(count)
            if needed.size:
                yield slab.between(int(needed[0]), int(needed[-1]) + 1)
            start += count
        if wanted is None:
            yield from self.newest

    def clean(self, w: Array, do: Kernels, wanted: np.ndarray) -> tuple[Array, Basis]:
        """Return a block W and the basis, W and the last block cleaned of the `wanted` blocks.

        And W of the two newest ones. In place as far as W is concerned.
        """
        basis = self
        if wanted.any():
            p, xp = w.shape[0], compat.array_namespace(w)
            both = xp.concat([w, self.newest[-1]])
            for rows in self.rows(wanted):
                both, _ = do.remove(both, rows)
            w, basis = both[:p, :], replace(self, newest=(*self.newest[:-1], both[p:, :]))
        for q in basis.newest:
            w, _ = do.remove(w, q)
        return w, basis

    def __len__(self) -> int:
        return sum(self.counts) + len(self.newest)

    @overload
    def __getitem__(self, index: int) -> Array: ...

    @overload
    def __getitem__(self, index: slice) -> tuple[Array, ...]: ...

    def __getitem__(self, index: int | slice) -> Array:
        if isinstance(index, slice):
            return tuple(self[j] for j in range(*index.indices(len(self))))
        position = range(len(self))[index]
        for slab, count in zip(self.slabs, self.counts, strict=True):
            if position < count:
                return slab.between(position, position + 1)
            position -= count
        return self.newest[position]


def _room(block: Array) -> int:
    """Return how many blocks to put into one array."""
    p, n = block.shape
    xp = compat.array_namespace(block)
    parts = 1 + xp.isdtype(block.dtype, "complex floating")
    size = p * n * parts * xp.finfo(block.dtype).bits // 8
    limit = _BYTES if compat.is_writeable_array(block) else _JOINED_BYTES
    return min(-(-_ROWS // p), limit // size)
