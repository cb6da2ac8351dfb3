r"""A distribution function between the nodes of a Gauss rule, and how far it is off. NumPy only.

A Gauss rule puts all mass on its nodes, and so is a step function: for a smooth spectrum most of
its Wasserstein distance to the truth are the steps. By the Chebyshev-Markov-Stieltjes inequalities
the true distribution function crosses the middle of every step, :math:`C_{j-1} + w_j / 2` at
:math:`\theta_j`, nearly; the straight lines between these points are several times closer to it.

A node is spread only if its Ritz vector reaches as far as the next one. The spectral measure of a
Ritz vector has mean :math:`\theta_j` and standard deviation :math:`\|A y_j - \theta_j y_j\|`, its
residual; by Chebyshev's inequality at most a part :math:`(r/g)^2` of it lies beyond a gap g. Where
that is small (eigenvalues that are resolved, tight clusters) mass stays where it is.

The error has two parts. *Statistical*: the masses that a uniform random vector gives to parts of
the spectrum have a Dirichlet law, whose fluctuations are simulated. *Quadrature*: the distance to
the rule of half the steps, or the bound by residuals if that is smaller.
"""

from __future__ import annotations

import numpy as np

from specdens.quadrature import KrylovRule, QuadratureRule, gauss_rule, jacobi_matrix
from specdens.sharpening import Outliers, sharpen

_PIECES = 8  # points that stand for the straight line on either side of a node
_REACHES = 0.3  # of the gap: with a smaller residual less than a tenth lies beyond it
_GROUPS = 256  # parts of the spectrum whose masses are simulated
_SAMPLES = 2000


def interpolated(
    rule: KrylovRule, dimension: int, *, freedoms: int = 1
) -> tuple[np.ndarray, np.ndarray, Outliers]:
    """Return nodes and weights with known outliers as atoms and everything else interpolated.

    Parameters
    ----------
    rule : KrylovRule
        Of random probes.
    dimension : int
        n.
    freedoms : int
        2 for complex probes, otherwise 1.
    """
    nodes, weights, outliers = sharpen(rule, dimension, freedoms=freedoms)
    known = outliers.eigenvalues[outliers.stderr == 0]
    shared = QuadratureRule(nodes, weights, rule.shared.residuals)
    rows = [_row(shared, rule, i, np.isin(nodes[i], known)) for i in range(len(nodes))]
    length = max(len(theta) for theta, _ in rows)
    padding = [(0, length - len(theta)) for theta, _ in rows]
    return (
        np.stack([np.pad(t, pad, mode="edge") for (t, _), pad in zip(rows, padding, strict=True)]),
        np.stack([np.pad(w, pad) for (_, w), pad in zip(rows, padding, strict=True)]),
        outliers,
    )


