"""What fails on one process, or differs between two, is an error on both, and none waits for ever.

One launch of two processes makes all the mistakes in order and brings back what each was told.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812
from torch import nn

from specdens import kpm, slq
from specdens_torch import GaussNewton, Hessian, Risk, gradient, risk_value
from specdens_torch.layerwise import layerwise
from specdens_torch.processes import Processes
from specdens_torch.spreading import spread_probes
from tests.adapters.torch_cases import classes, dense, mlp
from tests.adapters.torch_launch import NUMBER, launch, relative, shard, vectors

WEIGHTED = nn.CrossEntropyLoss(torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64))
uncoupled = partial(F.cross_entropy, reduction="none")


class Unsteady:
    """Batches whose examples are others in every pass."""

    def __init__(self, data):
        self.data, self.passes = data, 0

    def __iter__(self):
        self.passes += 1
        yield self.data[0] + self.passes, self.data[1]


def coupled(outputs, targets):
    losses = F.cross_entropy(outputs, targets, reduction="none")
    return losses * losses.mean()


def broken(matrix, *, probes, **settings):
    if "from 0" not in probes.__name__:
        raise ArithmeticError(probes.__name__)
    return slq(matrix, probes=probes, **settings)


def altered(name, there):
    """A model of which one parameter or buffer is a little different on one process."""
    model = nn.Sequential(mlp(), nn.BatchNorm1d(3).double()).eval()
    with torch.no_grad():
        dict([*model.named_parameters(), *model.named_buffers()])[name].add_(1e-6 * there)
    return model


def failing_cases(rank, group):
    """Return callables of which each must raise on both processes."""
    there = rank == 1
    inputs, labels = data = shard(classes(NUMBER), rank)
    wrong = inputs, labels + 3 * there  # beyond the three classes
    unsteady = Unsteady(data) if there else data
    single = torch.float32 if there else torch.float64
    uneven = nn.CrossEntropyLoss(torch.tensor([1.0, 1.0, 1.0 + rank], dtype=torch.float64))
    dropout = nn.Sequential(mlp(), nn.Dropout(0.5)).train(there)

    def risk(data=data, loss=None, model=None, **options):
        loss = loss or nn.CrossEntropyLoss(reduction=options.pop("reduction", "mean"))
        return Risk(model or mlp(), loss, data, process_group=group, **options)

    def product(risk, x=None):
        return Hessian(risk) @ (vectors(43) if x is None else x)

    return {
        "nan": lambda: product(risk((inputs / (not there), labels))),
        "coupled": lambda: product(risk(loss=coupled if there else uncoupled)),
        "exception": lambda: gradient(risk(wrong)),
        "data differ": lambda: risk_value(risk(unsteady)),
        "shape of x": lambda: product(risk(), vectors(43 - there)),
        "number of x": lambda: product(risk(), vectors(43, 2 + there)),
        "x": lambda: product(risk(), vectors(43) * (1 + 1e-3 * there)),
        "dtype": lambda: gradient(risk((inputs.to(single), labels), model=mlp(dtype=single))),
        "parameters": lambda: gradient(risk(model=altered("0.0.weight", there))),
        "buffers": lambda: gradient(risk(model=altered("1.running_mean", there))),
        "class weights": lambda: risk_value(risk(loss=uneven)),
        "reduction": lambda: risk_value(risk(reduction="sum" if there else "mean")),
        "width": lambda: risk_value(risk(model=mlp(width=5 + there))),
        "selection": lambda: gradient(risk(parameters="*.bias" if there else "*.weight")),
        "operation": lambda: (risk_value if there else gradient)(risk()),
        "matrix": lambda: (GaussNewton if there else Hessian)(risk()) @ vectors(43),
        "empty": lambda: product(risk([])),
        "all ignored": lambda: product(risk((inputs, torch.full_like(labels, -100)))),
        "mode": lambda: gradient(risk(model=dropout)),
        "layers": lambda: layerwise(Hessian(risk(wrong)))["0.bias"] @ vectors(5),
        "spread": lambda: spread_probes(slq, Hessian(risk()), process_group=group),
        "spread seed": lambda: spread_probes(slq, np.eye(9), num_steps=3, seed=rank),
        "spread failure": lambda: spread_probes(broken, np.eye(9), num_steps=3),
        "spread kpm": lambda: spread_probes(kpm, np.eye(9)),
        "spread none": lambda: spread_probes(slq, np.eye(9), num_probes=0),
    }


def told(function):
    """Return what a call returns, or the type and text of its error."""
    try:
        return function()
    except Exception as error:
        return type(error).__name__, " ".join([str(error), *getattr(error, "__notes__", [])])


def failures(rank, group):
    found = {name: told(case) for name, case in failing_cases(rank, group).items()}
    risk = Risk(mlp(), WEIGHTED, shard(classes(NUMBER), rank), process_group=group)
    return found | {"after": gradient(risk)} | subgroups(rank) | sharded(rank)


def subgroups(rank):
    """A group of rank 0 alone, wrapped models, and what is no group."""
    alone, pair = dist.new_group([0]), dist.new_group([1, 0])
    data, part = classes(NUMBER), shard(classes(NUMBER), rank)
    wrapped = nn.parallel.DistributedDataParallel(mlp())
    return {
        "alone": told(lambda: gradient(Risk(mlp(), WEIGHTED, data, process_group=alone))),
        "pair": told(lambda: gradient(Risk(mlp(), WEIGHTED, part, process_group=pair))),
        "wrapped": told(lambda: Risk(wrapped, WEIGHTED, data)),
        "no group": told(lambda: Risk(mlp(), WEIGHTED, data, process_group="all")),
        "backend": told(lambda: Processes("world", torch.device("meta"))),
        "none": told(lambda: risk_value(Risk(mlp(), WEIGHTED, part))),
    }


def sharded(rank):
    """Sharded models, and a whole copy of one."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import distribute_module

    mesh = init_device_mesh("cpu", (2,))
    data = shard(classes(NUMBER), rank)
    fsdp, tensors = mlp(), distribute_module(mlp(), mesh)
    fully_shard(fsdp, mesh=mesh)
    whole = mlp()
    nn.init.zeros_(whole[0].weight)
    state = get_model_state_dict(fsdp, options=StateDictOptions(full_state_dict=True))
    whole.load_state_dict(state)
    return {
        "fsdp": told(lambda: Risk(fsdp, WEIGHTED, data, process_group="world")),
        "dtensor": told(lambda: Risk(tensors, WEIGHTED, data)),
        "whole": gradient(Risk(whole, WEIGHTED, data, process_group="world")),
    }


