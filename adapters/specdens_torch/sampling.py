r"""Targets drawn from a model's own predictive distribution, for Fisher matrices.

The distribution of a loss is chosen so that the loss :math:`\ell_s` at a sampled target :math:`s`
satisfies :math:`E_s[\nabla \ell_s \nabla \ell_s^T] = \nabla^2 \ell` in the outputs: the average
outer product of sampled gradients is the generalized Gauss-Newton matrix. A loss whose Hessian is
:math:`h` times that of its distribution's negative log-likelihood (class weights with label
smoothing, weights of positive examples) has its sampled loss multiplied by :math:`\sqrt h`.

References
----------
Martens (2020), New insights and perspectives on the natural gradient method, J. Mach. Learn. Res.
21(146), sections 8 and 9 (arXiv 1412.1193).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812 (the name torch's own documentation uses)
from torch import Tensor

from specdens_torch.state import wide_dtype
from specdens_torch.structures import logits_of

_MOST_ENTRIES = 2**22  # of probabilities in double precision at a time: 32 MiB
Settings = Mapping[str, Any]


class SoftmaxRows(NamedTuple):
    r"""Logits z whose weighted loss has the Hessian :math:`\kappa (\mathrm{diag}\,p - p p^\top)`.

    p is the softmax of a row of z.
    """

    logits: Tensor
    axis: int  # of the classes
    factor: Tensor  # kappa of every row, of the logits' shape without that axis


class Law(NamedTuple):
    """A predictive distribution, as pure functions of a model's outputs.

    Uniforms and samples have the examples along the first axis; every term takes equally many
    uniforms, and those of one term lie next to each other. So the numbers at the same place of the
    flattened data belong to the same term, however the data are cut.
    """

    draws: Callable[[Any, Any], torch.Size]  # (outputs, targets) -> shape of the uniforms
    sampler: Callable[[Any, Any, Tensor], Tensor]  # (outputs, targets, uniforms) -> sampled
    resampled: Callable[[Any, Any, Tensor], Tensor]  # (outputs, targets, sampled) -> losses
    softmax: Callable[[Any, Any], SoftmaxRows] | None = None  # of softmax cross-entropy


def law_of(name: str, settings: Settings) -> Law | None:
    """Return the distribution of torch's loss called `name`, or None if it has none.

    Parameters
    ----------
    name : str
        A class of `torch.nn` or a function of `torch.nn.functional`.
    settings : mapping
        The keywords or attributes of the loss.

    Returns
    -------
    Law or None
    """
    build = _LAWS.get(name)
    weight = settings.get("weight")
    if settings.get("label_smoothing") and weight is not None and not bool((weight > 0).all()):
        return None  # smoothed terms of weight zero have curvature that no weighted draw can give
    return None if build is None else build(settings)


def sample_classes(logits: Tensor, uniforms: Tensor) -> Tensor:
    """Invert the distribution function of ``softmax(logits)`` at one uniform for each row.

    Parameters
    ----------
    logits : tensor of shape (..., C)
    uniforms : tensor of shape (...)
        Numbers in (0, 1).

    Returns
    -------
    tensor of shape (...)
        Classes as int64; one with probability zero is never drawn.
    """
    rows = logits.detach().flatten(0, -2) if logits.ndim > 1 else logits.detach()[None]
    wide = wide_dtype(rows.device)
    levels = uniforms.to(device=rows.device, dtype=wide).reshape(-1, 1)
    classes = torch.empty(levels.shape, dtype=torch.int64, device=rows.device)
    step = max(1, _MOST_ENTRIES // logits.shape[-1])
    for start in range(0, len(rows), step):
        some = slice(start, start + step)
        cumulative = torch.softmax(rows[some], -1, dtype=wide).cumsum(-1)
        level = levels[some] * cumulative[:, -1:]  # the sum of probabilities, rounded
        classes[some] = torch.searchsorted(cumulative, level)  # the first that reaches the level
    return classes.reshape(logits.shape[:-1])


def _tensor(outputs: Any) -> Tensor:
    logits = logits_of(outputs)
    if logits is None:
        msg = f"outputs have type {type(outputs).__qualname__}; expected a tensor, or logits."
        raise TypeError(msg)
    return logits


def _class_axis(outputs: Tensor) -> int:
    return 1 if outputs.ndim > 1 else 0


def _categorical(log_likelihood: Callable[..., Tensor], settings: Settings) -> Law:
    """One class for each term, of outputs (N, C, ...); torch's layout."""

    def draws(outputs: Any, targets: Any) -> torch.Size:
        shape = list(_tensor(outputs).shape)
        del shape[_class_axis(_tensor(outputs))]
        return torch.Size(shape)

    def sampler(outputs: Any, targets: Any, uniforms: Tensor) -> Tensor:
        logits = _tensor(outputs)
        return sample_classes(logits.movedim(_class_axis(logits), -1), uniforms)

    def resampled(outputs: Any, targets: Any, sampled: Tensor) -> Tensor:
        logits = _tensor(outputs)
        factor = _class_factor(logits, targets, settings).to(logits)
        losses = factor.sqrt() * log_likelihood(logits, sampled, reduction="none")
        return losses if losses.ndim else losses.reshape(1)

    def softmax(outputs: Any, targets: Any) -> SoftmaxRows:
        logits = _tensor(outputs)
        factor = _class_factor(logits, targets, settings) * _class_weight(targets, settings)
        return SoftmaxRows(logits, _class_axis(logits), factor)

    is_softmax = log_likelihood is F.cross_entropy
    return Law(draws, sampler, resampled, softmax if is_softmax else None)


