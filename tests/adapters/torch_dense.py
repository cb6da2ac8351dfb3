"""Dense curvature matrices of small models, from PyTorch's own derivatives and the definitions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from specdens_torch import (
    GaussNewton,
    GradientCovariance,
    GradientSecondMoment,
    Hessian,
    Residual,
    Risk,
)

PerExample = Callable[[Any, Any], Tensor]
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


def all_matrices(
    model: nn.Module,
    losses: PerExample,
    batches: Sequence[tuple[Any, Tensor]],
    names: list[str] | None = None,
) -> dict[type, Tensor]:
    """Return the dense matrix of every class, of ``losses(outputs, labels)`` (one per example).

    Derivatives are taken column by column, which works for every layer. Each batch is evaluated
    whole, in the model's mode; inputs are a tensor or a tuple.
    """
    state = {name: p.detach() for name, p in model.named_parameters()}
    names = [n for n, p in model.named_parameters() if p.requires_grad] if names is None else names
    flat = torch.cat([state[name].flatten() for name in names])
    sizes = [state[name].numel() for name in names]
    buffers = {name: b.clone() for name, b in model.named_buffers()}

    def outputs_of(theta: Tensor, inputs: Any) -> Tensor:
        parts = zip(names, theta.split(sizes), strict=True)
        varied = {name: part.view(state[name].shape) for name, part in parts}
        args = inputs if isinstance(inputs, tuple) else (inputs,)
        copies = {name: b.clone() for name, b in buffers.items()}
        return functional_call(model, {**state, **copies, **varied}, args)

    def every_loss(theta: Tensor) -> Tensor:
        return torch.cat([losses(outputs_of(theta, x), y) for x, y in batches])

    functional = torch.autograd.functional
    with sdpa_kernel(SDPBackend.MATH):
        hessian = functional.hessian(lambda theta: every_loss(theta).mean(), flat)
        gradients = functional.jacobian(every_loss, flat)
        gauss_newton = torch.zeros_like(hessian)
        for x, y in batches:
            rows = functional.jacobian(lambda theta, x=x: outputs_of(theta, x), flat)
            outputs = outputs_of(flat.clone().requires_grad_(), x).detach()
            curvature = functional.hessian(lambda f, y=y: losses(f, y).sum(), outputs)
            rows = rows.flatten(0, -2)
            gauss_newton += rows.T @ curvature.reshape(len(rows), -1) @ rows / len(gradients)
    # Some layers of torch have wrong second derivatives; they give themselves away.
    torch.testing.assert_close(hessian, hessian.T, rtol=1e-9, atol=1e-11)
    weights = torch.ones(len(gradients), dtype=gradients.dtype)
    return {
        Hessian: hessian,
        GaussNewton: gauss_newton,
        Residual: hessian - gauss_newton,
        GradientSecondMoment: second_moment(gradients, weights),
        GradientCovariance: second_moment(gradients, weights, centered=True),
    }


def assert_matrices(risk: Risk, expected: dict[type, Tensor], rtol: float = 1e-10) -> None:
    """Compare every matrix, in the scale of the largest entry of all, as the residual may be 0."""
    scale = max(matrix.abs().max().item() for matrix in expected.values())
    assert scale > 1e-6
    for kind, dense in expected.items():
        operator = kind(risk)
        actual = operator @ torch.eye(operator.space.dimension, dtype=operator.space.dtype)
        torch.testing.assert_close(actual, dense, rtol=rtol, atol=rtol * scale)


def assert_close(actual: Tensor, expected: Tensor, rtol: float = 1e-10) -> None:
    """Compare two tensors in the scale of the largest entry."""
    scale = expected.abs().max().item()
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=rtol * scale)
