"""Convolutions with lean second derivatives: the numbers of torch, fewer operations."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from specdens_torch import GaussNewton, Hessian, Residual
from specdens_torch.convolution import CONVOLUTIONS
from tests.adapters.torch_cases import dense
from tests.adapters.torch_dense import assert_close, gauss_newton

CE = nn.CrossEntropyLoss()
SETTINGS = {
    "plain": {},
    "strided": {"stride": 2, "padding": 1},
    "dilated": {"dilation": 2, "padding": 2},
    "grouped": {"groups": 2, "bias": False},
    "depthwise": {"groups": 2, "padding": 1},
    "same": {"padding": "same"},
    "circular": {"padding": 1, "padding_mode": "circular"},
}


def network(dimensions, settings):
    layer = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dimensions]
    torch.manual_seed(0)
    pool = {1: nn.AdaptiveAvgPool1d, 2: nn.AdaptiveAvgPool2d, 3: nn.AdaptiveAvgPool3d}[dimensions]
    first = layer(1, 2, 3, padding=1)
    model = nn.Sequential(
        first, nn.Tanh(), layer(2, 2, 3, **settings), nn.Tanh(), pool(1), nn.Flatten(),
        nn.Linear(2, 3),
    )  # fmt: skip
    size = {1: (9,), 2: (6, 5), 3: (5, 5, 5)}[dimensions]
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(4, 1, *size, generator=generator, dtype=torch.float64)
    return model.double(), inputs, torch.randint(3, (4,), generator=generator)


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_second_derivatives_are_those_of_torch(dimensions, name):
    model, inputs, labels = network(dimensions, SETTINGS[name])
    hessian = Hessian(model, CE, (inputs, labels))
    identity = torch.eye(hessian.space.dimension, dtype=torch.float64)
    expected = dense(model, CE, inputs, labels)
    assert_close(hessian @ identity, expected)
    part = gauss_newton(model, CE, inputs, labels)
    assert_close(GaussNewton(model, CE, (inputs, labels)) @ identity, part)
    assert_close(Residual(model, CE, (inputs, labels)) @ identity, expected - part, 1e-9)


@pytest.mark.parametrize("name", ["0.weight", "2.weight", "2.bias"])
def test_derivatives_of_a_part(name):
    model, inputs, labels = network(2, {})
    hessian = Hessian(model, CE, (inputs, labels), name)
    identity = torch.eye(hessian.space.dimension, dtype=torch.float64)
    assert_close(hessian @ identity, dense(model, CE, inputs, labels, [name]))


class Counting(TorchDispatchMode):
    """Counts convolutions and their derivatives, one for each tensor that is computed."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.convolution.default:
            self.count += 1
        if func is torch.ops.aten.convolution_backward.default:
            self.count += sum(args[-1][:2])
        return func(*args, **(kwargs or {}))


def test_products_compute_what_they_need():
    model, inputs, labels = network(2, {})
    # Of two layers the first has constant inputs. Both: 1 convolution for the first layer and 2 for
    # the second forward, the first's weight and the second's input and weight back. The Hessian
    # has the second's input and weight in a second term, too.
    for kind, least in ((GaussNewton, 6), (Hessian, 8)):
        matrix = kind(model, CE, (inputs, labels))
        x = torch.randn(matrix.space.dimension, dtype=torch.float64)
        matrix @ x
        with Counting() as counting:
            matrix @ x
        assert counting.count == least


def test_checkpointed_convolutions():
    class Checkpointed(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return checkpoint(self.inner, x, use_reentrant=False)

    model, inputs, labels = network(2, {})
    wrapped = nn.Sequential(Checkpointed(model[:4]), *model[4:])
    for kind in (Hessian, GaussNewton):
        x = torch.randn(sum(p.numel() for p in model.parameters()), dtype=torch.float64)
        assert_close(kind(wrapped, CE, (inputs, labels)) @ x, kind(model, CE, (inputs, labels)) @ x)


def test_what_is_not_a_batch_is_left_to_torch():
    weight = torch.randn(2, 1, 3, 3)
    single, none = torch.randn(1, 5, 5), torch.randn(0, 1, 5, 5)
    for x in (single, none):
        assert torch.equal(CONVOLUTIONS[torch.conv2d](x, weight), torch.conv2d(x, weight))
