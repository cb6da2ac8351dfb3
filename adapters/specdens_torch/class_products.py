"""Rows of softmax probabilities by class, and passes over the data in which classes come apart."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from specdens_torch.data import regroup
from specdens_torch.evaluation import Evaluation
from specdens_torch.guards import Totals
from specdens_torch.jacobian import Jacobian
from specdens_torch.language import NEXT_TOKEN_LAW, TOKEN_LAW, following, labels_of
from specdens_torch.losses import TermLoss
from specdens_torch.memory import Plan
from specdens_torch.passes import Passes
from specdens_torch.sampling import SoftmaxRows
from specdens_torch.state import Fingerprint, wide_dtype
from specdens_torch.structures import Batch, map_tensors, num_examples, tensors_in


def check_softmax(loss: TermLoss) -> Callable[[Any, Any], SoftmaxRows]:
    """Return what gives the logits of a softmax cross-entropy, and refuse other losses.

    Raises
    ------
    ValueError
        If `loss` is another.
    """
    if loss.softmax is None:
        msg = (
            f"loss={loss.name} is no softmax cross-entropy, so there are no class "
            "probabilities; use CrossEntropyLoss (not with label smoothing and class weights "
            "of zero), next_token_loss or token_loss."
        )
        raise ValueError(msg)
    return loss.softmax


@dataclass(frozen=True)
class Memberships:
    """How much each row belongs to each class: y_ic, rows of which add up to 1."""

    labels: Tensor | None  # (n,) int64, if every row is of one class
    shares: Tensor | None  # (n, C) otherwise
    num_classes: int

    def gathered(self, table: Tensor) -> Tensor:
        """Return the sum over c of y_ic times row c of a table (C, m), (n, m)."""
        if self.labels is not None:
            return table[self.labels]
        assert self.shares is not None
        return self.shares @ table

    def summed(self, rows: Tensor) -> Tensor:
        """Return the sum over i of y_ic times row i, (C, m)."""
        if self.labels is not None and rows.device.type == "cpu":
            return rows.new_zeros(self.num_classes, rows.shape[1]).index_add_(0, self.labels, rows)
        # Elsewhere atomic additions would not repeat to the bit.
        return self._dense(rows).t() @ rows

    def of_class(self, number: int, like: Tensor) -> Tensor:
        """Return the column y_ic of one class, (n,)."""
        if self.labels is not None:
            return (self.labels == number).to(like)
        assert self.shares is not None
        return self.shares[:, number]

    def present(self, factor: Tensor) -> list[int]:
        """Return the classes that rows with a factor other than zero belong to."""
        live = factor != 0
        if self.labels is not None:
            return list(torch.unique(self.labels[live]).tolist())
        assert self.shares is not None
        return list(torch.nonzero((self.shares[live] != 0).any(0)).flatten().tolist())

    def _dense(self, like: Tensor) -> Tensor:
        if self.labels is None:
            assert self.shares is not None
            return self.shares
        return torch.nn.functional.one_hot(self.labels, self.num_classes).to(like)


@dataclass(frozen=True)
class ClassRows:
    r"""The logits of one chunk as rows, with all that a class structure weighs them by.

    With s the slopes along a vector, :math:`s_{ic'} = h_{ic'}^\top v` for :math:`h_{ic'} = d_{ic'}
    J_i^\top (p_i - e_{c'})`, where d is 1 and a pair weighs :math:`\kappa_i y_{ic} p_{ic'}`, or d
    is :math:`\sqrt{p_{ic'}}` and it weighs :math:`\kappa_i y_{ic}`.
    """

    probabilities: Tensor  # (n, C), in double precision
    factor: Tensor  # (n,) kappa
    memberships: Memberships
    uniform: bool
    like: Tensor  # the logits' dtype and shape with the classes last, of one number's memory
    axis: int

    @classmethod
    def of(cls, evaluation: Evaluation, uniform: bool) -> tuple[ClassRows, tuple[Tensor, ...]]:
        """Return the rows, and the logits in the model's graph, if they depend on parameters.

        Raises
        ------
        ValueError
            If the loss is not a softmax cross-entropy, or its targets are no classes.
        """
        law = check_softmax(evaluation.loss)
        assert evaluation.cut is not None
        softmax = law(evaluation.outputs, evaluation.targets)
        logits = softmax.logits.detach().movedim(softmax.axis, -1)
        wide = wide_dtype(logits.device)
        number = logits.shape[-1]
        probabilities = torch.softmax(logits.reshape(-1, number), -1, dtype=wide)
        factor = softmax.factor.detach().reshape(-1).to(probabilities)
        memberships = _memberships(evaluation, softmax.axis, probabilities, factor)
        like = torch.zeros((), dtype=logits.dtype, device=logits.device).expand(logits.shape)
        rows = cls(probabilities, factor, memberships, uniform, like, softmax.axis)
        return rows, evaluation.cut.behind(softmax.logits)

    @property
    def shares(self) -> Tensor:
        """The part of a pair's weight that depends on i and c', (n, C)."""
        return (self.factor[:, None]).expand_as(self.probabilities) * (
            1.0 if self.uniform else self.probabilities
        )

    def flat(self, logits: Tensor) -> Tensor:
        """Return a tensor like the logits as rows in double precision, (n, C)."""
        rows = logits.movedim(self.axis, -1).reshape(self.probabilities.shape)
        return rows.to(self.probabilities)

    @property
    def num_classes(self) -> int:
        """Number C of classes."""
        return self.probabilities.shape[1]

    def of_pair(self, c: int, other: int) -> Tensor:
        """Return coefficients: the weights of one pair, (n, C)."""
        result = torch.zeros_like(self.probabilities)
        result[:, other] = self.shares[:, other] * self.memberships.of_class(c, result)
        return result

    def of_others(self, c: int) -> Tensor:
        """Return coefficients: the weights of class c with all others, (n, C)."""
        result = self.shares * self.memberships.of_class(c, self.shares)[:, None]
        result[:, c] = 0.0
        return result

    def pair_sums(self) -> Tensor:
        """Return the weights of all pairs, not divided by anything, (C, C)."""
        return self.memberships.summed(self.shares)

    def slopes(self, tangents: Tensor) -> Tensor:
        """Return s of the derivatives of the logits along a vector, (n, C)."""
        means = (self.probabilities * tangents).sum(1, keepdim=True)
        return self._scaled(means - tangents)

    def pair_products(self, tangents: Tensor) -> Tensor:
        """Return the weighted sums of the slopes by pair, (C, C)."""
        return self.memberships.summed(self.shares * self.slopes(tangents))

    def cotangents(self, coefficients: Tensor) -> Tensor:
        r"""Return u, like the logits, with :math:`J^\top u = \sum_{ic'} b_{ic'} h_{ic'}`."""
        scaled = self._scaled(coefficients)
        rows = scaled.sum(1, keepdim=True) * self.probabilities - scaled
        return rows.reshape(self.like.shape).to(self.like).movedim(-1, self.axis)

    def spread(self, table: Tensor) -> Tensor:
        """Return coefficients: the weights of i and c' times the sum over c of y_ic b_cc'."""
        return self.shares * self.memberships.gathered(table.to(self.probabilities))

    def _scaled(self, rows: Tensor) -> Tensor:
        return rows * self.probabilities.sqrt() if self.uniform else rows


def _memberships(
    evaluation: Evaluation, axis: int, probabilities: Tensor, factor: Tensor
) -> Memberships:
    """Return the classes of a chunk's targets, whatever for rows that count nothing."""
    number, targets = probabilities.shape[1], evaluation.targets
    law = evaluation.loss.softmax
    if law is NEXT_TOKEN_LAW.softmax or law is TOKEN_LAW.softmax:
        own = labels_of(targets)
        targets = following(own) if law is NEXT_TOKEN_LAW.softmax else own
    if targets.is_floating_point():
        shares = targets.detach().movedim(axis, -1).reshape(-1, number).to(probabilities)
        sums = shares.sum(1, keepdim=True)
        if bool((shares[factor != 0] < 0).any()) or bool((sums[factor != 0] <= 0).any()):
            msg = (
                "targets has rows of class probabilities that are negative or add up to zero; "
                "expected probabilities, so that every example belongs to some classes."
            )
            raise ValueError(msg)
        return Memberships(None, shares / sums.where(sums > 0, 1.0), number)
    labels = targets.detach().reshape(-1).long()
    return Memberships(labels.where(factor != 0, 0), None, number)


