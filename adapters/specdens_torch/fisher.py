"""The Fisher information matrix of a model, from targets drawn from its own predictions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from specdens import uniforms
from specdens.arguments import checked_count, checked_seed
from specdens_torch.evaluation import Evaluation
from specdens_torch.guards import Totals
from specdens_torch.jacobian import Jacobian
from specdens_torch.linearized import Linearized, RiskMatrix
from specdens_torch.parameters import FlatParameters
from specdens_torch.risk import Risk
from specdens_torch.selection import Selection
from specdens_torch.state import Fingerprint


class Fisher(RiskMatrix):
    r"""The sampled Fisher matrix :math:`\sum_i w_i \frac1S \sum_s g_{is} g_{is}^\top / \sum_i w_i`.

    :math:`g_{is}` is the gradient of the loss of term i, not multiplied by its weight, at the s-th
    target drawn from the model's own predictive distribution: softmax probabilities for
    cross-entropy, a normal distribution for the squared error, and so on. Its expectation is the
    Gauss-Newton matrix. True targets give nothing but the weights (with them in place of samples
    it would be `GradientSecondMoment`).

    Parameters
    ----------
    risk : Risk or torch.nn.Module
        A risk, or a model followed by `loss`, `data`, `parameters` and the options of `Risk`.
    loss, data, parameters
        As in `Risk`, if `risk` is a model.
    num_samples : int
        The number S of targets drawn for each term.
    seed : int
        Determines the samples, with the place of a term in the data: they are the same in every
        product and for every split into batches and over processes.
    **options
        As in `Risk`, if `risk` is a model.

    Attributes
    ----------
    risk : Risk
    num_samples, seed : int
    parameters : FlatParameters
        Names and places of the parameters; ``ravel`` and ``unravel``.
    space : VectorSpace
        Vectors of length n, in the dtype and on the device of the parameters.

    Raises
    ------
    ValueError
        If `num_samples` or `seed` is out of range, or the loss is the negative log-likelihood of
        no known distribution; and as in `GaussNewton`.
    TypeError
        If `x` is not a tensor or has another dtype.

    Notes
    -----
    Every term is a datum of its own, so that tokens and elements are sampled independently. Weight
    decay of the risk has no part in it.

    References
    ----------
    Martens (2020), New insights and perspectives on the natural gradient method, JMLR 21(146).
    arXiv:1412.1193

    Examples
    --------
    >>> model = torch.nn.Linear(1, 2, bias=False)
    >>> _ = torch.nn.init.zeros_(model.weight)  # probabilities 1/2, gradients +-(1/2, -1/2)
    >>> data = torch.ones(3, 1), torch.zeros(3, dtype=torch.int64)
    >>> Fisher(model, torch.nn.CrossEntropyLoss(), data) @ torch.eye(2)
    tensor([[ 0.2500, -0.2500],
            [-0.2500,  0.2500]])
    """

    def __init__(
        self,
        risk: Risk | nn.Module,
        loss: Any = None,
        data: Any = None,
        parameters: Selection = None,
        *,
        num_samples: int = 1,
        seed: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(risk, loss, data, parameters, **options)
        num_samples, seed = checked_count("num_samples", num_samples), checked_seed(seed)
        self.num_samples, self.seed = num_samples, seed
        self._first = 0  # place of this process's first term among those of all
        self._counted: tuple[Fingerprint, int, Totals] | None = None

    def product(self, x: Tensor, part: FlatParameters, chosen: Sequence[int]) -> Tensor:
        """Return the product with a diagonal block, see `RiskMatrix.product`."""
        if self.risk.processes is not None:
            first, _ = self.risk.places("terms", self._count)
            if first != self._first:
                self._first, self._kept = first, None
        return super().product(x, part, chosen)

    def _count(self) -> tuple[int, Totals]:
        """Return the number of terms in the data of this process."""
        fingerprint = self.risk.passes.fingerprint()
        if self._counted is None or self._counted[0] != fingerprint:
            terms = 0

            def add(evaluation: Evaluation) -> None:
                nonlocal terms
                terms += evaluation.terms.weights.numel()

            totals = self.risk.passes.sweep(add)
            self._counted = fingerprint, terms, totals
        return self._counted[1:]

    def _linearize(self, evaluation: Evaluation) -> Linearized:
        loss, outputs, targets = evaluation.loss, evaluation.outputs, evaluation.targets
        if loss.draws is None or loss.sampler is None or loss.resampled is None:
            msg = (
                f"loss={loss.name} is the negative log-likelihood of no known distribution, so no "
                "targets can be drawn; GaussNewton needs none, GradientSecondMoment takes the true "
                "ones."
            )
            raise ValueError(msg)
        shape = loss.draws(outputs, targets)
        terms = evaluation.terms.weights
        place = self._first + evaluation.position
        start = place * shape.numel() // max(1, terms.numel())
        sampled: list[Tensor] = []
        for sample in range(self.num_samples):
            numbers = uniforms(self.seed, sample, start, shape.numel())
            drawn = loss.sampler(outputs, targets, torch.from_numpy(numbers).reshape(shape))
            losses = loss.resampled(outputs, targets, drawn)
            if losses.requires_grad:
                sampled.append(losses.reshape(terms.shape))
        return _WeightedOuterProducts(
            Jacobian(evaluation.leaves, sampled), terms / self.num_samples
        )


class _WeightedOuterProducts:
    """The sum of :math:`w_t g_t g_t^\\top` over terms and samples, for one chunk."""

    def __init__(self, jacobian: Jacobian, weights: Tensor) -> None:
        self._jacobian, self._weights = jacobian, weights

    def __call__(self, blocks: Sequence[Tensor], chosen: Sequence[int]) -> Sequence[Tensor | None]:
        slopes = self._jacobian(blocks, chosen)
        return self._jacobian.transposed([self._weights * slope for slope in slopes], chosen)
