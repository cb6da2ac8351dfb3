"""Operators whose eigenvalues are known exactly: prescribed spectra, and a network's Hessian."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import scipy
import torch
from scipy.stats import wasserstein_distance
from sklearn.datasets import load_digits

import specdens
from specdens.testing import spiked_spectrum

Cdf = Callable[[np.ndarray], np.ndarray]

GRID_POINTS = 4000  # of the grid that distribution functions are compared on


@dataclass
class Problem:
    """A Hermitian operator with known eigenvalues that counts its products."""

    name: str
    eigenvalues: np.ndarray  # ascending
    product: Callable[[np.ndarray], np.ndarray]  # of (n, k) arrays
    num_products: int = 0

    @property
    def dimension(self) -> int:
        return self.eigenvalues.size

    def multiply(self, x: np.ndarray) -> np.ndarray:
        """Return the product with an (n,) or (n, k) array."""
        columns = x.reshape(self.dimension, -1)
        self.num_products += columns.shape[1]
        return self.product(columns).reshape(x.shape)

    def operator(self) -> specdens.FunctionOperator:
        space = specdens.VectorSpace.like(self.eigenvalues)
        return specdens.FunctionOperator(self.multiply, space, blocks=True)

    def rule_distance(self, nodes: np.ndarray, weights: np.ndarray) -> float:
        """Return W1 over range of a rule with nonnegative weights."""
        used = weights > 0
        distance = wasserstein_distance(nodes[used], self.eigenvalues, weights[used])
        return float(distance / np.ptp(self.eigenvalues))

    def cdf_distance(self, cdf: Cdf) -> float:
        """Return W1 over range of a distribution function: the integral of the difference.

        The true one is constant between points, since all eigenvalues are among them.
        """
        low, size = self.eigenvalues[0], np.ptp(self.eigenvalues)
        grid = np.linspace(low - size, low + 2 * size, 3 * GRID_POINTS)
        x = np.union1d(grid, self.eigenvalues)
        values = np.clip(cdf(x), 0, 1)
        truth = np.searchsorted(self.eigenvalues, x[:-1], side="right") / self.dimension
        apart = (np.abs(values[:-1] - truth) + np.abs(values[1:] - truth)) / 2
        return float(apart @ np.diff(x) / size)

    def density_distance(self, grid: np.ndarray, density: np.ndarray) -> float:
        """Return W1 over range of a density on a grid, scaled to a total mass of 1."""
        steps = np.diff(grid) * (density[1:] + density[:-1]) / 2
        mass = np.concatenate([[0.0], np.cumsum(steps)])
        return self.cdf_distance(lambda x: np.interp(x, grid, mass / mass[-1]))


def prescribed_spectra(n: int) -> dict[str, np.ndarray]:
    """Return eigenvalues at the mid quantiles of known laws, and some that are no law's."""
    rng = np.random.default_rng(0)
    x = np.linspace(-1, 1, 100_001)
    ratio = 0.5  # of Marchenko-Pastur: dimension over samples
    low, high = (1 - ratio**0.5) ** 2, (1 + ratio**0.5) ** 2
    y = low + (high - low) * (x + 1) / 2
    edges = np.sqrt(np.maximum((high - y) * (y - low), 0))
    bands = [np.linspace(0, 1, n - n // 3), np.linspace(2.5, 3, n // 3)]
    centers = np.repeat(np.sort(rng.uniform(0, 1, 12)), n // 12)
    return {
        "uniform": np.linspace(0, 1, n),
        "semicircle": quantiles(x, np.sqrt(1 - x**2), n),
        "Marchenko-Pastur": quantiles(y, edges / y, n),
        "two bands": np.concatenate(bands),
        "clusters": np.sort(centers + 1e-4 * rng.standard_normal(centers.size)),
        "spiked": spiked_spectrum(n),
        "power law": np.sort(1 / np.arange(1, n + 1)),
    }


def quantiles(x: np.ndarray, density: np.ndarray, count: int) -> np.ndarray:
    """Return the values that split a density, given on a grid, into parts of equal mass."""
    mass = np.concatenate([[0.0], np.cumsum(np.diff(x) * (density[1:] + density[:-1]) / 2)])
    return np.interp((np.arange(count) + 0.5) / count, mass / mass[-1], x)


def rotated(name: str, eigenvalues: np.ndarray) -> Problem:
    r"""Return :math:`S C^T \Lambda C S` with C the cosine transform, S random signs."""
    signs = np.random.default_rng([1, 2]).choice([-1.0, 1.0], eigenvalues.size)[:, None]

    def product(x: np.ndarray) -> np.ndarray:
        inside = scipy.fft.dct(signs * x, axis=0, norm="ortho")
        return signs * scipy.fft.idct(eigenvalues[:, None] * inside, axis=0, norm="ortho")

    return Problem(name, eigenvalues, product)


def network_hessian(steps: int = 300) -> Problem:
    """Return the Hessian of the mean loss of an MLP 64-16-10 after full-batch training."""
    torch.manual_seed(0)
    digits = load_digits()
    images, labels = torch.tensor(digits.data / 16), torch.tensor(digits.target)
    model = torch.nn.Sequential(
        torch.nn.Linear(64, 16), torch.nn.Tanh(), torch.nn.Linear(16, 10)
    ).double()
    parameters = list(model.parameters())
    optimizer = torch.optim.SGD(parameters, lr=0.2, momentum=0.9)
    for _ in range(steps):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
    loss = torch.nn.functional.cross_entropy(model(images), labels)
    gradient = flat(torch.autograd.grad(loss, parameters, create_graph=True))
    rows = [flat(torch.autograd.grad(g, parameters, retain_graph=True)) for g in gradient]
    hessian = torch.stack(rows).numpy()
    hessian = (hessian + hessian.T) / 2
    return Problem("Hessian (digits)", np.linalg.eigvalsh(hessian), hessian.__matmul__)


def flat(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])
