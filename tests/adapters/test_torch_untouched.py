"""Every operator leaves models, data and generators as they were, also where it fails."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from specdens_torch import (
    Fisher,
    GaussNewton,
    GradientCovariance,
    GradientSecondMoment,
    Hessian,
    Residual,
    Risk,
    TangentKernel,
    gradient,
    layerwise,
    risk_value,
)
from tests.adapters.test_torch_state import Busy, assert_same, everything, prepared
from tests.adapters.torch_cases import classes

CE = nn.CrossEntropyLoss()


class Drawing(Busy):
    """A model that also draws numbers, without effect, and fails at a call of choice."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(3).double()
        self.fails_at, self.log = 0, []

    def forward(self, x):
        self.log.append(len(x))
        if len(self.log) == self.fails_at:
            msg = "model failed"
            raise RuntimeError(msg)
        unseen = random.random() + np.random.rand() + torch.rand(())  # noqa: NPY002
        return self.norm(super().forward(x)) + 0 * unseen


def drawing():
    model = Drawing().eval()
    model.body[2].bias.requires_grad_(False)
    CE(model(classes()[0]), classes()[1]).backward()
    return model


def multiplied(operator):
    return operator @ torch.ones(operator.space.dimension, 2, dtype=torch.float64)


def blocks(risk):
    matrix = GaussNewton(risk)
    return [multiplied(block) for block in (matrix, *layerwise(matrix).values())]


MATRICES = (Hessian, GaussNewton, Residual, GradientSecondMoment, GradientCovariance, Fisher)
USES = {kind.__name__: lambda risk, kind=kind: multiplied(kind(risk)) for kind in MATRICES}
USES["TangentKernel"] = lambda risk: multiplied(TangentKernel(risk))
USES |= {"layerwise": blocks, "gradient": gradient, "risk_value": risk_value}


@pytest.mark.parametrize("budget", [2**30, 100], ids=["kept", "not kept"])
@pytest.mark.parametrize("name", USES)
def test_every_operator_leaves_everything_as_it_was_wherever_it_fails(name, budget):
    model, failures, call = drawing(), 0, 1
    while True:
        model.fails_at = call
        model.log.clear()
        loader = DataLoader(TensorDataset(*classes()), 5, shuffle=True)
        risk, before = Risk(model, CE, loader, memory_budget=budget), everything(model)
        try:
            USES[name](risk)
        except RuntimeError as error:
            assert "model failed" in str(error)  # noqa: PT017 (at last it succeeds)
            assert_same(before, everything(model))
            failures, call = failures + 1, call + 1 + call // 12
        else:
            break
    assert_same(before, everything(model))
    assert failures >= 8


@pytest.mark.parametrize("name", USES)
def test_every_operator_leaves_everything_as_it_was_with_batch_statistics(name):
    model = nn.Sequential(Busy(), nn.BatchNorm1d(3).double())
    CE(model(classes()[0]), classes()[1]).backward()
    before = everything(model)
    USES[name](Risk(model, CE, [classes(), classes(7)], batch_statistics=True))
    assert_same(before, everything(model))


@pytest.mark.parametrize("name", USES)
def test_every_operator_leaves_everything_as_it_was_when_something_is_wrong(name):
    model, seen = prepared(), []

    def loss(outputs, targets):
        random.random(), torch.rand(())
        seen.append(len(targets))
        if len(seen) > 7:
            msg = "loss failed"
            raise RuntimeError(msg)
        return F.cross_entropy(outputs, targets, reduction="none")

    before = everything(model.eval())
    loader = DataLoader(TensorDataset(*classes()), 5, shuffle=True)
    with pytest.raises(RuntimeError, match="loss failed"):
        USES[name](Risk(model, loss, loader))
    assert_same(before, everything(model))
    inputs, labels = classes()
    inputs[4] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        USES[name](Risk(model, CE, (inputs, labels)))
    assert_same(before, everything(model))
