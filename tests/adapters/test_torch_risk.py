"""Which models, losses and data make a risk, and what is said about those that do not."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler, TensorDataset

from specdens_torch import Hessian, Risk, gradient, risk_value
from tests.adapters.torch_cases import classes, mlp, ragged

CE = nn.CrossEntropyLoss()


def product(model, data=None, loss=CE, **options):
    hessian = Hessian(model, loss, classes() if data is None else data, **options)
    return hessian @ torch.ones(hessian.space.dimension, dtype=hessian.space.dtype)


def with_layer(layer):
    return nn.Sequential(nn.Linear(4, 3), layer, nn.Tanh(), nn.Linear(3, 3)).double()


class Function(nn.Module):
    """A perceptron with a function of its hidden layer in between."""

    def __init__(self, function):
        super().__init__()
        self.first, self.last = nn.Linear(4, 3).double(), nn.Linear(3, 3).double()
        self.function = function

    def forward(self, x):
        return self.last(self.function(torch.tanh(self.first(x))))


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        (nn.BatchNorm1d(3), "model.eval()"),
        (nn.BatchNorm1d(3, track_running_stats=False).eval(), "track_running_stats=True"),
        (nn.Dropout(0.1), "p=0.1"),
        (nn.AlphaDropout(0.2), "model.eval()"),
        (nn.RReLU(), "model.eval()"),
    ],
)
def test_modules_that_are_refused(layer, words):
    model = with_layer(layer)
    for use in (product, lambda m: gradient(Risk(m, CE, classes()))):
        with pytest.raises(
            ValueError, match=words.replace("(", r"\(").replace(")", r"\)")
        ) as raised:
            use(model)
        assert "'1'" in str(raised.value)


def test_modules_that_change_themselves():
    norm = nn.Sequential(
        nn.Unflatten(1, (2, 2)), nn.InstanceNorm1d(2, track_running_stats=True), nn.Flatten()
    ).double()
    with pytest.raises(ValueError, match="running statistics"):
        product(nn.Sequential(nn.Linear(4, 4).double(), norm))
    assert torch.isfinite(product(nn.Sequential(nn.Linear(4, 4).double(), norm).eval())).all()
    embedding = nn.Sequential(nn.Embedding(5, 3, max_norm=1.0))
    with pytest.raises(ValueError, match="max_norm=None"):
        product(embedding, (torch.tensor([1, 2]), torch.tensor([0, 1])))
    with pytest.raises(ValueError, match=r"dropout=0\.5"):
        product(nn.ModuleList([nn.MultiheadAttention(4, 2, dropout=0.5), mlp()]))


@pytest.mark.parametrize("layer", [nn.BatchNorm1d(3), nn.Dropout(0.1), nn.RReLU()])
def test_evaluation_mode_is_accepted(layer):
    assert torch.isfinite(product(with_layer(layer).eval())).all()


def test_inactive_dropout_is_accepted_in_train_mode():
    assert torch.isfinite(product(with_layer(nn.Dropout(0.0)))).all()


@pytest.mark.parametrize(
    "draw",
    [
        lambda h: F.dropout(h, 0.5),
        lambda h: h + 0.1 * torch.randn_like(h),
        lambda h: h * random.random(),
        lambda h: h * np.random.rand(),  # noqa: NPY002 (what a model may do)
        lambda h: (
            h if torch.rand(()) < 2 else 0 * h
        ),  # a layer that is dropped too rarely to be seen
    ],
    ids=["dropout", "noise", "python", "numpy", "rare"],
)
def test_random_models_are_refused(draw):
    with pytest.raises(ValueError, match=r"model\.eval\(\)"):
        product(Function(draw))


def test_random_numbers_without_effect_are_accepted_in_evaluation_mode():
    assert torch.isfinite(product(Function(lambda h: h + 0 * torch.rand(())).eval())).all()
    with pytest.raises(ValueError, match="random or keeps a state"):
        product(Function(lambda h: F.dropout(h, 0.5)).eval())


def test_models_with_a_memory_are_refused():
    calls = []

    def count(h):
        calls.append(1)
        return h * len(calls)

    with pytest.raises(ValueError, match="keeps a state"):
        product(Function(count))


@pytest.mark.parametrize(
    ("function", "loss"),
    [
        (lambda h: h - h.mean(0), CE),
        (lambda h: F.batch_norm(h, None, None, training=True), CE),
        (torch.tanh, lambda o, y: F.cross_entropy(o, y).reshape(1)),
        (torch.tanh, lambda o, y: torch.cdist(o, o).mean(1)),
    ],
    ids=["centered", "batch-norm", "mean-of-batch", "contrastive"],
)
def test_coupled_examples_are_refused_unless_batches_are_kept(function, loss):
    with pytest.raises(ValueError, match="regroup=False"):
        product(Function(function), loss=loss)
    inputs, labels = classes()
    batches = [(inputs[:5], labels[:5]), (inputs[5:], labels[5:])]
    risk = Risk(Function(function), loss, batches, regroup=False)
    if loss is CE:
        losses = [F.cross_entropy(risk.model(x), y, reduction="sum") for x, y in batches]
        expected = sum(losses).item() / 12
        assert risk_value(risk) == pytest.approx(expected, rel=1e-12)


def test_outputs_that_broadcast_against_the_targets_are_noticed():
    model = nn.Linear(4, 1).double()
    inputs, _ = classes()
    with pytest.raises(ValueError, match="matching shapes"):
        risk_value(Risk(model, lambda o, y: (o - y) ** 2, (inputs, inputs[:, 0])))


def test_single_examples_are_joined_for_the_check():
    inputs, labels = classes()
    data = [(inputs[i : i + 1], labels[i : i + 1]) for i in range(12)]
    with pytest.raises(ValueError, match="regroup=False"):
        product(Function(lambda h: h - h.mean(0)), data)
    expected = F.cross_entropy(mlp()(inputs), labels).item()
    assert risk_value(Risk(mlp(), CE, data)) == pytest.approx(expected, rel=1e-12)


class Augmented(Dataset):
    """Images that come with different noise each time."""

    def __init__(self, draw):
        self.inputs, self.labels = classes()
        self.draw = draw

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return self.inputs[index] + self.draw(), self.labels[index]


@pytest.mark.parametrize(
    "draw",
    [
        lambda: 0.1 * torch.randn(4, dtype=torch.float64),
        lambda: 0.1 * random.random(),
        lambda: 0.1 * np.random.rand(),  # noqa: NPY002 (what a data set may do)
    ],
    ids=["torch", "python", "numpy"],
)
@pytest.mark.parametrize("budget", [2**30, 1000])
def test_random_augmentation_is_refused(draw, budget):
    loader = DataLoader(Augmented(draw), batch_size=5)
    with pytest.raises(ValueError, match="augmentation"):
        product(mlp(), loader, memory_budget=budget)


def test_data_that_lose_or_repeat_examples_are_refused():
    dataset = TensorDataset(*classes(13))
    with pytest.raises(ValueError, match="drop_last"):
        product(mlp(), DataLoader(dataset, batch_size=5, shuffle=True, drop_last=True))
    sampler = RandomSampler(dataset, replacement=True, num_samples=13)
    with pytest.raises(ValueError, match="without replacement"):
        product(mlp(), DataLoader(dataset, batch_size=5, sampler=sampler))

    class Shrinking:
        size = 13

        def __iter__(self):
            Shrinking.size -= 1
            return iter([(classes(13)[0][: self.size], classes(13)[1][: self.size])])

    with pytest.raises(ValueError, match="examples"):
        product(mlp(), Shrinking())


class Stream(IterableDataset):
    """An iterable data set of batches."""

    def __iter__(self):
        return iter(ragged(*classes(), 3))


class Sequence:
    """An object with the old iteration protocol only."""

    def __getitem__(self, index):
        return ragged(*classes(), 3)[index]


@pytest.mark.parametrize("data", [Stream(), DataLoader(Stream(), batch_size=None), Sequence()])
def test_other_iterables_of_pairs(data):
    inputs, labels = classes()
    expected = F.cross_entropy(mlp()(inputs), labels).item()
    assert risk_value(Risk(mlp(), CE, data)) == pytest.approx(expected, rel=1e-12)


def test_empty_batches_are_skipped():
    inputs, labels = classes()
    data = [(inputs[:0], labels[:0]), (inputs, labels), (inputs[:0], labels[:0])]
    expected = F.cross_entropy(mlp()(inputs), labels).item()
    assert risk_value(Risk(mlp(), CE, data)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("data", "error", "words"),
    [
        (iter([classes()]), TypeError, "one-shot"),
        ((pair for pair in [classes()]), TypeError, "generator"),
        (zip(*classes(), strict=True), TypeError, "zip"),
        (TensorDataset(*classes()), TypeError, "DataLoader(dataset"),
        (classes()[0], TypeError, "Tensor"),
        ({"x": 1}, TypeError, "dict"),
        (7, TypeError, "int"),
        (list(classes()), TypeError, "a tuple (inputs, targets)"),
        ((*classes(), 1), TypeError, "length 3"),
        ([{"x": 1}], TypeError, "item 0"),
        ([], ValueError, "empty"),
        ([(torch.zeros(0, 4), torch.zeros(0))], ValueError, "empty"),
        (DataLoader(TensorDataset(torch.zeros(0, 4))), ValueError, "empty"),
    ],
)
def test_data_that_are_refused(data, error, words):
    with pytest.raises(error) as raised:
        risk_value(Risk(mlp(), CE, data))
    assert words in str(raised.value)


def test_risks_that_are_not_finite():
    inputs, labels = classes()
    inputs[7, 0] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        product(mlp(), (inputs, labels))
    model = mlp()
    with torch.no_grad():
        model[2].weight[0, 0] = float("inf")
    with pytest.raises(ValueError, match="not finite"):
        risk_value(Risk(model, CE, classes()))


@pytest.mark.parametrize("function", [risk_value, gradient])
def test_what_is_no_risk_is_named(function):
    for wrong in (mlp(), Hessian(mlp(), CE, classes()), None):
        expected = rf"risk has type {type(wrong).__name__}; pass Risk\(model, loss, data\)\."
        with pytest.raises(TypeError, match=expected):
            function(wrong)


@pytest.mark.parametrize("budget", [0, -1, True])
def test_budgets_are_positive(budget):
    with pytest.raises((TypeError, ValueError), match="memory_budget"):
        Risk(mlp(), CE, classes(), memory_budget=budget)


def test_errors_of_the_model_say_that_batches_were_regrouped():
    def needs_twelve(h):
        if len(h) != 12:
            msg = "twelve, please"
            raise RuntimeError(msg)
        return h

    inputs, labels = classes(24)
    data = [(inputs[:12], labels[:12]), (inputs[12:], labels[12:])]
    with pytest.raises(RuntimeError, match="twelve") as raised:
        product(Function(needs_twelve), data)
    assert any("regroup=False" in note for note in raised.value.__notes__)
    assert torch.isfinite(product(Function(needs_twelve), data, regroup=False)).all()


def test_repr_says_what_is_known():
    risk = Risk(mlp(), CE, ragged(*classes(), 3))
    assert repr(risk) == "Risk(Sequential, CrossEntropyLoss, 43 parameters, data not read yet)"
    risk_value(risk)
    assert "12 examples in 1 chunk, graphs kept" in repr(risk)
