"""A classifier on the data of a risk: its errors, its surrogate loss, and what bounds demand."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from specdens.arguments import shown
from specdens.certificates.checks import (
    check_center,
    check_class_range,
    check_class_shapes,
    check_rows,
    is_single_logit,
)
from specdens.certificates.fitting import MOST_AT_ONCE
from specdens_jax.data import Batch, num_examples
from specdens_jax.losses import logits_of
from specdens_jax.risk import Risk, risk_value


@dataclass(frozen=True, eq=False)
class Classifier:
    """The model of a risk as a function of its flat parameters, on data in memory.

    Attributes
    ----------
    risk : Risk
    inputs : pytree of arrays
        Of all examples.
    labels : array of shape (n,)
        Classes, or 0 and 1 of a single logit.
    num_classes : int
        2 for a single logit.
    binary : bool
        Whether there is a single logit.
    """

    risk: Risk
    inputs: Any
    labels: jax.Array
    num_classes: int
    binary: bool

    @classmethod
    def of(cls, risk: Risk) -> Classifier:
        """Read the data, and check that bounds on the error can hold.

        Raises
        ------
        ValueError
            If examples or labels cannot be told apart, or the risk is not finite.
        """
        risk_value(risk)
        batches = list(risk.batches())
        check_rows(map(num_examples, batches), "arrays")
        data: Batch = jax.tree.map(lambda *parts: jnp.concatenate(parts), *batches)
        few = jax.tree.map(lambda leaf: leaf[:2], data.inputs)
        logits = logits_of(risk.predict(risk.params, few))
        labels, binary = _labels(logits, data.targets)
        return cls(risk, data.inputs, labels, 2 if binary else logits.shape[1], binary)

    @property
    def num_examples(self) -> int:
        """The number n of examples."""
        return len(self.labels)

    @property
    def kind(self) -> tuple[Any, ...]:
        """What compiled functions depend on beside their arguments."""
        return self.num_examples, self.num_classes, self.binary

    def surrogate(
        self, parameters: jax.Array, constants: list[Any], inputs: Any, labels: jax.Array
    ) -> jax.Array:
        """Return the average surrogate loss of some examples, a pure function.

        The logistic loss over ln 2, which is above the error everywhere, or cross-entropy over
        ln C; both are 1 where nothing is known.
        """
        logits = self._logits(parameters, constants, inputs)
        if self.binary:
            signs = jnp.where(labels == 1, 1, -1)
            return jax.nn.softplus(-signs * logits.reshape(-1)).mean() / math.log(2)
        own = jnp.take_along_axis(logits, labels[:, None], axis=1)[:, 0]
        return (jax.nn.logsumexp(logits, axis=1) - own).mean() / math.log(self.num_classes)

    def errors(self, draws: Iterable[jax.Array]) -> np.ndarray:
        """Return the fraction of all examples that each draw of the parameters gets wrong."""
        risk = self.risk
        wrong = risk.kernel(("errors", *self.kind), lambda: jax.jit(self._wrong))
        starts = range(0, self.num_examples, MOST_AT_ONCE)
        data = (self.inputs, self.labels)
        parts = [jax.tree.map(lambda leaf, i=i: leaf[i : i + MOST_AT_ONCE], data) for i in starts]
        counts = [[wrong(draw, risk.constants, *part) for part in parts] for draw in draws]
        return np.asarray(jax.device_get(counts)).sum(axis=1) / self.num_examples

    def _wrong(
        self, parameters: jax.Array, constants: list[Any], inputs: Any, labels: jax.Array
    ) -> jax.Array:
        """Count examples whose own class does not lead all others; ties and nan are errors."""
        logits = self._logits(parameters, constants, inputs)
        if self.binary:
            margins = jnp.where(labels == 1, 1, -1) * logits.reshape(-1)
        else:
            is_own = jnp.arange(logits.shape[1]) == labels[:, None]
            own = jnp.where(is_own, logits, 0).sum(axis=1)
            margins = own - jnp.where(is_own, -jnp.inf, logits).max(axis=1)
        return (~(margins > 0)).sum()

    def _logits(self, parameters: jax.Array, constants: list[Any], inputs: Any) -> jax.Array:
        flat = self.risk.parameters
        varying = [block[0] for block in flat.blocks(parameters[None, :])]
        return logits_of(self.risk.predict(flat.merge(varying, constants), inputs))


def check_prior(risk: Risk, prior_mean: Any) -> jax.Array:
    """Return the center of the prior as a flat vector, if the data cannot have determined it.

    Raises
    ------
    ValueError
        If it has another shape, is not finite, or equals the risk's parameters; or if leaves that
        do not vary are others.
    TypeError
        If it is no array.
    """
    flat = risk.parameters
    dtype = flat.space.working_dtype
    structures: list[Any] = [jax.tree.structure(tree) for tree in (prior_mean, risk.params)]
    if structures[0] == structures[1]:
        _, constants = flat.split(prior_mean)
        pairs = zip(constants, risk.constants, strict=True)
        if not all(np.array_equal(before, now) for before, now in pairs if now is not None):
            msg = (
                "prior_mean differs from the risk's params in leaves that do not vary, so that the "
                "bound would not hold: they learned from the data without being counted. Select "
                "them with Risk(..., parameters=)."
            )
            raise ValueError(msg)
        vector = flat.ravel(prior_mean).astype(dtype)
    else:
        try:
            vector = jnp.asarray(prior_mean)
        except (TypeError, ValueError) as error:
            msg = (
                f"prior_mean={shown(prior_mean)} is no array; expected the parameters before "
                "training, as a flat vector or a pytree like the params."
            )
            raise TypeError(msg) from error
        if vector.shape != (flat.size,):
            msg = (
                f"prior_mean has shape {vector.shape}; expected ({flat.size},), "
                "risk.parameters.ravel(params) before training, or a pytree like the params."
            )
            raise ValueError(msg)
        vector = vector.astype(dtype)
    check_center(
        finite=bool(jnp.isfinite(vector).all()),
        trained=bool((vector == flat.ravel(risk.params)).all()),
        present="the risk's parameters",
    )
    return vector


def _labels(logits: jax.Array, targets: Any) -> tuple[jax.Array, bool]:
    """Return labels (n,) as integers, and whether they are 0 and 1 of a single logit."""
    if not isinstance(targets, jax.Array):
        msg = f"targets have type {type(targets).__qualname__}; expected an array of labels."
        raise ValueError(msg)
    number = len(targets)
    if is_single_logit(logits.shape) and targets.size == number:
        flat = np.asarray(targets).reshape(-1)
        found = set(np.unique(flat).tolist())
        if not (found <= {0, 1} or found <= {-1, 1}):
            msg = f"labels of a single logit are {sorted(found)[:5]}; expected +-1, or 0 and 1."
            raise ValueError(msg)
        return jnp.asarray(flat == 1, dtype=jnp.int32), True
    whole = jnp.issubdtype(targets.dtype, jnp.integer)
    check_class_shapes(logits.shape, targets.shape, dtype=targets.dtype, whole=whole)
    check_class_range(int(targets.min()), int(targets.max()), logits.shape[1])
    return targets, False
