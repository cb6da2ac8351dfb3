"""The value of a risk and its gradient, added up over the data."""

from __future__ import annotations

import torch
from torch import Tensor

from specdens_torch.evaluation import Evaluation, accumulate
from specdens_torch.guards import Totals
from specdens_torch.processes import Share
from specdens_torch.risk import Risk, check_risk


def risk_value(risk: Risk) -> float:
    """Return the risk at the present parameters, added up in double precision.

    Parameters
    ----------
    risk : Risk

    Returns
    -------
    float

    Raises
    ------
    TypeError
        If `risk` is not a `Risk`.
    ValueError
        If the risk is not one finite, repeatable function of the parameters; see `Risk`.

    Examples
    --------
    >>> model = torch.nn.Linear(1, 1, bias=False)
    >>> _ = torch.nn.init.constant_(model.weight, 3.0)
    >>> risk_value(Risk(model, torch.nn.L1Loss(), (torch.ones(4, 1), torch.zeros(4, 1))))
    3.0
    """
    check_risk(risk)
    totals = risk.combined("risk_value", lambda: Share(risk.passes.sweep())).totals
    value = totals.value / totals.weight if risk.divides else totals.value
    if risk.weight_decay:
        blocks = risk.parameters.tensors.values()
        value += (
            0.5 * risk.weight_decay * sum(float(p.detach().double().square().sum()) for p in blocks)
        )
    return value


def gradient(risk: Risk) -> Tensor:
    """Return the gradient of the risk with respect to the selected parameters.

    Parameters
    ----------
    risk : Risk

    Returns
    -------
    tensor of shape (n,)
        In the dtype and on the device of ``risk.parameters.space``; ``risk.parameters.unravel``
        gives it by parameter name.

    Raises
    ------
    TypeError
        If `risk` is not a `Risk`.
    ValueError
        If the risk is not one finite, repeatable function of the parameters; see `Risk`.

    Examples
    --------
    >>> model = torch.nn.Linear(1, 1, bias=False)
    >>> gradient(Risk(model, torch.nn.L1Loss(), (torch.ones(4, 1), torch.full((4, 1), -9.0))))
    tensor([1.])
    """
    check_risk(risk)
    with torch.inference_mode(False), torch.no_grad():
        total, totals = summed_gradient(risk)
        if risk.divides:
            total /= totals.weight
        if risk.weight_decay:
            total.add_(risk.parameters.ravel().to(total.dtype), alpha=risk.weight_decay)
        return total.to(risk.parameters.space.dtype)


def summed_gradient(risk: Risk) -> tuple[Tensor, Totals]:
    """Return the gradient of the weighted sum of losses, (n,), and what the data add up to."""

    def compute() -> Share:
        space = risk.parameters.space
        total = torch.zeros(space.dimension, dtype=risk.accumulation_dtype, device=space.device)
        blocks = list(risk.parameters.unravel(total).values())

        def add(evaluation: Evaluation) -> None:
            with torch.no_grad():
                accumulate(blocks, evaluation.gradients(create_graph=False))

        return Share(risk.passes.sweep(add), total)

    share = risk.combined("gradient", compute)
    return share.vector, share.totals
