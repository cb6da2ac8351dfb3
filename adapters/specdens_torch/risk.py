"""The risk of a model on data: a sum of losses over a sum of weights, at the present parameters."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from specdens.arguments import checked_count
from specdens_torch.data import DataSource
from specdens_torch.guards import Totals, check_fixed_batches
from specdens_torch.losses import as_term_loss
from specdens_torch.memory import default_memory_budget
from specdens_torch.parameters import FlatParameters
from specdens_torch.passes import Passes
from specdens_torch.processes import Processes, Share, own_model
from specdens_torch.selection import Selection


class Risk:
    r"""The risk :math:`L(\theta) = \sum_i w_i \ell_i(\theta) / \sum_i w_i` of a model on data.

    Nothing is computed here. Matrices of the risk (`Hessian`, ...), `gradient` and `risk_value`
    always refer to the parameters that the model has when they are used. The model is left as it
    was: parameters, ``.grad``, buffers, training flags, attributes and the global random
    generators.

    Parameters
    ----------
    model : torch.nn.Module
    loss : callable
        One of torch's losses as module, function or `functools.partial` of a function, with the
        meaning it has in torch on all data as one batch, ``reduction`` included (``"none"`` is
        read as the mean). Or a function ``loss(outputs, targets)`` that returns one loss per
        example or term (a tensor of any shape but 0-d), or a pair ``(losses, weights)`` of equal
        shapes with the losses not yet weighted, as `next_token_loss` and `token_loss` do. Losses of
        torch take outputs that carry a tensor as ``logits``, too.
    data : pair, list of pairs, DataLoader, or other iterable
        ``(inputs, targets)``, each a tensor, a tuple or list (positional arguments of the model),
        or a mapping (its keyword arguments), examples along the first axis. A tuple is one pair, a
        mapping with ``"labels"`` stands for (everything else, labels); anything else is iterated
        over, in every pass, and must give the same examples in any order.
    parameters : str, module, tensor, or several of these, optional
        The parameters that vary: names, glob patterns, submodules or parameters, frozen or not.
        By default those with ``requires_grad``. See `FlatParameters`.
    memory_budget : int
        Bytes for saved activations; by default 1 GiB, or an eighth of a graphics processor's. If
        the linearized graphs of all chunks of the data fit, a matrix keeps them between products;
        otherwise one chunk at a time must fit (but a chunk has at least one example). As much
        again bounds how many columns of a product a graphics processor computes at once.
    regroup : bool
        Whether batches may be cut and joined into chunks that compute fast. False keeps the batches
        that `data` gives, for losses that couple the examples of a batch on purpose.
    weight_decay : float
        Adds ``weight_decay / 2`` times the sum of squares of the selected parameters to the risk,
        as torch's optimizers do with the argument of that name. It is a part of the value, the
        gradient, the Hessian and the Gauss-Newton matrix, not of the moments of the examples'
        gradients.
    accumulate : torch.dtype, optional
        The dtype that products and gradients of the chunks are added up in, ``torch.float64``
        for instance, while the model computes in its own. By default that of the parameters, in
        half precision float32.
    process_group : ProcessGroup or "world", optional
        Processes of `torch.distributed` that each hold a part of the data, of any size. All must
        call the same operations, in which they add up what each finds in its own part: values,
        gradients and products are those of all data, the same on every process. None means this
        process alone, whatever the default group is.
    batch_statistics : bool
        Whether batch-norm layers in train mode normalize with the mean and variance of each batch
        that `data` gives, which depend on the parameters and are differentiated. The risk is then
        that of this fixed split into batches, which are never regrouped; data that shuffle are
        refused. By default such layers are refused, and ``model.eval()`` makes them use their
        running statistics, which are constants. Neither changes the running statistics.

    Attributes
    ----------
    parameters : FlatParameters
        Names and places of the parameters that vary.
    divides : bool
        Whether the sum of losses is divided by the sum of weights: False for ``reduction="sum"``.
    accumulation_dtype : torch.dtype
        What sums over the data are accumulated in.
    source : DataSource
        The data, as batches of inputs and targets.
    processes : Processes or None
        The rank of this process and the number of all, with a process group.

    Raises
    ------
    TypeError
        If `model` is not a module, `loss` not callable, or `data` is a one-shot iterator, a data
        set of single examples, or not made of pairs.
    ValueError
        If `parameters` selects nothing, `data` is empty, or `loss` has no meaning term by term.
        When the risk is first used: if the model is in a mode in which the risk is not one fixed
        function (batch norm in train mode, dropout), if data or losses differ between two passes,
        if the loss couples the examples of a batch, or if the risk is not finite. Each says what
        to do. With a process group also if parameters, buffers or settings differ between the
        processes.
    RuntimeError
        If an operation fails on another process, naming it.

    Examples
    --------
    >>> from specdens_torch import gradient, risk_value
    >>> model = nn.Linear(2, 1, bias=False)
    >>> _ = nn.init.ones_(model.weight)
    >>> inputs, targets = torch.tensor([[1.0, 2.0], [0.0, 1.0]]), torch.tensor([[1.0], [1.0]])
    >>> risk = Risk(model, nn.MSELoss(), (inputs, targets))
    >>> risk_value(risk)
    2.0
    >>> gradient(risk)
    tensor([2., 4.])
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Any,
        data: Any,
        parameters: Selection = None,
        *,
        memory_budget: int | None = None,
        regroup: bool = True,
        weight_decay: float = 0.0,
        accumulate: torch.dtype | None = None,
        process_group: Any = None,
        batch_statistics: bool = False,
    ) -> None:
        model = own_model(model, process_group)
        self.parameters = FlatParameters(model, parameters)
        self.model = model
        self.weight_decay = _checked_decay(weight_decay)
        self.accumulation_dtype: torch.dtype = self._checked_accumulation(accumulate)
        if memory_budget is None:
            memory_budget = default_memory_budget(self.parameters.space.device)
        self.memory_budget = checked_count("memory_budget", memory_budget, advice="it counts bytes")
        self.batch_statistics = bool(batch_statistics)
        if self.batch_statistics:
            check_fixed_batches(data)
        self.regroup = bool(regroup) and not self.batch_statistics
        self._loss = as_term_loss(loss)
        self.processes: Processes | None = None
        if process_group is not None:
            self.processes = Processes(process_group, self.parameters.space.device)
            if isinstance(data, list) and not data:
                data = _NoBatches()  # there are others who have some
        self.source = DataSource(data)
        self.passes = Passes(
            model,
            self._loss,
            self.parameters,
            self.source,
            self.memory_budget,
            self.regroup,
            self.processes,
            self.batch_statistics,
        )

    def _checked_accumulation(self, dtype: torch.dtype | None) -> torch.dtype:
        space = self.parameters.space
        if dtype is None:
            return space.working_dtype
        fits = isinstance(dtype, torch.dtype) and dtype.is_floating_point
        if not fits or torch.promote_types(dtype, space.working_dtype) != dtype:
            msg = (
                f"accumulate={dtype!r} must be a floating-point dtype at least as wide as "
                f"{space.working_dtype}, such as torch.float64."
            )
            raise ValueError(msg)
        return dtype

    @property
    def divides(self) -> bool:
        """Whether the sum of losses is divided by the sum of weights."""
        return self._loss.divides

    def restricted(self, parameters: Selection) -> Risk:
        """Return the same risk with fewer parameters that vary; model, loss and data are shared."""
        part = copy.copy(self)
        part.parameters = FlatParameters(self.model, parameters)
        part.passes = self.passes.restricted(part.parameters)
        return part

    def combined(
        self, operation: str, compute: Callable[[], Share], part: FlatParameters | None = None
    ) -> Share:
        """Return what `compute` finds in the data of this process, added up over all processes.

        Parameters
        ----------
        operation : str
            What is done; it must be the same on all processes.
        compute : callable
            Passes over the data, without communication.
        part : FlatParameters, optional
            The parameters that it is done for, by default all that vary.

        Returns
        -------
        Share

        Raises
        ------
        ValueError
            If the processes do different things, or with different models.
        RuntimeError
            If `compute` fails on another process.
        """
        if self.processes is None:
            return compute()
        part = part or self.parameters
        facts = [
            f"operation: {operation}",
            f"loss: {self._loss.name}, {'mean' if self.divides else 'sum'}",
            f"weight_decay: {self.weight_decay}",
            f"accumulation: {self.accumulation_dtype}",
            f"parameters: {', '.join(part.names)}",
            f"model: {type(self.model).__name__}",
            f"batch_statistics: {self.batch_statistics}",
        ]
        return self.passes.combined(facts, compute)

    def places(self, what: str, count: Callable[[], tuple[int, Totals]]) -> tuple[int, int]:
        """Return how many of something the processes before this one have, and how many all have.

        Parameters
        ----------
        what : str
            What is counted.
        count : callable
            Returns the number of them in the data of this process, and what a pass added up to.

        Returns
        -------
        first, number : int
            Zero and the own number without a process group.
        """
        if self.processes is None:
            return 0, count()[0]
        rank, size, device = self.processes.rank, self.processes.size, self.parameters.space.device

        def compute() -> Share:
            number, totals = count()
            numbers = torch.zeros(size, dtype=torch.int64, device=device)
            numbers[rank] = number
            return Share(totals, numbers)

        numbers = self.combined(f"count of {what}", compute).vector
        return int(numbers[:rank].sum()), int(numbers.sum())

    def refresh(self) -> None:
        """Forget what is known about the data and drop kept graphs at the next product.

        Changes of parameters, buffers and tensors in memory are noticed without it. Call it after
        changing data that cannot be seen, such as what a custom data set holds.
        """
        self.passes.refresh()

    def __repr__(self) -> str:
        plan = self.passes.known_plan
        read = "data not read yet"
        num_chunks = self.passes.num_chunks
        if plan is not None and num_chunks is not None:
            kept = "kept" if plan.keeps_graphs else "not kept"
            chunks = "1 chunk" if num_chunks == 1 else f"{num_chunks} chunks"
            here = "" if self.processes is None else " here"
            read = f"{plan.examples:,} examples{here} in {chunks}, graphs {kept} between products"
        if self.processes is not None:
            size = self.processes.size
            read = f"{size} process{'' if size == 1 else 'es'}, {read}"
        name = type(self.model).__name__
        return f"Risk({name}, {self._loss.name}, {self.parameters.size:,} parameters, {read})"


