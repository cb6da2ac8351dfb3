r"""Resolved eigenvalues as atoms of known mass: variance reduction of a rule. NumPy only.

The weight that a random probe gives to an eigenvector is 1/n on average, with a standard deviation
of :math:`\sqrt 2 / n`; for an outlier far from the bulk this noise dominates every error of
stochastic Lanczos quadrature. Where Lanczos has found an eigenvector its mass need not be
estimated: it is 1/n (Bhattacharjee, Jayaram, Musco, Musco, Ray 2024, arXiv 2410.21690, for the
idea). The rule here:

1. Nodes closer than rounding are one number, so the ghosts of a recurrence without
   reorthogonalization are counted together. So are nodes that are not resolved by themselves and
   nearer than their residuals.
2. Such a cluster is *resolved* if its residuals, and its width where that is more than rounding,
   are below `RESOLVED` times its distance to the next node that carries weight; a few roundings
   if there is no other. The test is relative to the gap, not to the norm, and needs no scale.
3. It is *found* if it is resolved in at least half of the blocks of probes, and every other block
   has a node that can only be it (nearer than `_MATCHED` times that node's own gap).
4. Its multiplicity k is how often it occurs among the Ritz values of a block. A block of b probes
   sees an eigenspace in at most b directions, so k = b leaves k unknown. Single probes see one
   direction each; k is then the rank of these directions, read off a fixed random projection to 64
   numbers, and unknown if it exceeds half the number of probes. In either case the average weight
   must agree (chi-squared test). A single probe knows nothing of k; it is taken as 1 unless the
   weight contradicts that.
5. Found eigenvalues of known multiplicity get mass k/n in every row, and the other weights of a row
   share the rest in proportion. Others keep their weights, and the average times n estimates their
   multiplicity.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.special import chdtr, chdtrc

from specdens.quadrature import RESOLVED, KrylovRule

_MATCHED = 0.1
_REJECTED = 1e-6
_NEGLIGIBLE = 1e-10  # times 1/n: weights below it belong to ghosts that are still being born
_RANK_TOLERANCE = 0.05


@dataclass(frozen=True, eq=False)
class Outliers:
    """Eigenvalues that Lanczos has resolved one by one, ascending.

    Attributes
    ----------
    eigenvalues : ndarray of shape (q,)
    bounds : ndarray of shape (q,)
        Residual norms: within this distance of the number lies an eigenvalue.
    multiplicities : ndarray of shape (q,)
        How often each is repeated; estimated where `stderr` is above 0.
    stderr : ndarray of shape (q,)
        Standard error of the multiplicity over probes; 0 where it was determined, nan if
        unknowable.
    """

    eigenvalues: np.ndarray
    bounds: np.ndarray
    multiplicities: np.ndarray
    stderr: np.ndarray

    @classmethod
    def none(cls) -> Outliers:
        """Return an empty collection."""
        return cls(*(np.zeros(0) for _ in range(4)))

    def __len__(self) -> int:
        return len(self.eigenvalues)

    def __repr__(self) -> str:
        values = np.array2string(self.eigenvalues, precision=6, threshold=8, edgeitems=3)
        return (
            f"Outliers({len(self)} eigenvalues {values}, within {self.bounds.max(initial=0):.1g})"
        )

    def join(self, other: Outliers) -> Outliers:
        """Return the eigenvalues of both, ascending."""
        order = np.argsort(np.concatenate([self.eigenvalues, other.eigenvalues]), kind="stable")
        mine, theirs = vars(self), vars(other)
        return Outliers(*(np.concatenate([mine[key], theirs[key]])[order] for key in mine))


@dataclass(frozen=True)
class _Cluster:
    """Nodes of one block that are one number."""

    columns: np.ndarray  # their columns in the rule
    position: float
    weights: np.ndarray  # (b,) together, as each probe of the block sees them
    residual: float
    gap: float  # distance to the next node that carries weight; inf if there is none
    resolved: bool  # step 2
    direction: np.ndarray  # (s,) projection of the Ritz vector of a single probe, unit norm


@dataclass(frozen=True)
class _Found:
    """An eigenvalue, and the cluster that stands for it in each block."""

    best: _Cluster
    clusters: tuple[_Cluster, ...]
    multiplicity: int | None  # None: only its average weight is known


def sharpen(
    rule: KrylovRule, dimension: int, *, freedoms: int = 1
) -> tuple[np.ndarray, np.ndarray, Outliers]:
    """Return nodes and weights of the rule with found eigenvalues at their exact mass, and those.

    Parameters
    ----------
    rule : KrylovRule
        From isotropic random probes.
    dimension : int
        n.
    freedoms : int
        Real numbers per entry of a probe: 2 for complex probes, otherwise 1.
    """
    blocks = [np.flatnonzero(rule.blocks == number) for number in np.unique(rule.blocks)]
    clusters = [_clusters(rule, rows, dimension) for rows in blocks]
    found = _find(clusters, dimension, freedoms)
    known = [item for item in found if item.multiplicity is not None]
    mass = sum(item.multiplicity or 0 for item in known) / dimension
    nodes, weights = rule.shared.nodes.copy(), rule.shared.weights.copy()
    for number, rows in enumerate(blocks):
        parts = [item.clusters[number].columns for item in known]
        atoms = np.zeros(nodes.shape[1], dtype=bool)
        atoms[np.concatenate(parts) if parts else []] = True
        rest = weights[np.ix_(rows, ~atoms)].sum(axis=1)
        if mass > 1 + 1e-12 or (mass < 1 - 1e-12 and rest.min() <= _NEGLIGIBLE / dimension):
            # Some multiplicity must be wrong: nothing is left to carry the rest, or there is no
            # rest.
            unknown = [_Found(item.best, item.clusters, None) for item in found]
            return rule.shared.nodes, rule.shared.weights, _summary(unknown, rule, dimension)
        factor = np.divide(1 - mass, rest, out=np.zeros_like(rest), where=rest > 0)
        weights[rows] *= np.where(atoms, 0.0, factor[:, None])
        for item, columns in zip(known, parts, strict=True):
            nodes[np.ix_(rows, columns)] = item.best.position
            weights[rows, columns[0]] = (item.multiplicity or 0) / dimension
    return nodes, weights, _summary(found, rule, dimension)


def resolved(rule: KrylovRule) -> Outliers:
    """Return the resolved Ritz values of given vectors, which say nothing of multiplicities."""
    rows = np.flatnonzero(rule.blocks == 0)
    clusters = [c for c in _clusters(rule, rows, rule.shared.nodes.shape[1]) if c.resolved]
    unknown = np.full(len(clusters), np.nan)
    bounds = np.array([max(c.residual, rule.resolution) for c in clusters])
    return Outliers(np.array([c.position for c in clusters]), bounds, unknown, unknown)


def _clusters(rule: KrylovRule, rows: np.ndarray, dimension: int) -> list[_Cluster]:
    """Return the distinct nodes of a block that carry weight, ascending (step 1)."""
    nodes, residuals = rule.shared.nodes[rows[0]], rule.shared.residuals[rows[0]]
    weights = rule.shared.weights[rows]
    used = np.flatnonzero(np.isfinite(residuals) & (weights.max(axis=0) > _NEGLIGIBLE / dimension))
    if not used.size:
        return []
    groups = _groups(nodes[used], residuals[used], rule.resolution)
    ends = np.array([(nodes[used[g[0]]], nodes[used[g[-1]]]) for g in groups])
    between = np.concatenate([[np.inf], ends[1:, 0] - ends[:-1, 1], [np.inf]])
    clusters = []
    for i, group in enumerate(groups):
        columns = used[group]
        heaviest = columns[np.argmax(weights[:, columns].sum(axis=0))]
        direction = rule.sketches[rows[0], heaviest]
        length = np.linalg.norm(direction)
        # A ghost's residual says nothing; copies within rounding are as good as the best of them.
        width = float(np.ptp(nodes[columns]))
        tight = width <= rule.resolution
        residual = residuals[columns].min() if tight else residuals[columns].max() + width
        gap = float(min(between[i], between[i + 1]))
        # A lone cluster may be a spectrum of which nothing is known yet: its gap says nothing.
        # Many copies of one eigenvalue spread over a few times the rounding of one.
        limit = RESOLVED * gap if np.isfinite(gap) else 8 * rule.resolution
        clusters.append(
            _Cluster(
                columns,
                float(nodes[heaviest]),
                weights[:, columns].sum(axis=1),
                float(residual),
                gap,
                bool(residual <= limit),
                direction / length if length > 0 else direction,
            )
        )
    return clusters


def _groups(nodes: np.ndarray, residuals: np.ndarray, resolution: float) -> list[np.ndarray]:
    """Split ascending nodes into groups that are one number as far as is known."""
    gaps = np.diff(nodes)
    apart = np.concatenate([[np.inf], gaps, [np.inf]])
    alone = residuals <= RESOLVED * np.minimum(apart[:-1], apart[1:])
    blurred = gaps <= np.maximum(residuals[:-1], residuals[1:])
    together = (gaps <= resolution) | (blurred & ~alone[:-1] & ~alone[1:])
    return np.split(np.arange(len(nodes)), np.flatnonzero(~together) + 1)


def _find(clusters: list[list[_Cluster]], dimension: int, freedoms: int) -> list[_Found]:
    """Return the eigenvalues that all blocks agree on, ascending (steps 3 and 4)."""
    if not all(clusters):
        return []
    positions = [np.array([cluster.position for cluster in block]) for block in clusters]
    candidates = [cluster for block in clusters for cluster in block if cluster.resolved]
    candidates.sort(key=lambda cluster: cluster.residual / cluster.gap)
    found: list[_Found] = []
    taken: set[tuple[int, int]] = set()
    for best in candidates:
        nearest = [int(np.abs(at - best.position).argmin()) for at in positions]
        if any(place in taken for place in enumerate(nearest)):
            continue
        matched = tuple(block[j] for block, j in zip(clusters, nearest, strict=True))
        far = [abs(c.position - best.position) > _MATCHED * c.gap for c in matched]
        agreeing = [cluster for cluster in matched if cluster.resolved]
        if any(far) or 2 * len(agreeing) < len(matched):
            continue
        taken.update(enumerate(nearest))
        found.append(_Found(best, matched, _multiplicity(matched, agreeing, dimension, freedoms)))
    return sorted(found, key=lambda item: item.best.position)


def _multiplicity(
    matched: tuple[_Cluster, ...], agreeing: list[_Cluster], dimension: int, freedoms: int
) -> int | None:
    """Return the multiplicity if it is decisive and the weights agree, else None (step 4)."""
    if any(len(cluster.weights) > 1 for cluster in matched):
        # A block of b probes that counts fewer than b, or n, has seen all; the others saw b of
        # them.
        seen = [(len(cluster.columns), len(cluster.weights)) for cluster in agreeing]
        counts = {count for count, size in seen if count < size or count == dimension}
        if len(counts) != 1 or any(count != min(*counts, size) for count, size in seen):
            return None
        multiplicity = counts.pop()
    else:
        directions = np.stack([cluster.direction for cluster in agreeing])
        values = np.linalg.svd(directions, compute_uv=False)
        multiplicity = int((values > _RANK_TOLERANCE * len(agreeing) ** 0.5).sum()) or 1
        if multiplicity > max(1, len(agreeing) // 2):
            return None
    # n times the weight is chi-squared with k degrees of freedom (per real number of an entry).
    weights = np.concatenate([cluster.weights for cluster in matched])
    degrees = freedoms * multiplicity * len(weights)
    statistic = freedoms * dimension * weights.sum()
    doubtful = min(chdtr(degrees, statistic), chdtrc(degrees, statistic)) < _REJECTED
    return None if doubtful and multiplicity < dimension else multiplicity


def _summary(found: list[_Found], rule: KrylovRule, dimension: int) -> Outliers:
    multiplicities, stderr, bounds = [], [], []
    for item in found:
        weights = np.concatenate([cluster.weights for cluster in item.clusters])
        known = item.multiplicity is not None
        p = len(weights)
        spread = dimension * weights.std(ddof=1) / p**0.5 if p > 1 else np.nan
        multiplicities.append(item.multiplicity if known else dimension * weights.mean())
        stderr.append(0.0 if known and p > 1 else spread)  # one probe cannot know
        bounds.append(max(item.best.residual, rule.resolution))
    eigenvalues = [item.best.position for item in found]
    return Outliers(
        *(np.array(part, dtype=float) for part in (eigenvalues, bounds, multiplicities, stderr))
    )
