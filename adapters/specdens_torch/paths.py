"""Risk and curvature on the line between two parameter vectors, and statistics of batch norm."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn

from specdens.arguments import checked_callable
from specdens.line_path import LinePath, line_path
from specdens_torch.data import DataSource
from specdens_torch.evaluation import arguments_of, twice_differentiable
from specdens_torch.parameters import FlatParameters
from specdens_torch.risk import Risk, check_risk
from specdens_torch.state import left_as_it_was, wide_dtype
from specdens_torch.structures import Batch, move, num_examples
from specdens_torch.values import risk_value

#: A flat vector (n,), or the blocks of one by parameter name.
Point: TypeAlias = Tensor | Mapping[str, Tensor]
Layers: TypeAlias = dict[nn.Module, str]

_BATCH_NORMS = nn.modules.batchnorm._BatchNorm


def along_line(
    risk: Risk,
    start: Point,
    end: Point,
    alphas: ArrayLike,
    *,
    quantity: Callable[[Risk], Any] | None = None,
    statistics: str = "kept",
) -> LinePath:
    r"""Evaluate a risk at :math:`(1 - \alpha) \theta_0 + \alpha \theta_1`.

    No barrier between two solutions means that they lie in one basin, as far as the line can tell.
    A barrier is measured from the chord, the straight line between the values at both ends: on a
    slope between unequal ends there is none.

    Parameters
    ----------
    risk : Risk
        Its model is moved along the line, and is as it was afterwards, whatever happens.
    start, end : tensor of shape (n,), or mapping of str to tensor
        Flat vectors, such as ``risk.parameters.ravel()`` returns at each solution, or the blocks
        of `risk.parameters` by name. What does not vary keeps the model's present value.
    alphas : array_like of shape (m,)
        Places on the line, also beyond its ends. Where 0 and 1 are missing, the ends are evaluated
        in addition.
    quantity : callable, optional
        ``quantity(risk)`` returns a number, or an array of one shape at all points; by default
        `risk_value`. ``lambda risk: eigsh(Hessian(risk), 1).eigenvalues[0]`` is the sharpness.
    statistics : {"kept", "recomputed"}
        Running statistics of batch-norm layers: those that the model has now, at all points, or at
        each point those of the population, see `population_statistics`, with the model in eval
        mode. Statistics of one solution are wrong at the other, and a barrier may be theirs.

    Returns
    -------
    LinePath

    Raises
    ------
    TypeError
        If `risk` is not a `Risk`.
    ValueError
        If a point does not have the shape of the parameters, `alphas` are not finite numbers, or
        `statistics` is unknown, or ``"recomputed"`` for a risk with statistics of its batches or
        a process group.

    References
    ----------
    Sagun, Evci, Guney, Dauphin, Bottou (2017), Empirical analysis of the Hessian of
    over-parametrized neural networks. arXiv:1706.04454, on large and small batches.
    Frankle, Dziugaite, Roy, Carbin (2020), arXiv:1912.05671, section 2, for barriers.

    Examples
    --------
    >>> model = nn.Linear(1, 1, bias=False)
    >>> data = torch.ones(4, 1), torch.zeros(4, 1)
    >>> risk = Risk(model, nn.MSELoss(), data)  # the square of the weight
    >>> path = along_line(risk, torch.tensor([1.0]), torch.tensor([-3.0]), [0, 0.25, 0.5, 1])
    >>> path.values
    array([1., 0., 1., 9.])
    >>> path.barrier  # a convex function has none
    0.0
    """
    check_risk(risk)
    _check_statistics(risk, statistics)
    first, last = (
        _flat(point, risk.parameters, name) for name, point in (("start", start), ("end", end))
    )
    measure = risk_value if quantity is None else quantity
    checked_callable("quantity", measure, "a function of a Risk")

    def value(alpha: float) -> np.ndarray:
        _assign(risk.parameters, (1 - alpha) * first + alpha * last)
        with _settled(risk, statistics):
            found = measure(risk)
        return np.asarray(found.detach().cpu() if isinstance(found, Tensor) else found, np.float64)

    with _put_back(risk.parameters):
        return line_path(alphas, value)


def _check_statistics(risk: Risk, statistics: str) -> None:
    if statistics not in ("kept", "recomputed"):
        msg = f"statistics={statistics!r} is unknown; expected 'kept' or 'recomputed'."
        raise ValueError(msg)
    if statistics == "kept":
        return
    if risk.batch_statistics:
        msg = (
            "statistics='recomputed' is for running statistics, and this risk normalizes with "
            "those of its batches at every point (batch_statistics=True); leave 'kept'."
        )
        raise ValueError(msg)
    if risk.processes is not None:
        msg = (
            "statistics='recomputed' would be those of the data of one process; pass a risk "
            "without process_group, or 'kept'."
        )
        raise ValueError(msg)


def _flat(point: Point, parameters: FlatParameters, name: str) -> Tensor:
    vector: Any = parameters.ravel(point) if isinstance(point, Mapping) else point
    if getattr(vector, "shape", None) != (parameters.size,):
        given = f"shape {tuple(point.shape)}" if isinstance(point, Tensor) else f"value {point!r}"
        msg = (
            f"{name} has {given}; expected a vector of shape ({parameters.size},), such as "
            "risk.parameters.ravel() returns, or the blocks by parameter name."
        )
        raise ValueError(msg)
    device = parameters.space.device
    return torch.as_tensor(vector).detach().to(device).to(wide_dtype(device))


def _assign(parameters: FlatParameters, x: Tensor) -> None:
    blocks = parameters.unravel(x)
    with torch.inference_mode(False), torch.no_grad():
        for name, parameter in parameters.tensors.items():
            parameter.copy_(blocks[name])


@contextmanager
def _put_back(parameters: FlatParameters) -> Iterator[None]:
    """Give the parameters their present values again, to the bit."""
    present = {name: p.detach().clone() for name, p in parameters.tensors.items()}
    try:
        yield
    finally:
        with torch.inference_mode(False), torch.no_grad():
            for name, parameter in parameters.tensors.items():
                parameter.copy_(present[name])


def _settled(risk: Risk, statistics: str) -> AbstractContextManager[None]:
    if statistics == "kept":
        return nullcontext()
    return population_statistics(risk.model, risk.source)


@contextmanager
def population_statistics(model: nn.Module, data: Any) -> Iterator[None]:
    r"""Normalize with the mean and variance of all data, at the present parameters.

    Within the context the model is in eval mode, and the running statistics of its batch-norm
    layers are the exact mean and variance (the average of squares, not divided by N - 1) of each
    layer's inputs over all of `data`, the layers before it normalizing with theirs. The model then
    computes what it would in train mode with all data as one batch, but the statistics are
    constants: values agree, derivatives do not. Afterwards all is as it was, also after an error.

    Parameters
    ----------
    model : torch.nn.Module
    data
        As for `Risk`; targets are not used.

    Yields
    ------
    None

    Raises
    ------
    ValueError
        If a batch-norm layer has no running statistics, or is applied more than once in a forward
        pass, so that no statistics are those of both inputs; or `data` is empty.
    TypeError
        If `data` cannot be read twice, or is not made of pairs.

    Notes
    -----
    Data of one batch take one forward pass, others one for each layer, which ends there. Cumulative
    averages over one pass (torch's ``momentum=None``) are cheaper but not the same: they leave out
    the spread of the batches' means, and normalize the batches differently on the way.

    Examples
    --------
    >>> model = nn.Sequential(nn.BatchNorm1d(1), nn.Flatten(0))
    >>> data = torch.tensor([[1.0], [3.0]]), torch.zeros(2)
    >>> with population_statistics(model, [(data[0][:1], data[1][:1]), (data[0][1:], data[1][1:])]):
    ...     model[0].running_mean, model[0].running_var
    (tensor([2.]), tensor([1.]))
    >>> model[0].running_mean, model.training
    (tensor([0.]), True)
    """
    layers = _layers(model)
    source = data if isinstance(data, DataSource) else DataSource(data)
    modes = [(module, module.training) for module in model.modules()]
    present = [(buffer, buffer.clone()) for layer in layers for buffer in _statistics(layer)]
    try:
        model.eval()
        _recompute(model, layers, source)
        yield
    finally:
        for module, training in modes:
            module.training = training
        with torch.inference_mode(False), torch.no_grad():
            for buffer, copy in present:
                buffer.copy_(copy)


def _layers(model: nn.Module) -> Layers:
    """Return the batch-norm layers and their names."""
    if not isinstance(model, nn.Module):
        msg = f"model has type {type(model).__qualname__}; expected a torch.nn.Module."
        raise TypeError(msg)
    layers: Layers = {m: name for name, m in model.named_modules() if isinstance(m, _BATCH_NORMS)}
    for layer, name in layers.items():
        if layer.running_mean is None or layer.running_var is None:
            msg = (
                f"layer {name!r} has no running statistics that could be those of the population; "
                "build it with track_running_stats=True."
            )
            raise ValueError(msg)
    return layers


def _statistics(layer: nn.Module) -> tuple[Tensor, Tensor]:
    return layer.running_mean, layer.running_var  # type: ignore[return-value]


@dataclass(frozen=True, eq=False)
class _Moments:
    """Count, mean and sum of squares about it, by channel."""

    count: int
    mean: Tensor  # (channels,)
    scatter: Tensor  # (channels,)

    @classmethod
    def of(cls, x: Tensor) -> _Moments:
        """Return those of the inputs (batch, channels, ...) of a layer."""
        entries = x.detach().to(wide_dtype(x.device)).transpose(0, 1).flatten(1)
        mean = entries.mean(1)
        return cls(entries.shape[1], mean, (entries - mean[:, None]).square().sum(1))

    def joined(self, other: _Moments) -> _Moments:
        """Return those of both together (Chan, Golub, LeVeque 1983)."""
        count, apart = self.count + other.count, other.mean - self.mean
        mean = self.mean + apart * (other.count / count)
        between = apart.square() * (self.count * other.count / count)
        return _Moments(count, mean, self.scatter + other.scatter + between)

    def assign(self, layer: nn.Module) -> None:
        """Make these the layer's running statistics."""
        mean, variance = _statistics(layer)
        mean.copy_(self.mean)
        variance.copy_(self.scatter / self.count)


class _Reached(Exception):  # noqa: N818 (it ends a forward pass that has served its purpose)
    """A forward pass has come to the layer that it was made for."""


def _recompute(model: nn.Module, layers: Layers, source: DataSource) -> None:
    """Give the layers of a model in eval mode the statistics of all data."""
    tensors = chain(model.parameters(), model.buffers())
    device = next((t.device for t in tensors), torch.device("cpu"))
    untouched = left_as_it_was(model, [device], source.generators, seed=0)
    with twice_differentiable(model), torch.no_grad(), untouched:
        head = list(islice(_batches(source), 2))
        if not head:
            msg = "data is empty; pass at least one (inputs, targets) pair with an example."
            raise ValueError(msg)
        order = _visit(model, layers, head[0], device)
        for layer in order if len(head) > 1 else ():
            _moments_before(model, layer, source, device).assign(layer)


def _batches(source: DataSource) -> Iterator[Batch]:
    return (batch for batch in source if num_examples(batch) != 0)


def _forward(model: nn.Module, batch: Batch, device: torch.device) -> None:
    positional, keywords = arguments_of(move(batch.inputs, device))
    model(*positional, **keywords)


def _visit(model: nn.Module, layers: Layers, batch: Batch, device: torch.device) -> list[nn.Module]:
    """Return the layers in the order of their use, each with the statistics of this batch."""
    order: list[nn.Module] = []

    def settle(layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        if layer in order:
            msg = (
                f"layer {layers[layer]!r} is applied more than once in a forward pass, and no "
                "statistics are those of all its inputs; use a layer for each."
            )
            raise ValueError(msg)
        order.append(layer)
        _Moments.of(inputs[0]).assign(layer)

    handles = [layer.register_forward_pre_hook(settle) for layer in layers]
    try:
        _forward(model, batch, device)
    finally:
        for handle in handles:
            handle.remove()
    return order


def _moments_before(
    model: nn.Module, layer: nn.Module, source: DataSource, device: torch.device
) -> _Moments:
    """Return the moments of a layer's inputs over all data, from passes that end there."""
    found: list[_Moments] = []

    def take(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        moments = _Moments.of(inputs[0])
        found[:] = [found[0].joined(moments) if found else moments]
        raise _Reached

    handle = layer.register_forward_pre_hook(take)
    try:
        for batch in _batches(source):
            with suppress(_Reached):
                _forward(model, batch, device)
    finally:
        handle.remove()
    return found[0]
