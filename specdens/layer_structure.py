"""Features and backpropagated errors of one linear layer by class, and their spectra."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

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
        return np.asarray(np.linalg.eigvalsh(self.feature_second_moment)[::-1])

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
        return np.asarray(np.linalg.eigvalsh(matrix)[::-1])

    def __repr__(self) -> str:
        m, number, _ = self.error_means.shape
        features = len(self.feature_mean)
        return f"LayerStructure({self.name!r}, {features} inputs, {m} outputs, {number} classes)"