@dataclass(frozen=True)
class LinearizedRows:
    """The rows of one chunk with the Jacobian of their logits, for many products."""

    rows: ClassRows
    jacobian: Jacobian

    @classmethod
    def of(
        cls, evaluation: Evaluation, rows: ClassRows, logits: tuple[Tensor, ...]
    ) -> LinearizedRows:
        """Linearize a chunk."""
        return cls(rows, Jacobian(evaluation.leaves, logits))

    def tangents(self, blocks: Sequence[Tensor]) -> Tensor:
        """Return the derivatives of the logits along a vector, (n, C)."""
        found = self.jacobian(blocks, range(len(blocks)))
        return self.rows.flat(found[0] if found else self.rows.like.movedim(-1, self.rows.axis))

    def transposed(self, coefficients: Tensor, count: int) -> Sequence[Tensor | None]:
        r"""Return :math:`\sum_{ic'} b_{ic'} h_{ic'}` by parameter, of which there are `count`."""
        cotangents = [self.rows.cotangents(coefficients)] * len(self.jacobian.rows)
        return self.jacobian.transposed(cotangents, range(count))


@dataclass(frozen=True)
class KeptRows:
    """The linearized chunks of all data, kept between products."""

    fingerprint: Fingerprint
    chunks: list[LinearizedRows]
    totals: Totals


