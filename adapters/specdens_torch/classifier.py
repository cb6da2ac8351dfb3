"""A classifier on the data of a risk: its errors, its surrogate loss, and what bounds demand."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 (the name torch's own documentation uses)
from torch import Tensor
from torch.func import functional_call

from specdens.certificates.checks import (
    check_center,
    check_class_range,
    check_class_shapes,
    check_rows,
    is_single_logit,
)
from specdens.certificates.fitting import MOST_AT_ONCE
from specdens_torch.risk import Risk
from specdens_torch.structures import Batch, join, logits_of, map_tensors, move, num_examples
from specdens_torch.values import risk_value


@dataclass(frozen=True, eq=False)
class Classifier:
    """The model of a risk as a function of its flat parameters, on data in memory.

    Attributes
    ----------
    risk : Risk
    inputs : nested tensors
        Of all examples.
    labels : tensor of shape (n,)
        Classes, or 0 and 1 of a single logit.
    num_classes : int
        2 for a single logit.
    binary : bool
        Whether there is a single logit.
    """

    risk: Risk
    inputs: Any
    labels: Tensor
    num_classes: int
    binary: bool

    @classmethod
    def of(cls, risk: Risk) -> Classifier:
        """Read the data, and check that bounds on the error can hold.

        Raises
        ------
        ValueError
            If the examples or their labels cannot be told apart, some are left out, or the model is
            not one fixed function.
        """
        if risk.processes is not None or risk.batch_statistics:
            msg = (
                "risk has a process group or batch statistics; a bound needs all examples in one "
                "process, each with a prediction of its own."
            )
            raise ValueError(msg)
        risk_value(risk)  # refuses dropout and whatever else is not one fixed function
        data = _joined(list(risk.source))
        device = risk.parameters.space.device
        inputs, targets = move(data.inputs, device), move(data.targets, device)
        number = num_examples(data)
        _check_complete(risk, number)
        first = Classifier(risk, inputs, targets, 0, False)
        with torch.no_grad():
            logits = first._logits(risk.parameters.ravel(), torch.arange(min(2, number or 0)))
        labels, binary = _labels(logits, targets, number)
        return cls(risk, inputs, labels, 2 if binary else logits.shape[1], binary)

    @property
    def num_examples(self) -> int:
        """The number n of examples."""
        return len(self.labels)

    def surrogate(self, parameters: Tensor, chosen: Tensor) -> Tensor:
        """Return the average surrogate loss of some examples, differentiable in the parameters.

        The logistic loss over ln 2, which is above the error everywhere, or cross-entropy over
        ln C; both are 1 where nothing is known.
        """
        logits = self._logits(parameters, chosen)
        labels = self.labels[chosen.to(self.labels.device)]
        if self.binary:
            return F.softplus((1 - 2 * labels) * logits.reshape(-1)).mean() / math.log(2)
        return F.cross_entropy(logits, labels) / math.log(self.num_classes)

    def errors(self, draws: Iterable[Tensor]) -> np.ndarray:
        """Return the fraction of all examples that each draw of the parameters gets wrong."""
        parts = torch.split(torch.arange(self.num_examples), MOST_AT_ONCE)
        with torch.no_grad():
            wrong = [
                torch.stack([self._wrong(parameters, chosen) for chosen in parts]).sum()
                for parameters in draws
            ]
        return torch.stack(wrong).cpu().double().numpy() / self.num_examples

    def _wrong(self, parameters: Tensor, chosen: Tensor) -> Tensor:
        """Count examples whose own class does not lead all others; ties and nan are errors."""
        logits = self._logits(parameters, chosen)
        labels = self.labels[chosen.to(self.labels.device)]
        if self.binary:
            margins = (2 * labels - 1) * logits.reshape(-1)
        else:
            own = logits.gather(1, labels[:, None])
            others = logits.scatter(1, labels[:, None], -torch.inf).amax(1)
            margins = own[:, 0] - others
        return (~(margins > 0)).sum()

    def _logits(self, parameters: Tensor, chosen: Tensor) -> Tensor:
        model, flat = self.risk.model, self.risk.parameters
        tensors = flat.tensors
        state = {name: p.detach() for name, p in model.named_parameters()}
        state |= {name: b.detach().clone() for name, b in model.named_buffers()}
        state |= {name: t.to(tensors[name].dtype) for name, t in flat.unravel(parameters).items()}
        inputs = map_tensors(lambda t: t[chosen.to(t.device)], self.inputs)
        if isinstance(inputs, Mapping):
            outputs = functional_call(model, state, (), dict(inputs))
        else:
            several = type(inputs) in (tuple, list)
            outputs = functional_call(model, state, tuple(inputs) if several else (inputs,))
        logits = logits_of(outputs)
        if logits is None:
            msg = f"model returns {type(outputs).__qualname__}; expected logits or an attribute."
            raise ValueError(msg)
        return logits


def check_prior(risk: Risk, prior_mean: Tensor | Mapping[str, Tensor]) -> Tensor:
    """Return the center of the prior as a flat vector, if the data cannot have determined it.

    Raises
    ------
    ValueError
        If it has another shape, is not finite, or equals the present parameters; or if anything
        else that the model learned from the data is not among the parameters that vary.
    """
    flat = risk.parameters
    if isinstance(prior_mean, Mapping):
        missing = [name for name in flat.names if name not in prior_mean]
        if missing:
            msg = f"prior_mean lacks {missing}; pass a copy of model.state_dict() before training."
            raise ValueError(msg)
        _check_others(risk, prior_mean)
        vector = flat.ravel({name: prior_mean[name] for name in flat.names})
    else:
        vector = torch.as_tensor(prior_mean).detach()
        if tuple(vector.shape) != (flat.size,):
            msg = (
                f"prior_mean has shape {tuple(vector.shape)}; expected ({flat.size},), "
                "risk.parameters.ravel() before training, or a state dict."
            )
            raise ValueError(msg)
        _check_running(risk)
    vector = vector.to(dtype=flat.space.working_dtype, device=flat.space.device).clone()
    check_center(
        finite=bool(torch.isfinite(vector).all()),
        trained=torch.equal(vector, flat.ravel().to(vector.dtype)),
        present="the present parameters",
        advice=", copied before training (copy.deepcopy(model.state_dict()), since a state dict "
        "refers to the parameters)",
    )
    return vector


def _check_others(risk: Risk, before: Mapping[str, Tensor]) -> None:
    """Refuse parameters and buffers that changed in training and have no posterior."""
    for name, tensor in risk.model.state_dict().items():
        if name in risk.parameters.slices or name not in before or not isinstance(tensor, Tensor):
            continue
        if not torch.equal(tensor.cpu(), before[name].cpu()) and tensor.is_floating_point():
            tied = any(tensor.data_ptr() == p.data_ptr() for p in risk.parameters.tensors.values())
            if not tied:
                msg = (
                    f"{name!r} differs from prior_mean but is not among the parameters that vary, "
                    "so that the bound would not hold: it learned from the data without being "
                    "counted. Select it with Risk(..., parameters=), or use a layer without "
                    "running statistics, such as GroupNorm."
                )
                raise ValueError(msg)


def _check_running(risk: Risk) -> None:
    for name, module in risk.model.named_modules():
        if getattr(module, "running_mean", None) is not None:
            msg = (
                f"model has running statistics in {name or 'itself'!r} ({type(module).__name__}), "
                "which training takes from the data without a prior, so that the bound would not "
                "hold; use GroupNorm, or pass prior_mean as a state dict to show that they are "
                "still those from before."
            )
            raise ValueError(msg)


def _joined(batches: list[Batch]) -> Batch:
    full = [batch for batch in batches if num_examples(batch) != 0]
    check_rows(map(num_examples, full), "tensors")
    return join(full)


def _check_complete(risk: Risk, number: int | None) -> None:
    """Refuse a loader that leaves examples out: the model has seen more than the bound counts."""
    loader = risk.source.data
    dataset = getattr(loader, "dataset", None)
    size = len(dataset) if dataset is not None and hasattr(dataset, "__len__") else number
    if size != number:
        msg = (
            f"data give {number} examples in a pass and their data set has {size}; n of the risk "
            "and of the bound must be the same, so pass drop_last=False and no sampler that "
            "repeats or leaves out examples."
        )
        raise ValueError(msg)


def _labels(logits: Tensor, targets: Any, number: int | None) -> tuple[Tensor, bool]:
    """Return labels (n,) as integers or, for a single logit, 0 and 1, and whether it is one."""
    if not isinstance(targets, Tensor) or targets.shape[:1].numel() != number:
        msg = f"targets have type {type(targets).__qualname__}; expected a tensor of labels."
        raise ValueError(msg)
    flat = targets.reshape(-1) if targets.ndim <= 2 else targets
    if is_single_logit(logits.shape) and len(flat) == number:
        negative = 0 if (flat == 0).any() else -1
        if not ((flat == 1) | (flat == negative)).all():
            found = sorted(set(flat.tolist()))[:5]
            msg = f"labels of a single logit are {found}; expected -1 and 1, or 0 and 1."
            raise ValueError(msg)
        return (flat == 1).to(logits.dtype), True
    whole = not targets.is_floating_point() and targets.dtype != torch.bool
    shapes = tuple(logits.shape), tuple(targets.shape)
    check_class_shapes(*shapes, dtype=targets.dtype, whole=whole)
    check_class_range(int(targets.min()), int(targets.max()), logits.shape[1])
    return targets.to(torch.int64), False
