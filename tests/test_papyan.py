"""Papyan's spectral approximation and its variants, from arguments and smoothings alone.

Papyan (2019), The full spectrum of deepnet Hessians at scale. arXiv:1811.07062, appendix B.
"""

import numpy as np
import pytest

from specdens import Gaussian, from_vectors, lanczos, sphere, slq
from tests.cases import dense, probe_matrix

_KAPPA, _TAU, _POINTS = 1.25, 0.05, 1024


def _fast_lanczos(matrix, v, num_steps):
    """Three-term recurrence without reorthogonalization: nodes, weights, residuals."""
    alphas, betas = np.zeros(num_steps), np.zeros(num_steps)
    before, q, beta = np.zeros_like(v), v / np.linalg.norm(v), 0.0
    for j in range(num_steps):
        w = matrix @ q - beta * before
        alphas[j] = w @ q
        w = w - alphas[j] * q
        betas[j] = beta = np.linalg.norm(w)
        before, q = q, w / beta
    jacobi = np.diag(alphas) + np.diag(betas[:-1], 1) + np.diag(betas[:-1], -1)
    theta, s = np.linalg.eigh(jacobi)
    return theta, s[0] ** 2, np.abs(betas[-1] * s[-1])


def _published(matrix, first, probes, num_steps):
    """Return the grid and the density of Normalization and LanczosApproxSpec, kernels uncut."""
    theta, _, residuals = _fast_lanczos(matrix, first, 64)
    low, high = theta[0] - residuals[0], theta[-1] + residuals[-1]
    margin = _TAU * (high - low)
    low, high = low - margin, high + margin
    c, d = (low + high) / 2, (high - low) / 2
    sigma = 2 / (num_steps - 1) / np.sqrt(8 * np.log(_KAPPA))
    t = np.linspace(-1, 1, _POINTS)
    phi = np.zeros(_POINTS)
    for v in probes.T:
        theta, weights, _ = _fast_lanczos(matrix, v, num_steps)
        for node, weight in zip((theta - c) / d, weights, strict=True):
            phi += weight * np.exp(-((t - node) ** 2) / (2 * sigma**2))
    phi /= probes.shape[1] * np.sqrt(2 * np.pi * sigma**2)
    return t * d + c, phi / d


def _ours(matrix, num_probes, num_steps, measure):
    """Return the same from specdens: a run for the interval, a width, a grid."""
    gauss = lanczos(matrix, seed=1, num_steps=64, reorthogonalize=False).rule.gauss
    low = gauss.nodes[0, 0] - gauss.residuals[0, 0]
    high = gauss.nodes[0, -1] + gauss.residuals[0, -1]
    margin = _TAU * (high - low)
    low, high = low - margin, high + margin
    width = (high - low) / (num_steps - 1) / np.sqrt(8 * np.log(_KAPPA))
    x = np.linspace(low, high, _POINTS)
    return x, measure.pdf(x, Gaussian(width)).value


_BULKS = {
    "uniform": np.linspace(-1.0, 3.0, 700),
    "semicircle": 2 * np.sin(np.pi * (np.arange(700) + 0.5) / 1400 - np.pi / 4),
}
