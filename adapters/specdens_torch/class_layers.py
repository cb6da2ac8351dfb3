"""Class structure of a single linear layer: its features and its backpropagated errors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from specdens.layer_structure import LayerStructure, LayerSums, averaged
from specdens_torch.class_products import ClassRows
from specdens_torch.evaluation import Evaluation
from specdens_torch.risk import Risk


def layer_structure(
    risk: Risk, name: str, rows_of: Callable[[Evaluation], tuple[ClassRows, tuple[Tensor, ...]]]
) -> LayerStructure:
    """Return the structure of the layer called `name`, from one pass over the data.

    Parameters
    ----------
    risk : Risk
    name : str
        Of a `torch.nn.Linear` that is used once, on one vector for each example.
    rows_of : callable
        Gives the rows of an evaluated chunk, and the logits in the model's graph.

    Returns
    -------
    LayerStructure

    Raises
    ------
    ValueError
        If the layer is no such layer, its moments do not fit into the memory budget of the risk,
        or the risk adds up over processes.
    """
    layer = _linear(risk, name)
    capture = _Capture(name)
    sums: list[LayerSums] = []

    def add(evaluation: Evaluation) -> None:
        rows, logits = rows_of(evaluation)
        if not sums:
            sums.append(_zeros(rows.num_classes, layer))
        _add(sums[0], rows, logits, *capture.taken(rows))

    risk.passes.plan()  # evaluates some examples without our noticing
    handle = layer.register_forward_hook(capture)
    try:
        totals = risk.passes.sweep(add, cuts=True)
    finally:
        handle.remove()
    found = LayerSums(*(total.numpy() for total in sums[0]))
    return averaged(found, name, totals.weight if risk.divides else 1.0)


def _linear(risk: Risk, name: str) -> nn.Linear:
    layers = {key: m for key, m in risk.model.named_modules() if isinstance(m, nn.Linear)}
    if name not in layers:
        msg = f"name={name!r} is none of the linear layers {list(layers)}."
        raise ValueError(msg)
    layer = layers[name]
    needed = 8 * (layer.in_features**2 + layer.out_features**2)
    if needed > risk.memory_budget:
        msg = (
            f"name={name!r}: the second moments of the layer take {needed:,} bytes, more than "
            f"memory_budget={risk.memory_budget:,} of the risk; raise it, or take another layer."
        )
        raise ValueError(msg)
    if risk.processes is not None:
        msg = (
            "risk adds up over processes, which layers do not; make a Risk of all data without "
            "process_group for them."
        )
        raise ValueError(msg)
    return layer


class _Capture:
    """A forward hook that keeps a layer's input and output, as a leaf if nothing before varies."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._seen: list[tuple[Tensor, Tensor]] = []

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        if torch.is_grad_enabled() and not output.requires_grad:
            output = output.detach().requires_grad_()
        self._seen.append((args[0].detach(), output))
        return output

    def taken(self, rows: ClassRows) -> tuple[Tensor, Tensor]:
        """Return what the last forward pass left, checked, and forget it."""
        seen, self._seen = self._seen, []
        shapes = [tuple(output.shape) for _, output in seen]
        if len(seen) != 1 or seen[0][1].ndim != 2 or len(seen[0][1]) != len(rows.factor):
            msg = (
                f"name={self._name!r}: the layer returned {shapes} for {len(rows.factor)} rows of "
                "logits; expected one call with one vector for each."
            )
            raise ValueError(msg)
        return seen[0]


def _errors(rows: ClassRows, logits: tuple[Tensor, ...], outputs: Tensor, other: int) -> Tensor:
    """Return the errors of every row as if its label were `other`, (n, m)."""
    chosen = torch.zeros_like(rows.probabilities)
    chosen[:, other] = 1.0
    found = None
    if logits:
        cotangents = [rows.cotangents(chosen)]
        (found,) = torch.autograd.grad(
            logits, [outputs], cotangents, retain_graph=True, allow_unused=True
        )
    found = torch.zeros_like(outputs) if found is None else found
    return found.detach().to(rows.probabilities)


def _zeros(number: int, layer: nn.Linear) -> LayerSums:
    """Return sums of nothing, on the host in double precision."""
    d, m = layer.in_features, layer.out_features
    shapes = ((number,), (number, d), (d, d), (number, number), (number, number, m), (m, m))
    return LayerSums(*(torch.zeros(shape, dtype=torch.float64) for shape in shapes))


def _add(
    sums: LayerSums, rows: ClassRows, logits: tuple[Tensor, ...], inputs: Tensor, outputs: Tensor
) -> None:
    """Add one chunk, whose layer had these inputs and outputs."""
    x, factor = inputs.to(rows.probabilities), rows.factor[:, None]
    sums.shares.add_(rows.memberships.summed(factor)[:, 0].cpu())
    sums.features.add_(rows.memberships.summed(factor * x).cpu())
    sums.feature_square.add_((x.t() @ (factor * x)).cpu())
    sums.pairs.add_(rows.pair_sums().cpu())
    for other in range(rows.num_classes):
        errors = _errors(rows, logits, outputs, other)
        weighted = rows.shares[:, other, None] * errors
        sums.errors[:, other].add_(rows.memberships.summed(weighted).cpu())
        sums.error_square.add_((errors.t() @ weighted).cpu())
