"""Classifiers with all kinds of targets, and their class structure term by term."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from specdens_torch import Risk
from specdens_torch.class_structure import ClassStructure
from tests.adapters.torch_cases import classes, mlp, ragged
from tests.adapters.torch_dense import jacobian


class Dense(NamedTuple):
    """What the definitions give, summed over examples and pairs one by one."""

    parts: dict[str, Tensor]
    pair_weights: Tensor
    class_weights: Tensor
    pair_means: Tensor  # (C, C, p)
    class_means: Tensor  # (p, C)


def dense_structure(
    jacobians: Tensor, logits: Tensor, members: Tensor, factors: Tensor, weighting: str
) -> Dense:
    """Take Jacobians (n, C, p), logits and memberships (n, C), weights (n,) that add up to 1."""
    n, number, p = jacobians.shape
    probabilities = torch.softmax(logits, 1)
    h = torch.zeros(n, number, number, p, dtype=torch.float64)
    omega = torch.zeros(n, number, number, dtype=torch.float64)
    for i in range(n):
        for c in range(number):
            for other in range(number):
                q = probabilities[i, other]
                gradient = jacobians[i].T @ (probabilities[i] - torch.eye(number)[other])
                uniform = weighting == "uniform"
                h[i, c, other] = q.sqrt() * gradient if uniform else gradient
                omega[i, c, other] = factors[i] * members[i, c] * (1.0 if uniform else q)
    weights = omega.sum(0)
    means = torch.einsum("icd,icdp->cdp", omega, h) / weights.clamp_min(1e-300)[..., None]
    off = weights * (1 - torch.eye(number))
    class_weights = off.sum(1)
    class_means = torch.einsum("cd,cdp->cp", off, means) / class_weights.clamp_min(1e-300)[:, None]
    spread = means - class_means[:, None]
    rest = h - means
    diagonal = torch.stack([means[c, c] for c in range(number)])
    parts = {
        "class": torch.einsum("c,cp,cq->pq", class_weights, class_means, class_means),
        "cross": torch.einsum("cd,cdp,cdq->pq", off, spread, spread),
        "within": torch.einsum("icd,icdp,icdq->pq", omega, rest, rest),
        "equal": torch.einsum("c,cp,cq->pq", weights.diagonal(), diagonal, diagonal),
    }
    return Dense(parts, weights, class_weights, means, class_means.T)


class Case(NamedTuple):
    model: nn.Module
    loss: Any
    inputs: Tensor
    targets: Tensor
    members: Tensor  # (n, C)
    factors: Tensor  # (n,) weights divided by their sum

    def dense(self, weighting: str, names: list[str] | None = None) -> Dense:
        rows = jacobian(self.model, self.inputs, names)
        logits = self.model(self.inputs).detach().reshape(-1, 3)
        return dense_structure(
            rows.reshape(-1, 3, rows.shape[1]), logits, self.members, self.factors, weighting
        )

    def structure(self, weighting: str, seed: int = 3, **options: Any) -> ClassStructure:
        batches = ragged(self.inputs, self.targets, seed)
        return ClassStructure(Risk(self.model, self.loss, batches, **options), weighting=weighting)


def case(name: str) -> Case:
    """Return a network with data, and memberships and factors as its name says."""
    inputs, labels = classes(10)
    model, ones = mlp(), torch.ones(10, dtype=torch.float64)
    loss: Any = nn.CrossEntropyLoss()
    hard = partial(F.one_hot, num_classes=3)
    if name == "empty":
        labels = labels.where(labels != 1, 2)
    if name == "imbalanced":
        labels = torch.tensor([0] * 7 + [1] * 2 + [2])
    members, factors, targets = hard(labels).double(), ones / 10, labels
    if name == "sum":
        loss, factors = nn.CrossEntropyLoss(reduction="sum"), ones
    if name == "smoothed":
        loss = nn.CrossEntropyLoss(label_smoothing=0.2)
    if name == "weighted":
        weight = torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64)
        loss = nn.CrossEntropyLoss(weight=weight)
        factors = weight[labels] / weight[labels].sum()
    if name == "ignored":
        loss = nn.CrossEntropyLoss(ignore_index=1)
        factors = (labels != 1) / (labels != 1).sum().double()
    if name == "soft":
        targets = members = torch.rand(10, 3, generator=torch.Generator().manual_seed(5)).double()
        targets = members = members / members.sum(1, keepdim=True)
    return Case(model, loss, inputs, targets, members, factors)