def _class_weight(targets: Tensor, settings: Settings) -> Tensor | float:
    """Return the weight of every term with a class for its target, whatever for ignored ones."""
    weight = settings.get("weight")
    if weight is None or targets.is_floating_point():
        return 1.0
    own: Tensor = weight[targets.long().clamp(0, len(weight) - 1)]
    return own


def _class_factor(outputs: Tensor, targets: Tensor, settings: Settings) -> Tensor:
    r"""Return h of ∇²ℓ = h (diag p - p pᵀ) for the loss of every term without its weight.

    With targets q, class weights w and smoothing ε, ℓ = -Σ_c w_c q̃_c log p_c where
    q̃ = (1 - ε) q + ε / C, hence h = Σ_c w_c q̃_c. Terms of class y have the weight w_y.
    """
    weight, smoothing = settings.get("weight"), settings.get("label_smoothing") or 0.0
    axis = _class_axis(outputs)
    if targets.is_floating_point():
        mixed = (1 - smoothing) * targets + smoothing / outputs.shape[axis]
        mixed = mixed.movedim(axis, -1)
        return mixed.sum(-1) if weight is None else mixed @ weight.to(mixed)
    ignore_index = settings.get("ignore_index")
    kept = targets != (-100 if ignore_index is None else ignore_index)
    if weight is None or not smoothing:
        return kept
    own = weight[targets.long().where(kept, 0)]
    return ((1 - smoothing) + smoothing * weight.mean() / own).where(kept, 0.0)


def _per_entry(
    probability: Callable[[Tensor], Tensor],
    loss: Callable[[Tensor, Tensor], Tensor],
    factor: Callable[[Tensor, Any], Any],
    values: tuple[float, float] = (0.0, 1.0),
) -> Law:
    """One of two values for each entry of the outputs, the second with `probability`."""

    def draws(outputs: Any, targets: Any) -> torch.Size:
        return _tensor(outputs).shape

    def sampler(outputs: Any, targets: Any, uniforms: Tensor) -> Tensor:
        logits = _tensor(outputs).detach()
        wide = logits.to(wide_dtype(logits.device))
        low, high = (torch.full_like(logits, value) for value in values)
        return torch.where(uniforms.to(wide) < probability(wide), high, low)

    def resampled(outputs: Any, targets: Any, sampled: Tensor) -> Tensor:
        logits = _tensor(outputs)
        losses = loss(logits, sampled) * factor(logits, targets)
        return losses if losses.ndim else losses.reshape(1)

    return Law(draws, sampler, resampled)


def _bernoulli(settings: Settings) -> Law:
    weight, positive = settings.get("weight"), settings.get("pos_weight")

    def factor(outputs: Tensor, targets: Tensor) -> Tensor:  # ∇²ℓ = w (r y + 1 - y) σ (1 - σ)
        y = targets.to(outputs)
        curvature = torch.ones_like(y) if positive is None else positive.to(y) * y + 1 - y
        return (curvature if weight is None else weight.to(y) * curvature).sqrt()

    loss = functools.partial(F.binary_cross_entropy_with_logits, reduction="none")
    return _per_entry(torch.sigmoid, loss, factor)


def _bernoulli_of_probabilities(settings: Settings) -> Law:
    weight = settings.get("weight")

    def factor(outputs: Tensor, targets: Any) -> Any:
        return 1.0 if weight is None else weight.to(outputs).sqrt()

    return _per_entry(
        lambda p: p, functools.partial(F.binary_cross_entropy, reduction="none"), factor
    )