class _NoBatches:
    """The data of a process that has none."""

    def __iter__(self) -> Iterator[Any]:
        return iter(())


def _checked_decay(weight_decay: float) -> float:
    if not (isinstance(weight_decay, int | float) and 0 <= weight_decay < float("inf")):
        msg = f"weight_decay={weight_decay!r} must be a finite number, zero or positive."
        raise ValueError(msg)
    return float(weight_decay)


def as_risk(
    risk: Risk | nn.Module, loss: Any, data: Any, parameters: Selection, options: dict[str, Any]
) -> Risk:
    """Return the risk that the arguments of a matrix stand for: a `Risk`, or what makes one.

    Raises
    ------
    TypeError
        If a risk comes with more arguments, or a model without loss and data.
    """
    if isinstance(risk, Risk):
        if not (loss is None and data is None and parameters is None) or options:
            msg = "risk has its loss and data already; pass either a Risk or (model, loss, data)."
            raise TypeError(msg)
        return risk
    if loss is None or data is None:
        msg = (
            f"risk has type {type(risk).__qualname__} and comes without loss and data; pass a "
            "Risk or (model, loss, data)."
        )
        raise TypeError(msg)
    return Risk(risk, loss, data, parameters, **options)


def check_risk(risk: Any) -> None:
    """Refuse what is no risk.

    Raises
    ------
    TypeError
        If `risk` is not a `Risk`.

    Examples
    --------
    >>> check_risk(nn.Linear(2, 1))
    Traceback (most recent call last):
    TypeError: risk has type Linear; pass Risk(model, loss, data).
    """
    if not isinstance(risk, Risk):
        msg = f"risk has type {type(risk).__qualname__}; pass Risk(model, loss, data)."
        raise TypeError(msg)
