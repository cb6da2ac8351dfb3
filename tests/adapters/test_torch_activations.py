"""Activations with lean second derivatives: the numbers of torch, fewer operations."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from specdens_torch import GaussNewton, Hessian, Residual
from specdens_torch.activations import ACTIVATIONS
from tests.adapters.torch_cases import classes, dense, mlp
from tests.adapters.torch_dense import assert_close, gauss_newton

CE = nn.CrossEntropyLoss()
LAYERS = {
    "gelu": nn.GELU,
    "gelu by tanh": lambda: nn.GELU(approximate="tanh"),
    "silu": nn.SiLU,
    "silu in place": lambda: nn.SiLU(inplace=True),
}


@pytest.mark.parametrize("name", LAYERS)
def test_second_derivatives_are_those_of_torch(name):
    model, (inputs, labels) = mlp(LAYERS[name]), classes()
    hessian = Hessian(model, CE, (inputs, labels))
    identity = torch.eye(hessian.space.dimension, dtype=torch.float64)
    expected = dense(model, CE, inputs, labels)
    assert_close(hessian @ identity, expected)
    part = gauss_newton(model, CE, inputs, labels)
    assert_close(GaussNewton(model, CE, (inputs, labels)) @ identity, part)
    assert_close(Residual(model, CE, (inputs, labels)) @ identity, expected - part, 1e-9)


@pytest.mark.parametrize("function", [torch.nn.functional.gelu, torch.nn.functional.silu])
def test_derivatives_by_differences_and_no_third(function):
    x = torch.linspace(-4, 4, 9, dtype=torch.float64, requires_grad=True)
    lean = ACTIVATIONS[function]
    assert torch.equal(lean(x), function(x))
    assert torch.autograd.gradcheck(lean, x)
    assert torch.autograd.gradgradcheck(lean, x)
    (first,) = torch.autograd.grad(lean(x).pow(2).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.pow(2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        second.sum().backward()


@pytest.mark.parametrize("function", [torch.nn.functional.gelu, torch.nn.functional.silu])
def test_far_out_and_in_half_precision(function):
    lean = ACTIVATIONS[function]
    x = torch.tensor([-1e30, -200.0, 200.0, 1e30], requires_grad=True)
    (first,) = torch.autograd.grad(lean(x).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    assert torch.equal(first, torch.tensor([0.0, 0.0, 1.0, 1.0]))
    assert not second.any()
    half = torch.ones(2, dtype=torch.bfloat16)
    assert torch.equal(lean(half), function(half))


class Ensemble(nn.Module):
    """Two perceptrons, evaluated together by a transform of torch.func within the model."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        weights = torch.randn(2, 3, 4, generator=generator, dtype=torch.float64)
        self.weights = nn.Parameter(weights)

    def forward(self, x):
        def member(weight):
            normal = torch.nn.functional.layer_norm(x @ weight.T, (3,))
            return torch.nn.functional.gelu(normal)

        return torch.func.vmap(member)(self.weights).sum(0)


def test_models_that_use_transforms_themselves():
    model, (inputs, labels) = Ensemble(), classes()
    hessian = Hessian(model, CE, (inputs, labels))
    identity = torch.eye(24, dtype=torch.float64)
    assert_close(hessian @ identity, dense(model, CE, inputs, labels))
