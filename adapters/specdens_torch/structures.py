"""Nested batches of tensors: looking into them, slicing them by examples, joining them again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence


class Batch(NamedTuple):
    """Inputs and targets of some examples: tensors, or nested tuples, lists and mappings."""

    inputs: Any
    targets: Any


def _is_sequence(tree: Any) -> bool:
    # A packed sequence is a named tuple whose tensors mean nothing apart.
    return isinstance(tree, tuple | list) and not isinstance(tree, PackedSequence)


def tensors_in(tree: Any) -> Iterator[Tensor]:
    """Yield the tensors of `tree` in a fixed order."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, Mapping):
        for value in tree.values():
            yield from tensors_in(value)
    elif _is_sequence(tree):
        for value in tree:
            yield from tensors_in(value)


def logits_of(outputs: Any) -> Tensor | None:
    """Return what a model's outputs carry: themselves if a tensor, or a tensor called ``logits``.

    Models of Hugging Face return mappings with attributes that hold their logits.
    """
    found = outputs
    if not isinstance(outputs, Tensor):
        is_mapping = isinstance(outputs, Mapping)
        found = outputs.get("logits") if is_mapping else getattr(outputs, "logits", None)
    return found if isinstance(found, Tensor) else None


def map_tensors(function: Callable[[Tensor], Tensor], tree: Any) -> Any:
    """Return `tree` with every tensor replaced; mappings become dictionaries."""
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, Mapping):
        return {key: map_tensors(function, value) for key, value in tree.items()}
    if _is_sequence(tree):
        values = [map_tensors(function, value) for value in tree]
        if hasattr(tree, "_fields"):  # a named tuple takes its fields one by one
            return type(tree)(*values)
        return type(tree)(values)
    return tree


def num_examples(batch: Batch) -> int | None:
    """Return the length of the first axis that all tensors share, or None if they share none.

    None marks a batch that cannot be cut: nothing says where its examples are.
    """
    lengths = {t.shape[0] if t.ndim else -1 for t in tensors_in(batch)}
    if len(lengths) != 1 or -1 in lengths or not _only_plain(batch):
        return None
    return lengths.pop()


def num_elements(batch: Batch) -> int:
    """Return the number of input entries, the measure of a batch's size; at least 1."""
    return max(1, sum(t.numel() for t in tensors_in(batch.inputs)))


def cut(batch: Batch, start: int, stop: int) -> Batch:
    """Return the examples from `start` up to `stop`, as views."""
    return map_tensors(lambda t: t[start:stop], batch)


def signature(tree: Any) -> Any:
    """Return what batches must share to be joined: structure, trailing shapes and dtypes."""
    if isinstance(tree, Tensor):
        return (tree.dtype, tuple(tree.shape[1:]), tree.device)
    if isinstance(tree, Mapping):
        return (dict, *((key, signature(value)) for key, value in tree.items()))
    if _is_sequence(tree):
        return (type(tree), *(signature(value) for value in tree))
    return (type(tree), tree)


def join(batches: list[Batch]) -> Batch:
    """Return one batch with the examples of all; their signatures must be equal."""
    if len(batches) == 1:
        return batches[0]
    columns = zip(*(tensors_in(batch) for batch in batches), strict=True)
    joined = iter([torch.cat(parts) for parts in columns])
    return map_tensors(lambda _: next(joined), batches[0])


def move(tree: Any, device: torch.device) -> Any:
    """Return `tree` on `device`; what is there already is not copied."""
    if isinstance(tree, Mapping):
        return {key: move(value, device) for key, value in tree.items()}
    if _is_sequence(tree):
        values = [move(value, device) for value in tree]
        return type(tree)(*values) if hasattr(tree, "_fields") else type(tree)(values)
    if isinstance(tree, Tensor):
        return tree if tree.device == device else tree.to(device)
    # Graph batches, packed sequences and the like know how to move themselves.
    return tree.to(device) if callable(getattr(tree, "to", None)) else tree


def _only_plain(tree: Any, in_sequence: bool = False) -> bool:
    """Tell whether everything that is not a tensor is a setting, not data of single examples.

    A number or a text in a tuple or list may be one of many, one for each example, so it counts
    as data.
    """
    if isinstance(tree, Mapping):
        return all(_only_plain(value) for value in tree.values())
    if _is_sequence(tree):
        return all(_only_plain(value, not isinstance(tree, Batch)) for value in tree)
    if tree is None or isinstance(tree, Tensor | bool):
        return True
    return not in_sequence and isinstance(tree, int | float | str)