@pytest.fixture(scope="module")
def failed(tmp_path_factory):
    return launch(failures, tmp_path_factory.mktemp("failures"))


@pytest.fixture(scope="module")
def expected():
    return dense(mlp(), WEIGHTED, *classes(NUMBER), order=1)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nan", "not finite"),
        ("coupled", "couples the examples"),
        ("exception", "out of bounds"),
        ("data differ", "differ between two passes"),
        ("shape of x", "expected (43,) or (43, k)"),
        ("mode", "eval()"),
        ("layers", "out of bounds"),
        ("spread failure", "sphere from 5"),
    ],
)
def test_what_fails_on_one_process_is_known_to_all(failed, name, words):
    (kind_here, here), (kind_there, there) = (rank[name] for rank in failed)
    assert kind_here == "RuntimeError"
    assert here.startswith(f"rank 1 of 2 processes failed: {kind_there}: ")
    assert words in here
    assert words in there
    assert "on rank 1 of 2 processes" in there


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("number of x", "vectors: 2 of 43 numbers"),
        ("x", "x differs between rank 0"),
        ("dtype", "torch.float32"),
        ("parameters", "'0.0.weight' differs"),
        ("buffers", "'1.running_mean' differs"),
        ("class weights", "'CrossEntropyLoss[0]' differs"),
        ("reduction", "sum"),
        ("width", "(6, 4)"),
        ("selection", "parameters: 0.bias, 2.bias"),
        ("operation", "rank 1 has 'operation: risk_value'"),
        ("matrix", "product with GaussNewton"),
        ("empty", "data is empty"),
        ("all ignored", "sum to 0"),
        ("spread", "adds up over processes already"),
        ("spread seed", "rank 1 has 'seed: 1'"),
        ("spread kpm", "spectral_interval"),
        ("spread none", "num_probes=0"),
    ],
)
def test_what_differs_is_named_on_all_processes(failed, name, words):
    for kind, text in (rank[name] for rank in failed):
        assert kind == "ValueError"
        assert words in text


def test_processes_still_work_together_after_errors(failed, expected):
    for rank in failed:
        assert relative(rank["after"], expected) < 1e-12


def test_groups(failed, expected):
    assert relative(failed[0]["alone"], expected) < 1e-12
    kind, text = failed[1]["alone"]
    assert kind == "ValueError"
    assert "does not contain this process (rank 1 of the world)" in text
    for number, rank in enumerate(failed):
        assert relative(rank["pair"], expected) < 1e-12
        for name, words in (
            ("wrapped", "model.module"),
            ("no group", "'world' for all processes"),
            ("backend", "are on meta"),
        ):
            assert rank[name][0] == ("TypeError" if name == "no group" else "ValueError")
            assert words in rank[name][1]
        alone = Risk(mlp(), WEIGHTED, shard(classes(NUMBER), number))
        assert rank["none"] == risk_value(alone)  # no group: this process alone


def test_sharded_models_are_refused_and_whole_copies_are_not(failed, expected):
    for rank in failed:
        for name, words in (("fsdp", "FSDPSequential"), ("dtensor", "'0.weight' is a DTensor")):
            kind, text = rank[name]
            assert kind == "ValueError"
            assert words in text
            assert "full_state_dict=True" in text
        assert relative(rank["whole"], expected) < 1e-12


def test_a_group_needs_torch_distributed():
    with pytest.raises(ValueError, match="init_process_group"):
        Risk(mlp(), WEIGHTED, classes(NUMBER), process_group="world")
