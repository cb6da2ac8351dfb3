"""Multinomial logistic regression of separated classes: curvature with a known spectrum."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from specdens.arguments import (
    checked_choice,
    checked_count,
    checked_fraction,
    checked_nonnegative,
)
from specdens.backends import Array
from specdens.operators import FunctionOperator
from specdens.spaces import LinearOperator, VectorSpace

#: The parts of the second moment of extended gradients that add up to it.
PARTS = ("class", "cross", "equal", "within")


@dataclass(frozen=True)
class MultinomialLogisticModel:
    r"""Multinomial logistic regression of separated classes; see `multinomial_logistic_model`.

    Attributes
    ----------
    num_classes, dimension : int
        C classes and D inputs: the matrix has order ``D * C``, entry ``d * C + c`` of a vector
        belonging to the weight from input d to logit c.
    signal, error : float
        Length t of the class means, and probability :math:`\alpha` of all wrong classes together.
    """

    num_classes: int
    dimension: int
    signal: float
    error: float

    @cached_property
    def probabilities(self) -> np.ndarray:
        """Softmax probabilities, (C, C), one row for the examples of each class."""
        C = self.num_classes  # noqa: N806
        right = np.eye(C)
        return (1 - self.error) * right + self.error / (C - 1) * (1 - right)

    @property
    def levels(self) -> tuple[np.ndarray, np.ndarray]:
        """Eigenvalues of the theorem, (4,), and their multiplicities: outliers, mini-bulk, bulk, 0.

        For two classes the mini-bulk is empty; for an untrained model, with all probabilities
        equal, it has the eigenvalue of the outliers.
        """
        C, D, s = self.num_classes, self.dimension, self.signal**2  # noqa: N806
        b = self.error / (C - 1)
        k0 = 2 - self.error * C / (C - 1)
        values = np.array([b * (s * (1 - self.error) + k0), b * (s / C + k0), b * k0, 0.0])
        return values, np.array([C, C * (C - 2), (D - C) * (C - 1), D])

    def eigenvalues(self, part: str | None = None) -> np.ndarray:
        """Return the spectrum in closed form, in descending order.

        Parameters
        ----------
        part : {"class", "cross", "equal", "within"}, optional
            A part of the matrix, see `matrix`. None is the whole.

        Returns
        -------
        ndarray of shape (D * C,)
        """
        values, multiplicities = self.levels if part is None else self._part_levels(part)
        return np.sort(np.repeat(values, multiplicities))[::-1]

    def _part_levels(self, part: str) -> tuple[np.ndarray, np.ndarray]:
        """Return the eigenvalue other than zero and zero, and their multiplicities."""
        C, D, s = self.num_classes, self.dimension, self.signal**2  # noqa: N806
        b = self.error / (C - 1)
        value, multiplicity = {
            "class": (s * b * (1 - self.error) ** 2, C),
            "cross": (s * b / C, C * (C - 2)),
            "equal": (s * b * (1 - self.error) * self.error, C),
            "within": (b * (2 - self.error * C / (C - 1)), D * (C - 1)),
        }[_checked_part(part)]
        return np.array([value, 0.0]), np.array([multiplicity, D * C - multiplicity])

    def matrix(self, part: str | None = None) -> np.ndarray:
        r"""Return the matrix, added up class by class from its definition.

        Parameters
        ----------
        part : {"class", "cross", "equal", "within"}, optional
            With the extended gradients :math:`g_{icc'} = x_i \otimes (p_c - e_{c'})` and their
            weights :math:`p_{cc'} / C`: the second moment of the means over c' other than c
            (``"class"``), of the means over i for one c' about these (``"cross"``), of those of
            c' = c (``"equal"``), and of the gradients about their means (``"within"``). The four
            add up to the whole, which None returns.

        Returns
        -------
        ndarray of shape (D * C, D * C)
        """
        total = np.zeros((self.dimension * self.num_classes,) * 2)
        for name in PARTS if part is None else [_checked_part(part)]:
            for label in range(self.num_classes):
                inputs, outputs = self._factors(name, label)
                total += np.kron(inputs, outputs) / self.num_classes
        return total

    def _factors(self, part: str, label: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the factors over inputs (D, D) and logits (C, C) of one class's share."""
        p, unit = self.probabilities[label], np.eye(self.num_classes)
        if part == "within":  # mean over c' of (p - e_c')(p - e_c')^T, noise of unit variance
            return np.eye(self.dimension), (p[:, None] * (p - unit)).T @ (p - unit)
        mean = np.zeros((self.dimension, self.dimension))
        mean[label, label] = self.signal**2
        directions = p - unit  # row c' is p - e_c'
        others = np.arange(self.num_classes) != label
        center = p[others] @ directions[others] / p[others].sum()
        if part == "class":
            return mean, p[others].sum() * np.outer(center, center)
        if part == "equal":
            return mean, p[label] * np.outer(directions[label], directions[label])
        spread = directions[others] - center
        return mean, (p[others, None] * spread).T @ spread

    def operator(self) -> LinearOperator:
        """Return the matrix as an operator of :math:`O(D C^2)` work per product."""
        C, D = self.num_classes, self.dimension  # noqa: N806
        p = self.probabilities
        curvature = np.stack([np.diag(row) - np.outer(row, row) for row in p])  # (C, C, C)
        average = curvature.mean(axis=0)

        def multiply(x: Array) -> Array:
            X = x.reshape(D, C, -1)  # noqa: N806
            Y = average @ X  # noqa: N806
            Y[:C] += self.signal**2 / C * (curvature @ X[:C])
            return Y.reshape(x.shape)

        return FunctionOperator(multiply, VectorSpace.like(np.zeros(D * C)), blocks=True)


