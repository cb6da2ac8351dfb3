r"""Normalization layers whose second derivatives take few passes over the activations.

Batch normalization by stored statistics is written as the linear map of its inputs that it is. By
those of the batch, as in instance normalization, its second derivatives are PyTorch's own.

For layer normalization, with :math:`\hat x = r (x - \mu)`, r the inverse deviation of a row, and
the projector :math:`P z = z - \langle z \rangle - \hat x \langle z \hat x \rangle` (brackets are
means over a row), the slope g of the outputs gives that of inputs, weight and bias,

.. math:: r P (\gamma g), \qquad \sum g \hat x, \qquad \sum g.

Along directions u, a, b of these three, and with :math:`q = r P u`, their derivatives are

.. math:: \gamma q + a \hat x + b, \qquad
          r P (a g - r \langle \gamma g \hat x \rangle u - r \langle u \hat x \rangle \gamma g)
          - r \langle \gamma g q \rangle \hat x, \qquad \sum g q

in g, x and :math:`\gamma`. PyTorch takes about fifty passes for them, most of its time beside the
matrix products of a transformer. Here :math:`r P` is its own fused first derivative.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from specdens_torch.orders import is_linear_only, is_within_model

_batch_forward = torch.ops.aten.native_batch_norm.default
_batch_backward = torch.ops.aten.native_batch_norm_backward.default
_forward = torch.ops.aten.native_layer_norm.default
_backward = torch.ops.aten.native_layer_norm_backward.default


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, size: list[int], eps: float
    ) -> Tensor:
        result, mean, scale = _forward(x, size, weight, bias, eps)
        ctx.save_for_backward(x, weight, bias, mean, scale)
        ctx.size, ctx.eps = size, eps
        return result

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, scale = ctx.saved_tensors
        mask = ctx.needs_input_grad[:3]
        if is_within_model():
            trailing, leading = _axes(x, ctx.size)
            of_x, of_weight, of_bias = _slopes(slopes[0], x, weight, trailing, ctx.eps)
            exact = of_x, of_weight.sum(leading), of_bias.sum(leading)
            return (
                *(p if wanted else None for p, wanted in zip(exact, mask, strict=True)),
                None,
                None,
            )
        if not torch.is_grad_enabled():
            parts = _backward(slopes[0], x, ctx.size, mean, scale, weight, bias, mask)
            return (
                *(p if wanted else None for p, wanted in zip(parts, mask, strict=True)),
                None,
                None,
            )
        constants = bias, mean, scale, ctx.size, ctx.eps, mask
        parts = _Derivative.apply(slopes[0], x, weight, *constants)  # type: ignore[no-untyped-call]
        found = iter(parts if isinstance(parts, tuple) else (parts,))
        return (*(next(found) if wanted else None for wanted in mask), None, None)


def _axes(x: Tensor, size: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the axes that layer normalization takes means over, and the others."""
    return tuple(range(-len(size), 0)), tuple(range(x.ndim - len(size)))


def _standardized(x: Tensor, axes: tuple[int, ...], eps: float) -> tuple[Tensor, Tensor]:
    """Return the inputs less their mean over deviation, and the inverse of the deviation."""
    centered = x - x.mean(axes, keepdim=True)
    scale = torch.rsqrt(centered.square().mean(axes, keepdim=True) + eps)
    return centered * scale, scale


def _slopes(
    slope: Tensor, x: Tensor, weight: Tensor | None, axes: tuple[int, ...], eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the slopes of inputs, weight and bias by operations of which all derivatives exist.

    Those of weight and bias have not been added up. PyTorch's own third derivatives take mean and
    deviation for constants.
    """
    normal, scale = _standardized(x, axes, eps)
    inner = slope if weight is None else slope * weight
    along = (inner * normal).mean(axes, keepdim=True)
    of_x = scale * (inner - inner.mean(axes, keepdim=True) - normal * along)
    return of_x, slope * normal, slope


class _BatchNorm(torch.autograd.Function):
    """Normalization by the statistics of the batch, whose second derivatives are torch's own."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        statistics: tuple[Tensor | None, Tensor | None],
        momentum: float,
        eps: float,
    ) -> Tensor:
        result, mean, scale = _batch_forward(x, weight, bias, *statistics, True, momentum, eps)
        ctx.save_for_backward(x, weight, mean, scale)
        ctx.eps = eps
        return result

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, scale = ctx.saved_tensors
        mask = ctx.needs_input_grad[:3]
        if is_within_model():
            axes = _all_but_channels(x)
            own = None if weight is None else _by_channel(weight, x)
            of_x, of_weight, of_bias = _slopes(slopes[0], x, own, axes, ctx.eps)
            parts = of_x, of_weight.sum(axes), of_bias.sum(axes)
        else:
            kept = weight, None, None, mean, scale
            parts = _batch_backward(slopes[0], x, *kept, True, ctx.eps, mask)
        found = (part if wanted else None for part, wanted in zip(parts, mask, strict=True))
        return *found, None, None, None


