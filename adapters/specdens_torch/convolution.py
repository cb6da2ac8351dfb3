"""Convolutions that compute of their second derivatives only what is asked for.

PyTorch's double backward of a convolution always has three parts: the derivatives in the gradient
that came in, in the input and in the weight. A Jacobian's product needs the first alone, half of
the work. And the derivative in the weight is found by a convolution with a kernel as large as the
image, where the routine of the first backward pass does the same faster.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from specdens_torch.orders import is_linear_only

_convolve = torch.ops.aten.convolution.default
_differentiate = torch.ops.aten.convolution_backward.default


class _Settings(NamedTuple):
    """What a convolution is besides its tensors, in the order of torch's operators."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    @property
    def arguments(self) -> tuple[Any, ...]:
        nothing = (0,) * len(self.padding)
        return (self.stride, self.padding, self.dilation, False, nothing, self.groups)


def _derivatives(
    slope: Tensor, x: Tensor, weight: Tensor, settings: _Settings, mask: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Return the derivatives in input and weight as far as `mask` asks for them."""
    if not any(mask):
        return None, None
    found = _differentiate(slope, x, weight, None, *settings.arguments, [*mask, False])
    return tuple(part if wanted else None for part, wanted in zip(found, mask, strict=False))  # type: ignore[return-value]


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, settings: _Settings) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.settings = settings
        return _convolve(x, weight, None, *settings.arguments)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        mask = ctx.needs_input_grad[:2]
        if not torch.is_grad_enabled():
            return *_derivatives(slopes[0], x, weight, ctx.settings, mask), None
        parts = _Derivative.apply(slopes[0], x, weight, ctx.settings, mask)  # type: ignore[no-untyped-call]
        parts = parts if isinstance(parts, tuple) else (parts,)
        found = iter(parts)
        of_x, of_weight = (next(found) if wanted else None for wanted in mask)
        return of_x, of_weight, None


class _Derivative(torch.autograd.Function):
    r"""The derivatives of a convolution, :math:`(W^\top u, \; x \star u)` for a slope u."""

    @staticmethod
    def forward(
        ctx: Any,
        slope: Tensor,
        x: Tensor,
        weight: Tensor,
        settings: _Settings,
        mask: tuple[bool, bool],
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(slope, x, weight)
        ctx.settings, ctx.mask = settings, mask
        ctx.set_materialize_grads(False)
        found = _derivatives(slope, x, weight, settings, mask)
        return tuple(part for part in found if part is not None)

    @staticmethod
    def backward(ctx: Any, *directions: Tensor | None) -> tuple[Any, ...]:
        slope, x, weight = ctx.saved_tensors
        given = iter(directions)
        v, w = (next(given) if wanted else None for wanted in ctx.mask)  # of the input, the weight
        settings, needs = ctx.settings, ctx.needs_input_grad
        of_slope = of_x = of_weight = None
        if needs[0]:
            if v is not None:
                of_slope = _convolve(v, weight, None, *settings.arguments)
            if w is not None:
                part = _convolve(x, w, None, *settings.arguments)
                of_slope = part if of_slope is None else of_slope + part
        # Of a record within a record, a model that takes derivatives itself, all is needed.
        linear_only = is_linear_only() and not torch.is_grad_enabled()
        if needs[1] and w is not None and not linear_only:
            of_x, _ = _derivatives(slope, x, w, settings, (True, False))
        if needs[2] and v is not None and not linear_only:
            _, of_weight = _derivatives(slope, v, weight, settings, (False, True))
        return of_slope, of_x, of_weight, None, None


def _replacement(dimensions: int) -> Callable[..., Tensor]:
    original = {1: torch.conv1d, 2: torch.conv2d, 3: torch.conv3d}[dimensions]

    def convolve(
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Tensor:
        batched = input.ndim == dimensions + 2
        if isinstance(padding, str) or not batched or not input.numel():
            return original(input, weight, bias, stride, padding, dilation, groups)
        a, b, c = (_several(value, dimensions) for value in (stride, padding, dilation))
        result: Tensor = _Convolution.apply(input, weight, _Settings(a, b, c, groups))  # type: ignore[no-untyped-call]
        if bias is None:
            return result
        return result + bias.reshape(-1, *(1,) * dimensions)

    return convolve


def _several(value: Any, count: int) -> tuple[int, ...]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * count if len(values) == 1 else values


#: What to call in place of torch's own convolutions.
CONVOLUTIONS: dict[Any, Callable[..., Tensor]] = {
    torch.conv1d: _replacement(1),
    torch.conv2d: _replacement(2),
    torch.conv3d: _replacement(3),
}
