"""Losses as weighted terms: those of this module, and any function that returns one per example."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.special import ndtri

from specdens.arguments import checked_integer, checked_number, shown

IGNORED = -100


class Terms(NamedTuple):
    """The terms of a risk that one batch contributes."""

    weighted: jax.Array  # at least 1-d; weight times loss of every term
    weights: jax.Array  # same shape, constant


@dataclass(frozen=True)
class CrossEntropy:
    r"""Softmax cross-entropy :math:`-\log p_y`, one term for each row of logits.

    As in PyTorch: the mean over terms weighs them by the weight of their class.

    Parameters
    ----------
    class_weights : tuple of float, optional
        One for each class.
    ignore_index : int
        Targets with this value have weight zero.
    label_smoothing : float
        Part of the target that is spread over all classes, from 0 to 1.

    Raises
    ------
    TypeError
        If `ignore_index` is no integer, or `label_smoothing` or a class weight no number.
    ValueError
        If `label_smoothing` lies outside of [0, 1].

    Notes
    -----
    Called with logits (..., C) and either labels (...) or probabilities (..., C); it returns losses
    and weights. With probabilities every term has weight one, and class weights multiply the
    probabilities.

    Examples
    --------
    >>> losses, weights = CrossEntropy()(jnp.zeros((2, 4)), jnp.array([3, -100]))
    >>> [round(float(loss), 4) for loss in losses], weights.tolist()
    ([1.3863, 0.0], [1.0, 0.0])
    """

    class_weights: tuple[float, ...] | None = None
    ignore_index: int = IGNORED
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        checked_integer("ignore_index", self.ignore_index)
        if not 0 <= checked_number("label_smoothing", self.label_smoothing) <= 1:
            msg = f"label_smoothing={self.label_smoothing} must lie between 0 and 1."
            raise ValueError(msg)

    def __call__(self, outputs: Any, targets: Any) -> tuple[jax.Array, jax.Array]:
        logits = logits_of(outputs)
        if not logits.ndim:
            msg = "outputs have shape (); expected (..., C), one score for each of C classes."
            raise ValueError(msg)
        targets = _array_of(targets)
        log_p = jax.nn.log_softmax(logits, axis=-1)
        smoothing, classes = self.label_smoothing, logits.shape[-1]
        own = self._class_weights(logits)
        if jnp.issubdtype(targets.dtype, jnp.floating):
            _check_shape(logits.shape, targets.shape)
            mixed = (1 - smoothing) * targets + smoothing / classes
            losses = -(own * mixed * log_p).sum(-1)
            return losses, jnp.ones_like(losses)
        _check_shape(logits.shape[:-1], targets.shape)
        kept = targets != self.ignore_index
        labels = jnp.where(kept, targets, 0)
        weights = jnp.where(kept, own[labels], 0).astype(logits.dtype)
        hard = -jnp.take_along_axis(log_p, labels[..., None], axis=-1)[..., 0]
        if smoothing:
            # The weighted loss spreads class weights, too; the weight of the term is taken out.
            spread = -(own * log_p).sum(-1) / classes
            scale = jnp.where(own[labels] == 0, 1, own[labels])
            hard = (1 - smoothing) * hard + smoothing * spread / scale
        return jnp.where(kept, hard, 0), weights

    def _class_weights(self, logits: jax.Array) -> jax.Array:
        if self.class_weights is None:
            return jnp.ones(logits.shape[-1], logits.dtype)
        try:
            weights = jnp.asarray(self.class_weights, logits.dtype)
        except (TypeError, ValueError) as error:
            msg = f"class_weights={shown(self.class_weights)} must be one number for each class."
            raise TypeError(msg) from error
        if weights.shape != logits.shape[-1:]:
            msg = (
                f"class_weights={shown(self.class_weights)} must be one number for each of "
                f"{logits.shape[-1]} classes."
            )
            raise ValueError(msg)
        return weights

    def draws(self, outputs: Any, targets: Any) -> tuple[int, ...]:
        """Return the shape of the uniform random numbers that one sample takes."""
        return logits_of(outputs).shape[:-1]

    def sampler(self, outputs: Any, targets: Any, uniforms: jax.Array) -> jax.Array:
        """Draw a class for each row from the softmax, by inversion."""
        logits = logits_of(outputs)
        wide = jnp.promote_types(logits.dtype, uniforms.dtype)
        cumulative = jnp.cumsum(jax.nn.softmax(logits.astype(wide), axis=-1), axis=-1)
        levels = uniforms[..., None] * cumulative[..., -1:]
        return jnp.minimum((cumulative <= levels).sum(-1), logits.shape[-1] - 1)

    def resampled(self, outputs: Any, targets: Any, sampled: jax.Array) -> jax.Array:
        r"""Return losses at sampled classes whose outer products average to the curvature.

        With h the curvature of the term's own loss relative to :math:`\mathrm{diag}\,p - p p^T`,
        they are multiplied by its root.
        """
        logits = logits_of(outputs)
        log_p = jax.nn.log_softmax(logits, axis=-1)
        losses = -jnp.take_along_axis(log_p, sampled[..., None], axis=-1)[..., 0]
        return losses * jnp.sqrt(self.curvature_factor(logits, jnp.asarray(targets)))

    def curvature_factor(self, logits: jax.Array, targets: jax.Array) -> jax.Array:
        """Return k of every term whose Hessian in its logits is k (diag p - p p^T)."""
        smoothing, own = self.label_smoothing, self._class_weights(logits)
        if jnp.issubdtype(targets.dtype, jnp.floating):
            mixed = (1 - smoothing) * targets + smoothing / logits.shape[-1]
            return (mixed * own).sum(-1)
        kept = targets != self.ignore_index
        mine = own[jnp.where(kept, targets, 0)]
        scale = jnp.where(mine == 0, 1, mine)
        return jnp.where(kept, (1 - smoothing) + smoothing * own.mean() / scale, 0)


@dataclass(frozen=True)
class SquaredError:
    """Squared differences :math:`(f - y)^2`, one term for each element.

    Examples
    --------
    >>> SquaredError()(jnp.array([1.0, 3.0]), jnp.array([1.0, 1.0])).tolist()
    [0.0, 4.0]
    """

    def __call__(self, outputs: Any, targets: Any) -> jax.Array:
        outputs, targets = logits_of(outputs), _array_of(targets)
        _check_shape(outputs.shape, targets.shape)
        return jnp.square(outputs - targets)

    def draws(self, outputs: Any, targets: Any) -> tuple[int, ...]:
        """Return the shape of the uniform random numbers that one sample takes."""
        return logits_of(outputs).shape

    def sampler(self, outputs: Any, targets: Any, uniforms: jax.Array) -> jax.Array:
        """Draw from the normal distribution about the outputs, of variance one half."""
        outputs = logits_of(outputs)
        return outputs + (0.5**0.5 * ndtri(uniforms)).astype(outputs.dtype)

    def resampled(self, outputs: Any, targets: Any, sampled: jax.Array) -> jax.Array:
        """Return the losses at sampled targets."""
        return jnp.square(logits_of(outputs) - sampled)


@dataclass(frozen=True)
class BinaryCrossEntropy:
    r"""Cross-entropy of independent labels, :math:`-y \log \sigma(f) - (1 - y) \log \sigma(-f)`.

    One term for each element of the logits; targets may be anything from zero to one.

    Examples
    --------
    >>> float(BinaryCrossEntropy()(jnp.zeros(1), jnp.ones(1))[0])
    0.6931...
    """

    def __call__(self, outputs: Any, targets: Any) -> jax.Array:
        logits, targets = logits_of(outputs), _array_of(targets)
        _check_shape(logits.shape, targets.shape)
        return jax.nn.softplus(logits) - targets * logits

    def draws(self, outputs: Any, targets: Any) -> tuple[int, ...]:
        """Return the shape of the uniform random numbers that one sample takes."""
        return logits_of(outputs).shape

    def sampler(self, outputs: Any, targets: Any, uniforms: jax.Array) -> jax.Array:
        """Draw every label from its own probability."""
        logits = logits_of(outputs)
        return (uniforms < jax.nn.sigmoid(logits.astype(uniforms.dtype))).astype(logits.dtype)

    def resampled(self, outputs: Any, targets: Any, sampled: jax.Array) -> jax.Array:
        """Return the losses at sampled labels."""
        return self(outputs, sampled)


def token_loss(outputs: Any, labels: Any) -> tuple[jax.Array, jax.Array]:
    """Return the cross-entropy of every token (N, T), weight zero where the label is -100.

    Parameters
    ----------
    outputs : array of shape (N, T, V), or an object or mapping that carries it as ``logits``
    labels : array of shape (N, T)

    Returns
    -------
    losses, weights : arrays of shape (N, T)

    Raises
    ------
    ValueError
        If the shapes do not fit.

    Examples
    --------
    >>> losses, weights = token_loss(jnp.zeros((1, 2, 4)), jnp.array([[3, -100]]))
    >>> weights.tolist()
    [[1.0, 0.0]]
    """
    return CrossEntropy()(outputs, labels)


def next_token_loss(outputs: Any, labels: Any) -> tuple[jax.Array, jax.Array]:
    """Return the cross-entropy of every next token (N, T - 1), as causal models need it.

    Parameters
    ----------
    outputs : array of shape (N, T, V), or an object or mapping that carries it as ``logits``
    labels : array of shape (N, T)
        The tokens themselves; those that are -100 have weight zero as targets.

    Returns
    -------
    losses, weights : arrays of shape (N, T - 1)

    Raises
    ------
    ValueError
        If the shapes do not fit.

    Examples
    --------
    >>> losses, weights = next_token_loss(jnp.zeros((1, 3, 4)), jnp.array([[3, 1, -100]]))
    >>> weights.tolist()
    [[1.0, 0.0]]
    """
    logits, tokens = logits_of(outputs), _array_of(labels)
    if logits.ndim != 3 or tokens.shape != logits.shape[:2]:
        msg = (
            f"outputs have shape {logits.shape} and labels {tokens.shape}; expected (N, T, V) and "
            "(N, T), one score for each of V tokens and one label at T positions."
        )
        raise ValueError(msg)
    return CrossEntropy()(logits[:, :-1], tokens[:, 1:])


def logits_of(outputs: Any) -> jax.Array:
    """Return a model's outputs themselves if they are an array, or the one called ``logits``.

    Raises
    ------
    TypeError
        If there is neither.
    """
    found = outputs
    if not isinstance(outputs, jax.Array):
        is_mapping = isinstance(outputs, Mapping)
        found = outputs.get("logits") if is_mapping else getattr(outputs, "logits", None)
    if not isinstance(found, jax.Array):
        msg = (
            f"predict returned {type(outputs).__qualname__}; expected an array, or something that "
            "carries one as .logits or under 'logits'. A loss of your own may take anything."
        )
        raise TypeError(msg)
    return found


def _array_of(targets: Any) -> jax.Array:
    try:
        return jnp.asarray(targets)
    except (TypeError, ValueError) as error:
        msg = f"targets have type {type(targets).__qualname__}; expected an array of numbers."
        raise TypeError(msg) from error


def _check_shape(expected: tuple[int, ...], shape: tuple[int, ...]) -> None:
    if tuple(expected) != tuple(shape):
        msg = f"targets have shape {tuple(shape)}; the outputs need {tuple(expected)}."
        raise ValueError(msg)


def terms_of(loss: Any, outputs: Any, targets: Any) -> Terms:
    """Evaluate a loss and check what it returned.

    Raises
    ------
    TypeError, ValueError
        If it is not one real loss for each example or term, with constant weights if any.
    """
    result = loss(outputs, targets)
    weights: Any = None
    if isinstance(result, tuple) and len(result) == 2:
        result, weights = result
    if not isinstance(result, jax.Array) or not jnp.issubdtype(result.dtype, jnp.floating):
        kind = getattr(result, "dtype", type(result).__qualname__)
        msg = (
            f"loss returned {kind}; expected an array with one real loss for each example or term, "
            "or a pair (losses, weights) of arrays."
        )
        raise TypeError(msg)
    if result.ndim == 0:
        msg = (
            "loss returned a single number; return one loss per example (or term), so that every "
            "split of the data into batches has the same risk."
        )
        raise ValueError(msg)
    if weights is None:
        return Terms(result, jnp.ones_like(result))
    weights = jax.lax.stop_gradient(jnp.asarray(weights, result.dtype))
    if weights.shape != result.shape:
        msg = f"loss returned weights {weights.shape} with losses {result.shape}; they must agree."
        raise ValueError(msg)
    return Terms(result * weights, weights)