def _all_but_channels(x: Tensor) -> tuple[int, ...]:
    return (0, *range(2, x.ndim))


def _by_channel(numbers: Tensor, x: Tensor) -> Tensor:
    return numbers.reshape(-1, *(1,) * (x.ndim - 2))


class _Derivative(torch.autograd.Function):
    """The slopes of inputs, weight and bias, as far as `mask` asks for them."""

    @staticmethod
    def forward(
        ctx: Any,
        slope: Tensor,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        scale: Tensor,
        size: list[int],
        eps: float,
        mask: Sequence[bool],
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(slope, x, weight, mean, scale)
        ctx.size, ctx.eps, ctx.mask = size, eps, mask
        ctx.set_materialize_grads(False)
        parts = _backward(slope, x, size, mean, scale, weight, bias, mask)
        return tuple(part for part, wanted in zip(parts, mask, strict=True) if wanted)

    @staticmethod
    @once_differentiable  # the formulas take mean and deviation for constants
    def backward(ctx: Any, *directions: Tensor | None) -> tuple[Any, ...]:
        slope, x, weight, mean, scale = ctx.saved_tensors
        given = iter(directions)
        u, a, b = (next(given) if wanted else None for wanted in ctx.mask)
        needs = ctx.needs_input_grad
        norm = _Rows(x, mean, scale, ctx.size, ctx.eps)
        q = None if u is None else norm.projected(u)
        of_slope = norm.affine(q, weight, a, b) if needs[0] else None
        of_x = of_weight = None
        if not is_linear_only():
            if needs[2] and q is not None:
                of_weight = (slope * q).sum(norm.leading)
            if needs[1]:
                of_x = norm.curved(slope, weight, u, q, a)
        return of_slope, of_x, of_weight, *(None,) * 6


class _Rows:
    r"""Inputs x with the mean and the inverse deviation r of their rows: :math:`r P` and more."""

    def __init__(self, x: Tensor, mean: Tensor, scale: Tensor, size: list[int], eps: float) -> None:
        self._x, self._mean, self._scale, self._size, self._eps = x, mean, scale, size, eps
        self._trailing, self.leading = _axes(x, size)

    def projected(self, z: Tensor) -> Tensor:
        """Return r P z."""
        mask = [True, False, False]
        return _backward(z, self._x, self._size, self._mean, self._scale, None, None, mask)[0]

    def affine(
        self, q: Tensor | None, weight: Tensor | None, a: Tensor | None, b: Tensor | None
    ) -> Tensor | None:
        r"""Return :math:`\gamma q + a \hat x + b`."""
        if a is not None:
            b = _forward(self._x, self._size, a, b, self._eps)[0]
        if q is None:
            return None if b is None else b.expand(self._x.shape)
        if weight is None:
            return q if b is None else q + b
        return q * weight if b is None else torch.addcmul(b, q, weight)

    def curved(
        self,
        slope: Tensor,
        weight: Tensor | None,
        u: Tensor | None,
        q: Tensor | None,
        a: Tensor | None,
    ) -> Tensor | None:
        """Return the derivative in x along u and a."""
        if u is None or q is None:
            return None if a is None else self.projected(a * slope)
        normal = (self._x - self._mean) * self._scale
        weighted = slope if weight is None else slope * weight
        along_u = -self._scale * self._means(weighted * normal)
        along_slope = -self._scale * self._means(u * normal)
        inner = torch.addcmul(along_u * u, along_slope, weighted)
        if a is not None:
            inner = torch.addcmul(inner, a, slope)
        along_normal = -self._scale * self._means(weighted * q)
        return torch.addcmul(self.projected(inner), along_normal, normal)

    def _means(self, z: Tensor) -> Tensor:
        return z.mean(self._trailing, keepdim=True)


def _layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Tensor:
    """Normalize as `torch.layer_norm` does."""
    size = list(normalized_shape)
    alike = _alike(input, weight, bias)
    if not alike or not math.prod(input.shape) or list(input.shape[-len(size) :]) != size:
        return torch.layer_norm(input, size, weight, bias, eps, cudnn_enable)
    result: Tensor = _LayerNorm.apply(input, weight, bias, size, eps)  # type: ignore[no-untyped-call]
    return result


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Normalize as `torch.nn.functional.batch_norm` does."""
    statistics = running_mean, running_var
    alike = _alike(input, *statistics, weight, bias)
    if training and alike and torch.is_grad_enabled() and input.numel() > input.shape[1]:
        settings = statistics, momentum, eps
        result: Tensor = _BatchNorm.apply(input, weight, bias, *settings)  # type: ignore[no-untyped-call]
        return result
    if training or not alike or running_mean is None or running_var is None:
        return torch.nn.functional.batch_norm(
            input, *statistics, weight, bias, training, momentum, eps
        )
    factor = torch.rsqrt(running_var + eps)
    if weight is not None:
        factor = factor * weight
    shift = -running_mean * factor if bias is None else bias - running_mean * factor
    return torch.addcmul(_by_channel(shift, input), input, _by_channel(factor, input))


def _instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    batch_norm: Callable[..., Tensor] = _batch_norm,
) -> Tensor:
    """Normalize as `torch.nn.functional.instance_norm` does: every example is a batch."""
    none = running_mean is None and running_var is None and use_input_stats
    if not none or not math.prod(input.shape[2:]) > 1 or not _alike(input, weight, bias):
        return torch.nn.functional.instance_norm(
            input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps
        )
    examples, several = input.shape[0], input.flatten(0, 1)[None]
    w, b = (None if t is None else t.repeat(examples) for t in (weight, bias))
    return batch_norm(several, None, None, w, b, True, momentum, eps).reshape(input.shape)


def _alike(input: Tensor, *others: Tensor | None) -> bool:
    """Return whether all is of one dtype, and of which derivatives are written here."""
    given = (t for t in others if t is not None)
    return input.dtype in _DTYPES and all(t.dtype == input.dtype for t in given)


def _elementary_layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Tensor:
    """Normalize as `torch.layer_norm` does, with derivatives of any order."""
    size = list(normalized_shape)
    if not _alike(input, weight, bias) or list(input.shape[-len(size) :]) != size:
        return torch.layer_norm(input, size, weight, bias, eps, cudnn_enable)
    normal, _ = _standardized(input, _axes(input, size)[0], eps)
    scaled = normal if weight is None else normal * weight
    return scaled if bias is None else scaled + bias


def _elementary_batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Normalize as `torch.nn.functional.batch_norm` does, with derivatives of any order."""
    if not training:
        return _batch_norm(input, running_mean, running_var, weight, bias, eps=eps)
    if not _alike(input, weight, bias):
        return torch.nn.functional.batch_norm(
            input, running_mean, running_var, weight, bias, training, momentum, eps
        )
    normal, _ = _standardized(input, _all_but_channels(input), eps)
    scaled = normal if weight is None else normal * _by_channel(weight, input)
    return scaled if bias is None else scaled + _by_channel(bias, input)


_DTYPES = (torch.float32, torch.float64)  # others have statistics of another dtype

#: What to call in place of torch's own normalizations.
NORMALIZATIONS: dict[Any, Callable[..., Tensor]] = {
    torch.layer_norm: _layer_norm,
    torch.nn.functional.layer_norm: _layer_norm,
    torch.nn.functional.batch_norm: _batch_norm,
    torch.nn.functional.instance_norm: _instance_norm,
}

#: The same within transforms of torch.func, which know no functions with derivatives of their own.
ELEMENTARY: dict[Any, Callable[..., Tensor]] = {
    torch.layer_norm: _elementary_layer_norm,
    torch.nn.functional.layer_norm: _elementary_layer_norm,
    torch.nn.functional.batch_norm: _elementary_batch_norm,
    torch.nn.functional.instance_norm: partial(_instance_norm, batch_norm=_elementary_batch_norm),
}
