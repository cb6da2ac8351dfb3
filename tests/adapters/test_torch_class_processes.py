"""Class structure of data that are divided over two processes is that of one process."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from specdens_torch import Risk
from specdens_torch.class_structure import ClassStructure
from tests.adapters.torch_cases import classes, mlp
from tests.adapters.torch_launch import NUMBER, launch, relative, shard, vectors

PARTS = ("class", "cross", "within", "equal")


def structure_of(rank, group):
    """Everything that a class structure computes; all classes are not on every process."""
    inputs, labels = classes(NUMBER)
    order = labels.argsort()
    data = shard((inputs[order], labels[order]), rank)
    found = {}
    for budget in (2**30, 700):
        risk = Risk(mlp(), nn.CrossEntropyLoss(), data, memory_budget=budget, process_group=group)
        structure = ClassStructure(risk)
        found[budget, "weights"] = structure.class_weights
        found[budget, "gram"] = structure.pair_gram()
        for part in PARTS if budget == 700 else PARTS[:1]:  # in many chunks, or kept graphs
            found[budget, part] = getattr(structure, f"G_{part}") @ vectors(43)
        found[budget, "means"] = structure.class_means.clone()
    basis = structure.basis("means")
    found["basis"] = basis @ basis.t()
    if group is not None:
        found["errors"] = empty_share(rank, group)
    return found


def empty_share(rank, group):
    """A process without data must be told the number of classes; then it may have none."""
    data = [classes(NUMBER)] if rank == 0 else []
    messages = []
    for number in (None, 3):
        risk = Risk(mlp(), nn.CrossEntropyLoss(), data, process_group=group)
        try:
            messages.append(ClassStructure(risk, number).class_means)
        except (ValueError, RuntimeError) as error:
            messages.append(f"{type(error).__name__}: {error}")
    return messages


def test_two_processes_find_the_structure_of_all_data(tmp_path):
    both = launch(structure_of, tmp_path)
    alone = structure_of(None, None)
    for rank, found in enumerate(both):
        for key, expected in alone.items():
            values = (
                torch.from_numpy(v) if isinstance(v, np.ndarray) else v
                for v in (found[key], expected)
            )
            assert relative(*values) < 1e-10, (rank, key)
        message, means = found["errors"]
        assert "num_classes=None" in message
        assert message.startswith("ValueError" if rank == 1 else "RuntimeError")
        assert relative(means, alone[2**30, "means"]) < 1e-10