def _row(
    shared: QuadratureRule, rule: KrylovRule, i: int, atoms: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return one probe's atoms, and the interpolated Gauss rule of its other nodes."""
    theta, weights, residuals = shared.nodes[i], shared.weights[i], shared.residuals[i]
    used = weights > 0
    atoms, rest = atoms & used, ~atoms & used
    if not rest.any() or residuals[rest].max() <= rule.resolution:  # an exhausted Krylov space
        return theta[used], weights[used]
    mass = weights[rest].sum()
    gauss = rule.gauss.nodes[i], rule.gauss.weights[i], rule.gauss.residuals[i]
    if rest.sum() <= len(gauss[0]):  # a probe by itself: what is left is its own rule
        gauss = theta[rest], weights[rest] / mass, residuals[rest]
    elif atoms.any():
        gauss = _condensed(theta[rest], weights[rest], len(gauss[0]), rule.resolution)
    points, masses = _spread(*gauss)
    return np.concatenate([theta[atoms], points]), np.concatenate([weights[atoms], mass * masses])


def _condensed(
    theta: np.ndarray, weights: np.ndarray, num_steps: int, resolution: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return nodes, weights and residuals of the Gauss rule of a discrete measure."""
    inside = np.zeros((0, len(theta)))
    coefficients = jacobi_matrix(theta, np.sqrt(weights), inside, num_steps, resolution)
    rule, _ = gauss_rule(*([c] for c in coefficients))
    return rule.nodes[0], rule.weights[0], rule.residuals[0]


def _spread(
    theta: np.ndarray, weights: np.ndarray, residuals: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return points on the lines through the middles of the steps, where nodes reach that far."""
    used = np.flatnonzero(weights > 0)
    used = used[np.argsort(theta[used], kind="stable")]
    theta, weights, residuals = theta[used], weights[used], residuals[used]
    gaps = np.diff(theta)
    left = np.concatenate([[0.0], np.where(residuals[1:] > _REACHES * gaps, gaps, 0.0)])
    right = np.concatenate([np.where(residuals[:-1] > _REACHES * gaps, gaps, 0.0), [0.0]])
    steps = (np.arange(_PIECES) + 0.5) / _PIECES
    points = [theta[:, None] - left[:, None] * steps, theta[:, None] + right[:, None] * steps]
    masses = np.repeat(weights / (2 * _PIECES), _PIECES)
    return np.concatenate([p.ravel() for p in points]), np.tile(masses, 2)


def residual_distance(rule: KrylovRule) -> float:
    r"""Return a bound on the Wasserstein-1 distance of the rule to what its probes see.

    For f with Lipschitz constant 1 and a Ritz vector y of weight w in the probe v,
    :math:`|v^* (f(A) - f(\theta)) y| \le \|(A - \theta) y\|`, so that
    :math:`W_1 \le \sum_j \sqrt{w_j}\, r_j`. Small where all eigenvalues, or clusters, are found.

    Parameters
    ----------
    rule : KrylovRule
    """
    weights, residuals = rule.shared.weights, rule.shared.residuals
    used = weights > 0
    terms = np.where(used, np.sqrt(weights), 0.0) * np.where(used, residuals, 0.0)
    return float(terms.sum(axis=1).mean())


def statistical_distance(
    nodes: np.ndarray,
    weights: np.ndarray,
    known: np.ndarray,
    dimension: int,
    confidence: float,
    freedoms: int = 1,
) -> float:
    r"""Return the Wasserstein-1 distance that random probes cause, at `confidence`.

    For a probe uniform on the sphere the masses of disjoint parts of the spectrum with
    :math:`k_1, k_2, \ldots` eigenvalues have the law Dirichlet(:math:`k_1/2, k_2/2, \ldots`), and
    the average over p probes one of nearly p times the concentration. Mass that is known exactly
    does not fluctuate, and the shares of the rest keep a Dirichlet law.

    Parameters
    ----------
    nodes, weights : ndarray of shape (p, m)
    known : ndarray of shape (q,)
        Nodes of known mass.
    dimension : int
        n.
    confidence : float
    freedoms : int
        2 for complex probes, otherwise 1.
    """
    p = nodes.shape[0]
    rest = ~np.isin(nodes, known) & (weights > 0)
    positions, masses = nodes[rest], weights[rest] / p
    mass = float(masses.sum())
    if mass * dimension < 1e-6:
        return 0.0
    order = np.argsort(positions, kind="stable")
    positions, masses = positions[order], masses[order] / mass
    group = np.minimum((np.cumsum(masses) - masses / 2) * _GROUPS, _GROUPS - 1).astype(int)
    shares = np.bincount(group, masses, _GROUPS)
    centers = np.bincount(group, masses * positions, _GROUPS)[shares > 0] / shares[shares > 0]
    shares = shares[shares > 0]
    concentration = p * (freedoms * mass * dimension / 2 + 1) - 1
    rng = np.random.default_rng(0)
    drawn = rng.gamma(concentration * shares, size=(_SAMPLES, len(shares)))
    drawn /= drawn.sum(axis=1, keepdims=True)
    off = np.abs(np.cumsum(drawn - shares, axis=1)[:, :-1]) @ np.diff(centers)
    return mass * float(np.quantile(off, confidence))
