"""Quadrature rules: what a finished method hands to a `SpectralMeasure`. NumPy only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np
import scipy.linalg

#: A Ritz value is an eigenvalue if its residual is below this part of its distance to the next
#: node.
RESOLVED = 1e-3


#: Part of the range of the nodes by which a recurrence may leave the space that it runs in.
LEAK = 1e-4


@dataclass(frozen=True, eq=False)
class QuadratureRule:
    """Nodes and weights for the measures that p probes see, one row per probe.

    Rows that are shorter than others are padded with nodes of weight 0 and infinite residual.
    """

    nodes: np.ndarray  # (p, m) float64, eigenvalue units, ascending
    weights: np.ndarray  # (p, m) float64, each row sums to 1
    residuals: np.ndarray  # (p, m) float64, |A y - theta y| of each Ritz pair

    @classmethod
    def concatenate(cls, rules: Sequence[QuadratureRule]) -> QuadratureRule:
        """Stack the probes of several rules."""
        length = max(rule.nodes.shape[1] for rule in rules)
        rules = [rule.padded(length) for rule in rules]
        return cls(*(np.concatenate([getattr(r, f.name) for r in rules]) for f in fields(cls)))

    def padded(self, length: int) -> QuadratureRule:
        """Return the rule with `length` nodes per row; new ones weigh nothing."""
        if length == self.nodes.shape[1]:
            return self
        columns = ((0, 0), (0, length - self.nodes.shape[1]))
        return QuadratureRule(
            np.pad(self.nodes, columns, mode="edge"),
            np.pad(self.weights, columns),
            np.pad(self.residuals, columns, constant_values=np.inf),
        )


@dataclass(frozen=True, eq=False)
class KrylovRule:
    """What Lanczos knows of the measures of p probes.

    Probes that were advanced together with reorthogonalization share one Krylov space, the sum of
    theirs. Its Ritz pairs serve all of them: `shared` integrates what each probe sees over many
    more nodes than the probe's own Gauss rule, and as exactly at least.
    """

    shared: QuadratureRule  # nodes are Ritz values of the block's common Krylov space
    gauss: QuadratureRule  # (p, m) the Gauss rule of every probe by itself
    bulk: QuadratureRule | None  # (p, m) the same without what `resolved_nodes` of `shared` see
    blocks: np.ndarray  # (p,) integers: probes with the same number share a Krylov space
    sketches: np.ndarray  # (p, m, s) random projections of the Ritz vectors; s = 0 if not needed
    resolution: float  # a few roundings of the norm: nodes closer than this are one number

    @classmethod
    def concatenate(cls, rules: Sequence[KrylovRule]) -> KrylovRule:
        """Stack the probes of several runs, whose blocks stay apart."""
        counts = np.cumsum([0, *(int(rule.blocks.max()) + 1 for rule in rules)])
        shared = QuadratureRule.concatenate([rule.shared for rule in rules])
        length, size = shared.nodes.shape[1], min(rule.sketches.shape[2] for rule in rules)
        sketches = [
            np.pad(r.sketches[:, :, :size], ((0, 0), (0, length - r.sketches.shape[1]), (0, 0)))
            for r in rules
        ]
        return cls(
            shared,
            QuadratureRule.concatenate([rule.gauss for rule in rules]),
            QuadratureRule.concatenate([r.bulk for r in rules if r.bulk is not None])
            if all(rule.bulk is not None for rule in rules)
            else None,
            np.concatenate([r.blocks + first for r, first in zip(rules, counts, strict=False)]),
            np.concatenate(sketches),
            max(rule.resolution for rule in rules),
        )

    @property
    def num_probes(self) -> int:
        """Number of probes p."""
        return len(self.blocks)

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Return everything as named arrays, for files."""
        arrays = {"blocks": self.blocks, "sketches": self.sketches}
        arrays["resolution"] = np.array(self.resolution)
        for kind in ("shared", "gauss", "bulk"):
            rule: QuadratureRule | None = getattr(self, kind)
            if rule is not None:
                arrays |= {f"{kind}_{f.name}": getattr(rule, f.name) for f in fields(rule)}
        return arrays

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> KrylovRule:
        """Return the rule that `to_arrays` took apart."""
        rules = {
            kind: QuadratureRule(*(arrays[f"{kind}_{f.name}"] for f in fields(QuadratureRule)))
            for kind in ("shared", "gauss", "bulk")
            if f"{kind}_nodes" in arrays
        }
        return cls(
            shared=rules["shared"],
            gauss=rules["gauss"],
            bulk=rules.get("bulk"),
            blocks=arrays["blocks"],
            sketches=arrays["sketches"],
            resolution=float(arrays["resolution"]),
        )


