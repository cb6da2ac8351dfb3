"""Does the Hessian of data divided over processes have the spectrum of all data in one process?

Trains a small network on 1,797 handwritten digits, gives every process an uneven share of them,
and compares risk, gradient and spectrum with those of one process that has all of the data:

    torchrun --standalone --nproc-per-node 2 examples/distributed_hessian.py

Without torchrun it is one process that has everything. Some ten seconds; ``--quick`` is a smaller
run of the same.
"""

from __future__ import annotations

import argparse
import os
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional

from specdens import SpectralMeasure, slq
from specdens_torch import Hessian, Risk, gradient, risk_value

Data = tuple[torch.Tensor, torch.Tensor]


class Findings(NamedTuple):
    """What is compared."""

    risk: Risk
    value: float
    gradient: torch.Tensor
    measure: SpectralMeasure


def digits() -> Data:
    """Return the images, (1797, 64) with entries up to 1, and their labels."""
    images, labels = load_digits(return_X_y=True)
    return torch.tensor(images / 16), torch.tensor(labels, dtype=torch.int64)


def train(data: Data, num_steps: int) -> nn.Sequential:
    """Return a perceptron 64-32-10 after some steps of Adam on all of the data."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10)).double()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(num_steps):
        optimizer.zero_grad()
        functional.cross_entropy(model(data[0]), data[1]).backward()
        optimizer.step()
    return model


def share(data: Data, rank: int, size: int) -> Data:
    """Return the examples of one process: the second has twice as many as the first, and so on."""
    places = np.cumsum(np.arange(size + 1)) / (size * (size + 1) / 2)
    first, last = (round(len(data[1]) * place) for place in places[rank : rank + 2])
    return data[0][first:last], data[1][first:last]


def find(model: nn.Module, data: Data, num_steps: int, process_group: str | None) -> Findings:
    """Return risk, gradient and spectral measure of the Hessian."""
    risk = Risk(model, nn.CrossEntropyLoss(), data, process_group=process_group)
    measure = slq(Hessian(risk), num_probes=4, num_steps=num_steps, progress=False)
    return Findings(risk, risk_value(risk), gradient(risk), measure)


def compare(many: Findings, one: Findings, size: int) -> float:
    """Print both side by side; return the largest difference, each relative to its kind."""
    norms = [float(found.gradient.norm()) for found in (many, one)]
    tops = [np.sort(f.measure.outliers.eigenvalues)[::-1] for f in (many, one)]
    traces = [float(f.measure.trace().value) for f in (many, one)]
    scale = float(tops[1][0])
    differences = [
        abs(many.value - one.value) / one.value,
        float((many.gradient - one.gradient).norm()) / norms[1],
        float(np.abs(many.measure.nodes - one.measure.nodes).max()) / scale,
    ]
    rows = [
        ("risk", many.value, one.value),
        ("norm of the gradient", *norms),
        *((f"eigenvalue {i + 1}", tops[0][i], tops[1][i]) for i in range(5)),
        ("trace", *traces),
    ]
    print(f"{'':22}{size} process{'es' if size > 1 else '  '}    one process")
    for name, there, here in rows:
        print(f"{name:22}{there:11.8f}    {here:11.8f}")
    print("largest relative differences:")
    names = ("risk", "gradient", "nodes")
    print("  " + ", ".join(f"{n} {d:.1e}" for n, d in zip(names, differences, strict=True)))
    return max(differences)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Run the example; return what it found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer steps")
    options = parser.parse_args(arguments)
    num_epochs, num_steps = (100, 20) if options.quick else (200, 60)

    started = "RANK" in os.environ  # by torchrun
    if started:
        dist.init_process_group("gloo")
    try:
        group = "world" if started else None
        rank, size = (dist.get_rank(), dist.get_world_size()) if started else (0, 1)
        data = digits()
        model = train(data, num_epochs)
        if started:
            for parameter in model.parameters():  # trained alike, but perhaps rounded differently
                dist.broadcast(parameter.data, src=0)
        many = find(model, share(data, rank, size), num_steps, group)
        difference = 0.0
        if rank == 0:
            print(many.risk)
            difference = compare(many, find(model, data, num_steps, None), size)
    finally:
        if started:
            dist.destroy_process_group()
    return {"difference": difference, "size": size, "measure": many.measure}


if __name__ == "__main__":
    main()
