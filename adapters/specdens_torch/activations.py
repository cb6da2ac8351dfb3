r"""Smooth activations whose second derivatives are two products of kept numbers.

An activation s turns the slope g of its outputs into :math:`s'(x) g`, whose derivatives along u are
:math:`s'(x) u` in g and :math:`s''(x) g u` in x. What does not depend on u is computed once, where
PyTorch computes it anew for every vector, in a dozen passes over the activations.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from specdens_torch.orders import is_linear_only, is_within_model


class _Function(NamedTuple):
    """An activation, its fused first derivative (slope, x), and s' and s'' as numbers."""

    value: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]
    first: Callable[[Tensor], Tensor]
    second: Callable[[Tensor], Tensor]


def _density(x: Tensor) -> Tensor:
    return torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)


def _gelu_first(x: Tensor) -> Tensor:
    return torch.special.ndtr(x) + x * _density(x)


def _gelu_second(x: Tensor) -> Tensor:
    density = _density(x)
    return 2 * density - x * (x * density)  # in this order nothing overflows


def _silu_first(x: Tensor) -> Tensor:
    s = torch.sigmoid(x)
    return s * (1 + x * (1 - s))


def _silu_second(x: Tensor) -> Tensor:
    s = torch.sigmoid(x)
    return s * (1 - s) * (2 + x * (1 - 2 * s))


_GELU = _Function(
    torch.ops.aten.gelu.default, torch.ops.aten.gelu_backward.default, _gelu_first, _gelu_second
)
_SILU = _Function(
    torch.ops.aten.silu.default, torch.ops.aten.silu_backward.default, _silu_first, _silu_second
)


class _Activation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, function: _Function) -> Tensor:
        ctx.save_for_backward(x)
        ctx.function = function
        return function.value(x)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        if not torch.is_grad_enabled():
            return ctx.function.backward(slopes[0], x), None
        if is_within_model():
            return slopes[0] * ctx.function.first(x), None
        return _Slope.apply(slopes[0], x, ctx.function), None  # type: ignore[no-untyped-call]


class _Slope(torch.autograd.Function):
    """The slope of the inputs. Recorded within `linear_only`, only its derivative in g exists."""

    @staticmethod
    def forward(ctx: Any, slope: Tensor, x: Tensor, function: _Function) -> Tensor:
        kept = [function.first(x)]
        if not is_linear_only():
            kept.append(slope * function.second(x))
        ctx.save_for_backward(*kept)
        return function.backward(slope, x)

    @staticmethod
    @once_differentiable  # the kept numbers count as constants
    def backward(ctx: Any, u: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        first, *second = ctx.saved_tensors
        needs = ctx.needs_input_grad
        of_x = u * second[0] if needs[1] and not is_linear_only() else None
        return (u * first if needs[0] else None), of_x, None


def _gelu(input: Tensor, *, approximate: str = "none") -> Tensor:
    """Compute what `torch.nn.functional.gelu` does."""
    if approximate != "none" or input.dtype not in _DTYPES:
        return torch.nn.functional.gelu(input, approximate=approximate)
    result: Tensor = _Activation.apply(input, _GELU)  # type: ignore[no-untyped-call]
    return result


def _silu(input: Tensor, inplace: bool = False) -> Tensor:
    """Compute what `torch.nn.functional.silu` does."""
    if inplace or input.dtype not in _DTYPES:
        return torch.nn.functional.silu(input, inplace=inplace)
    result: Tensor = _Activation.apply(input, _SILU)  # type: ignore[no-untyped-call]
    return result


_DTYPES = (torch.float32, torch.float64)

#: What to call in place of torch's own activations.
ACTIVATIONS: dict[Any, Callable[..., Tensor]] = {
    torch.nn.functional.gelu: _gelu,
    torch.nn.functional.silu: _silu,
}
