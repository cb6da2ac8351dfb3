"""Papyan's spectral approximation and its variants, from arguments and smoothings alone.

Papyan (2019), The full spectrum of deepnet Hessians at scale. arXiv:1811.07062, appendix B.
"""

import numpy as np
import pytest

from specdens import Gaussian, lanczos, slq
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


def _ours(matrix, num_steps, measure):
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


@pytest.mark.parametrize("num_steps", [32, 64, 128])
@pytest.mark.parametrize("name", _BULKS)
def test_the_published_density_is_a_run_a_width_and_a_grid(name, num_steps):
    matrix = dense(_BULKS[name])
    first, probes = probe_matrix(matrix, 1, seed=1)[:, 0], probe_matrix(matrix, 3, seed=0)
    x, expected = _published(matrix, first, probes, num_steps)
    run = slq(matrix, num_probes=3, num_steps=num_steps, reorthogonalize=False).plain()
    grid, density = _ours(matrix, num_steps, run)
    np.testing.assert_allclose(grid, x, atol=1e-10)
    np.testing.assert_allclose(density, expected, atol=1e-10)
    # The published code leaves out what is below 1e-8 of a kernel's top; here nothing is.
    assert np.trapezoid(density, grid) == pytest.approx(1, abs=1e-3)


def test_one_probe_is_lanczos():
    matrix = dense(_BULKS["uniform"])
    first, probe = probe_matrix(matrix, 1, seed=1)[:, 0], probe_matrix(matrix, 1, seed=0)
    x, expected = _published(matrix, first, probe, 64)
    seen = lanczos(matrix, probe[:, 0], num_steps=64, reorthogonalize=False)
    grid, density = _ours(matrix, 64, seen)
    np.testing.assert_allclose(grid, x, atol=1e-10)
    np.testing.assert_allclose(density, expected, atol=1e-10)


_SPIKED = np.concatenate([np.linspace(-0.1, 0.5, 690), np.geomspace(2, 20, 10)])


@pytest.mark.parametrize("num_steps", [40, 80, 128])
def test_ghosts_change_counts_of_nodes_but_not_the_density(num_steps):
    matrix = dense(_SPIKED)
    probe = probe_matrix(matrix, 1, seed=0)[:, 0]
    fast, kept = (
        lanczos(matrix, probe, num_steps=num_steps, reorthogonalize=choice)
        for choice in (False, True)
    )
    assert np.sum(kept.nodes > 1) == 10
    assert np.sum(fast.nodes > 1) >= 15  # copies
    assert np.sum(fast.outliers.eigenvalues > 1) == 10  # merged before anything is counted
    x = np.linspace(-2, 22, 6001)
    smoothing = Gaussian(0.01 * np.ptp(_SPIKED))
    first, second = (m.pdf(x, smoothing).value for m in (fast, kept))
    assert np.trapezoid(np.abs(first - second), x) <= 1e-3
    theta, weights, _ = _fast_lanczos(matrix, probe, num_steps)
    published = smoothing.density(x, theta) @ weights
    np.testing.assert_allclose(first, published, atol=1e-10)


def _with_zeros():
    """Return 200 negative, 300 positive eigenvalues off zero, and 100 that are zero."""
    rng = np.random.default_rng(0)
    size = 0.1 + np.exp(rng.normal(0, 0.5, 500))
    signs = np.where(np.arange(500) < 200, -1.0, 1.0)
    return np.concatenate([signs * size, np.zeros(100)])


def test_logarithmic_density_and_exact_zeros():
    values = _with_zeros()
    measure = slq(dense(values), num_probes=20, num_steps=60, block_size=5)
    zeros = measure.count(-1e-9, 1e-9)
    assert abs(zeros.value - 100) <= 4 * zeros.stderr
    assert 0 < zeros.stderr < 15
    u, width = np.linspace(-8, 5, 4001), 0.3
    density = measure.log_pdf(u, width).value
    assert np.trapezoid(density, u) == pytest.approx(1 - zeros.value / 600, abs=1e-6)
    logs = np.log(np.abs(values[values != 0]))
    edges = np.linspace(-3, 3, 25)
    exact = np.histogram(logs, edges)[0] / 600
    mass = np.concatenate([[0], np.cumsum((density[1:] + density[:-1]) / 2 * np.diff(u))])
    ours = np.diff(np.interp(edges, u, mass))
    assert np.abs(np.cumsum(ours) - np.cumsum(exact)).max() < 0.06


def test_zeros_that_are_not_resolved_are_counted_up_to_the_gap():
    """Short recurrences leave nodes near zero, not on it: eps must be as wide as the gap allows."""
    measure = slq(dense(_with_zeros()), num_probes=20, num_steps=60, reorthogonalize=False)
    zeros = measure.count(-0.05, 0.05)
    assert abs(zeros.value - 100) <= 4 * zeros.stderr
    assert 0 < zeros.stderr < 15


def test_resolved_zeros_are_counted_without_error():
    values = np.concatenate([_with_zeros()[:500], np.zeros(4)])
    measure = slq(dense(values), num_probes=10, num_steps=80)  # more probes than zeros
    zeros = measure.count(-1e-9, 1e-9)
    assert zeros.value == pytest.approx(4, abs=1e-9)
    assert zeros.stderr == pytest.approx(0, abs=1e-9)