def multinomial_logistic_model(
    num_classes: int, dimension: int, signal: float, error: float
) -> MultinomialLogisticModel:
    r"""Return a model whose Gauss-Newton matrix has outliers, a mini-bulk and a bulk, all known.

    Examples of class c are :math:`x = t e_c + z` with standard normal z in D dimensions, and the
    softmax of the logits is :math:`1 - \alpha` for the true class, :math:`\alpha / (C - 1)` for
    every other. The expected Hessian of the cross-entropy with respect to the weights, which is
    also its Gauss-Newton matrix, is then

    .. math:: G = \frac1C \sum_c (t^2 e_c e_c^\top + I) \otimes (\mathrm{diag}(p_c) - p_c p_c^\top),

    with C outliers, :math:`C (C - 2)` eigenvalues in a mini-bulk, :math:`(D - C)(C - 1)` in the
    bulk and D zeros. What counts outliers, or tells class structure from the rest, can be tried
    on it: the answer is known, as are the spectra of its four parts.

    Parameters
    ----------
    num_classes : int
        C, at least 2.
    dimension : int
        D, at least C.
    signal : float
        t, not negative.
    error : float
        :math:`\alpha`, above 0 and below 1. At 1 - 1 / C all probabilities are equal.

    Returns
    -------
    MultinomialLogisticModel
        With ``levels``, ``eigenvalues(part=None)``, ``matrix(part=None)``, ``operator()`` and
        ``probabilities``.

    Raises
    ------
    ValueError
        If an argument is out of range.

    References
    ----------
    Papyan (2020), Traces of class/cross-class structure pervade deep learning spectra.
    arXiv:2008.11865, theorem 8.1; the parts as in equation 6.4.

    Examples
    --------
    >>> model = multinomial_logistic_model(5, 200, signal=10.0, error=0.1)
    >>> values, multiplicities = model.levels
    >>> values.round(6), multiplicities
    (array([2.296875, 0.546875, 0.046875, 0.      ]), array([  5,  15, 780, 200]))
    >>> from specdens import eigsh
    >>> eigsh(model.operator(), 6).eigenvalues.round(6)
    array([0.546875, 2.296875, 2.296875, 2.296875, 2.296875, 2.296875])
    """
    checked_count("num_classes", num_classes, 2)
    checked_count("dimension", dimension, num_classes, "it is num_classes at least")
    checked_nonnegative("signal", signal)
    checked_fraction("error", error, "it is the probability of a wrong class")
    return MultinomialLogisticModel(int(num_classes), int(dimension), float(signal), float(error))


def _checked_part(part: str) -> str:
    return checked_choice("part", part, PARTS, "None is the whole")
