"""Normalization layers with lean second derivatives: the numbers of torch, fewer operations."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from specdens_torch import GaussNewton, Hessian, Residual
from specdens_torch.normalization import NORMALIZATIONS
from tests.adapters.torch_cases import dense
from tests.adapters.torch_dense import assert_close, gauss_newton

CE = nn.CrossEntropyLoss()
LAYERS = {
    "plain": lambda: nn.LayerNorm(6),
    "without bias": lambda: nn.LayerNorm(6, bias=False),
    "without weight": lambda: nn.LayerNorm(6, elementwise_affine=False),
    "two axes": lambda: nn.Sequential(nn.Unflatten(-1, (3, 2)), nn.LayerNorm((3, 2)), nn.Flatten()),
    "large eps": lambda: nn.LayerNorm(6, eps=0.3),
}


def network(name):
    torch.manual_seed(0)
    layers = LAYERS[name](), nn.Tanh(), nn.Linear(6, 4), nn.LayerNorm(4), nn.Linear(4, 3)
    model = nn.Sequential(nn.Linear(4, 6), *layers).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():  # weights of one and biases of zero would hide mistakes
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(0.5 * noise)
    inputs = torch.randn(5, 4, generator=generator, dtype=torch.float64)
    return model, inputs, torch.randint(3, (5,), generator=generator)


@pytest.mark.parametrize("name", LAYERS)
def test_second_derivatives_are_those_of_torch(name):
    model, inputs, labels = network(name)
    hessian = Hessian(model, CE, (inputs, labels))
    identity = torch.eye(hessian.space.dimension, dtype=torch.float64)
    expected = dense(model, CE, inputs, labels)
    assert_close(hessian @ identity, expected)
    part = gauss_newton(model, CE, inputs, labels)
    assert_close(GaussNewton(model, CE, (inputs, labels)) @ identity, part)
    assert_close(Residual(model, CE, (inputs, labels)) @ identity, expected - part, 1e-9)


@pytest.mark.parametrize("name", ["0.weight", "1.weight", "1.bias", "4.*"])
def test_derivatives_of_a_part(name):
    model, inputs, labels = network("plain")
    hessian = Hessian(model, CE, (inputs, labels), name)
    names = hessian.parameters.names
    identity = torch.eye(hessian.space.dimension, dtype=torch.float64)
    assert_close(hessian @ identity, dense(model, CE, inputs, labels, list(names)))


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_batch_norm_by_stored_statistics(dimensions, affine):
    torch.manual_seed(0)
    layer = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dimensions - 1]
    convolution = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dimensions - 1]
    layers = layer(2), nn.Tanh(), convolution(2, 2, 2), layer(2, affine=affine), nn.Flatten()
    model = nn.Sequential(*layers, nn.LazyLinear(3)).double()
    inputs = torch.randn(6, 2, *(3,) * dimensions, dtype=torch.float64)
    labels = torch.randint(3, (6,))
    model(inputs)  # in training mode, which sets the statistics
    model.eval()
    hessian = Hessian(model, CE, (inputs, labels))
    identity = torch.eye(hessian.space.dimension, dtype=torch.float64)
    assert_close(hessian @ identity, dense(model, CE, inputs, labels))
    matrix = GaussNewton(model, CE, (inputs, labels))
    assert_close(matrix @ identity, gauss_newton(model, CE, inputs, labels))


def test_batch_norm_of_a_batch_is_that_of_torch():
    own, norm = torch.nn.functional.batch_norm, NORMALIZATIONS[torch.nn.functional.batch_norm]
    x = torch.randn(4, 3, 2, dtype=torch.float64, requires_grad=True)
    weight, bias = torch.randn(2, 3, dtype=torch.float64).unbind()
    statistics = torch.stack([torch.zeros(3), torch.ones(3)]).double()
    mine, theirs = statistics.clone(), statistics.clone()
    found = norm(x, *mine, weight, bias, training=True, momentum=0.3)
    expected = own(x, *theirs, weight, bias, training=True, momentum=0.3)
    assert torch.equal(found, expected)
    assert torch.equal(mine, theirs)
    assert not torch.equal(mine, statistics)
    tensors = x, weight.requires_grad_(), bias.requires_grad_()
    assert torch.autograd.gradgradcheck(lambda *t: norm(t[0], None, None, *t[1:], True), tensors)


@pytest.mark.parametrize("affine", [True, False])
def test_instance_norm_is_that_of_torch(affine):
    layer = nn.InstanceNorm2d(3, affine=affine).double()
    x = torch.randn(2, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    norm = NORMALIZATIONS[torch.nn.functional.instance_norm]

    def function(*tensors):
        return norm(tensors[0], None, None, *tensors[1:])

    tensors = (x, *(p.data.normal_().requires_grad_() for p in layer.parameters()))
    assert_close(function(*tensors), torch.nn.functional.instance_norm(x, None, None, *tensors[1:]))
    assert torch.autograd.gradgradcheck(function, tensors)
    with pytest.raises(ValueError, match="more than 1 spatial element"):
        norm(x[..., :1, :1])


@pytest.mark.parametrize("needs", [(1, 1, 1), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 1, 1)])
@pytest.mark.parametrize("size", [(6,), (3, 6)])
def test_first_and_second_derivatives_by_differences(needs, size):
    generator = torch.Generator().manual_seed(2)
    shapes = ((2, 3, 6), size, size)
    tensors = [
        torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_(bool(need))
        for shape, need in zip(shapes, needs, strict=True)
    ]
    norm = NORMALIZATIONS[torch.layer_norm]

    def function(*inputs):
        return norm(inputs[0], size, *inputs[1:], 1e-2)

    assert torch.equal(function(*tensors), torch.layer_norm(tensors[0], size, *tensors[1:], 1e-2))
    assert torch.autograd.gradcheck(function, tensors)
    assert torch.autograd.gradgradcheck(function, tensors)


def test_third_derivatives_are_refused():
    x = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    norm = NORMALIZATIONS[torch.layer_norm]
    (first,) = torch.autograd.grad(norm(x, (4,)).pow(3).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.pow(2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        second.sum().backward()


def test_other_dtypes_and_empty_inputs_are_left_to_torch():
    norm = NORMALIZATIONS[torch.layer_norm]
    for x in (torch.randn(2, 4, dtype=torch.bfloat16), torch.zeros(0, 4)):
        result = norm(x, (4,))
        assert result.dtype == x.dtype
        assert torch.equal(result, torch.layer_norm(x, (4,)))
    with pytest.raises(RuntimeError, match="normalized_shape"):
        norm(torch.ones(2, 4), (3,))


class Passes(TorchDispatchMode):
    """Counts operators that write an array as large as the activations."""

    def __init__(self, size):
        super().__init__()
        self.size, self.count = size, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        first = result[0] if isinstance(result, tuple) else result
        views = {"view", "_unsafe_view", "expand", "detach", "t", "transpose", "_reshape_alias"}
        if isinstance(first, torch.Tensor) and func._opname not in views:
            self.count += first.numel() == self.size
        return result


def test_a_product_takes_few_passes_over_the_activations():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 50), nn.LayerNorm(50), nn.Linear(50, 2))
    x, labels = torch.randn(40, 3), torch.randint(2, (40,))
    for kind, most in ((GaussNewton, 9), (Hessian, 26)):  # torch alone: 49 and 51
        matrix = kind(model, CE, (x, labels))
        v = torch.randn(matrix.space.dimension)
        matrix @ v
        with Passes(40 * 50) as passes:
            matrix @ v
        assert passes.count <= most
