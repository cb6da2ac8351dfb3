"""Second moments of the gradients of single examples, uncentered and centered."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from specdens_torch.evaluation import Evaluation
from specdens_torch.guards import Totals
from specdens_torch.jacobian import Jacobian
from specdens_torch.linearized import Linearized, RiskMatrix
from specdens_torch.parameters import FlatParameters
from specdens_torch.state import Fingerprint
from specdens_torch.values import summed_gradient


class GradientSecondMoment(RiskMatrix):
    r"""The second moment :math:`\sum_i w_i g_i g_i^\top / \sum_i w_i` of the examples' gradients.

    :math:`g_i` is the gradient of the loss of example i, not multiplied by its weight
    :math:`w_i`. Also called the empirical Fisher matrix, though it is not a Fisher information,
    and uncentered gradient covariance. No gradient of a single example is ever formed: the vector
    of losses has Jacobian rows :math:`w_i g_i^\top`, and a product is one pass each way.

    Parameters
    ----------
    risk : Risk or torch.nn.Module
        A risk, or a model followed by `loss`, `data`, `parameters` and the options of `Risk`.
    loss, data, parameters, **options
        As in `Risk`, if `risk` is a model.

    Attributes
    ----------
    risk : Risk
    parameters : FlatParameters
        Names and places of the parameters; ``ravel`` and ``unravel``.
    space : VectorSpace
        Vectors of length n, in the dtype and on the device of the parameters.

    Raises
    ------
    ValueError
        At the first product, if the risk is not one finite, repeatable function (see `Risk`); or
        if `x` has another length or is on another device.
    TypeError
        If `x` is not a tensor, or has another dtype.

    Notes
    -----
    An example is an entry of the first axis of the losses. Where it has several terms (tokens,
    elements of a squared error), its loss is their weighted mean and its weight the sum of theirs,
    so that the risk is :math:`\sum_i w_i \ell_i / \sum_i w_i` all the same. With
    ``reduction="sum"`` nothing is divided. Weight decay of the risk has no part in it.

    References
    ----------
    Kunstner, Balles, Hennig (2019), Limitations of the empirical Fisher approximation.
    arXiv:1905.12558

    Examples
    --------
    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> _ = torch.nn.init.ones_(model.weight)
    >>> data = torch.eye(2), torch.tensor([[0.0], [3.0]])  # residuals 1 and -2, gradients 2 r x
    >>> GradientSecondMoment(model, torch.nn.MSELoss(), data) @ torch.eye(2)
    tensor([[2., 0.],
            [0., 8.]])
    """

    def _linearize(self, evaluation: Evaluation) -> Linearized:
        weighted = _by_example(evaluation.terms.weighted)
        weights = _by_example(evaluation.terms.weights).to(weighted.dtype)
        inverse = torch.where(weights == 0, 0.0, 1.0 / torch.where(weights == 0, 1.0, weights))
        outputs = [weighted] if weighted.requires_grad else []
        return _OuterProducts(Jacobian(evaluation.leaves, outputs), inverse)


def _by_example(terms: Tensor) -> Tensor:
    return terms.flatten(1).sum(1) if terms.ndim > 1 else terms


class _OuterProducts:
    """The sum of :math:`h_i h_i^\\top / w_i` of one chunk, with :math:`h_i = w_i g_i`."""

    def __init__(self, jacobian: Jacobian, inverse_weights: Tensor) -> None:
        self._jacobian, self._inverse_weights = jacobian, inverse_weights

    def __call__(self, blocks: Sequence[Tensor], chosen: Sequence[int]) -> Sequence[Tensor | None]:
        slopes = self._jacobian(blocks, chosen)
        scaled = [slope * self._inverse_weights for slope in slopes]
        return self._jacobian.transposed(scaled, chosen)


@dataclass(frozen=True)
class _Mean:
    fingerprint: Fingerprint
    vector: Tensor  # (n,)


class GradientCovariance(GradientSecondMoment):
    r"""The covariance :math:`\sum_i w_i (g_i - g)(g_i - g)^\top / \sum_i w_i` of the gradients.

    The second moment of the examples' gradients about their mean :math:`g = \sum_i w_i g_i /
    \sum_i w_i`, the gradient of the risk. See `GradientSecondMoment` for what an example is.

    Parameters
    ----------
    risk : Risk or torch.nn.Module
        A risk, or a model followed by `loss`, `data`, `parameters` and the options of `Risk`.
    loss, data, parameters, **options
        As in `Risk`, if `risk` is a model.

    Attributes
    ----------
    risk : Risk
    parameters : FlatParameters
    space : VectorSpace

    Raises
    ------
    ValueError, TypeError
        As `GradientSecondMoment`.

    Notes
    -----
    The mean takes one more pass over the data, at the first product and after every change. With
    ``reduction="sum"`` the matrix is the sum of the outer products, not divided.

    Examples
    --------
    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> _ = torch.nn.init.ones_(model.weight)
    >>> data = torch.eye(2), torch.tensor([[0.0], [3.0]])  # gradients (2, 0) and (0, -4)
    >>> GradientCovariance(model, torch.nn.MSELoss(), data) @ torch.eye(2)
    tensor([[1., 2.],
            [2., 4.]])
    """

    _mean: _Mean | None = None

    def release(self) -> None:
        """Free the graphs and the mean kept between products."""
        super().release()
        self._mean = None

    def _complete(self, total: Tensor, rows: Tensor, part: FlatParameters, totals: Totals) -> None:
        mean = self._present_mean()
        if part is not self.parameters:
            blocks = self.parameters.unravel(mean)
            mean = torch.cat([blocks[name].flatten() for name in part.names])
        mass = 1.0 if self.risk.divides else totals.weight
        total.addr_(rows.to(mean.dtype) @ mean, mean, alpha=-mass)

    def _present_mean(self) -> Tensor:
        fingerprint = self.risk.passes.fingerprint()
        if self._mean is None or self._mean.fingerprint != fingerprint:
            total, totals = summed_gradient(self.risk)
            self._mean = _Mean(fingerprint, total / (totals.weight or 1.0))
        return self._mean.vector
