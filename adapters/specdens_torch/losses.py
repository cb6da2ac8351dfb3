"""Losses as weighted terms: what torch's own losses and user functions mean, term by term.

A risk is (sum of weight * loss over all terms) / (sum of weights over all terms). torch's
``"mean"`` is that too, with weights that depend on the loss: class weights for class indices, one
per element for regression, one per example for ``"batchmean"``. Knowing them makes a risk
independent of how its data are split into batches.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812 (the name torch's own documentation uses)
from torch import Tensor, nn

from specdens_torch.language import NEXT_TOKEN_LAW, TOKEN_LAW, next_token_loss, token_loss
from specdens_torch.sampling import Law, SoftmaxRows, law_of
from specdens_torch.structures import logits_of


class Terms(NamedTuple):
    """The terms of a risk that one chunk of data contributes."""

    weighted: Tensor  # at least 1-d; weight times loss of every term
    weights: Tensor  # same shape, without gradient


@dataclass(frozen=True)
class TermLoss:
    r"""A loss as a function from a model's outputs and the targets to `Terms`.

    Attributes
    ----------
    terms : callable
        ``terms(outputs, targets)`` gives weighted losses and weights.
    divides : bool
        Whether the risk is divided by the sum of weights: False for ``reduction="sum"``.
    name : str
    tensors : tuple of tensors
        Class weights and the like, which a kept graph depends on.
    draws : callable, optional
        ``draws(outputs, targets)`` gives the shape of the uniform random numbers, all independent,
        that one sample takes. It and the next two are None for a loss that no predictive
        distribution belongs to.
    sampler : callable, optional
        ``sampler(outputs, targets, uniforms)`` draws one target for each term from the model's own
        predictive distribution: a pure function of float64 `uniforms` in (0, 1), without gradient.
    resampled : callable, optional
        ``resampled(outputs, targets, sampled)`` gives the losses of the terms at sampled targets,
        not multiplied by the weights, which remain those of the true targets. Terms that these
        ignore are zero. With g a term's gradient in the outputs, the average of
        :math:`w g g^T` over the samples is the Hessian of the weighted term in the outputs. The
        outputs of ``NLLLoss`` and ``BCELoss`` are (log-)probabilities already; there it is the
        Fisher matrix of the distribution, which is that Hessian in the logits before them.
    softmax : callable, optional
        ``softmax(outputs, targets)`` gives the logits of a softmax cross-entropy and what its
        Hessian in them is; None for other losses.
    """

    terms: Callable[[Any, Any], Terms]
    divides: bool
    name: str
    tensors: tuple[Tensor, ...] = ()
    draws: Callable[[Any, Any], torch.Size] | None = None
    sampler: Callable[[Any, Any, Tensor], Tensor] | None = None
    resampled: Callable[[Any, Any, Tensor], Tensor] | None = None
    softmax: Callable[[Any, Any], SoftmaxRows] | None = None


def as_term_loss(loss: Any) -> TermLoss:
    """Return what `loss` means, term by term.

    Parameters
    ----------
    loss : callable
        One of torch's losses (module, function, or `functools.partial` of a function) with its
        own meaning, or any function ``loss(outputs, targets)`` that returns one loss per example
        or term, or ``(losses, weights)``. Losses of torch take outputs that carry a tensor as
        ``logits``, too. A loss module of torch is taken as it is now, a user's module as it will
        be.

    Returns
    -------
    TermLoss

    Raises
    ------
    TypeError
        If `loss` cannot be called.
    ValueError
        If it is a loss of torch with a reduction, argument or kind that has no meaning term by
        term.
    """
    if not callable(loss):
        msg = f"loss has type {type(loss).__qualname__}; expected a function of (outputs, targets)."
        raise TypeError(msg)
    function, options = loss, {}
    if isinstance(loss, functools.partial):
        function, options = loss.func, dict(loss.keywords)
    if getattr(function, "__module__", None) == F.__name__ and function.__name__ in _FUNCTIONS:
        return _from_function(loss, function, options)
    if isinstance(loss, nn.Module):
        for kind, rule in _MODULES.items():
            # A subclass with a forward of its own is a user's function.
            if isinstance(loss, kind) and type(loss).forward is kind.forward:
                return _from_module(loss, kind.__name__, rule)
        if type(loss).__module__ == "torch.nn.modules.loss":
            raise ValueError(_no_rule(type(loss).__name__))
        tensors = (*loss.parameters(), *loss.buffers())
        return TermLoss(functools.partial(_user_terms, loss), True, type(loss).__name__, tensors)
    if getattr(function, "__module__", None) == F.__name__:
        raise ValueError(_no_rule(function.__name__))
    name = getattr(function, "__name__", type(function).__name__)
    tensors = tuple(v for v in options.values() if isinstance(v, Tensor))
    law = next((law for own, law in _LANGUAGE if loss is own), None) or ()
    return TermLoss(functools.partial(_user_terms, loss), True, name, tensors, *law)


_LANGUAGE: tuple[tuple[Any, Law], ...] = (
    (next_token_loss, NEXT_TOKEN_LAW),
    (token_loss, TOKEN_LAW),
)


def _no_rule(name: str) -> str:
    return (
        f"loss={name} has no known meaning term by term; pass a function of (outputs, targets) "
        "that returns one loss per example, for instance by calling it with reduction='none'."
    )


def _from_function(loss: Any, function: Any, options: dict[str, Any]) -> TermLoss:
    name = function.__name__
    legacy = [key for key in ("size_average", "reduce") if options.get(key) is not None]
    if legacy or (isinstance(loss, functools.partial) and loss.args):
        wrong = f"{legacy[0]}=" if legacy else "positional arguments"
        msg = f"loss={name} was given {wrong}; pass keywords only, and reduction= for mean or sum."
        raise ValueError(msg)
    rule = _FUNCTIONS[name]
    if rule is _per_element and name in _PER_BATCH_WEIGHT and options.get("weight") is not None:
        msg = (
            f"loss={name} was given weight=, which belongs to one batch; put the weights into the "
            "targets and return (losses, weights) from a function of your own."
        )
        raise ValueError(msg)
    reduction = _checked_reduction(name, options.pop("reduction", "mean"))
    per_term = functools.partial(function, **options, reduction="none")
    tensors = tuple(v for v in options.values() if isinstance(v, Tensor))
    terms = functools.partial(_torch_terms, per_term, rule, options, reduction, name)
    law = law_of(name, options) or ()
    return TermLoss(terms, reduction != "sum", name, tensors, *law)


def _from_module(loss: nn.Module, name: str, rule: Rule) -> TermLoss:
    reduction = _checked_reduction(name, loss.reduction)
    # A copy that shares the tensors, but not the dictionary that holds them: if the caller replaced
    # the class weights, the losses would use the new ones and their weights the old.
    per_term = copy.copy(loss)
    per_term._buffers = dict(loss._buffers)
    per_term.reduction = "none"  # type: ignore[assignment]
    keys = ("weight", "pos_weight", "ignore_index", "label_smoothing", "log_input")
    options = {key: getattr(loss, key, None) for key in keys}
    terms = functools.partial(_torch_terms, per_term, rule, options, reduction, name)
    tensors = (*loss.parameters(), *loss.buffers())
    law = law_of(name, options) or ()
    return TermLoss(terms, reduction != "sum", name, tensors, *law)


def _checked_reduction(name: str, reduction: Any) -> str:
    allowed = ("mean", "sum", "none") + ("batchmean",) * (name in ("KLDivLoss", "kl_div"))
    if reduction not in allowed:
        msg = f"loss={name} has reduction={reduction!r}; expected one of {', '.join(allowed)}."
        raise ValueError(msg)
    return str(reduction)


def _torch_terms(
    per_term: Callable[..., Tensor],
    rule: Rule,
    options: dict[str, Any],
    reduction: str,
    name: str,
    outputs: Any,
    targets: Any,
) -> Terms:
    """Evaluate a loss of torch without reduction and weigh its terms as its mean does."""
    arguments = [outputs, targets]
    if name in ("GaussianNLLLoss", "gaussian_nll_loss") and isinstance(outputs, tuple | list):
        arguments = [outputs[0], targets, *outputs[1:]]  # the model predicts (mean, variance)
    arguments[0] = logits = logits_of(arguments[0])
    if logits is None:
        msg = (
            f"loss={name} needs a tensor of outputs, or logits, but the model returned "
            f"{type(outputs).__qualname__}; pass a function of (outputs, targets) that picks the "
            "tensor out of it and returns one loss per example (reduction='none')."
        )
        raise TypeError(msg)
    if rule is _per_class:
        _check_layout(name, logits, targets)
    losses = per_term(*arguments)
    if reduction == "batchmean":
        losses = losses.flatten(1).sum(1) if losses.ndim > 1 else losses
    if losses.ndim == 0:
        losses = losses.reshape(1)
    return Terms(losses, rule(logits, targets, losses, options).detach())


def _check_layout(name: str, outputs: Tensor, targets: Any) -> None:
    """Refuse one label for each token: torch has the classes along the second axis."""
    shape = getattr(targets, "shape", None)
    along_last = outputs.ndim == 3 and shape == outputs.shape[:2]
    if along_last and shape != (outputs.shape[0], outputs.shape[2]):
        msg = (
            f"loss={name} got outputs {tuple(outputs.shape)} and targets {tuple(targets.shape)}; "
            "torch expects classes along axis 1. For one label at each of several tokens pass "
            "specdens_torch.token_loss, or next_token_loss for causal language models."
        )
        raise ValueError(msg)


Rule = Callable[[Tensor, Any, Tensor, dict[str, Any]], Tensor]


def _per_element(outputs: Tensor, targets: Any, losses: Tensor, options: dict[str, Any]) -> Tensor:
    """Weigh every term by one: the mean over the terms."""
    return torch.ones((), dtype=losses.dtype, device=losses.device).expand(losses.shape)


def _per_class(outputs: Tensor, targets: Any, losses: Tensor, options: dict[str, Any]) -> Tensor:
    """Weigh every term by the weight of its class, ignored ones by zero."""
    if targets.is_floating_point():  # class probabilities: torch divides by the number of rows
        return _per_element(outputs, targets, losses, options)
    ignore_index = options.get("ignore_index")
    ignored = targets == (-100 if ignore_index is None else ignore_index)
    weight = options.get("weight")
    if weight is None:
        weights = (~ignored).to(losses.dtype)
    else:
        weights = weight.to(losses.dtype)[targets.long().masked_fill(ignored, 0)]
        weights = weights.masked_fill(ignored, 0)
    return weights.reshape(losses.shape)


_PER_BATCH_WEIGHT = ("mse_loss", "l1_loss", "huber_loss", "smooth_l1_loss")
_MODULES: dict[type[nn.Module], Rule] = {
    nn.CrossEntropyLoss: _per_class,
    nn.NLLLoss: _per_class,
    nn.MSELoss: _per_element,
    nn.L1Loss: _per_element,
    nn.SmoothL1Loss: _per_element,
    nn.HuberLoss: _per_element,
    nn.BCELoss: _per_element,
    nn.BCEWithLogitsLoss: _per_element,
    nn.KLDivLoss: _per_element,
    nn.PoissonNLLLoss: _per_element,
    nn.GaussianNLLLoss: _per_element,
    nn.SoftMarginLoss: _per_element,
    nn.MultiLabelSoftMarginLoss: _per_element,
    nn.HingeEmbeddingLoss: _per_element,
}
_FUNCTIONS: dict[str, Rule] = {
    "cross_entropy": _per_class,
    "nll_loss": _per_class,
    "mse_loss": _per_element,
    "l1_loss": _per_element,
    "smooth_l1_loss": _per_element,
    "huber_loss": _per_element,
    "binary_cross_entropy": _per_element,
    "binary_cross_entropy_with_logits": _per_element,
    "kl_div": _per_element,
    "poisson_nll_loss": _per_element,
    "gaussian_nll_loss": _per_element,
    "soft_margin_loss": _per_element,
    "multilabel_soft_margin_loss": _per_element,
    "hinge_embedding_loss": _per_element,
}


def _user_terms(loss: Callable[[Any, Any], Any], outputs: Any, targets: Any) -> Terms:
    """Check what a user's function returned and multiply its weights in."""
    result = loss(outputs, targets)
    weights: Any = None
    if isinstance(result, tuple) and len(result) == 2:
        result, weights = result
    if not isinstance(result, Tensor):
        msg = (
            f"loss returned {type(result).__qualname__}; expected a tensor with one loss per "
            "example or term, or a pair (losses, weights) of tensors."
        )
        raise TypeError(msg)
    if result.ndim == 0:
        msg = (
            "loss returned a single number; return one loss per example (or term), for instance "
            "with reduction='none', so that every split of the data into batches has the same "
            "risk."
        )
        raise ValueError(msg)
    if not result.is_floating_point():
        msg = f"loss returned {result.dtype}; expected real floating-point losses."
        raise TypeError(msg)
    if weights is None:
        return Terms(result, _per_element(result, None, result, {}))
    if not isinstance(weights, Tensor) or weights.shape != result.shape:
        got = tuple(weights.shape) if isinstance(weights, Tensor) else type(weights).__qualname__
        msg = (
            f"loss returned weights {got} with losses {tuple(result.shape)}; the shapes must agree."
        )
        raise ValueError(msg)
    if weights.requires_grad:
        msg = (
            "loss returned weights that depend on the parameters, so the sum of weights would too; "
            "detach them, or multiply them into the losses and return weights of one."
        )
        raise ValueError(msg)
    weights = weights.to(result)
    return Terms(result * weights, weights)
