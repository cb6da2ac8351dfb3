"""Reading data again and again, batch by batch, as arrays whose shapes repeat."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from specdens_jax.sharding import automatic, from_caller


class Batch(NamedTuple):
    """Inputs and targets of some examples: arrays, or pytrees of arrays."""

    inputs: Any
    targets: Any


EMPTY = "data is empty; pass at least one (inputs, targets) pair with at least one example."


class DataSource:
    """The batches of a risk, the same in every pass.

    Parameters
    ----------
    data : pair, mapping with labels, list of either, or other iterable
        A tuple of length two is one ``(inputs, targets)`` pair, a mapping with the key ``"labels"``
        stands for (everything else, labels); anything else is iterated over, once in each pass, and
        must give such items. A single item and those of a list are copied to the device once.
    batch_size : int, optional
        Most examples at a time; larger batches are cut along their first axis.

    Raises
    ------
    TypeError
        If `data` cannot be iterated over twice, or does not give pairs.
    ValueError
        If `data` is empty, or a batch to be cut has arrays without a common first axis.
    """

    def __init__(self, data: Any, batch_size: int | None = None) -> None:
        _check_readable(data)
        self._data, self._batch_size = data, batch_size
        self.in_memory = isinstance(data, tuple | list | Mapping)
        if self.in_memory:
            pairs = data if isinstance(data, list) else [data]
            read = [as_batch(item, f"item {i} of data") for i, item in enumerate(pairs)]
            self._batches = [part for batch in read for part in self._parts(batch)]
            if not self._batches:
                raise ValueError(EMPTY)

    def __iter__(self) -> Iterator[Batch]:
        if self.in_memory:
            yield from self._batches
            return
        for number, item in enumerate(from_caller(self._data)):
            yield from self._parts(as_batch(item, f"item {number} of data"))

    def _parts(self, batch: Batch) -> Iterator[Batch]:
        examples = num_examples(batch)
        if examples == 0:
            return
        if self._batch_size is None:
            yield batch
            return
        if examples is None:
            shapes = [leaf.shape for leaf in jax.tree.leaves(batch)]
            msg = (
                f"batch_size={self._batch_size} cannot cut a batch of arrays of shapes {shapes}; "
                "give all of them the same first axis, that of the examples, or pass "
                "batch_size=None and a list of batches."
            )
            raise ValueError(msg)
        for start in range(0, examples, self._batch_size):
            yield cut(batch, start, min(examples, start + self._batch_size))


def num_examples(batch: Batch) -> int | None:
    """Return the length of the first axis that all arrays share, or None if they share none."""
    lengths = {leaf.shape[0] if leaf.ndim else -1 for leaf in jax.tree.leaves(batch)}
    return lengths.pop() if len(lengths) == 1 and -1 not in lengths else None


def cut(batch: Batch, start: int, stop: int) -> Batch:
    """Return the examples from `start` up to `stop`."""
    return jax.tree.map(lambda leaf: leaf[start:stop], batch)


def as_batch(item: Any, what: str) -> Batch:
    """Return `item` as a batch of arrays, or say what an item must be."""
    if isinstance(item, Mapping):
        if "labels" not in item:
            msg = (
                f"{what} is a {type(item).__qualname__} with the keys "
                f"{', '.join(map(str, item))} and without labels; put the targets under "
                '"labels", or pass a pair (inputs, targets).'
            )
            raise TypeError(msg)
        item = ({key: value for key, value in item.items() if key != "labels"}, item["labels"])
    if not isinstance(item, tuple | list) or len(item) != 2:
        length = f" of length {len(item)}" if isinstance(item, tuple | list) else ""
        msg = (
            f"{what} is a {type(item).__qualname__}{length}; expected a pair (inputs, targets), "
            "each an array or a pytree of arrays. A single pair of arrays is a tuple, not a list."
        )
        raise TypeError(msg)
    return jax.tree.map(_as_array, Batch(*item))


def _as_array(leaf: Any) -> jax.Array:
    if isinstance(leaf, jax.Array):
        return automatic(leaf)
    if hasattr(leaf, "detach"):  # a torch tensor, which may require gradients
        leaf = leaf.detach()
    try:
        array = np.asarray(leaf)
    except TypeError:  # NumPy has no such dtype, or the array lies on another device
        if not hasattr(leaf, "__dlpack__"):
            raise
        return jnp.from_dlpack(leaf, copy=True)
    if array.dtype.kind in "OSUmM":
        msg = f"data hold a {type(leaf).__qualname__} of {array.dtype}; expected arrays of numbers."
        raise TypeError(msg)
    return jnp.array(array)  # a copy: loaders may write into their arrays again


def _check_readable(data: Any) -> None:
    if isinstance(data, Iterator):
        msg = (
            f"data is a one-shot {type(data).__qualname__}, empty after one pass; pass a list or "
            "another object that can be iterated over again, such as list(data)."
        )
        raise TypeError(msg)
    is_iterable = isinstance(data, Iterable) or hasattr(data, "__getitem__")
    if isinstance(data, jax.Array | np.ndarray | str) or not is_iterable:
        msg = (
            f"data has type {type(data).__qualname__}; expected an (inputs, targets) pair, a "
            "mapping with labels, a list of either, or another iterable of them."
        )
        raise TypeError(msg)
