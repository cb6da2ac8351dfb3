"""Which parameters of a model a matrix is about: names, glob patterns, modules or tensors."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

Selector: TypeAlias = str | nn.Module | Tensor
Selection: TypeAlias = Selector | Iterable[Selector] | None


def select_parameters(model: Any, parameters: Any = None) -> dict[str, nn.Parameter]:
    """Return the selected parameters by name, each once, in the model's order.

    Parameters
    ----------
    model : torch.nn.Module
    parameters : str, module, tensor, or several of these, optional
        None selects what is trainable (``requires_grad``). Whatever is named is selected, frozen
        or not: a parameter's name, a glob pattern over names such as ``"layers.*.weight"``, a
        submodule (all its parameters), or a parameter itself.

    Raises
    ------
    ValueError
        If a selector matches nothing, nothing is selected, or a selected parameter is not real
        floating point or has no shape yet.
    TypeError
        If a selector is of another type.
    """
    if not isinstance(model, nn.Module):
        msg = f"model has type {type(model).__qualname__}; expected a torch.nn.Module."
        raise TypeError(msg)
    if parameters is None:
        chosen = {id(p) for p in model.parameters() if p.requires_grad}
    else:
        single = isinstance(parameters, str | nn.Module | Tensor)
        if not single and not isinstance(parameters, Iterable):
            msg = (
                f"parameters has type {type(parameters).__qualname__}; expected names, glob "
                "patterns, modules or tensors, one or a list."
            )
            raise TypeError(msg)
        selectors = [parameters] if single else list(parameters)
        chosen = {key for selector in selectors for key in _matches(model, selector)}
    selected = {name: p for name, p in model.named_parameters() if id(p) in chosen}
    if not selected:
        advice = (
            "the model has no parameter with requires_grad=True; name those you mean"
            if parameters is None
            else "name at least one"
        )
        msg = f"parameters={parameters!r} selects nothing: {advice}."
        raise ValueError(msg)
    for name, parameter in selected.items():
        _check_usable(name, parameter)
    return selected


def _matches(model: nn.Module, selector: Any) -> set[int]:
    """Return the identities of the parameters that `selector` names."""
    # Every name of a tied parameter counts, so duplicates are kept here and merged by identity.
    named = list(model.named_parameters(remove_duplicate=False))
    if isinstance(selector, str):
        return _matches_name(named, selector)
    known = {id(p) for _, p in named}
    if isinstance(selector, nn.Module):
        found = {id(p) for p in selector.parameters()}
        what = f"the module {type(selector).__name__}"
        if not found:
            msg = f"parameters names {what}, which has no parameters."
            raise ValueError(msg)
    elif isinstance(selector, Tensor):
        found = {id(selector)}
        what = f"a tensor of shape {tuple(selector.shape)}"
    else:
        msg = (
            f"parameters holds an item of type {type(selector).__qualname__}; expected a name, a "
            "glob pattern, a module or one of the model's parameters."
        )
        raise TypeError(msg)
    if not found <= known:
        msg = f"parameters names {what}, which is not part of the model; pass a part of this model."
        raise ValueError(msg)
    return found


def _matches_name(named: list[tuple[str, nn.Parameter]], pattern: str) -> set[int]:
    exact = {id(p) for name, p in named if name == pattern}
    found = exact or {id(p) for name, p in named if fnmatchcase(name, pattern)}
    if not found:
        names = [name for name, _ in named]
        close = [name for name in names if name.startswith(f"{pattern}.")]
        close = close or difflib.get_close_matches(pattern, names, n=3, cutoff=0.4) or names[:5]
        msg = (
            f"parameters={pattern!r} matches no parameter of the model; close to it: "
            f"{', '.join(map(repr, close[:5])) or 'none, the model has no parameters'}."
        )
        raise ValueError(msg)
    return found


def _check_usable(name: str, parameter: Any) -> None:
    if nn.parameter.is_lazy(parameter):
        msg = f"parameter {name!r} has no shape yet; call the model once before selecting it."
        raise ValueError(msg)
    if not parameter.dtype.is_floating_point:
        kind = str(parameter.dtype).removeprefix("torch.")
        msg = (
            f"parameter {name!r} is {kind}; curvature is defined for real floating-point "
            "parameters, select others with parameters=."
        )
        raise ValueError(msg)
    if parameter.device.type == "meta":
        msg = f"parameter {name!r} is on the meta device and has no values; load the model first."
        raise ValueError(msg)


def promoted_dtype(tensors: Iterable[Tensor]) -> torch.dtype:
    """Return the dtype that holds every one of `tensors` (float16 with bfloat16 makes float32)."""
    return widest(t.dtype for t in tensors)


def widest(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """Return the dtype that holds numbers of every one of `dtypes`."""
    return functools.reduce(torch.promote_types, dtypes)
