"""Diagonal blocks of curvature matrices by parameter, module, row and name."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from specdens import kpm, restrict
from specdens.testing import check_operator
from specdens_torch import (
    GaussNewton,
    GradientCovariance,
    GradientSecondMoment,
    Hessian,
    Residual,
    Risk,
    layerwise,
)
from tests.adapters.torch_cases import architectures, classes, mlp

CE = nn.CrossEntropyLoss()
ARCHITECTURES = architectures()
MATRICES = (Hessian, GaussNewton, Residual, GradientSecondMoment, GradientCovariance)


def matrix_of(operator):
    return operator @ torch.eye(operator.space.dimension, dtype=operator.space.dtype)


def assert_close(actual, expected, scale, rtol=1e-12):
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=rtol * float(scale))


@pytest.mark.parametrize("budget", [2**30, 1], ids=["shared graphs", "own graphs"])
@pytest.mark.parametrize("kind", MATRICES)
@pytest.mark.parametrize("name", ["tanh", "attention", "tied", "batchnorm"])
def test_blocks_are_those_of_the_dense_matrix(name, kind, budget):
    model, inputs, labels = ARCHITECTURES[name]()
    operator = kind(model, CE, (inputs, labels), memory_budget=budget, weight_decay=0.1)
    dense = matrix_of(operator)
    blocks = layerwise(operator)
    assert list(blocks) == list(operator.parameters.names)
    for key, block in blocks.items():
        place = operator.parameters.slices[key]
        assert_close(matrix_of(block), dense[place, place], dense.abs().max())
        check_operator(block)
    modules = layerwise(operator, by="module")
    for key, block in modules.items():
        names = [n for n in operator.parameters.names if n.rpartition(".")[0] == key]
        places = np.concatenate([operator.parameters.indices(n).ravel() for n in names])
        assert block.parameters.names == tuple(names)
        assert_close(matrix_of(block), dense[places][:, places], dense.abs().max())


def test_blocks_share_the_graphs_of_the_whole(monkeypatch):
    model, data = mlp(), classes()
    hessian = Hessian(model, CE, data)
    evaluated = []
    linearize = Hessian._linearize
    monkeypatch.setattr(
        Hessian, "_linearize", lambda self, e: evaluated.append(1) or linearize(self, e)
    )
    for block in layerwise(hessian).values():
        block @ torch.ones(block.space.dimension, dtype=torch.float64)
    hessian @ torch.ones(43, dtype=torch.float64)
    assert len(evaluated) == 1
    with torch.no_grad():
        model[0].weight.mul_(2.0)
    layerwise(hessian)["2.bias"] @ torch.ones(3, dtype=torch.float64)
    assert len(evaluated) == 2


def test_groups_of_ones_own():
    model, data = mlp(), classes()
    hessian = Hessian(model, CE, data)
    kinds = layerwise(hessian, by=lambda name: "weights" if name.endswith("weight") else None)
    assert list(kinds) == ["weights"]
    assert kinds["weights"].space.dimension == 35
    assert repr(kinds["weights"]) == "Block(2 parameters, n=35, of Hessian)"
    with pytest.raises(ValueError, match="leaves out every parameter"):
        layerwise(hessian, by=lambda name: None)
    with pytest.raises(ValueError, match="by='layer'"):
        layerwise(hessian, by="layer")
    with pytest.raises(TypeError, match="expected a matrix over the parameters"):
        layerwise(Risk(model, CE, data))


def test_the_spectra_of_all_blocks_in_one_call():
    model, data = mlp(), classes()
    blocks = layerwise(Hessian(model, CE, data))
    measures = blocks.spectra(num_probes=25, num_steps=25, progress=False)
    for name, block in blocks.items():
        exact = torch.linalg.eigvalsh(matrix_of(block)).numpy()
        assert measures[name].distance(exact) <= 1e-6 * abs(exact).max()
    moments = blocks.spectra(kpm, num_probes=3, num_moments=16, progress=False)
    assert moments["0.weight"].dimension == 20


def test_rows_of_a_weight():
    model, data = mlp(), classes()
    hessian = Hessian(model, CE, data)
    places = hessian.parameters.indices("2.weight")
    assert places.shape == (3, 5)
    neuron = restrict(hessian, places[1])
    dense = matrix_of(hessian)
    assert_close(matrix_of(neuron), dense[30:35, 30:35], dense.abs().max())
    with pytest.raises(ValueError, match=r"name='3\.weight'"):
        hessian.parameters.indices("3.weight")


def operations(task):
    with FlopCounterMode(display=False) as counter:
        task()
    return counter.get_total_flops()


@pytest.mark.parametrize("depth", [2, 8])
def test_all_blocks_together_cost_less_than_twice_the_whole(depth):
    torch.manual_seed(0)
    hidden = [part for _ in range(depth) for part in (nn.Linear(16, 16), nn.Tanh())]
    model = nn.Sequential(*hidden, nn.Linear(16, 3)).double()
    data = torch.randn(40, 16, dtype=torch.float64), torch.randint(3, (40,))
    hessian = Hessian(model, CE, data)
    x = torch.ones(hessian.space.dimension, dtype=torch.float64)
    hessian @ x  # records the graphs
    blocks = layerwise(hessian, by="module")
    parts = [
        operations(lambda b=b: b @ torch.ones(b.space.dimension, dtype=torch.float64))
        for b in blocks.values()
    ]
    assert sum(parts) <= 2 * operations(lambda: hessian @ x)
