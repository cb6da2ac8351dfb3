"""Batch norm: the statistics of fixed batches, differentiated, or the running ones as constants."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from specdens_torch import Fisher, Hessian, Risk, TangentKernel, gradient, layerwise, risk_value
from tests.adapters.torch_cases import classes, mlp
from tests.adapters.torch_dense import all_matrices, assert_matrices

CE = nn.CrossEntropyLoss()


def per_example(outputs, labels):
    return F.cross_entropy(outputs, labels, reduction="none")


class Written(nn.Module):
    """Batch norm in train mode by its definition, of inputs (batch, channels, ...)."""

    def __init__(self, norm):
        super().__init__()
        self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps

    def forward(self, x):
        axes = [axis for axis in range(x.ndim) if axis != 1]
        centered = x - x.mean(axes, keepdim=True)
        result = centered / (centered.square().mean(axes, keepdim=True) + self.eps).sqrt()
        shape = [-1 if axis == 1 else 1 for axis in range(x.ndim)]
        if self.weight is not None:
            result = result * self.weight.view(shape) + self.bias.view(shape)
        return result


def written(model):
    """Return a copy of the model that shares its parameters, its batch norm spelled out."""
    layers = [Written(m) if isinstance(m, nn.modules.batchnorm._BatchNorm) else m for m in model]
    return nn.Sequential(*layers)


def flat_net(**options):
    torch.manual_seed(1)
    norm = nn.BatchNorm1d(3, **options)
    return nn.Sequential(nn.Linear(4, 3), norm, nn.Tanh(), nn.Linear(3, 3)).double()


def conv_net():
    torch.manual_seed(1)
    body = (nn.Conv2d(1, 2, 2), nn.BatchNorm2d(2), nn.SiLU())
    return nn.Sequential(*body, nn.Flatten(), nn.Linear(2, 3)).double()


MODELS = {
    "flat": (flat_net, (4,)),
    "conv": (conv_net, (1, 2, 2)),
    "cumulative": (lambda: flat_net(momentum=None), (4,)),
    "not affine": (lambda: flat_net(affine=False), (4,)),
    "no running statistics": (lambda: flat_net(track_running_stats=False), (4,)),
    "none, evaluated": (lambda: flat_net(track_running_stats=False).eval(), (4,)),
}
SPLITS = {"one batch": [12], "equal": [6, 6], "uneven": [3, 5, 4]}


def batches_of(shape, sizes):
    inputs, labels = classes()
    return list(zip(inputs.view(-1, *shape).split(sizes), labels.split(sizes), strict=True))


@pytest.mark.parametrize("budget", [2**30, 1], ids=["kept", "not kept"])
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("name", MODELS)
def test_every_matrix_with_the_statistics_of_the_batches(name, split, budget):
    make, shape = MODELS[name]
    model, batches = make(), batches_of(shape, SPLITS[split])
    buffers = copy.deepcopy(dict(model.named_buffers()))
    expected = all_matrices(written(model), per_example, batches)
    risk = Risk(model, CE, batches, memory_budget=budget, batch_statistics=True)
    assert_matrices(risk, expected)
    assert all(torch.equal(buffers[n], b) for n, b in model.named_buffers())
    losses = torch.cat([per_example(written(model)(x), y) for x, y in batches])
    assert risk_value(risk) == pytest.approx(losses.mean().item(), rel=1e-12)
    losses.mean().backward()
    grads = torch.cat([p.grad.flatten() for p in model.parameters()])
    torch.testing.assert_close(gradient(risk), grads, rtol=1e-10, atol=1e-12)


def test_equal_batches_give_the_mean_of_what_training_minimizes():
    model, batches = flat_net(), batches_of((4,), [6, 6])
    hessian = Hessian(model, CE, batches, batch_statistics=True)
    identity = torch.eye(hessian.space.dimension, dtype=torch.float64)
    parts = [Hessian(model, CE, [batch], batch_statistics=True) @ identity for batch in batches]
    torch.testing.assert_close(hessian @ identity, (parts[0] + parts[1]) / 2)
    whole = Hessian(model, CE, classes(), batch_statistics=True)
    assert not torch.allclose(whole @ identity, hessian @ identity, rtol=1e-3)


def test_it_is_neither_the_running_statistics_nor_the_default():
    model, batches = flat_net(), batches_of((4,), [6, 6])
    with pytest.raises(ValueError, match="batch_statistics=True"):
        risk_value(Risk(model, CE, batches))
    train = risk_value(Risk(model, CE, batches, batch_statistics=True))
    population = risk_value(Risk(model.eval(), CE, batches))
    expected = CE(model(classes()[0]), classes()[1]).item()
    assert population == pytest.approx(expected, rel=1e-12)
    assert abs(train - population) > 1e-3


def test_tangent_kernel_fisher_and_blocks():
    model, batches = flat_net(), batches_of((4,), [5, 7])
    risk = Risk(model, CE, batches, batch_statistics=True)
    twin = Risk(written(model), CE, batches, regroup=False)
    pairs = [(TangentKernel(risk), TangentKernel(twin)), (Fisher(risk), Fisher(twin))]
    blocks = [layerwise(Hessian(r)).values() for r in (risk, twin)]
    for own, other in [*pairs, *zip(*blocks, strict=True)]:
        identity = torch.eye(own.space.dimension, dtype=torch.float64)
        torch.testing.assert_close(own @ identity, other @ identity, rtol=1e-10, atol=1e-12)
    kernel = pairs[0][0] @ torch.eye(36, dtype=torch.float64)
    assert kernel[:15, 15:].abs().max() > 1e-3  # examples of different batches share parameters


def test_only_some_layers_in_train_mode():
    model = nn.Sequential(*flat_net()[:3], nn.Dropout(0.5), nn.Linear(3, 3).double())
    risk = Risk(model, CE, classes(), batch_statistics=True)
    with pytest.raises(ValueError, match=r"p=0\.5"):
        risk_value(risk)
    model.eval()
    model[1].train()
    layers = [layer for layer in model if not isinstance(layer, nn.Dropout)]
    twin = written(nn.Sequential(*layers))
    expected = all_matrices(twin, per_example, [classes()])
    assert_matrices(risk, expected)


def test_layers_of_ones_own_and_instance_norm():
    class Own(nn.Module):
        def forward(self, x):
            return F.batch_norm(x, None, None, training=True)

    model = nn.Sequential(nn.Linear(4, 3), Own(), nn.Linear(3, 3)).double()
    batches = batches_of((4,), [5, 7])
    with pytest.raises(ValueError, match="need regroup=False alone"):
        risk_value(Risk(model, CE, batches, batch_statistics=True))
    twin = nn.Sequential(model[0], Written(nn.BatchNorm1d(3, affine=False)), model[2])
    expected = all_matrices(twin, per_example, batches)
    assert_matrices(Risk(model, CE, batches, regroup=False), expected)

    norm = nn.InstanceNorm1d(2, track_running_stats=True)
    model = nn.Sequential(nn.Linear(4, 4), nn.Unflatten(1, (2, 2)), norm, nn.Flatten())
    model = nn.Sequential(*model, nn.Linear(4, 3), nn.BatchNorm1d(3)).double()
    before = norm.running_mean.clone()
    value = risk_value(Risk(model, CE, batches, batch_statistics=True))
    assert torch.equal(before, norm.running_mean)
    losses = torch.cat([per_example(model(x), y) for x, y in batches])
    assert value == pytest.approx(losses.mean().item(), rel=1e-12)


@pytest.mark.parametrize("make", [mlp, lambda: flat_net().eval()])
def test_the_option_must_have_an_effect(make):
    with pytest.raises(ValueError, match="no batch-norm layer"):
        risk_value(Risk(make(), CE, classes(), batch_statistics=True))


def test_changes_of_the_mode_are_noticed():
    model, data = flat_net(), classes()
    hessian = Hessian(model, CE, data, batch_statistics=True)
    x = torch.ones(hessian.space.dimension, dtype=torch.float64)
    before = hessian @ x
    model.eval()
    with pytest.raises(ValueError, match="no batch-norm layer"):
        hessian @ x
    assert torch.equal(Hessian(model.train(), CE, data, batch_statistics=True) @ x, before)


def test_running_statistics_start_anew_in_every_batch():
    # torch updates them without counting up the version of the buffers.
    class Reading(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(4).double()
            self.head = nn.Linear(4, 3).double()

        def forward(self, x):
            return self.head(self.norm(x) + self.norm.running_mean)

    model, batches = Reading(), batches_of((4,), [5, 7])
    value = risk_value(Risk(model, CE, batches, batch_statistics=True))
    twin = Written(model.norm)
    outputs = [(model.head(twin(x) + 0.1 * x.mean(0)), y) for x, y in batches]
    expected = torch.cat([per_example(*pair) for pair in outputs]).mean().item()
    assert value == pytest.approx(expected, rel=1e-12)


def test_what_is_refused():
    loader = DataLoader(TensorDataset(*classes()), batch_size=4, shuffle=True)
    with pytest.raises(ValueError, match="shuffle=False"):
        Risk(flat_net(), CE, loader, batch_statistics=True)
    with pytest.raises(ValueError, match="normalizes over processes"):
        risk_value(Risk(flat_sync(), CE, classes(), batch_statistics=True))
    inputs, labels = classes()

    class Shuffling:
        def __iter__(self):
            order = torch.randperm(12)
            return iter([(inputs[part], labels[part]) for part in order.split(4)])

    with pytest.raises(ValueError, match="differ between two passes"):
        risk_value(Risk(flat_net(), CE, Shuffling(), batch_statistics=True))


def flat_sync():
    return nn.SyncBatchNorm.convert_sync_batchnorm(flat_net())


def test_a_fixed_split_of_a_shuffling_loader():
    loader = DataLoader(TensorDataset(*classes()), batch_size=4, shuffle=True)
    batches, model = list(loader), flat_net()
    expected = all_matrices(written(model), per_example, [tuple(batch) for batch in batches])
    assert_matrices(Risk(model, CE, batches, batch_statistics=True), expected)


def test_a_loader_in_order():
    loader = DataLoader(TensorDataset(*classes()), batch_size=5)
    model = flat_net()
    expected = all_matrices(written(model), per_example, batches_of((4,), [5, 5, 2]))
    for budget in (2**30, 1):
        risk = Risk(model, CE, loader, memory_budget=budget, batch_statistics=True)
        assert_matrices(risk, expected)
