"""What a finished rule says of the spectrum: nodes and weights in use, outliers, bands. NumPy only.

Three kinds of rule: Krylov spaces of random probes, Chebyshev moments, and either of the two on the
orthogonal complement of eigenvectors that are known.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from specdens.bands import distribution_band
from specdens.interpolation import interpolated
from specdens.quadrature import KrylovRule, MomentRule
from specdens.sharpening import Outliers, resolved, sharpen
from specdens.smoothing import Chebyshev, Smoothing


@dataclass(frozen=True, eq=False)
class DeflatedRule:
    """A rule on the complement of known eigenvectors, and their eigenvalues.

    The complement has dimension n - k. Each known eigenvalue has mass 1/n, whatever its sign, and
    what the rule says of the complement has mass (n - k)/n.
    """

    inner: KrylovRule | MomentRule
    eigenvalues: np.ndarray  # (k,) ascending
    bounds: np.ndarray  # (k,) residual norms

    @classmethod
    def concatenate(cls, rules: Sequence[DeflatedRule]) -> DeflatedRule:
        """Stack the probes of several runs, deflated of the same eigenvectors.

        Raises
        ------
        ValueError
            If they were deflated of others.
        """
        first = rules[0]
        for rule in rules:
            if not np.array_equal(rule.eigenvalues, first.eigenvalues):
                msg = "the measures are deflated of different eigenvalues; deflate both alike."
                raise ValueError(msg)
        return replace(first, inner=join([rule.inner for rule in rules]))

    @property
    def num_probes(self) -> int:
        """Number of probes p."""
        return self.inner.num_probes

    @property
    def resolution(self) -> float:
        """A few roundings of the norm: nodes closer than this are one number."""
        return self.inner.resolution

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Return everything as named arrays, for files."""
        known = {"deflated_eigenvalues": self.eigenvalues, "deflated_bounds": self.bounds}
        return self.inner.to_arrays() | known


Rule: TypeAlias = KrylovRule | MomentRule | DeflatedRule


class Reading(NamedTuple):
    """What a `SpectralMeasure` is made of."""

    nodes: np.ndarray  # (p, m)
    weights: np.ndarray  # (p, m)
    outliers: Outliers
    smoothing: Smoothing | None  # None: set by the range of the bulk


def join(rules: Sequence[Any]) -> Any:
    """Stack the probes of rules of one kind."""
    if len({type(rule) for rule in rules}) > 1:
        msg = "other is of another kind of rule; only like can be joined."
        raise ValueError(msg)
    return type(rules[0]).concatenate(rules)


def rule_from_arrays(arrays: Mapping[str, np.ndarray]) -> Rule:
    """Return the rule whose ``to_arrays`` this is."""
    inner = (MomentRule if "moments" in arrays else KrylovRule).from_arrays(arrays)
    if "deflated_eigenvalues" not in arrays:
        return inner
    return DeflatedRule(inner, arrays["deflated_eigenvalues"], arrays["deflated_bounds"])


def read(rule: Rule, dimension: int, provenance: Mapping[str, Any]) -> Reading:
    """Return nodes and weights to use, outliers at their exact mass if the probes were random.

    Parameters
    ----------
    rule : KrylovRule, MomentRule or DeflatedRule
    dimension : int
        n.
    provenance : mapping
        Holds ``isotropic`` (random probes) and ``complex`` (complex vectors).
    """
    if isinstance(rule, DeflatedRule):
        return _with_known(rule, dimension, provenance)
    if isinstance(rule, MomentRule):
        low, high = (float(end) for end in rule.interval)
        smoothing = Chebyshev(rule.moments.shape[1] - 1, (low, high))
        return Reading(*rule.quadrature(), Outliers.none(), smoothing)
    if not provenance["isotropic"]:
        return Reading(rule.gauss.nodes, rule.gauss.weights, resolved(rule), None)
    freedoms = 2 if provenance["complex"] else 1
    reading = interpolated if provenance.get("method") == "density" else sharpen
    return Reading(*reading(rule, dimension, freedoms=freedoms), None)


def _with_known(rule: DeflatedRule, dimension: int, provenance: Mapping[str, Any]) -> Reading:
    """Return the complement's reading with the known eigenvalues added, each of mass 1/n."""
    count = len(rule.eigenvalues)
    inner = read(rule.inner, dimension - count, provenance)
    p = inner.nodes.shape[0]
    nodes = np.concatenate([inner.nodes, np.tile(rule.eigenvalues, (p, 1))], axis=1)
    share = 1 - count / dimension
    atoms = np.full((p, count), 1 / dimension)
    weights = np.concatenate([inner.weights * share, atoms], axis=1)
    known = Outliers(rule.eigenvalues, rule.bounds, np.ones(count), np.zeros(count))
    smoothing = inner.smoothing
    if isinstance(smoothing, Chebyshev):  # its interval holds the complement's nodes only
        low, high = smoothing.interval
        low, high = min(low, rule.eigenvalues.min()), max(high, rule.eigenvalues.max())
        smoothing = replace(smoothing, interval=(float(low), float(high)))
    return Reading(nodes, weights, inner.outliers.join(known), smoothing)


def plain(rule: Rule, dimension: int) -> tuple[np.ndarray, np.ndarray]:
    """Return nodes and weights as the recurrence computed them, nothing at its exact mass."""
    if isinstance(rule, MomentRule):
        return rule.quadrature()
    if isinstance(rule, KrylovRule):
        return rule.gauss.nodes, rule.gauss.weights
    nodes, weights = plain(rule.inner, dimension)
    p, count = rule.num_probes, len(rule.eigenvalues)
    atoms = np.full((p, count), 1 / dimension)
    return (
        np.concatenate([nodes, np.tile(rule.eigenvalues, (p, 1))], axis=1),
        np.concatenate([weights * (1 - count / dimension), atoms], axis=1),
    )


def steps_of(rule: Rule) -> int:
    """Return the number of nodes that one probe's own rule has in the bulk."""
    if isinstance(rule, DeflatedRule):
        return steps_of(rule.inner)
    return (rule.moments if isinstance(rule, MomentRule) else rule.gauss.nodes).shape[1]


def band(
    rule: Rule, dimension: int, x: np.ndarray, confidence: float, freedoms: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the bounds of `specdens.bands`, with known eigenvalues where they are.

    Raises
    ------
    ValueError
        If the rule is one of moments.
    """
    if isinstance(rule, MomentRule):
        msg = "moments have no certified band; use slq, or lower the degree until curves agree."
        raise ValueError(msg)
    if isinstance(rule, KrylovRule):
        return distribution_band(rule, dimension, x, confidence, freedoms)
    count = len(rule.eigenvalues)
    # A differs from what its known part and its complement make by A Q - Q Lambda, twice.
    reach = 2 * float(np.linalg.norm(rule.bounds)) + rule.resolution
    bounds = (
        band(rule.inner, dimension - count, x - reach, confidence, freedoms)[0],
        band(rule.inner, dimension - count, x + reach, confidence, freedoms)[1],
    )
    known = [np.searchsorted(rule.eigenvalues, at, side="right") for at in (x - reach, x + reach)]
    lower, upper = (
        ((dimension - count) * bound + number) / dimension
        for bound, number in zip(bounds, known, strict=True)
    )
    return lower, upper
