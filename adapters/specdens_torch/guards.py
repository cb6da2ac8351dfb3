"""Checks before the first product: a risk must be one fixed function of the parameters."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.utils.data import DataLoader, RandomSampler

_NORMS = nn.modules.batchnorm._NormBase  # batch norm and instance norm
_BATCH_NORMS = nn.modules.batchnorm._BatchNorm
_DROPOUTS = (
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
    nn.AlphaDropout,
    nn.FeatureAlphaDropout,
)


def check_modules(
    model: nn.Module, varying: Iterable[Tensor] = (), *, batch_statistics: bool = False
) -> None:
    """Refuse modules that are random, couple the examples of a batch, or change themselves.

    Parameters
    ----------
    model : torch.nn.Module
    varying : iterable of tensors
        The parameters that are differentiated for.
    batch_statistics : bool
        Whether batch norm may couple the examples of a batch, see `Risk`.

    Raises
    ------
    ValueError
        Naming the module and what to do about it; or if `batch_statistics` has no effect.
    """
    chosen = {id(parameter) for parameter in varying}
    for name, module in model.named_modules():
        problems = (*_problems(module, batch_statistics), *_missing_derivatives(module, chosen))
        for problem in problems:
            where = f"module {name!r} ({type(module).__name__})" if name else type(module).__name__
            msg = f"model cannot be analyzed: {where} {problem}."
            raise ValueError(msg)
    if batch_statistics and not any(_couples(module) for module in model.modules()):
        msg = (
            "batch_statistics=True, but no batch-norm layer of the model normalizes with the "
            "statistics of its batch; call train() on those that should, or leave the option out. "
            "Layers of your own that do so need regroup=False alone."
        )
        raise ValueError(msg)


def check_fixed_batches(data: Any) -> None:
    """Refuse a loader that makes up other batches in each pass, where batches matter.

    Raises
    ------
    ValueError
    """
    if isinstance(data, DataLoader) and isinstance(data.sampler, RandomSampler):
        msg = (
            "data is a DataLoader that shuffles, and with batch_statistics=True the split into "
            "batches is a part of the risk; pass shuffle=False, or list(loader) for one random "
            "split."
        )
        raise ValueError(msg)


def check_graph(losses: Tensor) -> None:
    """Refuse checkpoints that leave the parameters out of the graph, for they would count as zero.

    Raises
    ------
    ValueError
    """
    found = [losses.grad_fn]
    seen = set(found)
    while found:
        node = found.pop()
        if node is None:
            continue
        if node.name().endswith("CheckpointFunctionBackward"):
            msg = (
                "model uses torch.utils.checkpoint with use_reentrant=True, which hides its "
                "parameters from torch.autograd.grad; pass use_reentrant=False (in Hugging Face's "
                "transformers gradient_checkpointing_enable({'use_reentrant': False}))."
            )
            raise ValueError(msg)
        new = {parent for parent, _ in node.next_functions} - seen
        seen |= new
        found.extend(new)


def check_not_cached(model: nn.Module) -> None:
    """Refuse to evaluate a model whose parametrized weights are those of an earlier evaluation.

    Raises
    ------
    ValueError
    """
    if parametrize._cache_enabled and any(map(parametrize.is_parametrized, model.modules())):
        msg = (
            "torch.nn.utils.parametrize.cached() is active, so that the model would keep weights "
            "of other evaluations; leave its context before using a risk."
        )
        raise ValueError(msg)


def written_silently(model: nn.Module) -> list[str]:
    """Return the buffers that a forward pass changes without counting up their version."""
    return [
        f"{name}.{buffer}" if name else buffer
        for name, module in model.named_modules()
        if isinstance(module, _NORMS) and module.training
        for buffer in dict(module.named_buffers(recurse=False))
    ]


def _couples(module: nn.Module) -> bool:
    """Tell whether a module normalizes with the statistics of its batch."""
    return isinstance(module, _BATCH_NORMS) and (module.training or module.running_mean is None)


def _problems(module: nn.Module, batch_statistics: bool) -> Iterator[str]:
    if isinstance(module, _NORMS):
        yield from _problems_of_norms(module, batch_statistics)
    elif isinstance(module, _DROPOUTS):
        if module.training and module.p > 0:
            yield f"drops entries at random (p={module.p}); call model.eval() first"
    elif isinstance(module, nn.MultiheadAttention | nn.RNNBase):
        if module.training and module.dropout > 0:
            yield f"drops entries at random (dropout={module.dropout}); call model.eval() first"
    elif isinstance(module, nn.RReLU):
        if module.training:
            yield "has random slopes; call model.eval() first"
    elif isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.max_norm is not None:
        yield (
            f"rescales its own weights in every forward pass (max_norm={module.max_norm}); "
            "rescale them once and set max_norm=None"
        )
    elif isinstance(module, torch.jit.ScriptModule):
        yield (
            "is compiled by torch.jit, which keeps its parameters out of reach; pass the module "
            "that it was made from"
        )
    elif isinstance(module, nn.DataParallel):
        yield "copies itself to several devices in every forward pass; pass model.module"
    if module.training and _iterates_spectral_norm(module):
        yield (
            "changes its estimate of its weight's spectral norm in every forward pass, by a step "
            "that is not differentiated; call model.eval() first"
        )


def _problems_of_norms(module: _NORMS, batch_statistics: bool) -> Iterator[str]:
    choices = (
        "pass Risk(..., batch_statistics=True) for the statistics of the batches that data gives"
    )
    if isinstance(module, nn.SyncBatchNorm) and _couples(module):
        yield (
            "normalizes over processes, which cannot be differentiated twice; call model.eval() "
            "first, or use nn.BatchNorm1d, 2d or 3d"
        )
    elif batch_statistics:
        return
    elif isinstance(module, _BATCH_NORMS) and module.running_mean is None:
        yield (
            "has no running statistics, so that the examples of a batch depend on each other; "
            "build it with track_running_stats=True and call model.eval() after training, or "
            f"{choices}"
        )
    elif isinstance(module, _BATCH_NORMS) and module.training:
        yield (
            "is in train mode, so that the examples of a batch depend on each other and each "
            "forward pass changes its running statistics; call model.eval() first to normalize "
            f"with these, or {choices}"
        )
    elif module.training and module.track_running_stats:
        yield (
            "is in train mode and each forward pass would change its running statistics; "
            "call model.eval() first"
        )


def _missing_derivatives(module: nn.Module, chosen: set[int]) -> Iterator[str]:
    if isinstance(module, nn.EmbeddingBag) and id(module.weight) in chosen:
        yield (
            "has no second derivative in torch; use nn.Embedding and the sum, mean or maximum of "
            "what it gives, or leave its weight out of parameters"
        )


def _iterates_spectral_norm(module: nn.Module) -> bool:
    return _does(module, parametrizations._SpectralNorm, SpectralNorm)


def has_weight_norm(model: nn.Module) -> bool:
    """Tell whether weights of the model are made by weight norm, new or old."""
    return any(_does(m, parametrizations._WeightNorm, WeightNorm) for m in model.modules())


def _does(module: nn.Module, parametrization: type, hook: type) -> bool:
    """Tell whether a module is a parametrization, or has the hook that was used before these."""
    hooks = module._forward_pre_hooks.values()
    return isinstance(module, parametrization) or any(isinstance(h, hook) for h in hooks)


@dataclass(frozen=True)
class Totals:
    """What one pass over some data adds up to; equal (to rounding) in every pass."""

    examples: int = 0
    elements: int = 0
    chunks: int = 0
    weight: float = 0.0  # sum of the weights of all terms
    value: float = 0.0  # sum of weight times loss
    magnitude: float = 0.0  # sum of its absolute values, the scale for differences

    def __add__(self, other: Totals) -> Totals:
        return Totals(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def differs_from(self, other: Totals, rounding: Rounding) -> bool:
        """Tell whether value or weight differ by more than `rounding` explains."""
        tolerance = rounding.shared + rounding.single / max(1, self.examples) ** 0.5
        scale = max(self.magnitude, other.magnitude)
        weight_scale = max(abs(self.weight), abs(other.weight))
        return not (
            abs(self.value - other.value) <= tolerance * scale
            and abs(self.weight - other.weight) <= tolerance * weight_scale
        )


class Rounding(NamedTuple):
    """How much a sum of losses may change, relative to it, when only the order of operations does.

    The rounding of single losses averages out over the examples, and so does what random data do
    to the sum: both fall as one over the root of their number. A small part is shared by all.
    """

    single: float
    shared: float

    @classmethod
    def of(cls, dtypes: Iterable[torch.dtype], device: torch.device) -> Rounding:
        """Return what the coarsest of `dtypes` does on `device`."""
        epsilon = max(float(torch.finfo(dtype).eps) for dtype in dtypes)
        # Accelerators multiply float32 with 10-bit mantissas where they are allowed to.
        single = epsilon**0.5 if device.type == "cpu" else max(epsilon**0.5, 2.0**-5)
        return cls(single, 10 * epsilon)


def check_same_data(
    first: Totals, now: Totals, rounding: Rounding, *, same_parameters: bool
) -> None:
    """Refuse data that are not the same, in any order, in two passes.

    Raises
    ------
    ValueError
        With the numbers that differ.
    """
    differs = same_parameters and first.differs_from(now, rounding)
    if first.examples == now.examples and not differs:
        return
    msg = (
        f"data differ between two passes: {first.examples} examples with losses "
        f"{first.value:.8g} and weights {first.weight:.8g} in sum at first, then {now.examples} "
        f"with {now.value:.8g} and {now.weight:.8g}. Switch random augmentation and drop_last "
        "off, and sample without replacement; the order may differ, unless batches are kept "
        "(regroup=False, batch_statistics=True). If you changed the data yourself, call "
        "risk.refresh()."
    )
    raise ValueError(msg)


def check_repeats(
    first: Totals, again: Totals, rounding: Rounding, *, drew: bool, training: bool
) -> None:
    """Refuse a model or loss that is random, judged by two passes over the same examples.

    A forward pass in train mode that draws random numbers is refused even if the two agree: a layer
    that is seldom dropped would pass.

    Raises
    ------
    ValueError
        Saying which of the two was seen.
    """
    if first.differs_from(again, rounding):
        msg = (
            "model or loss is random or keeps a state: the same examples gave losses "
            f"{first.value:.8g} and then {again.value:.8g} in sum. Call model.eval() and switch "
            "dropout and sampling off."
        )
        raise ValueError(msg)
    if drew and training:
        msg = (
            "model is in train mode and its forward pass draws random numbers, as dropout does; "
            "call model.eval() first."
        )
        raise ValueError(msg)


def check_uncoupled(whole: Totals, halves: Totals, rounding: Rounding) -> None:
    """Refuse to regroup examples whose losses depend on the batch they are in.

    Raises
    ------
    ValueError
        Saying what the risk of the batch and of its halves is.
    """
    if not whole.differs_from(halves, rounding):
        return
    msg = (
        f"loss or model couples the examples of a batch: {whole.examples} examples have losses "
        f"{whole.value:.8g} and weights {whole.weight:.8g} in sum, but {halves.value:.8g} and "
        f"{halves.weight:.8g} when evaluated as two halves. Return one loss per example (not "
        "their mean), with outputs and targets of matching shapes and the batch on the first "
        "axis; if the coupling is meant, as in contrastive losses, Risk(..., regroup=False) "
        "keeps the batches that data gives."
    )
    raise ValueError(msg)


def check_finite(totals: Totals, divides: bool) -> None:
    """Refuse a risk that is not a finite number, or a mean of nothing.

    Raises
    ------
    ValueError
    """
    if not (abs(totals.value) < float("inf") and abs(totals.weight) < float("inf")):
        msg = (
            f"the risk is not finite: losses {totals.value} and weights {totals.weight} in sum; "
            "look for inputs, targets or parameters that are nan or infinite."
        )
        raise ValueError(msg)
    if divides and totals.weight == 0:
        msg = (
            "the weights of all terms sum to 0, so the mean loss is undefined; check "
            "ignore_index, class weights and padding, or use reduction='sum'."
        )
        raise ValueError(msg)
