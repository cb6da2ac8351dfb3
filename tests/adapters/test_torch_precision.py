"""Matrices of PyTorch models in half, single and mixed precision against those in double."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from specdens import slq
from specdens_torch import (
    GaussNewton,
    GradientCovariance,
    GradientSecondMoment,
    Hessian,
    Residual,
    Risk,
    gradient,
    risk_value,
)
from tests.adapters.torch_cases import classes, dense, mlp, ragged

CE = nn.CrossEntropyLoss()
MATRICES = (Hessian, GaussNewton, Residual, GradientSecondMoment, GradientCovariance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    model, (inputs, labels) = mlp(dtype=dtype), classes(30)
    data = ragged(inputs.to(dtype), labels, 4)
    hessian = Hessian(model, CE, data)
    expected = dense(_double(model), CE, inputs.to(dtype).double(), labels)
    x = torch.randn(43, 2, dtype=torch.float64)
    error = (hessian @ x.to(dtype)).double() - expected @ x
    assert (hessian @ x.to(dtype)).dtype == dtype
    eps = torch.finfo(dtype).eps
    assert error.norm() < 8 * eps * (expected @ x).norm() + 8 * eps * expected.norm()
    assert (hessian @ x.float()).dtype == torch.float32  # what is added up in float32 may stay so
    assert hessian.space.dtype == dtype
    assert gradient(hessian.risk).dtype == dtype
    expected_value = CE(_double(model)(inputs.to(dtype).double()), labels).item()
    assert risk_value(hessian.risk) == pytest.approx(expected_value, rel=4 * eps)


def _double(model):
    copy = mlp()
    copy.load_state_dict(model.state_dict())
    return copy


def test_mixed_precisions():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            body = mlp(dtype=torch.float32)
            self.first, self.last = body[0], body[2].double()

        def forward(self, x):
            return self.last(torch.tanh(self.first(x)).double())

    inputs, labels = classes(dtype=torch.float32)
    hessian = Hessian(Mixed(), CE, (inputs, labels))
    assert hessian.space.dtype == torch.float64
    expected = dense(mlp(), CE, inputs.double(), labels)
    found = hessian @ torch.eye(43, dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


def test_automatic_mixed_precision_is_that_of_the_caller():
    model, data = mlp(dtype=torch.float32), classes(dtype=torch.float32)
    hessian = Hessian(model, CE, data)
    x = torch.randn(43)
    plain = hessian @ x
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = hessian @ x
    assert 1e-5 < (mixed - plain).norm() / plain.norm() < 0.1
    assert torch.equal(hessian @ x, plain)


def test_half_precision_has_a_density():
    hessian = Hessian(mlp(dtype=torch.bfloat16), CE, classes(dtype=torch.bfloat16))
    eigenvalues = torch.linalg.eigvalsh(dense(mlp(), CE, *classes()))
    measure = slq(hessian, num_probes=2, num_steps=10, seed=0)
    assert measure.nodes.max() == pytest.approx(eigenvalues.max().item(), rel=0.1)


@pytest.mark.parametrize("kind", MATRICES)
def test_float64_accumulation_of_float32_products(kind):
    model, (inputs, labels) = mlp(dtype=torch.float32), classes(200, dtype=torch.float32)
    exact = kind(mlp(), CE, (inputs.double(), labels))
    x = torch.randn(43, 3, generator=torch.Generator().manual_seed(5))
    errors = []
    for dtype in (None, torch.float64):
        risk = Risk(model, CE, (inputs, labels), memory_budget=1, accumulate=dtype)
        assert risk.accumulation_dtype == (dtype or torch.float32)
        product = kind(risk) @ x
        assert product.dtype == torch.float32
        errors.append((product - exact @ x.double()).norm() / (exact @ x.double()).norm())
    # One example at a time: 200 roundings to float32 against none.
    assert errors[1] < 2e-7
    assert errors[1] < errors[0]
    with pytest.raises(ValueError, match=r"accumulate=torch\.float16"):
        Risk(model, CE, (inputs, labels), accumulate=torch.float16)


def test_gauss_newton_in_half_precision():
    model, (inputs, labels) = mlp(dtype=torch.bfloat16), classes(dtype=torch.bfloat16)
    reference = GaussNewton(mlp(), CE, (inputs.double(), labels))
    x = torch.randn(43, dtype=torch.float32)
    product = GaussNewton(model, CE, (inputs, labels)) @ x
    assert (product - reference @ x.double()).norm() <= 0.1 * (reference @ x.double()).norm()
