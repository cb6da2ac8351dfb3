"""Means of the extended gradients over classes and pairs of classes, and their inner products."""

from __future__ import annotations

from functools import cached_property

import jax
import jax.numpy as jnp
import numpy as np

from specdens import VectorSpace, hierarchy
from specdens.class_parts import check_num_classes, check_weighting, divided
from specdens_jax.class_products import NO_PROBABILITIES, ClassPasses, check_softmax
from specdens_jax.parameters import FlatParameters
from specdens_jax.risk import Risk, Totals, check_risk
from specdens_jax.sharding import on_automatic_axes

#: Bytes that pair means and their inner products may take at a time: 2 GiB.
MEMORY_BUDGET = 2 * 2**30
_GRAM_NUMBERS = 2**24  # numbers that come to the host at a time
_SUMMED = 2**14  # products that are added up at a time: long sums in single precision lose digits


class ClassMeans:
    """What the parts of a class structure are made of; `ClassStructure` says what they are."""

    def __init__(
        self, risk: Risk, num_classes: int | None = None, weighting: str = "probability"
    ) -> None:
        check_risk(risk)
        check_weighting(weighting)
        check_num_classes(num_classes)
        check_softmax(risk.loss)
        self.risk, self.weighting, self._asked = risk, weighting, num_classes
        self._passes = ClassPasses(risk, weighting)

    @cached_property
    @on_automatic_axes
    def num_classes(self) -> int:
        """The number C of classes, that of the logits."""
        found = self._passes.num_classes()
        if self._asked not in (None, found):
            msg = (
                f"num_classes={self._asked!r} differs from the {found} logits of the model; leave "
                "it out."
            )
            raise ValueError(msg)
        return found

    @property
    def parameters(self) -> FlatParameters:
        """Names and places of the parameters; ``ravel`` and ``unravel``."""
        return self.risk.parameters

    @property
    def space(self) -> VectorSpace:
        """The flat vectors: length p, dtype and device of the parameters."""
        return self.risk.parameters.space

    @cached_property
    @on_automatic_axes
    def _weights(self) -> tuple[np.ndarray, Totals]:
        _ = self.num_classes  # which checks it
        pairs, totals = self._passes.weights()
        if not np.isfinite(pairs).all():
            raise ValueError(NO_PROBABILITIES)
        return pairs, totals

    @property
    def _mass(self) -> float:
        """W, what the risk divides by."""
        return self._weights[1].weight if self.risk.divides else 1.0

    @property
    def pair_weights(self) -> np.ndarray:
        """The weights w_cc' of the pairs, (C, C), of which row c belongs to true class c."""
        return self._weights[0] / self._mass

    @property
    def class_weights(self) -> np.ndarray:
        """The weights w_c of the classes, (C,), without the pairs of equal classes."""
        return hierarchy.class_weights(self.pair_weights)

    @property
    @on_automatic_axes
    def class_means(self) -> jax.Array:
        """The class means g_c, (p, C), zero for a class without weight."""
        return self._class_means

    @cached_property
    def _class_means(self) -> jax.Array:
        count = self.num_classes
        return self._means(np.arange(count), 1 - np.eye(count), self.class_weights)

    @cached_property
    def _equal_means(self) -> jax.Array:
        count = self.num_classes
        return self._means(np.arange(count), np.eye(count), np.diagonal(self.pair_weights))

    def _means(self, classes: np.ndarray, others: np.ndarray, weights: np.ndarray) -> jax.Array:
        """Return the means over pairs (classes[j], c' with others[j, c'] = 1) of `weights`."""
        rows = self._passes.vectors(classes, others)
        mass = weights * self._mass
        normal = mass > float(jnp.finfo(rows.dtype).tiny)  # weights below have no inverse
        scale = divided(normal.astype(np.float64), mass)
        rows = rows * jnp.asarray(scale, dtype=rows.dtype)[:, None]
        return self.parameters.placed(rows.T.astype(self.space.working_dtype))

    def _pair_block(self, classes: np.ndarray) -> jax.Array:
        """Return the pair means of some true classes with all others, (p, len(classes) * C)."""
        count = self.num_classes
        weights = self.pair_weights[classes].reshape(-1)
        others = np.tile(np.eye(count), (len(classes), 1))
        return self._means(np.repeat(classes, count), others, weights)

    @on_automatic_axes
    def pair_means(self) -> jax.Array:
        """Return the pair means g_cc', zero where the pair has no weight.

        Returns
        -------
        array of shape (C, C, p)
            In one pass over the data. Nothing else needs all of them at once.
        """
        count = self.num_classes
        return self._pair_block(np.arange(count)).T.reshape(count, count, -1)

    def release(self) -> None:
        """Free the means and inner products that are kept."""
        for name in ("_weights", "_class_means", "_equal_means", "_gram"):
            self.__dict__.pop(name, None)

    def _affordable(self) -> int:
        """Return how many means fit `MEMORY_BUDGET` at a time."""
        one = self.space.dimension * jnp.dtype(self.space.working_dtype).itemsize
        return MEMORY_BUDGET // one

    def _class_vectors(self, part: str) -> tuple[jax.Array, np.ndarray]:
        """Return the C means that a part is made of, and their weights."""
        if part == "class":
            return self.class_means, self.class_weights
        return self._equal_means, np.diagonal(self.pair_weights)

    @on_automatic_axes
    def pair_gram(self) -> np.ndarray:
        """Return the inner products of all pair means.

        Returns
        -------
        ndarray of shape (C * C, C * C), float64
            Pairs are in row-major order. Computed once, by blocks of classes if the pair means do
            not fit `MEMORY_BUDGET`, each in two passes.

        Raises
        ------
        ValueError
            If the inner products do not fit it either.
        """
        return self._gram

    @cached_property
    def _gram(self) -> np.ndarray:
        count = self.num_classes
        if 8 * count**4 > MEMORY_BUDGET:
            msg = (
                f"num_classes={count} has {count**2:,} pairs, whose inner products take "
                f"{8 * count**4 / 2**30:.1f} GiB of {MEMORY_BUDGET / 2**30:.1f}; what concerns "
                "classes only still works: class_means, principal_subspace, G_class, and "
                "'class' and 'equal' as parts."
            )
            raise ValueError(msg)
        at_once = max(1, self._affordable() // count)
        if at_once >= count:
            return gram_of(self._pair_block(np.arange(count)))
        blocks = []
        for start in range(0, count, at_once):
            means = self._pair_block(np.arange(start, min(start + at_once, count)))
            blocks.append(self._products(means.T).reshape(-1, count**2))
        gram = np.concatenate(blocks)
        return (gram + gram.T) / 2

    def _rounding(self, part: str) -> float:
        """Return the relative rounding of the inner products behind a part."""
        own = 10 * float(jnp.finfo(self.space.working_dtype).eps)
        in_blocks = part in ("cross", "means") and self._affordable() < self.num_classes**2
        return own if in_blocks else own**2  # of vectors rounded so, multiplied in float64

    def _products(self, rows: jax.Array) -> np.ndarray:
        """Return the inner products of rows (k, p) with all pair means, (k, C, C)."""
        return divided(self._passes.products(rows), self._weights[0])

    def _combined(self, factors: np.ndarray) -> jax.Array:
        """Return sums of pair means with the factors (C * C, r), (p, r), in one pass."""
        count, mass = self.num_classes, self._weights[0]
        tables = divided(factors.T.reshape(-1, count, count), mass)
        return self._passes.combinations(tables).T.astype(self.space.working_dtype)


def matmul(a: jax.Array, b: jax.Array) -> jax.Array:
    """Return the product in the full precision of the dtype, whatever the device prefers."""
    return jnp.matmul(a, b, precision="highest")


def inner_products(rows: jax.Array, means: jax.Array) -> jax.Array:
    """Return the inner products (k, m) of rows (k, p) with columns (p, m)."""
    if len(means.sharding.device_set) > 1:  # every device adds up its part
        return matmul(rows, means)
    parts = (slice(at, at + _SUMMED) for at in range(0, len(means), _SUMMED))
    return jnp.stack([matmul(rows[:, some], means[some]) for some in parts]).sum(axis=0)


def gram_of(means: jax.Array) -> np.ndarray:
    """Return the inner products of columns (p, m), on the host in double precision by blocks."""
    length, count = means.shape
    step = max(1, _GRAM_NUMBERS // count)
    total = np.zeros((count, count))
    for start in range(0, length, step):
        block = np.asarray(means[start : start + step], dtype=np.float64)
        total += block.T @ block
    return total
