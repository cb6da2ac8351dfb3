"""What a product leaves behind, what it keeps, and when it starts again."""

from __future__ import annotations

import copy
import gc
import random
import weakref

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from specdens_torch import Hessian, Risk, gradient, risk_value
from tests.adapters.torch_cases import classes, dense, mlp, ragged

CE = nn.CrossEntropyLoss()


class Busy(nn.Module):
    """A model whose forward pass writes to buffers and attributes, but not into its outputs."""

    def __init__(self):
        super().__init__()
        self.body = mlp()
        self.register_buffer("calls", torch.zeros((), dtype=torch.float64))
        self.register_buffer("last", torch.zeros(3, dtype=torch.float64), persistent=False)
        self.cached = None

    def forward(self, x):
        y = self.body(x)
        self.calls += 1
        self.last = y.detach().mean(0)
        self.cached = y
        self.new = y
        return y


def everything(model):
    """Return all of a model's state, with the identity of its tensors."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return {
        "values": {name: t.detach().clone() for name, t in tensors},
        "identities": {name: (id(t), t.data_ptr(), t._version) for name, t in tensors},
        "grads": {
            n: None if p.grad is None else (id(p.grad), p.grad.clone())
            for n, p in model.named_parameters()
        },
        "requires": [p.requires_grad for p in model.parameters()],
        "modes": [m.training for m in model.modules()],
        "attributes": [dict(vars(m)) for m in model.modules()],
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": np.random.get_state(legacy=True)[1].copy(),  # noqa: NPY002
    }


def assert_same(before, after):
    for name, value in before["values"].items():
        assert torch.equal(value, after["values"][name])
    for name, grad in before["grads"].items():
        other = after["grads"][name]
        if grad is None:
            assert other is None
        else:
            assert grad[0] == other[0]
            assert torch.equal(grad[1], other[1])
    for key in ("identities", "requires", "modes", "python", "attributes"):
        assert before[key] == after[key]
    assert torch.equal(before["torch"], after["torch"])
    assert np.array_equal(before["numpy"], after["numpy"])


def prepared():
    model = Busy()
    model.body[0].eval()
    model.body[2].bias.requires_grad_(False)
    CE(model(classes()[0]), classes()[1]).backward()
    return model


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("budget", [2**30, 100])
def test_everything_is_left_as_it_was(shuffle, budget):
    model = prepared()
    generator = torch.Generator().manual_seed(7)
    loaders = [
        DataLoader(TensorDataset(*classes()), 5, shuffle=shuffle),
        DataLoader(TensorDataset(*classes()), 5, shuffle=shuffle, generator=generator),
        ragged(*classes(), 3),
    ]
    for data in loaders:
        before, own = everything(model), generator.get_state()
        risk = Risk(model, CE, data, memory_budget=budget)
        hessian = Hessian(risk)
        for _ in range(2):
            hessian @ torch.ones(40, 2, dtype=torch.float64)
        gradient(risk)
        risk_value(risk)
        assert_same(before, everything(model))
        assert torch.equal(own, generator.get_state())


def test_buffers_that_a_forward_pass_writes_do_not_carry_over():
    class Counting(Busy):
        def forward(self, x):
            return super().forward(x) * (1.0 + 0.1 * self.calls)

    model, (inputs, labels) = Counting(), classes()
    hessian = Hessian(model, CE, (inputs, labels), memory_budget=100)
    scaled = nn.Sequential(mlp())

    def reference(outputs, targets):
        return CE(outputs * 1.1, targets)  # every chunk is the first one

    expected = dense(scaled, reference, inputs, labels)
    identity = torch.eye(43, dtype=torch.float64)
    torch.testing.assert_close(hessian @ identity, expected, rtol=1e-10, atol=1e-12)


def forward_passes(model):
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    return calls


@pytest.mark.parametrize("loader", [True, False])
def test_forward_passes_are_made_once_for_many_products(loader):
    model = mlp()
    data = DataLoader(TensorDataset(*classes()), 5) if loader else classes()
    calls = forward_passes(model)
    hessian = Hessian(model, CE, data)
    x = torch.ones(43, 3, dtype=torch.float64)
    hessian @ x
    first = len(calls)
    assert first <= 8  # six on a few examples, one survey of what is not in memory, one record
    for _ in range(10):
        hessian @ x
    assert len(calls) == first


def test_forward_passes_without_memory_serve_all_columns():
    model = mlp()
    hessian = Hessian(model, CE, classes(), memory_budget=1)
    hessian @ torch.ones(43, 8, dtype=torch.float64)
    calls = forward_passes(model)
    hessian @ torch.ones(43, 8, dtype=torch.float64)
    assert len(calls) == 12


def edit_in_place(model, data):
    with torch.no_grad():
        model[0].weight.mul_(1.5)


def edit_data_attribute(model, data):
    model[0].weight.data[0, 0] += 1.0


def swap_data_attribute(model, data):
    model[0].weight.data = model[0].weight.data * 1.5


def replace_parameter(model, data):
    model[0].weight = nn.Parameter(model[0].weight.detach() * 1.5)


def load_state(model, data):
    state = {name: 1.5 * value for name, value in model.state_dict().items()}
    model.load_state_dict(state)


def train(model, data):
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    CE(model(data[0]), data[1]).backward()
    optimizer.step()


def edit_inputs(model, data):
    data[0].mul_(1.5)


def edit_labels(model, data):
    data[1].copy_((data[1] + 1) % 3)


@pytest.mark.parametrize(
    "change",
    [
        edit_in_place,
        edit_data_attribute,
        swap_data_attribute,
        replace_parameter,
        load_state,
        train,
        edit_inputs,
        edit_labels,
    ],
)
@pytest.mark.parametrize("loader", [True, False])
def test_products_refer_to_the_present_parameters_and_data(change, loader):
    model, data = mlp(), classes()
    hessian = Hessian(model, CE, DataLoader(TensorDataset(*data), 5) if loader else data)
    identity = torch.eye(43, dtype=torch.float64)
    before = hessian @ identity
    change(model, data)
    after = hessian @ identity
    assert not torch.allclose(before, after)
    torch.testing.assert_close(after, dense(model, CE, *data), rtol=1e-10, atol=1e-12)
    expected = CE(model(data[0]), data[1]).item()
    assert risk_value(hessian.risk) == pytest.approx(expected, rel=1e-12)


def test_a_list_of_batches_may_grow():
    model, batches = mlp(), [classes(5)]
    hessian = Hessian(model, CE, batches)
    x = torch.ones(43, dtype=torch.float64)
    hessian @ x
    batches.append((classes(9)[0][5:], classes(9)[1][5:]))
    inputs, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    expected = dense(model, CE, inputs, labels) @ x
    torch.testing.assert_close(hessian @ x, expected, rtol=1e-10, atol=1e-12)


def test_what_cannot_be_seen_can_be_told():
    class Batches:
        scale = 1.0

        def __iter__(self):
            inputs, labels = classes()
            return iter([(self.scale * inputs, labels)])

    model, data, x = mlp(), Batches(), torch.ones(43, dtype=torch.float64)
    hessian = Hessian(model, CE, data)
    before = hessian @ x
    data.scale = 2.0
    assert torch.equal(hessian @ x, before)
    with pytest.raises(ValueError, match=r"risk\.refresh\(\)"):
        gradient(hessian.risk)
    hessian.risk.refresh()
    expected = dense(model, CE, 2.0 * classes()[0], classes()[1]) @ x
    torch.testing.assert_close(hessian @ x, expected, rtol=1e-10, atol=1e-12)


def test_the_mode_is_checked_again():
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).double().eval()
    hessian = Hessian(model, CE, classes())
    x = torch.ones(hessian.space.dimension, dtype=torch.float64)
    hessian @ x
    model.train()
    with pytest.raises(ValueError, match="train mode"):
        hessian @ x
    model.eval()
    hessian @ x


def test_models_that_changed_their_kind_are_refused():
    model = mlp()
    hessian = Hessian(model, CE, classes())
    model.float()
    with pytest.raises(ValueError, match="new Risk"):
        hessian @ torch.ones(43, dtype=torch.float64)
    model = mlp()
    risk = Risk(model, CE, classes())
    model[2] = nn.Linear(5, 3, bias=False).double()
    with pytest.raises(ValueError, match="gone"):
        gradient(risk)


def test_nothing_outlives_the_operator():
    model, data = mlp(), classes()
    hessian = Hessian(model, CE, data)
    hessian @ torch.ones(43, dtype=torch.float64)
    graph = hessian._kept.chunks[0]
    references = [weakref.ref(hessian), weakref.ref(graph), weakref.ref(graph._leaves[0])]
    del graph
    gc.disable()  # reference counts alone must do
    try:
        del hessian
        assert [reference() for reference in references] == [None] * 3
    finally:
        gc.enable()


def test_graphs_can_be_released():
    hessian = Hessian(mlp(), CE, classes())
    x = torch.ones(43, dtype=torch.float64)
    before = hessian @ x
    assert hessian._kept is not None
    hessian.release()
    assert hessian._kept is None
    assert torch.equal(hessian @ x, before)


def test_a_failed_product_keeps_nothing():
    model = mlp()
    hessian = Hessian(model, CE, classes())
    x = torch.ones(43, dtype=torch.float64)
    expected = hessian @ x
    saved = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        model[0].weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="not finite"):
        hessian @ x
    model.load_state_dict(saved)
    assert torch.equal(hessian @ x, expected)