@dataclass(frozen=True, eq=False)
class MomentRule:
    """What the kernel polynomial method knows of the measures of p probes: Chebyshev moments.

    Kept without damping, which is chosen afterwards.
    """

    moments: np.ndarray  # (p, K) float64, of T_0, ..., T_{K-1} on the interval, the first being 1
    interval: np.ndarray  # (2,) its ends
    resolution: float  # a few roundings of the norm

    @classmethod
    def concatenate(cls, rules: Sequence[MomentRule]) -> MomentRule:
        """Stack the probes of several runs.

        Raises
        ------
        ValueError
            If their intervals or numbers of moments differ.
        """
        first = rules[0]
        for rule in rules:
            if not np.array_equal(rule.interval, first.interval):
                msg = (
                    f"interval={tuple(rule.interval.tolist())} differs from that of the other "
                    f"moments, {tuple(first.interval.tolist())}; run both with the same."
                )
                raise ValueError(msg)
            if rule.moments.shape[1] != first.moments.shape[1]:
                msg = (
                    f"num_moments={rule.moments.shape[1]} differs from that of the other probes, "
                    f"{first.moments.shape[1]}; run both with the same."
                )
                raise ValueError(msg)
        moments = np.concatenate([rule.moments for rule in rules])
        return cls(moments, first.interval, max(rule.resolution for rule in rules))

    @property
    def num_probes(self) -> int:
        """Number of probes p."""
        return len(self.moments)

    def quadrature(self) -> tuple[np.ndarray, np.ndarray]:
        """Return nodes and signed weights (p, K) that have exactly these moments, and none beyond.

        The nodes are the Chebyshev points, the weights the cut Chebyshev series at them, by
        discrete orthogonality (Weisse et al. 2006, eqs. 81-84).
        """
        p, count = self.moments.shape
        low, high = self.interval
        points = np.cos(np.pi * (np.arange(count) + 0.5) / count)[::-1]
        series = self.moments * np.where(np.arange(count) == 0, 1, 2)
        weights = (series @ np.cos(np.outer(np.arange(count), np.arccos(points)))) / count
        return np.tile((low + high) / 2 + (high - low) / 2 * points, (p, 1)), weights

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Return everything as named arrays, for files."""
        return {f.name: np.asarray(getattr(self, f.name)) for f in fields(self)}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> MomentRule:
        """Return the rule that `to_arrays` took apart."""
        return cls(arrays["moments"], arrays["interval"], float(arrays["resolution"]))


def rounding(precision: float, nodes: np.ndarray) -> float:
    """Return the distance below which two computed nodes are the same number."""
    return 16 * precision * float(np.abs(nodes).max())


def resolved_nodes(nodes: np.ndarray, residuals: np.ndarray, resolution: float) -> np.ndarray:
    """Tell which ascending Ritz values are eigenvalues beyond doubt, vectors included.

    The residual must be below a millionth of the distance to the next node, and rounding below a
    thousandth.
    """
    gaps = distances(nodes)
    return (residuals <= 1e-6 * gaps) & (resolution <= 1e-3 * gaps)


def distances(nodes: np.ndarray) -> np.ndarray:
    """Return how far each of some ascending nodes is from the next one on either side."""
    gaps = np.diff(nodes, prepend=-np.inf, append=np.inf)
    return np.minimum(gaps[:-1], gaps[1:])


def gauss_rule(
    alphas: Sequence[np.ndarray] | np.ndarray, betas: Sequence[np.ndarray] | np.ndarray
) -> tuple[QuadratureRule, list[np.ndarray]]:
    """Return the Gauss rules of p Jacobi matrices, and the eigenvectors of each matrix.

    Nodes are the eigenvalues of the tridiagonal matrix, weights the squared first components of its
    eigenvectors (Golub and Welsch 1969), and ``|beta_m s_m|``, with s_m the last component, is the
    residual norm of the Ritz pair.

    Parameters
    ----------
    alphas, betas : p arrays of length m, which may differ
        Diagonal, and off-diagonal with the norm of the last residual in ``betas[i][-1]``. A zero in
        `betas` ends its row: the Krylov space is invariant and the rule exact.
    """
    rules, eigenvectors = [], []
    for alpha, beta in zip(alphas, betas, strict=True):
        ended = np.flatnonzero(beta == 0)
        k = int(ended[0]) + 1 if ended.size else len(beta)
        theta, vectors = scipy.linalg.eigh_tridiagonal(alpha[:k], beta[: k - 1])
        residuals = np.abs(beta[k - 1] * vectors[-1])
        rules.append(QuadratureRule(theta[None], vectors[:1] ** 2, residuals[None]))
        eigenvectors.append(vectors)
    return QuadratureRule.concatenate(rules), eigenvectors


def jacobi_matrix(
    nodes: np.ndarray, amplitudes: np.ndarray, tails: np.ndarray, num_steps: int, floor: float
) -> tuple[np.ndarray, np.ndarray]:
    """Return the recurrence coefficients of one probe from the Ritz pairs of a space that holds its
    own.

    Lanczos on the host, with the diagonal matrix of Ritz values.

    Parameters
    ----------
    nodes : ndarray of shape (N,)
        Ritz values.
    amplitudes : ndarray of shape (N,)
        ``y^* v`` of the probe v for every Ritz vector y; real or complex, of norm 1.
    tails : ndarray of shape (b, N)
        Residual vectors ``A y - theta y``, in an orthonormal basis.
    num_steps : int
    floor : float
        Norm below which a residual is rounding error.

    Returns
    -------
    alphas, betas : ndarray of shape (m,)
        As many as are known, at most `num_steps`: the recurrence ends where the next vector would
        leave the space. The last beta is the norm of what comes next, 0 if nothing does.
    """
    alphas, betas = np.zeros(num_steps), np.zeros(num_steps)
    q = amplitudes / np.linalg.norm(amplitudes)
    basis = np.zeros((num_steps, len(nodes)), dtype=q.dtype)
    for j in range(num_steps):
        basis[j] = q
        known = basis[: j + 1]
        w = nodes * q
        alphas[j] = np.vdot(q, w).real
        for _ in range(2):
            w = w - known.T @ (known.conj() @ w)
        inside = np.linalg.norm(w)
        outside = float(np.linalg.norm(tails @ q))
        residual = float(np.hypot(inside, outside))
        betas[j] = residual if residual > floor else 0.0
        if j + 1 == num_steps or inside <= floor or outside > floor + LEAK * np.ptp(nodes):
            break
        q = w / inside
    return alphas[: j + 1], betas[: j + 1]


def step_distance(a: np.ndarray, f: np.ndarray, b: np.ndarray, g: np.ndarray) -> float:
    """Return the area between two step functions of values f, g just after the ascending a, b."""
    grid = np.sort(np.concatenate([a, b]))
    left = np.concatenate([[0.0], f])[np.searchsorted(a, grid[:-1], side="right")]
    right = np.concatenate([[0.0], g])[np.searchsorted(b, grid[:-1], side="right")]
    return float(np.sum(np.abs(left - right) * np.diff(grid)))
