"""Columns that go through the graphs together, as on a graphics processor, tried on a CPU."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from specdens_torch import (
    Fisher,
    GaussNewton,
    GradientCovariance,
    GradientSecondMoment,
    Hessian,
    Residual,
    Risk,
    layerwise,
    memory,
)
from specdens_torch.columns import Columns
from tests.adapters.torch_cases import architectures, classes, mlp, ragged

CE = nn.CrossEntropyLoss()
ARCHITECTURES = architectures()
MATRICES = (Hessian, GaussNewton, Residual, GradientSecondMoment, GradientCovariance, Fisher)


@pytest.fixture
def counted(monkeypatch):
    """Have columns go together on the CPU too, and count how many do at a time."""
    monkeypatch.setattr(memory, "batches_columns", lambda device: True)
    sizes, vmap = [], torch.func.vmap

    def counting(function):
        pushed = vmap(function)

        def push(*blocks):
            sizes.append(len(blocks[0]))
            return pushed(*blocks)

        return push

    monkeypatch.setattr(torch.func, "vmap", counting)
    return sizes


def assert_close(actual, expected):
    scale = max(expected.abs().max().item(), 1e-300)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12 * scale)


@pytest.mark.parametrize("budget", [2**30, 2000], ids=["kept", "one by one"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_together_or_not_is_the_same_product(name, budget, counted):
    model, inputs, labels = ARCHITECTURES[name]()
    risk = Risk(model, CE, ragged(inputs, labels, seed=2), memory_budget=budget)
    x = torch.randn(risk.parameters.size, 5, dtype=torch.float64)
    for matrix in MATRICES if budget == 2**30 else (Hessian, GaussNewton, Fisher):
        operator = matrix(risk)
        before = len(counted)
        found = operator @ x
        assert len(counted) > before or budget < 2**30
        single = torch.stack([operator @ column for column in x.T.contiguous()], 1)
        assert_close(found, single)


def test_blocks_of_a_matrix_and_wide_accumulators(counted):
    model, data = mlp(dtype=torch.float32), classes(dtype=torch.float32)
    whole = Hessian(model, CE, data, accumulate=torch.float64)
    for block in layerwise(whole).values():
        x = torch.randn(block.space.dimension, 3)
        single = torch.stack([block @ column for column in x.T.contiguous()], 1)
        torch.testing.assert_close(block @ x, single)
    assert set(counted) == {3}


def test_what_a_chunk_saves_bounds_the_columns(counted):
    risk = Risk(mlp(), CE, classes())
    saved = risk.passes.plan().elements * risk.passes.plan().bytes_per_element
    for most in (1, 2, 3):
        budget = int((most + 0.5) * (saved + risk.passes.plan().fixed_bytes))
        tight = Risk(mlp(), CE, classes(), memory_budget=budget)
        assert tight.passes.plan().columns_at_once == most
        counted.clear()
        Hessian(tight) @ torch.ones(43, 7, dtype=torch.float64)
        assert counted == {1: [], 2: [2, 2, 2], 3: [3, 3]}[most]


def test_without_a_graphics_processor_columns_go_one_by_one():
    assert Risk(mlp(), CE, classes()).passes.plan().columns_at_once == 1


class Stubborn(torch.autograd.Function):
    """A square whose backward pass looks at its argument, which vmap does not allow."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, slope):
        (x,) = ctx.saved_tensors
        if slope.sum().item() == 0.0:
            return torch.zeros_like(slope)
        return 2 * x * slope


class Squared(nn.Module):
    def forward(self, x):
        return Stubborn.apply(x)


def test_layers_that_vmap_does_not_take_go_one_by_one_from_then_on(counted):
    model = mlp(Squared)
    operator = GaussNewton(model, CE, classes())
    x = torch.randn(43, 4, dtype=torch.float64)
    single = torch.stack([operator @ column for column in x.T.contiguous()], 1)
    assert not counted
    assert_close(operator @ x, single)
    assert counted == [4]  # tried once
    assert_close(operator @ x, single)
    assert counted == [4]


def test_no_part_of_a_failed_attempt_is_added(counted):
    calls = []

    def product(blocks):
        calls.append(blocks[0])
        if len(calls) == 1:
            raise torch.OutOfMemoryError
        return [2 * blocks[0], None]

    vectors = [torch.arange(6.0).reshape(3, 2), torch.ones(3, 1)]
    targets = [torch.zeros(3, 2), torch.zeros(3, 1)]
    assert not Columns(vectors, targets).add(product, 3)
    assert torch.equal(targets[0], 2 * vectors[0])
    assert not targets[1].any()
    assert len(calls) == 4


def test_what_is_wrong_alone_is_raised(counted):
    def product(blocks):
        raise NotImplementedError

    with pytest.raises(NotImplementedError):
        Columns([torch.ones(2, 2)], [torch.zeros(2, 2)]).add(product, 2)
