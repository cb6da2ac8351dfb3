"""Passes over the data of a risk: chunks, checks before the first use, and repeated sums."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from specdens_torch.data import EMPTY, DataSource, regroup
from specdens_torch.evaluation import (
    Evaluation,
    Evaluator,
    RunningTotals,
    totals_of,
    twice_differentiable,
)
from specdens_torch.guards import (
    Rounding,
    Totals,
    check_finite,
    check_graph,
    check_modules,
    check_repeats,
    check_same_data,
    check_uncoupled,
)
from specdens_torch.losses import TermLoss
from specdens_torch.memory import PILOT_EXAMPLES, Plan, SavedBytes, WrittenBytes, fit_plan
from specdens_torch.parameters import FlatParameters
from specdens_torch.processes import Processes, Share
from specdens_torch.state import Fingerprint, RandomState, autocast_settings, left_as_it_was
from specdens_torch.structures import Batch, cut, join, move, num_elements, num_examples, signature

# Passes repeat their random numbers; the first look uses others, so that random data show.
_PASS_SEED, _SURVEY_SEED = 0, 1


class Passes:
    """Evaluates a model and its loss on all data, chunk by chunk, as often as a matrix needs it.

    Parameters
    ----------
    model : torch.nn.Module
    loss : TermLoss
    parameters : FlatParameters
    source : DataSource
    memory_budget : int
        Bytes of saved activations, see `Risk`.
    regroup : bool
        Whether batches may be cut and joined.
    processes : Processes, optional
        Those that hold the other data of the risk.
    batch_statistics : bool
        Whether batch norm may couple the examples of a batch, see `Risk`.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: TermLoss,
        parameters: FlatParameters,
        source: DataSource,
        memory_budget: int,
        regroup: bool,
        processes: Processes | None = None,
        batch_statistics: bool = False,
    ) -> None:
        self._batch_statistics = batch_statistics
        self._model, self._loss, self._parameters = model, loss, parameters
        self._source, self._memory_budget, self._regroup = source, memory_budget, regroup
        # A model may be spread over several devices; its inputs go where it begins.
        self._devices = list(dict.fromkeys(p.device for p in model.parameters()))
        self._device = self._devices[0]
        self.num_chunks: int | None = None  # of the last complete pass
        self._generation = 0
        self._planned: tuple[Any, Plan] | None = None
        self._rounding = Rounding(0.0, 0.0)
        self._first_pass: tuple[Fingerprint, Totals] | None = None
        self._processes, self._combining = processes, False
        self._epoch = 0  # what one process must compute anew, all must
        self._combined_at: Fingerprint | None = None

    @property
    def known_plan(self) -> Plan | None:
        """The plan, if it was made already."""
        return self._planned[1] if self._planned else None

    def refresh(self) -> None:
        """Forget what is known about the data; no fingerprint from before is valid any more."""
        self._generation += 1
        self._planned = self._first_pass = None

    def restricted(self, parameters: FlatParameters) -> Passes:
        """Return passes over the same data with other parameters that vary."""
        part = copy.copy(self)
        part._parameters, part.num_chunks = parameters, None
        part.refresh()
        return part

    def fingerprint(self) -> Fingerprint:
        """Return what tells whether anything that a kept graph depends on has changed since."""
        state = [*self._model.parameters(), *self._model.buffers()]
        watched = [*self._source.tensors, *self._loss.tensors]
        settings = (self._epoch, *self._mode(), *autocast_settings(self._device))
        return Fingerprint.of(state, watched, settings)

    def combined(self, facts: Sequence[str], compute: Callable[[], Share]) -> Share:
        """Return what `compute` makes of the data of this process, added up over all processes.

        Raises
        ------
        ValueError
            If the risk of all is not finite, or there are no data at all; see `Processes.combined`.
        """
        if self._processes is None:
            return compute()
        now: list[Fingerprint] = []

        def changed() -> bool:
            now.append(self.fingerprint())
            return now[0] != self._combined_at

        facts = [*facts, f"autocast: {autocast_settings(self._device)}"]
        model = self._model
        state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        state |= {f"{self._loss.name}[{i}]": t for i, t in enumerate(self._loss.tensors)}
        self._combining = True
        try:
            share, mixed = self._processes.combined(compute, facts, state, changed)
        finally:
            self._combining = False
        self._combined_at = now[0]
        self._epoch += mixed
        if share.totals.examples == 0:
            raise ValueError(EMPTY)
        check_finite(share.totals, self._loss.divides)
        return share

    def forget_combined(self) -> None:
        """Have all processes compute anew what they keep, as this one will."""
        self._combined_at = None

    def plan(self) -> Plan:
        """Return how the data are cut into chunks; the first call checks the risk (see `Risk`).

        Raises
        ------
        ValueError
            If the risk fails one of the checks.
        """
        places = tuple((id(t), t.shape) for t in self._source.tensors)
        key = (*self._mode(), places)
        if self._planned is None or self._planned[0] != key:
            self._planned = self._first_pass = None
            try:
                varying = self._parameters.tensors.values()
                check_modules(self._model, varying, batch_statistics=self._batch_statistics)
                plan = self._probe()
                self._planned = key, self._survey(plan)
            except Exception:
                if self._processes is None or self._combining:
                    raise
                return self._no_plan()  # it will be raised where all processes hear of it
        return self._planned[1]

    def _no_plan(self) -> Plan:
        return Plan(0.0, 0.0, self._memory_budget, 1)

    def sweep(
        self, visit: Callable[[Evaluation], None] | None = None, *, cuts: bool = False
    ) -> Totals:
        """Evaluate all chunks once, hand each to `visit`, and return what they add up to.

        With `cuts`, outputs and loss are cut apart, see `Evaluator`.

        Raises
        ------
        ValueError
            If the risk is not finite, or the data are not those of the first pass.
        """
        if self._processes is not None and not self._combining:
            msg = (
                "a pass over the data of one process alone, for a risk with process_group; use "
                "risk.combined, which adds up what all processes find."
            )
            raise ValueError(msg)
        plan = self.plan()
        with self._undisturbed(_PASS_SEED):
            totals = self._run(plan, visit, cuts)
        if not self._source.in_memory:
            self._compare(totals)
        # The mean over the data of all processes may exist where that over these does not.
        check_finite(totals, self._loss.divides and self._processes is None)
        self.num_chunks = totals.chunks
        return totals

    def _run(
        self, plan: Plan, visit: Callable[[Evaluation], None] | None, cuts: bool = False
    ) -> Totals:
        evaluator = Evaluator(self._model, self._loss, self._parameters, cuts=cuts)
        running = RunningTotals()
        for batch in self._chunks(plan):
            # No name holds the evaluation here, so that a visitor can free what it needs no more.
            if visit is None:
                self._counted(evaluator, batch, running)
            else:
                visit(self._counted(evaluator, batch, running))
        return running.result()

    def _counted(self, evaluator: Evaluator, batch: Batch, running: RunningTotals) -> Evaluation:
        evaluation = self._evaluate(evaluator, batch)
        running.add(batch, evaluation.terms)
        return evaluation

    def _evaluate(self, evaluator: Evaluator, batch: Batch) -> Evaluation:
        try:
            return evaluator(batch)
        except Exception as error:
            if self._regroup:
                note = (
                    f"specdens had cut and joined batches to a chunk of {num_examples(batch)} "
                    "examples; Risk(..., regroup=False) takes the batches as data gives them."
                )
                error.add_note(note)
            raise

    def _chunks(self, plan: Plan) -> Iterator[Batch]:
        batches = (batch for batch in self._source if num_examples(batch) != 0)
        chunks = regroup(batches, plan.limit) if self._regroup else batches
        return (self._moved(chunk) for chunk in chunks)

    def _probe(self) -> Plan:
        """Measure what linearizing one or two examples saves, then check the risk on a few more."""
        with self._undisturbed(_SURVEY_SEED):
            first = self._first()
            if first is None:
                return self._no_plan()
            splits = self._regroup and num_examples(first) is not None
            pilots = [cut(first, 0, n) for n in (2, 1)] if splits else [first]
            sizes = [(num_elements(p), self._saved_by(self._moved(p))) for p in pilots]
            parameters = self._parameters.tensors.values()
            own_bytes = sum(p.numel() * p.element_size() for p in parameters)
            plan = fit_plan(sizes, self._memory_budget, self._device, own_bytes)
            if splits:
                first = cut(first, 0, max(2, min(PILOT_EXAMPLES, plan.limit(first))))
            self._check(self._moved(first), splits)
        return plan

    def _saved_by(self, batch: Batch) -> int:
        try:
            return self._counted_by(SavedBytes, batch)
        except RuntimeError as error:
            if "saved tensor hooks" not in str(error):
                raise
        return self._counted_by(WrittenBytes, batch)  # a model with transforms of torch.func

    def _counted_by(self, kind: type[SavedBytes], batch: Batch) -> int:
        evaluator = Evaluator(self._model, self._loss, self._parameters)
        counter = kind(evaluator.tensors)
        with counter.counting():
            evaluation = self._evaluate(evaluator, batch)
            check_graph(evaluation.terms.weighted)
            evaluation.gradients(create_graph=True)
        return counter.total

    def _check(self, batch: Batch, splits: bool) -> None:
        """Check that losses repeat, draw nothing, and do not depend on each other."""
        evaluator = Evaluator(self._model, self._loss, self._parameters)
        before = RandomState.now(self._devices)
        terms = self._evaluate(evaluator, batch).terms
        drew = not before.same_as(RandomState.now(self._devices))
        rounding = self._rounding = self._rounding_of(terms.weighted)
        whole = totals_of(batch, terms)
        check_finite(whole, divides=False)
        again = totals_of(batch, self._evaluate(evaluator, batch).terms)
        training = any(module.training for module in self._model.modules())
        check_repeats(whole, again, rounding, drew=drew, training=training)
        examples = num_examples(batch)
        if splits and examples is not None and examples > 1:
            parts = (cut(batch, 0, examples // 2), cut(batch, examples // 2, examples))
            halves = [totals_of(part, self._evaluate(evaluator, part).terms) for part in parts]
            check_uncoupled(whole, halves[0] + halves[1], rounding)

    def _first(self) -> Batch | None:
        """Return the first batch, with at least two examples where two batches fit together.

        None if there are no data, which one of many processes may be without.
        """
        batches = (batch for batch in self._source if num_examples(batch) != 0)
        first = next(batches, None)
        if first is None and self._processes is not None:
            return None
        if first is None:
            raise ValueError(EMPTY)
        if self._regroup and num_examples(first) == 1:
            second = next(batches, None)
            if second is not None and signature(first) == signature(second):
                first = join([first, second])
        return first

    def _survey(self, plan: Plan) -> Plan:
        """Complete `plan` with the size of the data, from a pass unless they are in memory."""
        if self._source.in_memory:
            sizes = [(num_examples(batch), num_elements(batch)) for batch in self._source]
            examples = sum(1 if length is None else length for length, _ in sizes)
            return replace(plan, examples=examples, elements=sum(size for _, size in sizes))
        with self._undisturbed(_SURVEY_SEED):
            totals = self._run(plan, None)
        self._first_pass = self.fingerprint(), totals
        return replace(plan, examples=totals.examples, elements=totals.elements)

    def _compare(self, totals: Totals) -> None:
        """Check a pass against the one before; losses only if the parameters are the same."""
        fingerprint = self.fingerprint()
        if self._first_pass is not None:
            before, first = self._first_pass
            same = before == fingerprint
            check_same_data(first, totals, self._rounding, same_parameters=same)
        self._first_pass = fingerprint, totals

    @contextmanager
    def _undisturbed(self, seed: int) -> Iterator[None]:
        """Evaluate with gradients, whatever mode the caller is in, and leave no trace."""
        preserved = left_as_it_was(self._model, self._devices, self._source.generators, seed)
        with twice_differentiable(self._model), torch.enable_grad(), preserved:
            yield

    def _moved(self, batch: Batch) -> Batch:
        return Batch(move(batch.inputs, self._device), move(batch.targets, self._device))

    def _mode(self) -> tuple[Any, ...]:
        return self._generation, tuple(module.training for module in self._model.modules())

    def _rounding_of(self, losses: Tensor) -> Rounding:
        """Return the rounding of the losses, that of the coarsest tensor behind them."""
        dtypes = {p.dtype for p in self._model.parameters() if p.dtype.is_floating_point}
        if torch.is_autocast_enabled(self._device.type):
            dtypes.add(torch.get_autocast_dtype(self._device.type))
        return Rounding.of({losses.dtype, *dtypes}, self._device)
