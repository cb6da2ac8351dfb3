"""Dense curvature matrices of small models, from PyTorch's own derivatives and the definitions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

PerTerm = Callable[[Any, Any], tuple[Tensor, Tensor]]


def flat_outputs(
    model: nn.Module, inputs: Any, names: list[str] | None = None
) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """Return the model's outputs as a function of its flat parameters, and the parameters."""
    state = {name: p.detach() for name, p in model.named_parameters()}
    names = [n for n, p in model.named_parameters() if p.requires_grad] if names is None else names
    sizes = [state[name].numel() for name in names]

    def function(flat: Tensor) -> Tensor:
        parts = zip(names, flat.split(sizes), strict=True)
        varied = {name: part.view(state[name].shape) for name, part in parts}
        return functional_call(model, {**state, **varied}, (inputs,))

    return function, torch.cat([state[name].flatten() for name in names])


def jacobian(model: nn.Module, inputs: Any, names: list[str] | None = None) -> Tensor:
    """Return the Jacobian of all outputs, (number of outputs, n)."""
    function, flat = flat_outputs(model, inputs, names)
    with sdpa_kernel(SDPBackend.MATH):
        result = torch.autograd.functional.jacobian(function, flat, vectorize=True)
    return result.reshape(-1, flat.numel())


def gauss_newton(
    model: nn.Module,
    loss: Callable[[Any, Any], Tensor],
    inputs: Any,
    targets: Any,
    names: list[str] | None = None,
) -> Tensor:
    """Return the Gauss-Newton matrix of a scalar ``loss(model(inputs), targets)``, (n, n)."""
    function, flat = flat_outputs(model, inputs, names)
    with torch.no_grad():
        outputs = function(flat)
    curvature = torch.autograd.functional.hessian(lambda f: loss(f, targets), outputs)
    rows = jacobian(model, inputs, names)
    return rows.T @ curvature.reshape(rows.shape[0], -1) @ rows


def example_gradients(
    model: nn.Module,
    loss: Callable[[Any, Any], Tensor],
    inputs: Any,
    targets: Any,
    names: list[str] | None = None,
) -> Tensor:
    """Return the gradients of the single losses that ``loss`` returns, (number of losses, n)."""
    function, flat = flat_outputs(model, inputs, names)
    with sdpa_kernel(SDPBackend.MATH):
        return torch.autograd.functional.jacobian(
            lambda theta: loss(function(theta), targets), flat, vectorize=True
        )


def second_moment(gradients: Tensor, weights: Tensor, *, centered: bool = False) -> Tensor:
    """Return the weighted second moment of the rows of `gradients`, about their mean or zero."""
    if centered:
        gradients = gradients - weights @ gradients / weights.sum()
    return gradients.T @ (weights[:, None] * gradients) / weights.sum()
