r"""Certified bands on the distribution function of the eigenvalues. NumPy only.

Two errors stand between a Gauss rule and the eigenvalues, and each has its own bound.

*Quadrature.* For the measure :math:`\Psi_v(x) = \sum_{\lambda_i \le x} |u_i^* v|^2` of one probe, a Gauss rule with
nodes :math:`\theta_1 < \dots < \theta_m` and weights w satisfies the Chebyshev-Markov-Stieltjes inequalities

.. math:: \sum_{j:\, \theta_{j+1} \le x} w_j \;\le\; \Psi_v(x) \;\le\; w_1 + \sum_{j:\, \theta_j \le x} w_{j+1}

(Golub and Meurant 2010, ch. 6; Chen, Trogdon, Ubaru 2021, arXiv 2105.06595). If the Krylov space was exhausted, the
rule is the measure itself.

*Probes.* For v uniform on the real sphere :math:`\Psi_v(x)` has the law Beta(k/2, (n-k)/2), with k the number of
eigenvalues up to x, whose deviations are sub-Gaussian with variance proxy :math:`1 / (2(n+2))` (Marchal and Arbel 2017,
arXiv 1705.00048, theorem 1). Averaged over p probes, and with a union bound over the n jumps,

.. math:: r = \sqrt{\frac{\ln(2n/\eta)}{(n+2)\,p}}

bounds all deviations at once with probability :math:`1 - \eta`; for the complex sphere
(Beta(k, n-k), proxy :math:`1/(4(n+1))`) it is :math:`r = \sqrt{\ln(2n/\eta) / (2(n+1)p)}`.
"""

from __future__ import annotations

import numpy as np

from specdens.quadrature import KrylovRule


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

    Points are moved by the rule's resolution in the safe direction, since nodes are known to rounding only.
    """
    lower, upper = np.zeros(x.shape), np.zeros(x.shape)
    gauss = rule.gauss
    p = gauss.nodes.shape[0]
    for nodes, weights, residuals in zip(gauss.nodes, gauss.weights, gauss.residuals, strict=True):
        used = np.isfinite(residuals)
        nodes, weights = nodes[used], weights[used]
        exhausted = bool((residuals[used] <= rule.resolution).all())
        sums = np.concatenate([[0.0], np.cumsum(weights)])
        above = np.searchsorted(nodes, x + rule.resolution, side="right")  # nodes up to x
        below = np.searchsorted(nodes, x - rule.resolution, side="right")
        slack = 0 if exhausted else 1
        upper += sums[np.minimum(above + slack, len(nodes))] / p
        lower += sums[np.maximum(below - slack, 0)] / p
    r = probe_radius(dimension, p, confidence, freedoms)
    # The distribution function itself lies in [0, 1], so cutting the band there loses nothing.
    return np.clip(lower - r, 0, 1), np.clip(upper + r, 0, 1)