class ClassPasses(Passes):
    """Passes in whose chunks all examples are of one class, where that can be arranged.

    A product with one class's examples then costs one pass back through these alone. Data are
    sorted within windows that take an eighth of the memory budget. Soft labels, several labels for
    an example, and batches that must not be regrouped leave the chunks as they are.
    """

    @classmethod
    def like(cls, passes: Passes) -> ClassPasses:
        """Return such passes over the data of others, which are checked already."""
        passes.plan()
        own = cls.__new__(cls)
        vars(own).update(vars(passes))
        return own

    def _chunks(self, plan: Plan) -> Iterator[Batch]:
        if not self._regroup:
            yield from super()._chunks(plan)
            return
        batches = (batch for batch in self._source if num_examples(batch) != 0)
        for window in regroup(batches, lambda batch: self._window(plan, batch)):
            for piece in _by_class(window):
                for chunk in regroup([piece], plan.limit):
                    yield self._moved(chunk)

    def _window(self, plan: Plan, batch: Batch) -> int:
        held = sum(t.numel() * t.element_size() for t in tensors_in(batch))
        each = max(1, held // max(1, num_examples(batch) or 1))
        return max(plan.limit(batch), self._memory_budget // 8 // each)


def _by_class(batch: Batch) -> Iterator[Batch]:
    """Yield the examples of each class, or the batch as it is."""
    labels: Any = batch.targets
    single = isinstance(labels, Tensor) and labels.ndim == 1 and not labels.is_floating_point()
    if not single or num_examples(batch) is None:
        yield batch
        return
    order = torch.argsort(labels, stable=True)
    _, counts = torch.unique(labels, return_counts=True)
    for places in torch.split(order, counts.tolist()):
        yield map_tensors(_taker(places), batch)


def _taker(places: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda tensor: tensor[places.to(tensor.device)]
