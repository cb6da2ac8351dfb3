"""Sampled Fisher matrices of PyTorch models: their definition, their mean, their repeatability."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from specdens import uniforms
from specdens.probes import generator
from specdens.testing import check_operator
from specdens_torch import Fisher, GaussNewton, Risk, layerwise
from tests.adapters.torch_cases import architectures, classes, mlp, ragged
from tests.adapters.torch_dense import assert_close, example_gradients, second_moment

CE = nn.CrossEntropyLoss()
ARCHITECTURES = architectures()


def matrix_of(operator):
    return operator @ torch.eye(operator.space.dimension, dtype=operator.space.dtype)


def labels_drawn(model, inputs, seed, sample):
    """Invert the distribution functions of the classes, as its definition says."""
    with torch.no_grad():
        cumulative = torch.softmax(model(inputs), 1).cumsum(1).numpy()
    numbers = uniforms(seed, sample, 0, len(cumulative))
    return torch.tensor([np.searchsorted(row, u) for row, u in zip(cumulative, numbers)])  # noqa: B905


@pytest.mark.parametrize("budget", [2**30, 1], ids=["kept", "one by one"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_it_is_the_second_moment_at_sampled_labels(name, budget):
    model, inputs, labels = ARCHITECTURES[name]()
    weight = torch.tensor([1.0, 3.0, 0.5], dtype=torch.float64)
    loss = nn.CrossEntropyLoss(weight=weight)
    risk = Risk(model, loss, ragged(inputs, labels, 2), memory_budget=budget)
    fisher = Fisher(risk, num_samples=3, seed=5)
    per_example = lambda o, y: F.cross_entropy(o, y, reduction="none")  # noqa: E731
    moments = [
        second_moment(example_gradients(model, per_example, inputs, drawn), weight[labels])
        for drawn in (labels_drawn(model, inputs, 5, sample) for sample in range(3))
    ]
    assert_close(matrix_of(fisher), sum(moments) / 3)
    check_operator(fisher)


LOSSES = {
    "cross entropy": nn.CrossEntropyLoss(),
    "sum": nn.CrossEntropyLoss(reduction="sum"),
    "squared error": nn.MSELoss(),
    "logistic": nn.BCEWithLogitsLoss(),
}


@pytest.mark.parametrize("name", LOSSES)
def test_its_mean_is_gauss_newton(name):
    model, (inputs, labels) = mlp(), classes(40)
    targets = labels
    if name in ("squared error", "logistic"):
        targets = F.one_hot(labels, 3).double()
    risk = Risk(model, LOSSES[name], (inputs, targets))
    exact = matrix_of(GaussNewton(risk))
    errors = []
    for num_samples in (4, 400):
        estimate = matrix_of(Fisher(risk, num_samples=num_samples, seed=1))
        errors.append(float((estimate - exact).norm() / exact.norm()))
    # The relative error of one sample is near 1/sqrt(40) to 1; it falls as 1/sqrt(samples).
    assert errors[0] < 0.5
    assert errors[1] < 0.05
    assert 3 < errors[0] / errors[1] < 30


def test_samples_depend_on_seed_and_place_alone():
    model, (inputs, labels) = mlp(), classes(23)
    x = torch.randn(43, 2, dtype=torch.float64)
    whole = Fisher(model, CE, (inputs, labels), num_samples=2, seed=3) @ x
    for seed in range(5):
        for budget in (2**30, 1):
            risk = Risk(model, CE, ragged(inputs, labels, seed), memory_budget=budget)
            assert_close(Fisher(risk, num_samples=2, seed=3) @ x, whole, 1e-12)
    other = Fisher(model, CE, (inputs, labels), num_samples=2, seed=4) @ x
    assert (other - whole).norm() > 0.01 * whole.norm()


def test_uniform_numbers_are_streams_of_their_own():
    stream = uniforms(7, 2, 0, 1000)
    for start, count in ((0, 3), (1, 5), (4, 4), (995, 5), (13, 500)):
        assert np.array_equal(uniforms(7, 2, start, count), stream[start : start + count])
    assert stream.min() > 0.0
    assert stream.max() < 1.0
    assert abs(stream.mean() - 0.5) < 4 / np.sqrt(12 * 1000)
    for other in (uniforms(7, 3, 0, 1000), uniforms(8, 2, 0, 1000), generator(7, 2).random(1000)):
        assert not np.intersect1d(stream, other).size


def test_blocks_have_the_samples_of_the_whole():
    model, data = mlp(), classes()
    for budget in (2**30, 1):
        fisher = Fisher(model, CE, data, num_samples=2, seed=1, memory_budget=budget)
        dense = matrix_of(fisher)
        for name, block in layerwise(fisher).items():
            place = fisher.parameters.slices[name]
            assert_close(matrix_of(block), dense[place, place])


def test_arguments_and_losses_without_a_distribution_are_refused():
    model, data = mlp(), classes()
    with pytest.raises(ValueError, match="num_samples=0"):
        Fisher(model, CE, data, num_samples=0)
    with pytest.raises(ValueError, match="seed=-1"):
        Fisher(model, CE, data, seed=-1)
    with pytest.raises(TypeError, match=r"num_samples=1\.5 must be an integer"):
        Fisher(model, CE, data, num_samples=1.5)
    fisher = Fisher(model, lambda o, y: o.square().sum(1), data)
    with pytest.raises(ValueError, match="no known distribution"):
        fisher @ torch.ones(43, dtype=torch.float64)
