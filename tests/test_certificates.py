"""PAC-Bayes certificates against closed forms, root finding, quadrature and simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import brentq
from scipy.stats import ortho_group

from specdens.certificates import (
    PacBayesResult,
    PriorGrid,
    binary_kl,
    certificate,
    gaussian_kl,
    kl_inverse,
    monte_carlo_upper,
    pac_bayes_bound,
)


@pytest.mark.parametrize("q", [1e-9, 0.001, 0.03, 0.5, 0.9, 1 - 1e-9])
@pytest.mark.parametrize("c", [1e-8, 1e-3, 0.1, 1.0, 20.0])
def test_kl_inverse_is_the_root(q, c):
    edge = 1 - 1e-16
    root = (
        brentq(lambda p: binary_kl(q, p) - c, q, edge, xtol=1e-15) if binary_kl(q, edge) > c else 1
    )
    tolerance = 1e-12 if c > 1e-5 else 1e-9  # where brentq cannot see the divergence for rounding
    assert kl_inverse(q, c) == pytest.approx(root, abs=tolerance)


@given(st.floats(0, 1), st.floats(0, 100))
def test_kl_inverse_inverts(q, c):
    p = float(kl_inverse(q, c))
    assert q <= p <= 1
    if 1e-6 < p < 1 - 1e-6 and c > 1e-6:
        assert binary_kl(q, p) == pytest.approx(c, rel=1e-6, abs=1e-12)


def test_kl_inverse_at_its_ends():
    np.testing.assert_allclose(
        kl_inverse(0.0, [0.0, 0.1, 1e-300, 5.0]), -np.expm1([0, -0.1, -1e-300, -5])
    )
    assert kl_inverse([0.0, 0.3, 1.0], 0.0).tolist() == [0.0, 0.3, 1.0]
    assert kl_inverse([0.0, 0.3, 1.0], np.inf).tolist() == [1.0, 1.0, 1.0]
    assert kl_inverse([[0.1], [0.2]], [0.01, 0.02, 0.03]).shape == (2, 3)
    # For small c: p - q = sqrt(2 q (1 - q) c), to first order.
    assert kl_inverse(0.2, 1e-20) - 0.2 == pytest.approx(math.sqrt(0.32e-20), rel=1e-5)


def test_gaussian_kl_is_that_of_dense_matrices_in_any_basis():
    rng = np.random.default_rng(0)
    w, w0, scales, variance = rng.normal(size=6), rng.normal(size=6), rng.uniform(0.1, 2, 6), 0.3
    Q = ortho_group.rvs(6, random_state=1)  # noqa: N806
    covariance, inverse = Q @ np.diag(scales**2) @ Q.T, np.eye(6) / variance
    dense = 0.5 * (
        np.trace(inverse @ covariance)
        + (w - w0) @ inverse @ (w - w0)
        - 6
        + 6 * np.log(variance)
        - np.linalg.slogdet(covariance)[1]
    )
    assert gaussian_kl(w, scales, w0, variance) == pytest.approx(dense, rel=1e-12)
    # A rotation of everything about the prior's center changes nothing.
    assert gaussian_kl(w0 + Q @ (w - w0), scales, w0, variance) == pytest.approx(dense, rel=1e-12)
    shared = gaussian_kl(w, [0.5, 2.0], w0, variance, multiplicities=[5, 1])
    assert shared == pytest.approx(gaussian_kl(w, [0.5] * 5 + [2.0], w0, variance), rel=1e-12)


def test_the_grid_spends_its_probability_and_surrounds_every_variance():
    grid, n = PriorGrid(delta=0.025), 1000
    costs = np.array([grid.cost(j, n) for j in range(1, 20_000)])
    spent = (n * np.exp(-costs)).sum()  # sum of the shares of delta
    assert 0.9999 * 0.025 < spent < 0.025
    for variance in (1e-6, 0.003, 0.098):
        low, high = grid.neighbors(variance)
        assert high == low + 1
        assert grid.variance(high) <= variance <= grid.variance(low)
        assert grid.variance(grid.index(variance)) == pytest.approx(variance, rel=1e-12)
    # As the papers write it, for a variance between grid points.
    lam = 0.004
    cost = 2 * math.log(100 * math.log(0.1 / lam)) + math.log(math.pi**2 * n / (6 * 0.025))
    assert grid.cost(grid.index(lam), n) == pytest.approx(cost, rel=1e-12)
    assert grid.neighbors(0.09999) == (1, 1)


def test_a_certificate_joins_its_parts():
    rng = np.random.default_rng(0)
    w0, w, scales, n = np.zeros(8), rng.normal(size=8) / 5, rng.uniform(0.05, 0.3, 8), 500
    errors = rng.binomial(n, 0.04, size=300) / n
    found = certificate(errors, w, scales, w0, 0.02, n, delta=0.02)
    assert found.confidence == pytest.approx(1 - 0.025 - 0.02)
    assert found.error_upper == kl_inverse(errors.mean(), math.log(2 / 0.02) / 300)
    assert found.empirical_error < found.error_upper < found.bound < 1
    grid, bounds = PriorGrid(), {}
    for j in grid.neighbors(0.02):
        kl = gaussian_kl(w, scales, w0, grid.variance(j))
        budget = (kl + 2 * math.log(j) + math.log(math.pi**2 * n / 0.15)) / (n - 1)
        bounds[j] = float(kl_inverse(found.error_upper, budget))
    assert found.bound == pytest.approx(min(bounds.values()), rel=1e-12)
    assert bounds[found.index] == min(bounds.values())
    assert found.kl == gaussian_kl(w, scales, w0, found.prior_variance)
    result = PacBayesResult(found, None, {})
    assert (result.bound, result.kl) == (found.bound, found.kl)
    assert result.prior_scale**2 == pytest.approx(found.prior_variance)


def test_the_sampling_bound_covers():
    """With 20 draws of a fair coin, fewer than delta = 0.1 of 2000 repetitions fail."""
    means = np.random.default_rng(0).binomial(20, 0.5, size=2000) / 20
    failures = (monte_carlo_upper(means, 20, 0.1) < 0.5).mean()
    assert 0 < failures < 0.1


def test_the_bound_holds_for_thresholds_on_a_line():
    """Learning a threshold: the true error of the posterior is an integral that is known."""
    rng = np.random.default_rng(1)
    n, s = 400, 0.05
    grid, failures = PriorGrid(largest=4.0), 0
    for _ in range(20):
        x = rng.uniform(-1, 1, n)
        w = np.sort(x)[np.argmin(np.abs(np.sort(x) - 0.4))]  # close to the truth, from the data
        draws = w + s * rng.normal(size=400)
        errors = ((x > draws[:, None]) != (x > 0.4)).mean(axis=1)
        found = certificate(errors, [w], [s], [0.0], 0.2, n, grid=grid)
        truth = np.abs(w + s * rng.normal(size=20_000) - 0.4).mean() / 2
        failures += truth > found.bound
        assert found.bound < 0.2
    assert failures <= 1  # the probability of more than one failure in 20 is below 0.16


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: kl_inverse(1.5, 0.1), "q=1.5"),
        (lambda: kl_inverse(0.5, -0.1), "c=-0.1"),
        (lambda: kl_inverse(math.nan, 0.1), "q=nan"),
        (lambda: gaussian_kl([0.0], [0.0], [0.0], 1.0), "scales"),
        (lambda: gaussian_kl([0.0], [1.0], [0.0], -1.0), "prior_variance=-1.0"),
        (lambda: gaussian_kl([0.0, 1.0], [1.0], [0.0, 1.0], 1.0), "1 directions"),
        (lambda: PriorGrid(delta=1.0), "delta=1.0"),
        (lambda: PriorGrid().cost(0.5, 100), "index=0.5"),
        (lambda: pac_bayes_bound(0.1, 5.0, 100, index=1.5), "index=1.5"),
        (lambda: pac_bayes_bound(0.1, -5.0, 100, index=2), "kl=-5.0"),
        (lambda: pac_bayes_bound(0.1, 5.0, 1, index=2), "num_examples=1"),
        (lambda: monte_carlo_upper(0.1, 0), "num_samples=0"),
        (lambda: certificate([0.123], [0.0], [1.0], [0.0], 0.05, 10), "num_examples = 1 / 10"),
    ],
)
def test_errors_name_the_argument(call, named):
    with pytest.raises(ValueError, match=named.replace("(", r"\(")):
        call()
