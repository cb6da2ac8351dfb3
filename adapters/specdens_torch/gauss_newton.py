"""The Gauss-Newton matrix of a risk, and the residual that makes it the Hessian."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from specdens_torch.evaluation import Evaluation, total_gradient
from specdens_torch.hessian import GradientGraph
from specdens_torch.jacobian import Jacobian
from specdens_torch.linearized import Linearized, RiskMatrix
from specdens_torch.sampling import SoftmaxRows


class GaussNewton(RiskMatrix):
    r"""The Gauss-Newton matrix :math:`G = \sum_i w_i J_i^\top A_i J_i / \sum_i w_i` of a risk.

    :math:`J_i` is the Jacobian of the model's outputs for example i, :math:`A_i` the Hessian of
    its loss with respect to these outputs. For a loss that is convex in the outputs :math:`G` is
    positive semidefinite; for softmax cross-entropy it is the Fisher information. It is exact for
    any twice differentiable loss, by automatic differentiation; a chunk of data is evaluated once
    for all products.

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
        If `x` is not a tensor or has another dtype; or, at the first product, if the loss depends
        on the parameters other than through tensors in the model's outputs.

    Notes
    -----
    All tensors of the outputs that the loss depends on count as outputs, whatever structure holds
    them. Weight decay of the risk adds its multiple of the identity.

    References
    ----------
    Schraudolph (2002), Fast curvature matrix-vector products for second-order gradient descent,
    Neural Computation 14(7). doi:10.1162/08997660260028683

    Examples
    --------
    >>> inputs = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> matrix = GaussNewton(model, torch.nn.MSELoss(), (inputs, torch.ones(2, 1)))
    >>> matrix @ torch.eye(2)  # of a linear model it is the Hessian
    tensor([[1., 0.],
            [0., 4.]])
    """

    _cuts = True
    _decays = True

    def _linearize(self, evaluation: Evaluation) -> Linearized:
        if evaluation.loss.softmax is not None and evaluation.cut is not None:
            rows = evaluation.loss.softmax(evaluation.outputs, evaluation.targets)
            logits = evaluation.cut.behind(rows.logits)
            return _Sandwich(Jacobian(evaluation.leaves, logits), SoftmaxCurvature(rows))
        attached, leaves, gradients = loss_gradients(evaluation, create_graph=True)
        jacobian = Jacobian(evaluation.leaves, attached)
        return _Sandwich(jacobian, GradientGraph(leaves, gradients))


class SoftmaxCurvature:
    r"""The Hessian :math:`\kappa (\mathrm{diag}\,p - p p^\top)` of cross-entropy in its logits.

    With a large vocabulary these are the largest tensors there are: one is kept, a product needs
    another beside its argument.
    """

    def __init__(self, rows: SoftmaxRows) -> None:
        logits, self._axis, factor = rows
        self._probabilities = torch.softmax(logits.detach(), self._axis)
        self._factor = factor.to(self._probabilities).unsqueeze(self._axis)

    def __call__(self, blocks: Sequence[Tensor], chosen: Sequence[int]) -> list[Tensor]:
        """Return the products with tensors like the logits."""
        products = []
        for block in blocks:  # which may be a view of a vector of the caller's
            means = (block * self._probabilities).sum(self._axis, keepdim=True)
            products.append((block - means).mul_(self._probabilities).mul_(self._factor))
        return products


class _Sandwich:
    """:math:`J^\\top A J` of one chunk."""

    def __init__(self, jacobian: Jacobian, middle: Linearized) -> None:
        self._jacobian, self._middle = jacobian, middle

    def __call__(self, blocks: Sequence[Tensor], chosen: Sequence[int]) -> Sequence[Tensor | None]:
        outputs = self._jacobian(blocks, chosen)
        curved = self._middle(outputs, range(len(outputs)))
        return self._jacobian.transposed(curved, chosen)


class Residual(RiskMatrix):
    r"""The Hessian less the Gauss-Newton matrix, :math:`\sum_k \partial_k \ell \, \nabla^2 f_k`.

    The part of the Hessian that comes from the curvature of the model's outputs f, weighted by
    the derivative of the loss in each (also called H or E by Papyan, and nonlinear modeling
    error), in one pass: the gradient of the outputs is recorded with the derivative of the loss
    held fixed. Weight decay has no part in it.

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
        As `GaussNewton`.

    References
    ----------
    Papyan (2019), The full spectrum of deepnet Hessians at scale. arXiv:1811.07062

    Examples
    --------
    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> data = torch.eye(2), torch.ones(2, 1)
    >>> Residual(model, torch.nn.MSELoss(), data) @ torch.ones(2)  # linear models have none
    tensor([0., 0.])
    """

    _cuts = True

    def _linearize(self, evaluation: Evaluation) -> Linearized:
        attached, _, slopes = loss_gradients(evaluation, create_graph=False)
        live = [(f, slope) for f, slope in zip(attached, slopes, strict=True) if slope is not None]
        gradients: Sequence[Tensor | None] = [None] * len(evaluation.leaves)
        if live:
            outputs, weights = zip(*live, strict=True)
            gradients = torch.autograd.grad(
                outputs, evaluation.leaves, weights, create_graph=True, allow_unused=True
            )
        return GradientGraph(evaluation.leaves, gradients)


def loss_gradients(
    evaluation: Evaluation, *, create_graph: bool
) -> tuple[list[Tensor], list[Tensor], list[Tensor | None]]:
    """Return outputs in the model's graph, the loss's copies of them, and the gradients in these.

    Raises
    ------
    TypeError
        If the loss does not depend on the outputs alone.
    """
    cut = evaluation.cut
    assert cut is not None, "the matrix did not ask for a cut"
    inputs = (*cut.leaves, *evaluation.leaves)
    gradients = total_gradient(evaluation.terms.weighted, inputs, create_graph=create_graph)
    if any(g is not None for g in gradients[len(cut.leaves) :]):
        msg = (
            "the loss depends on the parameters other than through tensors in the model's outputs "
            f"of type {type(evaluation.outputs).__qualname__}; return a tensor, or a tuple, list "
            "or mapping of tensors."
        )
        raise TypeError(msg)
    return list(cut.attached), list(cut.leaves), list(gradients[: len(cut.leaves)])
