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
        once in each pass, and must give such pairs. A mapping with the key ``"labels"``, as Hugging
        Face's collators give them, stands for the pair (everything else, labels), alone or as an
        item: the model computes its outputs without knowing the labels.

    Raises
    ------
    TypeError
        If `data` cannot be iterated over twice, is a data set of single examples, or does not
        give pairs.
    ValueError
        If `data` is an empty list.
    """

    def __init__(self, data: Any) -> None:
        self.data = data
        _check_readable(data)
        # In memory the batches are known without reading, and their tensors tell when they change.
        self.in_memory = isinstance(data, tuple | list | Mapping)
        if self.in_memory and not any(True for _ in self):
            raise ValueError(EMPTY)

    def __iter__(self) -> Iterator[Batch]:
        if isinstance(self.data, tuple | Mapping):
            yield as_batch(self.data, "data")
            return
        for number, item in enumerate(self.data):
            yield as_batch(item, f"item {number} of data")

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors in memory that the batches are made of, as far as they are known."""
        if self.in_memory:
            return list(chain.from_iterable(tensors_in(batch) for batch in self))
        dataset = getattr(self.data, "dataset", None)
        return list(tensors_in(getattr(dataset, "tensors", ())))

    @property
    def generators(self) -> list[torch.Generator]:
        """The random generators that the order of the batches depends on."""
        holders = [self.data, getattr(self.data, "sampler", None)]
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
    if isinstance(data, Mapping):
        return  # one item, which `as_batch` reads
    is_iterable = isinstance(data, Iterable) or hasattr(data, "__getitem__")
    if isinstance(data, Tensor | str) or not is_iterable:
        msg = (
            f"data has type {type(data).__qualname__}; expected an (inputs, targets) pair, a "
            "mapping with labels, a list of either, a DataLoader, or another iterable of them."
        )
        raise TypeError(msg)


def as_batch(item: Any, what: str) -> Batch:
    """Return `item` as a batch, or say what an item must be."""
    if isinstance(item, Mapping):
        return _labeled(item, what)
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


def _labeled(item: Mapping[str, Any], what: str) -> Batch:
    """Return (everything else, labels), so that no model sees the labels and computes a loss."""
    kind = type(item).__qualname__
    if "labels" not in item:
        msg = (
            f"{what} is a {kind} with the keys {', '.join(map(str, item))} and without labels; put "
            'the targets under "labels", or pass a pair (inputs, targets) whose inputs are the '
            f"{kind}."
        )
        raise TypeError(msg)
    if not any(True for _ in tensors_in(item)):
        msg = (
            f"{what} is a {kind} without tensors, perhaps a single example; pass a DataLoader "
            "whose collate function makes batches of tensors."
        )
        raise TypeError(msg)
    inputs = {key: value for key, value in item.items() if key != "labels"}
    return Batch(inputs, item["labels"])


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
