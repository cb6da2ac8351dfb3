"""How does an operator of my own go through every estimator? A class with ``space`` and ``@`` does.

Two of about ten lines each, neither ever a matrix: the Laplacian of the nearest-neighbor graph of
1,797 real handwritten digits, which keeps lists of neighbors, and the periodic blur of an image by
fast Fourier transforms, whose eigenvalues are known, so that every number stands next to the truth:

    pip install ".[examples]" && python examples/custom_operator.py

Under a minute on two cores. ``--quick`` is a smaller run of the same.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from sklearn.datasets import load_digits
from sklearn.neighbors import NearestNeighbors

from specdens import (
    VectorSpace,
    apply_function,
    density,
    eigsh,
    kpm,
    lanczos,
    logdet,
    shift,
    slq,
    spectral_interval,
    trace,
)
from specdens.testing import check_operator


class GraphLaplacian:
    """L x = sum of (x_i - x_j)(e_i - e_j) over all i and their neighbors j."""

    def __init__(self, neighbors: np.ndarray) -> None:
        self.neighbors = neighbors  # (n, num_neighbors) integers
        self.space = VectorSpace.like(np.zeros(len(neighbors)))

    def __matmul__(self, x: np.ndarray) -> np.ndarray:
        differences = x[:, None] - x[self.neighbors]  # (n, num_neighbors) or one axis more
        y = differences.sum(axis=1)
        np.subtract.at(y, self.neighbors, differences)
        return y


class Blur:
    """Periodic convolution of images with an even kernel, by Fourier transforms."""

    def __init__(self, kernel: np.ndarray) -> None:
        self.transfer = np.fft.fft2(kernel).real  # the eigenvalues: only the script looks at them
        self.space = VectorSpace.like(np.zeros(kernel.size))

    def __matmul__(self, x: np.ndarray) -> np.ndarray:
        images = x.reshape(*self.transfer.shape, -1)
        transformed = self.transfer[..., None] * np.fft.fft2(images, axes=(0, 1))
        return np.fft.ifft2(transformed, axes=(0, 1)).real.reshape(x.shape)


@dataclass(frozen=True)
class Study:
    """An operator, a vector, a function of the operator, and what is known of the answers."""

    title: str
    operator: Any
    vector: np.ndarray  # (n,)
    which: str  # end of the spectrum to look at
    function: Callable[[np.ndarray], np.ndarray]
    trace: float
    eigenvalues: np.ndarray | None = None  # all of them, where they are known
    energies: np.ndarray | None = None  # of the vector in their eigenvectors


def graph_study(num_digits: int, num_neighbors: int = 10) -> Study:
    """Return the graph of digits, with the indicator of the class "3" as the vector."""
    digits = load_digits()
    pixels, labels = digits.data[:num_digits], digits.target[:num_digits]
    search = NearestNeighbors(n_neighbors=num_neighbors).fit(pixels)
    neighbors = search.kneighbors(return_distance=False)
    return Study(
        f"Laplacian of the graph of {num_digits:,} digits with {num_neighbors} neighbors each",
        GraphLaplacian(neighbors),
        (labels == 3).astype(float),
        "SA",
        lambda x: np.exp(-x / 20),  # the heat kernel
        2.0 * neighbors.size,  # every edge adds 1 to two diagonal entries
    )


def blur_study(size: int) -> Study:
    """Return the blur of a mosaic of digits, ``size`` pixels wide and high."""
    tiles = load_digits().images[: (size // 8) ** 2].reshape(size // 8, size // 8, 8, 8)
    image = tiles.transpose(0, 2, 1, 3).reshape(size, size) / 16
    offsets = np.fft.fftfreq(size, 1 / size)
    kernel = np.exp(-((offsets[:, None] / 1.2) ** 2) - (offsets / 0.8) ** 2)
    operator = Blur(kernel / kernel.sum())
    return Study(
        f"Periodic blur of an image of {size} x {size} pixels",
        operator,
        image.reshape(-1),
        "LA",
        lambda x: x / (x**2 + 0.01),  # Wiener's filter, to sharpen again
        float(operator.transfer.sum()),
        operator.transfer.reshape(-1),
        (np.abs(np.fft.fft2(image)) ** 2).reshape(-1) / np.sum(np.abs(np.fft.fft2(image)) ** 2),
    )


def print_row(name: str, *cells: object) -> None:
    """Print one row of a table."""
    print(f"  {name:26}" + "".join(f"{cell!s:>20}" for cell in cells))


def show_densities(study: Study, num_probes: int, interval: tuple[float, float]) -> dict[str, Any]:
    """Compare what three estimators say of the whole spectrum."""
    A, n = study.operator, study.operator.space.dimension  # noqa: N806
    measures = {
        "slq": slq(A, num_probes=num_probes),
        "kpm": kpm(A, num_probes=num_probes, num_moments=256, interval=interval),
        "density": density(A, tolerance=0.02),
    }
    cut = interval[0] + 0.25 * (interval[1] - interval[0])
    exact = [f"{study.trace / n:.4f}", "", ""]
    if study.eigenvalues is not None:
        values = study.eigenvalues
        exact[1:] = f"{np.mean(values**2):.4f}", f"{np.mean(values <= cut):.4f}"
    print_row("whole spectrum", *measures, "exact")
    print_row("mean", *(m.moment(1) for m in measures.values()), exact[0])
    print_row("mean square", *(m.moment(2) for m in measures.values()), exact[1])
    below = [m.count(interval[0] - 1, cut) for m in measures.values()]
    shares = [f"{b.value / n:.4f} ± {b.stderr / n:.4f}" for b in below]
    print_row(f"share below {cut:.3g}", *shares, exact[2])
    return measures


def show_ends(study: Study) -> Any:
    """Print the eigenvalues at one end, with residuals."""
    pairs = eigsh(study.operator, num_eigenvalues=6, which=study.which, tol=1e-8)
    known = study.eigenvalues is not None
    print(f"\n  {study.which} eigenvalues, {pairs.num_products} products")
    print_row("", "value", "residual", "exact" if known else "")
    exact = np.sort(study.eigenvalues)[::-1] if known else np.full(6, np.nan)
    order = np.argsort(pairs.eigenvalues)[:: -1 if study.which == "LA" else 1]
    for rank, i in enumerate(order):
        value, residual = pairs.eigenvalues[i], pairs.residuals[i]
        truth = f"{exact[rank]:.8f}" if known else ""
        print_row(f"{rank + 1:12d}", f"{round(value, 8) + 0.0:.8f}", f"{residual:.1e}", truth)
    return pairs


def show_functions(study: Study, num_products: int) -> dict[str, Any]:
    """Print trace, log-determinant, what the vector sees, and a function applied to it."""
    A, v, f = study.operator, study.vector, study.function  # noqa: N806
    seen = lanczos(A, v, num_steps=60)
    filtered = apply_function(f, A, v)
    found = {
        "trace": trace(A, num_products=num_products),
        "trace of f": trace(A, f, num_products=num_products),
        "log-determinant of A + I": logdet(shift(A, 1.0)),
        "mean that the vector sees": float(seen.moment(1).value),
        "norm of f(A) vector": float(np.linalg.norm(filtered)),
    }
    exact = {"trace": study.trace, "mean that the vector sees": float(v @ (A @ v) / (v @ v))}
    if study.eigenvalues is not None and study.energies is not None:
        values = study.eigenvalues
        exact |= {
            "trace of f": f(values).sum(),
            "log-determinant of A + I": np.log1p(values).sum(),
            "norm of f(A) vector": np.sqrt(study.energies @ f(values) ** 2) * np.linalg.norm(v),
        }
    print()
    print_row("functions", "found", "exact")
    for name, value in found.items():
        number = f"{value:.6g}" if isinstance(value, float) else value
        print_row(name, number, f"{exact[name]:.6g}" if name in exact else "")
    return {"found": found, "exact": exact, "filtered": filtered}


def run(study: Study, num_probes: int, num_products: int) -> dict[str, Any]:
    """Send one operator through everything."""
    print(f"\n{study.title}\n")
    check_operator(study.operator)
    interval = spectral_interval(study.operator)
    print(f"  linear, Hermitian, repeatable; the spectrum lies in {interval[0]:.4g} to", end="")
    print(f" {interval[1]:.4g}\n")
    measures = show_densities(study, num_probes, interval)
    pairs = show_ends(study)
    functions = show_functions(study, num_products)
    return {"interval": interval, "measures": measures, "pairs": pairs, **functions}


def main(arguments: list[str] | None = None) -> dict[str, dict[str, Any]]:
    """Run the example; return the numbers it printed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer digits, pixels and probes")
    options = parser.parse_args(arguments)
    quick = options.quick
    num_digits, size, num_probes, num_products = (500, 32, 4, 120) if quick else (1797, 64, 10, 600)
    return {
        "graph": run(graph_study(num_digits), num_probes, num_products),
        "blur": run(blur_study(size), num_probes, num_products),
    }


if __name__ == "__main__":
    main()