def _signs(settings: Settings) -> Law:
    """The values -1 and 1 of ``SoftMarginLoss``, whose loss is log(1 + exp(-y f))."""
    loss = functools.partial(F.soft_margin_loss, reduction="none")
    return _per_entry(torch.sigmoid, loss, lambda outputs, targets: 1.0, (-1.0, 1.0))


def _several_labels(settings: Settings) -> Law:
    """C independent labels; the loss of a term is their average, so each has the factor w_c / C."""
    weight = settings.get("weight")

    def loss(outputs: Tensor, sampled: Tensor) -> Tensor:
        factor = torch.ones_like(outputs) if weight is None else weight.to(outputs)
        losses = F.binary_cross_entropy_with_logits(outputs, sampled, reduction="none")
        return ((factor / outputs.shape[-1]).sqrt() * losses).sum(-1)

    return _per_entry(torch.sigmoid, loss, lambda outputs, targets: 1.0)


def _gaussian(settings: Settings) -> Law:
    """Normal targets s around the outputs f, of variance 1/2: ∇²(f - s)² = 2 = E[4 (f - s)²]."""

    def draws(outputs: Any, targets: Any) -> torch.Size:
        return (_tensor(outputs).detach() - targets).shape

    def sampler(outputs: Any, targets: Any, uniforms: Tensor) -> Tensor:
        center = _tensor(outputs).detach()
        wide = wide_dtype(center.device)
        normal = torch.special.ndtri(uniforms.to(device=center.device, dtype=wide))
        return (center.to(wide) + normal * 0.5**0.5).to(center.dtype)

    def resampled(outputs: Any, targets: Any, sampled: Tensor) -> Tensor:
        losses = (_tensor(outputs) - sampled).square()
        return losses if losses.ndim else losses.reshape(1)

    return Law(draws, sampler, resampled)


def _poisson(settings: Settings) -> Law | None:
    """Counts of rate e^f: e^f - s f has the curvature e^f, the variance of s."""
    if settings.get("log_input") is False:
        return None  # the curvature in a rate depends on the true count

    def sampler(outputs: Any, targets: Any, uniforms: Tensor) -> Tensor:
        logits = _tensor(outputs).detach()
        rate = logits.to(wide_dtype(logits.device)).exp()
        return _poisson_quantile(rate, uniforms.to(rate)).to(logits.dtype)

    def resampled(outputs: Any, targets: Any, sampled: Tensor) -> Tensor:
        losses = F.poisson_nll_loss(_tensor(outputs), sampled, reduction="none")
        return losses if losses.ndim else losses.reshape(1)

    return Law(lambda outputs, targets: _tensor(outputs).shape, sampler, resampled)


def _poisson_quantile(rate: Tensor, uniforms: Tensor) -> Tensor:
    """Return the smallest count k with P(X <= k) = Q(k + 1, rate) >= u, by bisection.

    Q is the regularized upper incomplete gamma function (https://dlmf.nist.gov/8.2).
    """
    below, above = torch.full_like(rate, -1.0), (rate + 40 * rate.sqrt() + 100).ceil()
    middle = ((below + above) / 2).floor()
    while bool(((below < middle) & (middle < above)).any()):
        reached = torch.special.gammaincc(middle + 1, rate) >= uniforms
        below, above = middle.where(~reached, below), middle.where(reached, above)
        middle = ((below + above) / 2).floor()
    return above


_LAWS: dict[str, Callable[[Settings], Law | None]] = {
    "CrossEntropyLoss": functools.partial(_categorical, F.cross_entropy),
    "cross_entropy": functools.partial(_categorical, F.cross_entropy),
    "NLLLoss": functools.partial(_categorical, F.nll_loss),
    "nll_loss": functools.partial(_categorical, F.nll_loss),
    "BCEWithLogitsLoss": _bernoulli,
    "binary_cross_entropy_with_logits": _bernoulli,
    "BCELoss": _bernoulli_of_probabilities,
    "binary_cross_entropy": _bernoulli_of_probabilities,
    "MSELoss": _gaussian,
    "mse_loss": _gaussian,
    "PoissonNLLLoss": _poisson,
    "poisson_nll_loss": _poisson,
    "SoftMarginLoss": _signs,
    "soft_margin_loss": _signs,
    "MultiLabelSoftMarginLoss": _several_labels,
    "multilabel_soft_margin_loss": _several_labels,
}
