"""What the examples of a network's Hessian print and draw alike."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from specdens import SpectralMeasure
from specdens.plotting import plot_cdf, plot_density

NUM_CLASSES = 10


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
