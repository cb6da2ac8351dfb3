"""Models that take derivatives themselves, whose curvature has third ones, by elementary layers."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from torch import nn
from torch.func import grad, jacrev
from torch.utils.checkpoint import checkpoint

from specdens_torch import (
    GaussNewton,
    GradientSecondMoment,
    Hessian,
    Residual,
    Risk,
    memory,
    orders,
)
from tests.adapters.torch_dense import assert_close, flat_outputs


class Slopes(nn.Module):
    """A network that returns derivatives in its inputs."""

    def __init__(self, *layers):
        super().__init__()
        self.inner = nn.Sequential(*layers)

    def forward(self, x):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            return torch.autograd.grad(self.inner(x).sum(), x, create_graph=True)[0]


class Transformed(Slopes):
    """The same by a transform, which the dense derivatives are made of, too."""

    def forward(self, x):
        return grad(lambda inputs: self.inner(inputs).sum())(x)


class Checkpointed(nn.Module):
    """A network that runs again where its saved tensors are needed."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return checkpoint(self.inner, x, use_reentrant=False)


BATCH_NORM = nn.modules.batchnorm._BatchNorm


class Plain(nn.Module):
    """A layer in operations whose derivatives of any order are torch's own, and right."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        layer = self.layer
        if isinstance(layer, nn.GELU):
            return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))
        if isinstance(layer, nn.SiLU):
            return x / (1 + torch.exp(-x))
        if isinstance(layer, nn.LayerNorm):
            centered = x - x.mean(-1, keepdim=True)
            spread = torch.sqrt(centered.square().mean(-1, keepdim=True) + layer.eps)
            return layer.weight * centered / spread + layer.bias
        if isinstance(layer, nn.InstanceNorm2d) or (
            isinstance(layer, BATCH_NORM) and layer.training
        ):
            axes = (2, 3) if isinstance(layer, nn.InstanceNorm2d) else (0, 2, 3)
            centered = x - x.mean(axes, keepdim=True)
            spread = torch.sqrt(centered.square().mean(axes, keepdim=True) + layer.eps)
            return layer.weight[:, None, None] * centered / spread + layer.bias[:, None, None]
        if isinstance(layer, BATCH_NORM):
            m, v, w, b = (
                t.reshape(-1, *(1,) * (x.ndim - 2))
                for t in (layer.running_mean, layer.running_var, layer.weight, layer.bias)
            )
            return w * (x - m) / torch.sqrt(v + layer.eps) + b
        if isinstance(layer, nn.Conv1d | nn.Conv2d):
            return convolved(layer, x)
        return layer(x)


def convolved(layer, x):
    """Return the sum over places in the kernel of products with shifted inputs."""
    x = nn.functional.pad(x, [side for p in reversed(layer.padding) for side in (p, p)])
    x = x.unflatten(1, (layer.groups, -1))
    weight = layer.weight.unflatten(0, (layer.groups, -1))
    counts = [
        (n - k) // s + 1
        for n, k, s in zip(x.shape[3:], layer.kernel_size, layer.stride, strict=True)
    ]
    found = 0 if layer.bias is None else layer.bias.reshape(-1, *(1,) * len(counts))
    for place in product(*map(range, layer.kernel_size)):
        window = [
            slice(a, a + (n - 1) * s + 1, s)
            for a, n, s in zip(place, counts, layer.stride, strict=True)
        ]
        shifted = x[:, :, :, *window]
        part = torch.einsum("ngc...,goc->ngo...", shifted, weight[:, :, :, *place])
        found = found + part.flatten(1, 2)
    return found


def statistics(layer):
    layer.running_mean.normal_()
    layer.running_var.uniform_(0.5, 2)
    return layer.eval()


def image_layers(middle):
    return nn.Conv2d(1, 2, 2), nn.Tanh(), middle, nn.Tanh(), nn.Flatten(), nn.LazyLinear(1)


LAYERS = {
    "convolution": lambda: image_layers(nn.Conv2d(2, 2, 2)),
    "strided": lambda: image_layers(nn.Conv2d(2, 2, 2, stride=2, padding=1)),
    "grouped": lambda: image_layers(nn.Conv2d(2, 4, 2, groups=2, bias=False)),
    "batch norm": lambda: image_layers(statistics(nn.BatchNorm2d(2))),
    "batch statistics": lambda: image_layers(nn.BatchNorm2d(2)),
    "instance norm": lambda: image_layers(nn.InstanceNorm2d(2, affine=True)),
    "row": lambda: (nn.Conv1d(1, 2, 2), nn.Tanh(), nn.Flatten(), nn.LazyLinear(1)),
    "layer norm": lambda: (nn.Linear(4, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 1)),
    "gelu": lambda: (nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 1)),
    "silu": lambda: (nn.Linear(4, 4), nn.SiLU(), nn.Linear(4, 1)),
}


def case(name):
    """Return layers in double precision with inputs and targets of the shape of these."""
    torch.manual_seed(0)
    layers = nn.Sequential(*LAYERS[name]()).double()
    shape = {nn.Conv2d: (1, 4, 4), nn.Conv1d: (1, 4), nn.Linear: (4,)}[type(layers[0])]
    inputs, targets = torch.randn(2, 3, *shape, dtype=torch.float64)
    layers(inputs)  # makes the lazy layers
    with torch.no_grad():  # weights of one and biases of zero would hide mistakes
        for parameter in layers.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    return layers, inputs, targets


@pytest.mark.parametrize("name", LAYERS)
def test_models_that_take_derivatives_themselves(name):
    layers, inputs, targets = case(name)
    outputs, flat = flat_outputs(Transformed(*map(Plain, layers)), inputs)
    rows = jacrev(outputs)(flat).reshape(len(inputs), -1, len(flat))
    errors = (outputs(flat) - targets).flatten(1)
    whole = jacrev(jacrev(lambda theta: (outputs(theta) - targets).square().mean()))(flat)
    part = 2 / targets.numel() * torch.einsum("nkp,nkq->pq", rows, rows)
    slopes = 2 / errors.shape[1] * torch.einsum("nkp,nk->np", rows, errors)
    assert (whole - part).abs().max() > 1e-3 * whole.abs().max()
    expected = {
        Hessian: whole,
        GaussNewton: part,
        Residual: whole - part,
        GradientSecondMoment: slopes.T @ slopes / len(inputs),
    }
    x = torch.randn(len(flat), 3, dtype=torch.float64)
    coupled = name == "batch statistics"
    models = [Slopes(*layers), Checkpointed(Slopes(*layers))]
    if coupled:
        expected.pop(GradientSecondMoment)  # examples have no gradients of their own
    else:  # transforms refuse layers that count the batches that they saw
        models.append(Transformed(*layers))
    for model in models:
        risk = Risk(model, nn.MSELoss(), (inputs, targets), batch_statistics=coupled)
        for kind, matrix in expected.items():
            assert_close(kind(risk) @ x, matrix @ x)


def test_what_is_written_holds_what_is_saved():
    layers, inputs, _ = case("convolution")
    totals = []
    for kind in (memory.SavedBytes, memory.WrittenBytes):
        counter = kind([inputs, *layers.parameters()])
        with counter.counting():
            outputs = layers(inputs)
            gradients = torch.autograd.grad(
                outputs.square().sum(), list(layers.parameters()), create_graph=True
            )
        totals.append(counter.total)
        del gradients
    assert 0 < totals[0] <= totals[1] < 5 * totals[0]


@pytest.mark.parametrize("together", [False, True], ids=["columns", "blocks"])
@pytest.mark.parametrize("name", ["strided", "batch norm", "instance norm", "layer norm", "gelu"])
def test_layers_that_run_again(name, together, monkeypatch):
    monkeypatch.setattr(memory, "batches_columns", lambda device: together)
    layers, inputs, _ = case(name)
    targets = torch.randn_like(layers(inputs))
    for kind in (Hessian, GaussNewton):
        expected = kind(layers, nn.MSELoss(), (inputs, targets))
        x = torch.randn(expected.space.dimension, 3, dtype=torch.float64)
        found = kind(nn.Sequential(Checkpointed(layers)), nn.MSELoss(), (inputs, targets))
        assert_close(found @ x, expected @ x, 1e-13)
    assert not orders.is_within_model()
    assert not nn.modules.module._global_forward_hooks
    assert not nn.modules.module._global_forward_pre_hooks
