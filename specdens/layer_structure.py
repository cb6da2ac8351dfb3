"""Features and backpropagated errors of one linear layer by class, and their spectra."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from specdens.class_parts import inverse_weights
from specdens.gram import spectrum_of
from specdens.hierarchy import part_eigenvalues


@dataclass(frozen=True, eq=False)
class LayerStructure:
    r"""Means and second moments of the inputs and errors of one linear layer, by class.

    With x the input of the layer, z its output and :math:`\delta_{icc'} = (\partial f_i / \partial
    z_i)^\top (p_i - e_{c'})`, the block of the Gauss-Newton matrix that belongs to the layer's
    weight is :math:`\sum \omega_{icc'} \, \delta_{icc'} \delta_{icc'}^\top \otimes x_i x_i^\top`;
    the symbols are those of `ClassStructure`. With uniform weights :math:`\delta_{icc'}` has the
    factor :math:`\sqrt{p_{ic'}}`, as :math:`h_{icc'}` has.

    Attributes
    ----------
    name : str
    class_shares : ndarray of shape (C,)
        Parts of the weight of all examples that the classes have.
    feature_means : ndarray of shape (d, C)
        Mean input of each class, zero for classes without examples.
    feature_mean : ndarray of shape (d,)
    feature_second_moment : ndarray of shape (d, d)
        The weighted mean of :math:`x x^\top`.
    pair_weights : ndarray of shape (C, C)
        As those of `ClassStructure`.
    error_means : ndarray of shape (m, C, C)
        Weighted means of :math:`\delta_{icc'}` of each pair.
    error_second_moment : ndarray of shape (m, m)
        The sum of :math:`\omega_{icc'} \delta_{icc'} \delta_{icc'}^\top`.

    References
    ----------
    Papyan (2020), JMLR 21(252), Eqs. 7.3-7.8. arXiv:2008.11865

    Examples
    --------
    One example of the first of two classes, whose probabilities are 1/2 each, and a layer that
    returns the logits of its single input 2.

    >>> errors = np.array([[[-0.5, 0.5], [0.0, 0.0]], [[0.5, -0.5], [0.0, 0.0]]])
    >>> layer = LayerStructure(
    ...     name="head",
    ...     class_shares=np.array([1.0, 0.0]),
    ...     feature_means=np.array([[2.0, 0.0]]),
    ...     feature_mean=np.array([2.0]),
    ...     feature_second_moment=np.array([[4.0]]),
    ...     pair_weights=np.array([[0.5, 0.5], [0.0, 0.0]]),
    ...     error_means=errors,
    ...     error_second_moment=np.array([[0.25, -0.25], [-0.25, 0.25]]),
    ... )
    >>> layer.feature_eigenvalues()
    array([4.])
    >>> layer.error_eigenvalues().round(12) + 0.0
    array([0.5, 0. ])
    >>> layer.error_eigenvalues("class").round(12) + 0.0
    array([0.25, 0.  ])
    """

    name: str
    class_shares: np.ndarray
    feature_means: np.ndarray
    feature_mean: np.ndarray
    feature_second_moment: np.ndarray
    pair_weights: np.ndarray
    error_means: np.ndarray
    error_second_moment: np.ndarray

    def feature_eigenvalues(self) -> np.ndarray:
        """Return the eigenvalues of the features' second moment, (d,) descending."""
        return spectrum_of(self.feature_second_moment)

    def error_eigenvalues(self, part: str | None = None) -> np.ndarray:
        """Return eigenvalues of the errors' second moment or of one of its parts, descending.

        Parameters
        ----------
        part : {"class", "cross", "equal", "means", "within"}, optional
            By default the whole, which is the sum of ``"means"`` and ``"within"``.

        Returns
        -------
        ndarray, float64
            As many as outputs, m; for parts made of means as many as `ClassStructure.eigenvalues`
            returns, the others being zero.

        Raises
        ------
        ValueError
            If `part` is none of these.
        """
        means = self.error_means.reshape(len(self.error_means), -1)
        if part is None:
            matrix = self.error_second_moment
        elif part == "within":
            matrix = self.error_second_moment - (means * self.pair_weights.ravel()) @ means.T
        else:
            return part_eigenvalues(means.T @ means, self.pair_weights, part)
        return spectrum_of(matrix)

    def __repr__(self) -> str:
        m, number, _ = self.error_means.shape
        features = len(self.feature_mean)
        return f"LayerStructure({self.name!r}, {features} inputs, {m} outputs, {number} classes)"


class LayerSums(NamedTuple):
    """Weighted sums over the data that a `LayerStructure` is made of, in arrays of any library."""

    shares: Any  # (C,)
    features: Any  # (C, d)
    feature_square: Any  # (d, d)
    pairs: Any  # (C, C)
    errors: Any  # (C, C, m), the true class first
    error_square: Any  # (m, m)


def averaged(sums: LayerSums, name: str, divisor: float) -> LayerStructure:
    """Divide sums over the data by their weights.

    Parameters
    ----------
    sums : LayerSums
        Of arrays on the host, float64.
    name : str
        The layer's.
    divisor : float
        What the risk divides by. Features are averages whatever it is.

    Returns
    -------
    LayerStructure

    Examples
    --------
    Inputs 2 and 4, both of the first of two classes, and errors of the pair (0, 1) alone:

    >>> errors, pairs = np.zeros((2, 2, 1)), np.array([[0.0, 0.5], [0.0, 0.0]])
    >>> errors[0, 1] = 1.0
    >>> square = np.array([[2.0]])
    >>> sums = LayerSums(
    ...     np.array([2.0, 0.0]), np.array([[6.0], [0.0]]), 10 * square, pairs, errors, square
    ... )
    >>> layer = averaged(sums, "head", 2.0)
    >>> layer.feature_means, layer.feature_second_moment, layer.error_means[:, 0, 1]
    (array([[3., 0.]]), array([[10.]]), array([2.]))
    """
    total = sums.shares.sum()
    errors = sums.errors * inverse_weights(sums.pairs)[..., None]
    return LayerStructure(
        name=name,
        class_shares=sums.shares / total,
        feature_means=(sums.features * inverse_weights(sums.shares)[:, None]).T,
        feature_mean=sums.features.sum(0) / total,
        feature_second_moment=sums.feature_square / total,
        pair_weights=sums.pairs / divisor,
        error_means=np.moveaxis(errors, -1, 0),
        error_second_moment=sums.error_square / divisor,
    )
