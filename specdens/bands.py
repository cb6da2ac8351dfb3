r"""Certified bands on the distribution function of the eigenvalues. NumPy only.

Two errors stand between a Gauss rule and the eigenvalues, and each has its own bound.

*Quadrature.* For the measure :math:`\Psi_v(x) = \sum_{\lambda_i \le x} |u_i^* v|^2` of one probe, a
Gauss rule with nodes :math:`\theta_1 < \ldots < \theta_m` and weights w satisfies the
Chebyshev-Markov-Stieltjes inequalities

.. math:: \sum_{j:\, \theta_{j+1} \le x} w_j \;\le\; \Psi_v(x)
          \;\le\; w_1 + \sum_{j:\, \theta_j \le x} w_{j+1}

(Golub and Meurant 2010, ch. 6; Chen, Trogdon, Ubaru 2021, arXiv 2105.06595). If the Krylov space
was exhausted, the rule is the measure itself. Where Ritz pairs are resolved, their part of
:math:`\Psi_v` is known, and the inequalities are needed for the rest only: its Gauss rule has
all its nodes in the bulk. Of a Ritz vector with residual r, the part that belongs to eigenvalues
further than t from the Ritz value has norm r / t at most; so its weight w is moved by t in either
direction and the band widened by :math:`2 \sqrt{w}\, r / t`, with t the geometric mean of r and the
gap to the next node. Only vectors with r below a millionth of the gap are taken out, so that what
they leave behind in the rest is of that order. The recurrence of the rest ends where it leaves the
common Krylov space by more than `LEAK` times the range of its nodes.

Rounding and that leak are perturbations of the matrix, which move no eigenvalue further than their
norm (Weyl); all points are moved by that much.
For the leak this is an argument about eigenvalues, not about the weights a probe gives them: that
part is tested on many spectra, with the probes' radius set to zero, and not proven.

*Probes.* For v uniform on the real sphere :math:`\Psi_v(x)` has the law Beta(k/2, (n-k)/2), with k
the number of eigenvalues up to x, whose deviations are sub-Gaussian with variance proxy
:math:`1 / (2(n+2))` (Marchal and Arbel 2017, arXiv 1705.00048, theorem 1). Averaged
over p probes, and with a union bound over the n jumps,

.. math:: r = \sqrt{\frac{\ln(2n/\eta)}{(n+2)\,p}}

bounds all deviations at once with probability :math:`1 - \eta`; for the complex sphere
(Beta(k, n-k), proxy :math:`1/(4(n+1))`) it is :math:`r = \sqrt{\ln(2n/\eta) / (2(n+1)p)}`.
"""

from __future__ import annotations

import numpy as np

from specdens.quadrature import LEAK, KrylovRule, QuadratureRule, distances, resolved_nodes


def probe_radius(dimension: int, num_probes: int, confidence: float, freedoms: int = 1) -> float:
    """Return r: all deviations of the probes' average distribution function, at `confidence`.

    Parameters
    ----------
    dimension, num_probes : int
        n and p.
    confidence : float
        1 - eta.
    freedoms : int
        2 for complex probes, otherwise 1.

    Examples
    --------
    >>> round(probe_radius(100_000, 10, 0.95), 4)
    0.0039
    """
    logarithm = np.log(2 * dimension / (1 - confidence))
    return float(np.sqrt(logarithm / ((freedoms * dimension + 2) * num_probes)))


def distribution_band(
    rule: KrylovRule, dimension: int, x: np.ndarray, confidence: float, freedoms: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """Return lower and upper bounds (q,) on the fraction of eigenvalues up to each x (q,).

    Points are moved by the rule's resolution in the safe direction.
    """
    rest, leak = (rule.gauss, 0.0) if rule.bulk is None else (rule.bulk, LEAK)
    p = len(rule.blocks)
    lower, upper = np.zeros(x.shape), np.zeros(x.shape)
    for i in range(p):
        bounds = _quadrature_bounds(rest, i, x, rule.resolution, leak)
        if rule.bulk is not None:
            bounds += _resolved_bounds(rule, i, x)
        lower += bounds[0] / p
        upper += bounds[1] / p
    r = probe_radius(dimension, p, confidence, freedoms)
    # The distribution function itself lies in [0, 1], so cutting the band there loses nothing.
    return np.clip(lower - r, 0, 1), np.clip(upper + r, 0, 1)


def _quadrature_bounds(
    rule: QuadratureRule, i: int, x: np.ndarray, resolution: float, leak: float
) -> np.ndarray:
    """Return the Chebyshev-Markov-Stieltjes bounds (2, q) of one row's Gauss rule."""
    used = np.isfinite(rule.residuals[i]) & (rule.weights[i] > 0)
    nodes, weights, residuals = rule.nodes[i, used], rule.weights[i, used], rule.residuals[i, used]
    exhausted = bool((residuals <= resolution).all())
    slack = 0 if exhausted else 1
    reach = resolution + (0.0 if exhausted else leak * float(np.ptp(nodes)))
    sums = np.concatenate([[0.0], np.cumsum(weights)])
    above = np.searchsorted(nodes, x + reach, side="right")
    below = np.searchsorted(nodes, x - reach, side="right")
    return np.stack(
        [sums[np.maximum(below - slack, 0)], sums[np.minimum(above + slack, len(nodes))]]
    )


def _resolved_bounds(rule: KrylovRule, i: int, x: np.ndarray) -> np.ndarray:
    """Return bounds (2, q) on what the resolved eigenvalues contribute to row i."""
    used = np.isfinite(rule.shared.residuals[i])
    nodes, residuals = rule.shared.nodes[i, used], rule.shared.residuals[i, used]
    exact = resolved_nodes(nodes, residuals, rule.resolution)
    weights = rule.shared.weights[i, used][exact]
    residuals = np.maximum(residuals[exact], rule.resolution)
    ratios = np.sqrt(residuals / distances(nodes)[exact])  # r / t for t = sqrt(r g)
    doubt = 2 * float(np.sum(np.sqrt(weights) * ratios))
    reach = np.divide(residuals, ratios, out=np.zeros_like(ratios), where=ratios > 0)
    reach += rule.resolution
    sums = np.concatenate([[0.0], np.cumsum(weights)])
    below = np.searchsorted(nodes[exact] + reach, x, side="right")
    above = np.searchsorted(nodes[exact] - reach, x, side="right")
    return np.stack([sums[below] - doubt, sums[above] + doubt])
