"""Layers whose matrix is a sum of Kronecker products, and what their weight multiplies."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F  # noqa: N812 (the name torch's own documentation uses)
from torch import Tensor, nn

_KINDS = nn.Linear | nn.Conv1d | nn.Conv2d


def checked_layer(model: nn.Module, layer: str, *, bias: bool) -> Any:
    """Return the module of that name if its matrix is a sum of Kronecker products."""
    named = dict(model.named_modules(remove_duplicate=False))
    possible = [name for name, module in named.items() if isinstance(module, _KINDS)]
    module = named.get(layer) if isinstance(layer, str) else None
    if module is None:
        msg = f"layer={layer!r} is no module of the model; the layers are {possible}."
        raise ValueError(msg)
    if isinstance(module, nn.MultiheadAttention):
        reason = "holds three projections in one in_proj_weight and calls no module for them; "
        reason += "write the attention with one nn.Linear for each projection"
    elif not isinstance(module, _KINDS):
        reason = f"is not nn.Linear, nn.Conv1d or nn.Conv2d; the layers are {possible}"
    elif not isinstance(module, nn.Linear) and module.groups != 1:
        reason = f"has groups={module.groups}: each group has inputs of its own, and the block is "
        reason += "no Kronecker product over all channels"
    elif not isinstance(module._parameters.get("weight"), nn.Parameter):
        reason = "has a weight that is computed from others (a parametrization); remove it"
    elif not any(_computes_as(module, kind) for kind in (nn.Linear, nn.Conv1d, nn.Conv2d)):
        reason = "has a forward of its own, which may do something else than multiply by its weight"
    elif bias and module.bias is None:
        reason = "has no bias; pass bias=False"
    else:
        _check_not_tied(model, layer, module, bias=bias)
        return module
    msg = f"layer={layer!r} of type {type(module).__name__} {reason}."
    raise ValueError(msg)


def _computes_as(module: nn.Module, kind: Any) -> bool:
    """Tell whether a module of a subclass maps inputs to outputs as torch's own does."""
    names = ("forward", "_conv_forward")
    own = type(module)
    return all(getattr(own, name, None) is getattr(kind, name, None) for name in names)


def _check_not_tied(model: nn.Module, layer: str, module: nn.Module, *, bias: bool) -> None:
    own = [module.weight, module.bias] if bias else [module.weight]
    for name, other in model.named_modules():
        tied = [p for p in other._parameters.values() if any(p is q for q in own)]
        if tied and other is not module:
            msg = (
                f"layer={layer!r} shares a parameter with the module {name!r}; Kronecker factors "
                "of one layer would leave out what the other does with it."
            )
            raise ValueError(msg)


def unfolded(module: Any, x: Tensor) -> Tensor:
    """Return what the rows of the weight multiply at every position, (N, S, d)."""
    if isinstance(module, nn.Linear):
        return x.reshape(len(x), -1, x.shape[-1])
    size, step, spread = module.kernel_size, module.stride, module.dilation
    pads: list[int] = []  # of the last axis first, as torch.nn.functional.pad has it
    for axis in reversed(range(len(size))):
        if module.padding == "same":
            total = spread[axis] * (size[axis] - 1)
            pads += [total // 2, total - total // 2]
        else:
            pads += [0 if module.padding == "valid" else module.padding[axis]] * 2
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    x = F.pad(x, pads, mode=mode)
    if len(size) == 1:
        x, size, step, spread = x[:, :, None], (1, *size), (1, *step), (1, *spread)
    return F.unfold(x, size, dilation=spread, stride=step).transpose(1, 2)


def positions(z: Tensor, module: nn.Module) -> Tensor:
    """Return pre-activations, or derivatives in them, as (N, S, m)."""
    if isinstance(module, nn.Linear):
        return z.reshape(len(z), -1, z.shape[-1])
    return z.flatten(2).transpose(1, 2)
