"""Spectra in closed form: a hidden layer's residual curvature, and spikes in white noise."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from specdens.arguments import checked_count, checked_numbers, checked_positive, checked_seed, shown
from specdens.laws import MarchenkoPastur
from specdens.operators import FunctionOperator
from specdens.spaces import LinearOperator, VectorSpace


def hidden_layer_residual_eigenvalues(
    inputs: ArrayLike, active: ArrayLike, errors: ArrayLike, *, bias: bool = True
) -> np.ndarray:
    r"""Return the spectrum of Hessian minus Gauss-Newton matrix of a network with one ReLU layer.

    The network :math:`f(x) = V \phi(W x + b) + a` with piecewise-linear :math:`\phi` has no second
    derivatives but those by a row of V's columns and the same unit's row of W, so that the residual
    of its mean loss falls apart into one block for each of the h hidden units,

    .. math:: \begin{pmatrix} 0 & M_j \\ M_j^\top & 0 \end{pmatrix}, \qquad
        M_j = \frac1n \sum_i \frac{\partial \ell_i}{\partial f} \phi'(a_{ij}) (x_i^\top, 1).

    Its eigenvalues are plus and minus the singular values of the :math:`C \times (d + 1)` matrices
    :math:`M_j`, and zeros: a symmetric spectrum of rank at most :math:`2 h \min(C, d + 1)`, and at
    most :math:`2 h (C - 1)` for cross-entropy, whose errors add up to zero.

    Parameters
    ----------
    inputs : array_like of shape (n, d)
    active : array_like of shape (n, h)
        Whether each hidden unit is active, :math:`a_{ij} > 0`; or the slope of :math:`\phi` there.
    errors : array_like of shape (n, C)
        Derivatives of each example's loss by the outputs: probabilities minus one-hot labels for
        cross-entropy. For unequal weights multiply them by :math:`n w_i / \sum w`.
    bias : bool
        Whether the layers have biases; without, the column of ones is missing.

    Returns
    -------
    ndarray of shape (h * (d + C) + h + C,), or (h * (d + C),) without biases
        In ascending order.

    Raises
    ------
    ValueError
        If the arrays are not matrices of one number of rows.

    References
    ----------
    Sagun, Evci, Guney, Dauphin, Bottou (2017), arXiv:1706.04454, for the split of the Hessian.

    Examples
    --------
    >>> hidden_layer_residual_eigenvalues([[3.0], [5.0]], [[1], [0]], [[2.0], [7.0]], bias=False)
    array([-3.,  3.])
    """
    x, slopes, e = (
        checked_numbers(name, a)
        for name, a in (("inputs", inputs), ("active", active), ("errors", errors))
    )
    shapes = {"inputs": x.shape, "active": slopes.shape, "errors": e.shape}
    if (
        any(len(shape) != 2 for shape in shapes.values())
        or len({s[0] for s in shapes.values()}) > 1
    ):
        found = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        msg = f"{found}: expected (n, d) inputs, (n, h) active and (n, C) errors of one n."
        raise ValueError(msg)
    num_examples, width = slopes.shape
    if bias:
        x = np.column_stack([x, np.ones(num_examples)])
    blocks = np.stack([e.T @ (slope[:, None] * x) for slope in slopes.T]) / num_examples
    singular = np.linalg.svd(blocks, compute_uv=False).ravel()
    total = width * (x.shape[1] + e.shape[1]) + (e.shape[1] if bias else 0)
    zeros = np.zeros(total - 2 * singular.size)
    return np.sort(np.concatenate([-singular, zeros, singular]))


@dataclass(frozen=True, eq=False)
class SpikedCovariance:
    r"""Data with a few strong directions in white noise; see `spiked_covariance`.

    Attributes
    ----------
    spikes : ndarray of shape (r,)
        Population eigenvalues :math:`\ell_j` above the noise, descending. Their eigenvectors are
        the first r coordinate axes.
    num_samples, dimension : int
        T and n.
    variance : float
        v, of the noise.
    """

    spikes: np.ndarray
    num_samples: int
    dimension: int
    variance: float

    @property
    def bulk(self) -> MarchenkoPastur:
        """The law of all sample eigenvalues but the outliers."""
        return MarchenkoPastur(self.dimension / self.num_samples, self.variance)

    @property
    def threshold(self) -> float:
        r"""Population eigenvalue :math:`v (1 + \sqrt c)` up to which a spike leaves no outlier."""
        return float(self.variance * (1 + np.sqrt(self.bulk.ratio)))

    @property
    def num_outliers(self) -> int:
        """Number of spikes above the threshold."""
        return int(np.sum(self.spikes > self.threshold))

    @property
    def eigenvalues(self) -> np.ndarray:
        r"""Limits of the largest r sample eigenvalues, :math:`\ell (1 + c v / (\ell - v))`, (r,).

        Spikes up to the threshold give the edge of the bulk.
        """
        gap = self.spikes - self.variance
        outliers = self.spikes * (1 + self.bulk.ratio * self.variance / gap)
        return np.where(self.spikes > self.threshold, outliers, self.bulk.support[1])

    @property
    def overlaps(self) -> np.ndarray:
        r"""Limits of the squared cosines between sample and population eigenvectors, (r,).

        :math:`(1 - c / g^2) / (1 + c / g)` with :math:`g = \ell / v - 1`, zero up to the threshold.
        """
        g, c = self.spikes / self.variance - 1, self.bulk.ratio
        return np.where(self.spikes > self.threshold, (1 - c / g**2) / (1 + c / g), 0.0)

    @property
    def fluctuations(self) -> np.ndarray:
        r"""Standard deviations of the outliers at large T, (r,); nan where there is none.

        :math:`\ell \sqrt{2 (1 - c / g^2) / T}`, for Gaussian data and distinct spikes.
        """
        g, c = self.spikes / self.variance - 1, self.bulk.ratio
        share = np.where(self.spikes > self.threshold, 1 - c / g**2, np.nan)
        return self.spikes * np.sqrt(2 * share / self.num_samples)

    def sample(self, seed: int = 0) -> np.ndarray:
        """Return Gaussian data, (T, n), one sample in each row, with mean zero."""
        data = np.random.default_rng(checked_seed(seed)).standard_normal(
            (self.num_samples, self.dimension)
        )
        data *= np.sqrt(self.variance)
        data[:, : self.spikes.size] *= np.sqrt(self.spikes / self.variance)
        return data

    def operator(self, seed: int = 0) -> LinearOperator:
        """Return the covariance matrix :math:`X^T X / T` of a sample, never formed."""
        data = self.sample(seed)
        space = VectorSpace.like(np.zeros(self.dimension))
        return FunctionOperator(
            lambda x: data.T @ (data @ x) / self.num_samples, space, blocks=True
        )


def spiked_covariance(
    spikes: ArrayLike, num_samples: int, dimension: int, *, variance: float = 1.0
) -> SpikedCovariance:
    r"""Return the spiked covariance model, whose outliers and their eigenvectors have known limits.

    T samples with covariance :math:`v I + \sum_j (\ell_j - v) u_j u_j^\top` in n dimensions. For
    large T and n of ratio c = n / T, the eigenvalues of the sample covariance matrix follow the law
    of Marchenko and Pastur, but for one outlier for each :math:`\ell_j > v (1 + \sqrt c)`, above
    its place in the population, whose eigenvector has a known angle to :math:`u_j`. Weaker spikes
    cannot be seen.

    Parameters
    ----------
    spikes : array_like of shape (r,)
        Population eigenvalues, above `variance`.
    num_samples, dimension : int
        T and n; n is larger than r.
    variance : float
        v, of the noise.

    Returns
    -------
    SpikedCovariance
        With ``bulk``, ``threshold``, ``num_outliers``, the limits ``eigenvalues`` and ``overlaps``,
        ``fluctuations``, and ``sample(seed)`` and ``operator(seed)``.

    Raises
    ------
    ValueError
        If an argument is out of range.

    References
    ----------
    Baik, Ben Arous, Péché (2005), Ann. Probab. 33, 1643. arXiv:math/0403022
    Baik, Silverstein (2006), arXiv:math/0408165, theorem 1.1, for real data.
    Paul (2007), Statistica Sinica 17, 1617, theorems 3 and 4: fluctuations and eigenvectors.

    Examples
    --------
    >>> model = spiked_covariance([4.0, 1.2], num_samples=4000, dimension=1000)
    >>> model.threshold, model.num_outliers, model.bulk.support
    (1.5, 1, (0.25, 2.25))
    >>> model.eigenvalues.round(4), model.overlaps.round(4)
    (array([4.3333, 2.25  ]), array([0.8974, 0.    ]))
    """
    checked_positive("variance", variance)
    levels = np.sort(np.atleast_1d(checked_numbers("spikes", spikes)))[::-1]
    if levels.ndim != 1 or not np.all((levels > variance) & (levels < np.inf)):
        msg = (
            f"spikes={shown(spikes)} must be finite numbers above variance={variance}, that of the "
            "noise."
        )
        raise ValueError(msg)
    checked_count("num_samples", num_samples)
    checked_count("dimension", dimension, levels.size + 1, "it is larger than the number of spikes")
    return SpikedCovariance(levels, int(num_samples), int(dimension), float(variance))
