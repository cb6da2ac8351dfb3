"""Risks and runs divided over two processes give the numbers of one process.

One launch of two processes does many things in order and brings back what each process saw.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Subset, TensorDataset

from specdens import kpm, slq
from specdens_torch import (
    Fisher,
    GaussNewton,
    GradientCovariance,
    GradientSecondMoment,
    Hessian,
    Residual,
    Risk,
    TangentKernel,
    gradient,
    layerwise,
    risk_value,
    spread_probes,
)
from tests.adapters.torch_cases import classes, dense, mlp
from tests.adapters.torch_launch import CUT, NUMBER, launch, relative, shard, vectors

MATRICES = (Hessian, GaussNewton, Residual, GradientSecondMoment, GradientCovariance, Fisher)
WEIGHTED = nn.CrossEntropyLoss(torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64))
SUMMED = nn.CrossEntropyLoss(reduction="sum")


def matrix_cases(rank, group):
    """Products, gradients and values of every matrix, loss and way to keep graphs."""
    found = {}
    for case, (loss, dtype, budget, decay) in {
        "weighted": (WEIGHTED, torch.float64, 2**30, 0.1),
        "nothing kept": (nn.CrossEntropyLoss(), torch.float64, 200, 0.0),
        "sum": (SUMMED, torch.float64, 2**30, 0.1),
        "float32": (nn.CrossEntropyLoss(), torch.float32, 2**30, 0.0),
        "half kept": (nn.CrossEntropyLoss(), torch.float64, 200 if rank == 1 else 2**30, 0.0),
    }.items():
        model = mlp(dtype=dtype)
        options = {"memory_budget": budget, "weight_decay": decay, "process_group": group}
        risk = Risk(model, loss, shard(classes(NUMBER, dtype=dtype), rank), **options)
        found[case, "value"] = risk_value(risk)
        found[case, "gradient"] = gradient(risk)
        for kind in (*MATRICES, TangentKernel):
            matrix = kind(risk)
            x = vectors(matrix.space.dimension, dtype=dtype)
            found[case, kind.__name__] = matrix @ x
            found[case, kind.__name__, "again"] = matrix @ x[:, 0]
        found[case, "repr"] = repr(risk)
    return found


def data_cases(rank, group):
    """Other forms of data and models, one product each."""
    inputs, labels = classes(NUMBER)
    x = vectors(43, 1)[:, 0]

    def product(data, model=None):
        model = mlp() if model is None else model
        return Hessian(model, nn.CrossEntropyLoss(), data, process_group=group) @ x

    dataset = TensorDataset(inputs, labels)
    places = {None: range(NUMBER), 0: range(0, NUMBER, 5), 1: [1, 2, 3, 4, 6, 7, 8, 9, 11]}[rank]
    everything = (inputs, labels)
    none = {"list": [], "tensors": (inputs[:0], labels[:0])}
    none["loader"] = DataLoader(Subset(dataset, []), batch_size=4)
    found = {("loader", ""): product(DataLoader(Subset(dataset, places), batch_size=4))}
    for name, empty in none.items():
        found["empty", name] = product(empty if rank == 1 else everything)
    kernel = TangentKernel(mlp(), WEIGHTED, [] if rank == 1 else everything, process_group=group)
    found["kernel", ""] = kernel @ vectors(3 * NUMBER, 1)[:, 0]
    found["ignored", ""] = _ignored(rank, group, x)
    for name, budget in {"kept": 2**30, "not": 200, "half": 200 if rank == 1 else 2**30}.items():
        options = {"memory_budget": budget, "process_group": group}
        hessian = Hessian(mlp(), WEIGHTED, shard(everything, rank), **options)
        for layer, block in layerwise(hessian, by="module").items():
            x_block = vectors(block.space.dimension)
            found["blocks", name, layer] = block @ x_block
            found["blocks", name, layer, "again"] = block @ x_block
    if rank is not None:
        wrapped = nn.parallel.DistributedDataParallel(mlp())
        found["wrapped", ""] = product(shard(everything, rank), wrapped)
        assert all(p.grad is None for p in wrapped.parameters())
    measure = slq(
        GaussNewton(mlp(), WEIGHTED, shard(everything, rank), process_group=group),
        num_probes=2,
        num_steps=12,
    )
    found["slq", ""] = np.stack([measure.nodes, measure.weights])
    return found


def _ignored(rank, group, x):
    """All labels of rank 1 are ignored: its weights sum to zero, those of all do not."""
    inputs, labels = classes(NUMBER)
    labels[CUT:] = -100
    data = shard((inputs, labels), rank)
    return Hessian(mlp(), nn.CrossEntropyLoss(), data, process_group=group) @ x


def changing_cases(rank, group):
    """One process computes anew what the other kept; then parameters change on both."""
    model, (inputs, labels) = mlp(), shard(classes(NUMBER), rank)
    labels = labels.clone()
    covariance = GradientCovariance(
        model, nn.CrossEntropyLoss(), (inputs, labels), process_group=group
    )
    x, found = vectors(43, 1)[:, 0], {}
    found["before"] = covariance @ x
    if rank != 0:
        labels[-2:] = 1 - labels[-2:].clamp(max=1)
    found["other labels"] = covariance @ x
    found["once more"] = covariance @ x
    with torch.no_grad():
        model[0].weight *= 1.5
    found["other weights"] = covariance @ x
    if rank == 0:
        covariance.release()
    found["released"] = covariance @ x
    return found


def spread_cases(rank, group):
    hessian = Hessian(mlp(), nn.CrossEntropyLoss(), classes(NUMBER))
    cases = {
        "slq": (slq, {"num_probes": 5, "block_size": 2, "num_steps": 12, "seed": 3}),
        "default": (slq, {"num_probes": 4, "block_size": None if group else 2, "num_steps": 9}),
        "fewer": (slq, {"num_probes": 1, "num_steps": 9}),
        "kpm": (kpm, {"num_probes": 3, "block_size": 1, "num_moments": 16, "interval": (-2, 4)}),
    }
    found = {}
    for name, (estimator, settings) in cases.items():
        measure = spread_probes(estimator, hessian, process_group=group, **settings)
        reference = {} if group else {"direct": estimator(hessian, **settings)}
        for key, m in {"spread": measure, **reference}.items():
            settings_of = {k: m.provenance[k] for k in ("num_probes", "isotropic", "probes")}
            found[name, key] = (m.nodes, m.weights, m.outliers.eigenvalues, settings_of)
    return found


def everything(rank, group):
    return {
        "matrices": matrix_cases(rank, group),
        "data": data_cases(rank, group),
        "changing": changing_cases(rank, group),
        "spread": spread_cases(rank, group),
    }


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return launch(everything, tmp_path_factory.mktemp("same"))


@pytest.fixture(scope="module")
def one():
    return everything(None, None)


def test_every_matrix_gradient_and_value_is_that_of_one_process(one, two):
    for key, expected in one["matrices"].items():
        if key[1] == "repr":
            continue
        for found in (rank["matrices"][key] for rank in two):
            expected = torch.as_tensor(expected)
            bound = 1e-5 if key[0] == "float32" else 1e-12
            assert relative(torch.as_tensor(found), expected) < bound, key
            assert torch.as_tensor(found).dtype == expected.dtype


def test_all_processes_have_the_same_bits(two):
    for key, here in two[0]["matrices"].items():
        if key[1] != "repr":
            there = two[1]["matrices"][key]
            assert torch.equal(torch.as_tensor(here), torch.as_tensor(there)), key


def test_the_hessian_is_the_dense_one(two):
    expected = dense(mlp(), WEIGHTED, *classes(NUMBER)) + 0.1 * torch.eye(43, dtype=torch.float64)
    found = two[1]["matrices"]["weighted", "Hessian"]
    assert relative(found, expected @ vectors(43)) < 1e-12


def test_repr_counts_processes(two):
    told = [rank["matrices"]["weighted", "repr"] for rank in two]
    assert "2 processes, 9 examples here in 1 chunk" in told[0]
    assert "2 processes, 3 examples here in 1 chunk" in told[1]
    kept = [rank["matrices"]["half kept", "repr"] for rank in two]
    assert "graphs kept" in kept[0]
    assert "graphs not kept" in kept[1]
    assert all("not kept" in rank["matrices"]["nothing kept", "repr"] for rank in two)


@pytest.mark.parametrize("name", ["loader", "empty", "ignored", "kernel", "wrapped"])
def test_forms_of_data(one, two, name):
    whole = one["data"]["loader", ""]  # all of them are the Hessian of the same examples
    for rank in two:
        for key, found in rank["data"].items():
            if key[0] == name:
                expected = one["data"][name, ""] if name in ("ignored", "kernel") else whole
                assert relative(found, expected) < 1e-12, key


def test_layers(one, two):
    for key, expected in one["data"].items():
        if key[0] == "blocks":
            assert all(relative(rank["data"][key], expected) < 1e-12 for rank in two), key


def test_a_run_has_the_same_nodes(one, two):
    for rank in two:
        np.testing.assert_allclose(rank["data"]["slq", ""], one["data"]["slq", ""], atol=1e-10)


def test_what_one_process_computes_anew_all_do(one, two):
    for name, expected in one["changing"].items():
        for rank in two:
            assert relative(rank["changing"][name], expected) < 1e-12, name
    assert relative(one["changing"]["other labels"], one["changing"]["before"]) > 0.01


def test_probes_spread_over_processes_give_the_measure_of_one(one, two):
    for (name, key), (nodes, weights, outliers, settings) in one["spread"].items():
        for rank in two:
            found = rank["spread"][name, "spread"]
            np.testing.assert_allclose(found[0], nodes, atol=1e-10, err_msg=f"{name} {key}")
            np.testing.assert_allclose(found[1], weights, atol=1e-8)
            np.testing.assert_allclose(found[2], outliers, atol=1e-10)
            assert found[3] == settings
