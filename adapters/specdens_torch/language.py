"""Losses of language models, one for each token, padded tokens with weight zero."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 (the name torch's own documentation uses)
from torch import Tensor

from specdens_torch.sampling import Law, SoftmaxRows, sample_classes
from specdens_torch.structures import logits_of

IGNORED = -100  # the label that Hugging Face's collators give to padding, and torch's default


def next_token_loss(outputs: Any, labels: Any) -> tuple[Tensor, Tensor]:
    r"""Return the loss of every next token, :math:`-\log p(y_{t+1} \mid y_1, ..., y_t)`.

    The loss of causal language models, as in ``Risk(model, next_token_loss, loader)``. The shift by
    one position happens here: labels are the tokens themselves. A risk divides by the number of
    tokens that count, in all data together, so padding and the split into batches do not matter.

    Parameters
    ----------
    outputs : tensor of shape (N, T, V), or an object or mapping that carries it as ``logits``
        Such as the outputs of a Hugging Face model called without labels.
    labels : tensor of shape (N, T), pair (labels, attention_mask), or mapping with these keys
        Token t + 1 is the target of position t. The targets that are -100, or where the attention
        mask is zero, have weight zero.

    Returns
    -------
    losses : tensor of shape (N, T - 1)
        In float32 if the logits have half precision.
    weights : tensor of shape (N, T - 1)
        One for the targets that count, zero for the others.

    Raises
    ------
    TypeError
        If there are no logits, or labels are not integers.
    ValueError
        If the shapes do not fit.

    References
    ----------
    Radford et al. (2019), Language models are unsupervised multitask learners, eq. 1.

    Examples
    --------
    A uniform prediction of 4 tokens costs log 4; the last token of the second text is padding:

    >>> labels = torch.tensor([[1, 2, 3], [1, 0, -100]])
    >>> losses, weights = next_token_loss(torch.zeros(2, 3, 4), labels)
    >>> losses
    tensor([[1.3863, 1.3863], [1.3863, 0.0000]])
    >>> weights
    tensor([[1., 1.], [1., 0.]])
    """
    # One softmax over all positions: leaving out the last one first would copy the logits.
    losses, weights = token_loss(outputs, following(labels_of(labels)))
    return losses[:, :-1], weights[:, :-1]


def token_loss(outputs: Any, labels: Any) -> tuple[Tensor, Tensor]:
    r"""Return the loss of every token, :math:`-\log p_t(y_t)`, without a shift.

    For masked language models and the classification of tokens, as in
    ``Risk(model, token_loss, loader)``. Encoder-decoder models need ``decoder_input_ids`` among
    their inputs, because they do not see the labels.

    Parameters
    ----------
    outputs : tensor of shape (N, T, V), or an object or mapping that carries it as ``logits``
        Such as the outputs of a Hugging Face model called without labels.
    labels : tensor of shape (N, T), pair (labels, attention_mask), or mapping with these keys
        The targets that are -100, or where the attention mask is zero, have weight zero.

    Returns
    -------
    losses : tensor of shape (N, T)
        In float32 if the logits have half precision.
    weights : tensor of shape (N, T)
        One for the targets that count, zero for the others.

    Raises
    ------
    TypeError
        If there are no logits, or labels are not integers.
    ValueError
        If the shapes do not fit.

    References
    ----------
    Devlin et al. (2019), BERT, section 3.1 (arXiv 1810.04805).

    Examples
    --------
    >>> losses, weights = token_loss(torch.zeros(1, 2, 4), torch.tensor([[3, -100]]))
    >>> losses, weights
    (tensor([[1.3863, 0.0000]]), tensor([[1., 0.]]))
    """
    logits, labels = _logits(outputs), labels_of(labels)
    if logits.ndim != 3 or labels.shape != logits.shape[:2]:
        msg = (
            f"logits have shape {tuple(logits.shape)} and labels {tuple(labels.shape)}; expected "
            "(N, T, V) and (N, T), one score for each of V tokens and one label at T positions."
        )
        raise ValueError(msg)
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    losses = F.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), reduction="none", ignore_index=IGNORED
    )
    return losses.view(labels.shape), (labels != IGNORED).to(losses.dtype)


def _logits(outputs: Any) -> Tensor:
    logits = logits_of(outputs)
    if logits is None:
        msg = (
            f"the model returned {type(outputs).__qualname__}; expected a tensor of logits "
            "(N, T, V), or something that carries it as .logits or under 'logits'."
        )
        raise TypeError(msg)
    return logits


def labels_of(labels: Any) -> Tensor:
    """Return labels as int64, -100 wherever an attention mask that comes with them is zero."""
    mask = None
    if isinstance(labels, Mapping) and "labels" in labels:
        labels, mask = labels["labels"], labels.get("attention_mask")
    elif isinstance(labels, tuple | list) and len(labels) == 2:
        labels, mask = labels
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.is_complex():
        got = labels.dtype if isinstance(labels, Tensor) else type(labels).__qualname__
        msg = (
            f"labels are {got}; expected an integer tensor (N, T), a pair (labels, "
            "attention_mask), or a mapping with these keys."
        )
        raise TypeError(msg)
    labels = labels.long()
    if mask is None:
        return labels
    if mask.shape != labels.shape:
        msg = (
            f"attention_mask has shape {tuple(mask.shape)} and labels {tuple(labels.shape)}; "
            "expected one number for each label, zero at padding."
        )
        raise ValueError(msg)
    return labels.masked_fill(mask == 0, IGNORED)


def following(labels: Tensor) -> Tensor:
    """Return at each position the label of the next one; after the last one there is none."""
    if labels.ndim < 2:
        msg = (
            f"labels have shape {tuple(labels.shape)}; expected (N, T), T labels in each of N rows."
        )
        raise ValueError(msg)
    return F.pad(labels, (0, 1), value=IGNORED)[:, 1:]


def _kept(losses: Tensor, labels: Tensor) -> Tensor:
    return losses.where(labels != IGNORED, 0.0)


def _resampled_next(outputs: Any, labels: Any, sampled: Tensor) -> Tensor:
    losses, _ = next_token_loss(outputs, F.pad(sampled, (1, 0)))
    return _kept(losses, labels_of(labels)[:, 1:])


def _softmax(outputs: Any, labels: Tensor) -> SoftmaxRows:
    return SoftmaxRows(_logits(outputs), -1, labels != IGNORED)


NEXT_TOKEN_LAW = Law(
    draws=lambda outputs, labels: _logits(outputs)[:, 1:, 0].shape,
    sampler=lambda outputs, labels, uniforms: sample_classes(_logits(outputs)[:, :-1], uniforms),
    resampled=_resampled_next,
    softmax=lambda outputs, labels: _softmax(outputs, following(labels_of(labels))),
)
TOKEN_LAW = Law(
    draws=lambda outputs, labels: _logits(outputs).shape[:2],
    sampler=lambda outputs, labels, uniforms: sample_classes(_logits(outputs), uniforms),
    resampled=lambda outputs, labels, sampled: _kept(
        token_loss(outputs, sampled)[0], labels_of(labels)
    ),
    softmax=lambda outputs, labels: _softmax(outputs, labels_of(labels)),
)
