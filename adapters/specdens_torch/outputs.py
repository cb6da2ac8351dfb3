"""Where a model ends and its loss begins: cutting outputs of any structure out of the graph."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn


class Cut(NamedTuple):
    """The tensors on both sides of a cut, in the same order."""

    attached: tuple[Tensor, ...]  # outputs of the model, in its graph
    leaves: tuple[Tensor, ...]  # the same values, where the loss's graph begins

    def behind(self, leaf: Tensor) -> tuple[Tensor, ...]:
        """Return the output that `leaf` stands for, nothing if it is constant."""
        pairs = zip(self.attached, self.leaves, strict=True)
        return tuple(output for output, own in pairs if own is leaf)


def cut_outputs(outputs: Any) -> tuple[Any, Cut]:
    """Return `outputs` with every differentiable tensor replaced by a leaf, and both of each.

    Tensors, nested tuples, lists and mappings (Hugging Face outputs are mappings), and objects
    that hold tensors as attributes keep their type. A tensor that occurs twice is cut once.
    """
    pairs: dict[int, tuple[Tensor, Tensor]] = {}

    def leaf(tensor: Tensor) -> Tensor:
        if not tensor.requires_grad:
            return tensor
        if id(tensor) not in pairs:
            pairs[id(tensor)] = tensor, tensor.detach().requires_grad_()
        return pairs[id(tensor)][1]

    replaced = _replaced(leaf, outputs)
    attached, leaves = zip(*pairs.values(), strict=True) if pairs else ((), ())
    return replaced, Cut(attached, leaves)


def _replaced(function: Callable[[Tensor], Tensor], tree: Any) -> Any:
    """Return a copy of `tree` with every tensor replaced, of the same types."""
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, Mapping):
        items = {key: _replaced(function, value) for key, value in tree.items()}
        if not hasattr(tree, "__setitem__"):
            return items
        result = copy.copy(tree)  # which keeps attributes, default factories and the like
        for key, value in items.items():
            result[key] = value
        return result
    if isinstance(tree, tuple | list):
        values = [_replaced(function, value) for value in tree]
        return type(tree)(*values) if hasattr(tree, "_fields") else type(tree)(values)
    if hasattr(tree, "__dict__") and not isinstance(tree, type | nn.Module) and not callable(tree):
        result = copy.copy(tree)
        for key, value in vars(tree).items():
            object.__setattr__(result, key, _replaced(function, value))
        return result
    return tree
