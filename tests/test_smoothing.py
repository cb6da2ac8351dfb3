"""Kernels against SciPy's laws, and Chebyshev smoothing against textbook KPM on dense matrices."""

from functools import partial

import numpy as np
import pytest
from scipy import stats

from specdens import Chebyshev, Gaussian, LorentzDamping, Lorentzian, jackson, lanczos_sigma, slq
from tests.cases import SPECTRA, dense, probe_matrix

X, NODES = np.linspace(-3, 3, 31), np.array([-1.0, 0.25, 2.0])


@pytest.mark.parametrize(
    ("smoothing", "law"), [(Gaussian(0.3), stats.norm), (Lorentzian(0.2), stats.cauchy)]
)
def test_kernels_are_the_laws_they_are_named_after(smoothing, law):
    expected = law(loc=NODES, scale=smoothing.width)
    np.testing.assert_allclose(smoothing.density(X, NODES), expected.pdf(X[:, None]), atol=1e-14)
    np.testing.assert_allclose(smoothing.cumulative(X, NODES), expected.cdf(X[:, None]), atol=1e-14)


def test_a_gaussian_of_width_zero_is_the_step_function():
    np.testing.assert_array_equal(
        Gaussian(0).cumulative(np.array([0.9, 1.0]), np.array([1.0])), [[0], [1]]
    )


def test_jackson_factors_are_those_of_the_fejer_square():
    # For two moments g_1 = cos(pi / 3): of all nonnegative kernels the narrowest.
    np.testing.assert_allclose(jackson(1), [1.0, 0.5], atol=1e-15)
    angles = np.linspace(0, np.pi, 400)
    for degree in (2, 7, 30):
        g = jackson(degree)
        kernel = g[0] + 2 * np.cos(np.outer(angles, np.arange(1, degree + 1))) @ g[1:]
        assert kernel.min() > -1e-12


@pytest.mark.parametrize("degree", [5, 12, 19])
def test_chebyshev_is_the_kernel_polynomial_method(degree):
    matrix, interval = dense(SPECTRA["indefinite"]), (-2.5, 3.5)
    probes = probe_matrix(matrix, 3, seed=0)
    center, half = np.mean(interval), np.diff(interval)[0] / 2
    scaled = (matrix - center * np.eye(40)) / half
    vectors = [probes, scaled @ probes]
    while len(vectors) <= degree:
        vectors.append(2 * scaled @ vectors[-1] - vectors[-2])
    moments = np.array([np.sum(probes * v, axis=0).mean() for v in vectors])
    x = np.linspace(-2.4, 3.4, 50)
    t = (x - center) / half
    factors = jackson(degree) * np.where(np.arange(degree + 1) == 0, 1, 2)
    series = np.polynomial.chebyshev.chebval(t, factors * moments)
    textbook = series / (np.pi * half * np.sqrt(1 - t**2))
    measure = slq(matrix, num_probes=3, num_steps=10, seed=0).plain()
    np.testing.assert_allclose(
        measure.pdf(x, Chebyshev(degree, interval)).value, textbook, atol=1e-10
    )


def test_chebyshev_distribution_is_the_integral_of_its_density():
    smoothing = Chebyshev(20, (-2.0, 3.0))
    angles = np.linspace(0, np.pi, 20001)[::-1]  # even in angle: the density has root singularities
    grid = 0.5 + 2.5 * np.cos(angles)
    inner = grid[1:-1]
    density = smoothing.density(inner, NODES) * (2.5 * np.sin(angles[1:-1]))[:, None]
    area = np.cumsum(density, axis=0) * (np.pi / 20000)
    np.testing.assert_allclose(area[-1], 1, atol=1e-3)
    np.testing.assert_allclose(
        area[9999], smoothing.cumulative(inner[9999:10000], NODES)[0], atol=1e-3
    )
    assert (smoothing.density(np.array([-2.0, 3.0, 7.0]), NODES) == 0).all()


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: Gaussian(-1.0), "width=-1.0"),
        (lambda: Gaussian(np.nan), "width=nan"),
        (lambda: Lorentzian(0.0), "width=0.0"),
        (lambda: Chebyshev(0, (0.0, 1.0)), "degree=0"),
        (lambda: Chebyshev(4, (1.0, 1.0)), "interval="),
        (lambda: Chebyshev(4, (0.0, np.inf)), "interval="),
        (lambda: Chebyshev(4, (0.0, 1.0)).density(X, NODES), "leaves out nodes between -1 and 2"),
    ],
)
def test_bad_parameters_are_named(make, text):
    with pytest.raises(ValueError, match=text):
        make()


@pytest.mark.parametrize(
    ("damping", "name"),
    [
        (jackson, "jackson"),
        (LorentzDamping(4.0), "LorentzDamping(strength=4.0)"),
        (partial(lanczos_sigma, power=1), "functools.partial(lanczos_sigma, power=1)"),
    ],
)
def test_dampings_are_shown_by_name(damping, name):
    shown = repr(Chebyshev(4, (0.0, 2.5), damping))
    assert shown == f"Chebyshev(degree=4, interval=(0, 2.5), damping={name})"
