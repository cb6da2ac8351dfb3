"""Reading data again and again, and regrouping it into chunks of the size that computes fastest."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from specdens_torch.structures import Batch, cut, join, num_examples, signature, tensors_in


class DataSource:
    """The batches of a risk, the same in every pass.

    Parameters
    ----------
    data : pair, list of pairs, DataLoader, or other iterable
        A tuple of length two is one ``(inputs, targets)`` pair; anything else is iterated over,
        once in each pass, and must give such pairs.

    Raises
    ------
    TypeError
        If `data` cannot be iterated over twice, is a data set of single examples, or does not
        give pairs.
    ValueError
        If `data` is an empty list.
    """

    def __init__(self, data: Any) -> None:
        self._data = data
        _check_readable(data)
        # In memory the batches are known without reading, and their tensors tell when they change.
        self.in_memory = isinstance(data, tuple | list)
        if self.in_memory and not any(True for _ in self):
            raise ValueError(EMPTY)

    def __iter__(self) -> Iterator[Batch]:
        if isinstance(self._data, tuple):
            yield as_batch(self._data, "data")
            return
        for number, item in enumerate(self._data):
            yield as_batch(item, f"item {number} of data")

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors in memory that the batches are made of, as far as they are known."""
        if self.in_memory:
            return list(chain.from_iterable(tensors_in(batch) for batch in self))
        dataset = getattr(self._data, "dataset", None)
        return list(tensors_in(getattr(dataset, "tensors", ())))

    @property
    def generators(self) -> list[torch.Generator]:
        """The random generators that the order of the batches depends on."""
        holders = [self._data, getattr(self._data, "sampler", None)]
        found = [getattr(holder, "generator", None) for holder in holders]
        unique = {id(g): g for g in found if isinstance(g, torch.Generator)}
        return list(unique.values())


EMPTY = "data is empty; pass at least one (inputs, targets) pair with at least one example."


def _check_readable(data: Any) -> None:
    if isinstance(data, Iterator):
        msg = (
            f"data is a one-shot {type(data).__qualname__}, empty after one pass; pass a list, a "
            "DataLoader or another object that can be iterated over again, such as list(data)."
        )
        raise TypeError(msg)
    if isinstance(data, Dataset) and not isinstance(data, IterableDataset | DataLoader):
        msg = (
            f"data is the data set {type(data).__qualname__}, which gives single examples; pass "
            "torch.utils.data.DataLoader(dataset, batch_size=...)."
        )
        raise TypeError(msg)
    is_iterable = isinstance(data, Iterable) or hasattr(data, "__getitem__")
    if isinstance(data, Tensor | Mapping | str) or not is_iterable:
        msg = (
            f"data has type {type(data).__qualname__}; expected an (inputs, targets) pair, a list "
            "of pairs, a DataLoader, or another iterable of pairs."
        )
        raise TypeError(msg)


def as_batch(item: Any, what: str) -> Batch:
    """Return `item` as a batch, or say what an item must be."""
    if not isinstance(item, tuple | list) or len(item) != 2:
        length = f" of length {len(item)}" if isinstance(item, tuple | list) else ""
        hint = ""
        if isinstance(item, Tensor):
            hint = " A single pair of tensors is a tuple (inputs, targets), not a list."
        msg = (
            f"{what} is a {type(item).__qualname__}{length}; expected a pair (inputs, targets), "
            f"each a tensor, a tuple (positional arguments) or a dict (keywords).{hint}"
        )
        raise TypeError(msg)
    return Batch(*item)


def regroup(batches: Iterable[Batch], limit: Callable[[Batch], int]) -> Iterator[Batch]:
    """Yield the same examples in the same order in chunks of at most ``limit(batch)`` examples.

    Big batches are cut, consecutive small ones are joined if they fit together (the same structure,
    trailing shapes and dtypes). Batches whose examples cannot be told apart pass as they are.
    """
    pending: list[Batch] = []
    held, kind = 0, None
    for batch in batches:
        length = num_examples(batch)
        last, kind = kind, None if length is None else signature(batch)
        if pending and kind != last:
            yield join(pending)
            pending, held = [], 0
        if length is None:
            yield batch
            continue
        start, most = 0, limit(batch)
        while start < length:
            stop = min(length, start + most - held)
            pending.append(batch if stop - start == length else cut(batch, start, stop))
            held += stop - start
            start = stop
            if held >= most:
                yield join(pending)
                pending, held = [], 0
    if pending:
        yield join(pending)
