"""Random-matrix laws against closed forms, quadrature and simulated matrices."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.integrate import quad

from specdens import slq
from specdens.laws import MarchenkoPastur, Semicircle, goodness_of_fit
from tests.cases import diagonal, hand_made
from tests.ensembles import gaussian_ensemble, wishart

LAWS = [
    Semicircle(2.0),
    Semicircle(0.3, center=-4.0),
    MarchenkoPastur(0.01, variance=3.0),
    MarchenkoPastur(0.5),
    MarchenkoPastur(1.0, variance=0.2),
    MarchenkoPastur(3.0, variance=1e-3),
]
BULK_LAWS = pytest.mark.parametrize("law", LAWS, ids=repr)


def integral(law, f, low, high):
    """Integrate f times the density, with the square roots at the edges taken out."""
    a, b = law.support

    def in_angle(t):
        x = (a + b) / 2 + (b - a) / 2 * np.cos(t)
        return f(x) * law.pdf(x) * (b - a) / 2 * np.sin(t)

    start, stop = (np.arccos(np.clip((2 * x - a - b) / (b - a), -1, 1)) for x in (high, low))
    return quad(in_angle, start, stop, epsabs=1e-13, epsrel=1e-11)[0]


def test_even_moments_of_the_semicircle_are_catalan_numbers():
    catalan = [1, 1, 2, 5, 14, 42, 132]
    assert [Semicircle(2.0).moment(2 * j) for j in range(7)] == catalan
    assert [Semicircle(2.0).moment(2 * j + 1) for j in range(6)] == [0.0] * 6


def test_moments_of_marchenko_pastur_are_narayana_polynomials():
    law = MarchenkoPastur(0.5, variance=2.0)
    # 1, 1 + c, 1 + 3c + c^2, 1 + 6c + 6c^2 + c^3 times powers of the variance
    assert [law.moment(j) for j in range(5)] == [1, 2, 4 * 1.5, 8 * 2.75, 16 * 5.625]
    assert [MarchenkoPastur(1.0).moment(j) for j in range(7)] == [1, 1, 2, 5, 14, 42, 132]


@BULK_LAWS
def test_density_integrates_to_one_with_the_atom(law):
    mass = integral(law, np.ones_like, *law.support)
    assert mass + law.atom == pytest.approx(1, abs=1e-10)


@BULK_LAWS
@pytest.mark.parametrize("order", [1, 2, 3, 6])
def test_moments_are_integrals(law, order):
    expected = integral(law, lambda x: x**order, *law.support)
    scale = max(abs(edge) for edge in law.support) ** order
    assert law.moment(order) == pytest.approx(expected, abs=1e-10 * scale)


@BULK_LAWS
def test_cdf_is_the_integral_of_the_density(law):
    low, high = law.support
    for x in np.linspace(low, high, 9):
        expected = law.atom + integral(law, np.ones_like, low, x)
        assert float(law.cdf(x)) == pytest.approx(expected, abs=1e-9)
    outside = np.array([low - 1.0, high + 1.0, high])
    np.testing.assert_allclose(law.cdf(outside), [law.atom * (low >= 1), 1.0, 1.0], atol=1e-12)
    assert (law.pdf(outside[:2]) == 0).all()


def test_cdf_near_an_edge_keeps_its_relative_accuracy():
    # Below the edge by d the mass is (2/3) A d^(3/2) up to a relative correction of order d.
    for law in LAWS:
        high = law.support[1]
        d = 1e-4 * (high - law.support[0])
        d = high - (high - d)
        expected = 2 / 3 * law.edge_coefficient * d**1.5
        assert 1 - float(law.cdf(high - d)) == pytest.approx(expected, rel=1e-3)


def test_the_atom_is_a_jump_at_zero():
    law = MarchenkoPastur(4.0)
    np.testing.assert_allclose(law.cdf([-1e-9, 0.0, 0.5]), [0, 0.75, 0.75], atol=1e-15)
    assert law.quantile([0.0, 0.5, 0.75]).tolist() == [0, 0, 0]
    assert law.quantile(0.76) > law.support[0]
    assert MarchenkoPastur(1.0).pdf(0.0) == np.inf


@given(
    st.one_of(
        st.builds(Semicircle, st.floats(1e-3, 1e3), st.floats(-100, 100)),
        st.builds(MarchenkoPastur, st.floats(1e-4, 1e3), st.floats(1e-3, 1e3)),
    ),
    st.floats(0, 1),
)
def test_quantile_inverts_cdf(law, q):
    x = law.quantile(q)
    expected = max(q, law.atom)
    assert float(law.cdf(x)) == pytest.approx(expected, abs=1e-8)
    assert law.mean_up_to(1.0) == pytest.approx(law.moment(1), rel=1e-9, abs=1e-9)


@BULK_LAWS
def test_mean_up_to_integrates_the_quantile_function(law):
    q = np.linspace(0, 1, 20001)
    middle = law.quantile((q[1:] + q[:-1]) / 2)
    sums = np.concatenate([[0.0], np.cumsum(middle) * (q[1] - q[0])])
    scale = np.abs(law.support).max()
    np.testing.assert_allclose(law.mean_up_to(q), sums, atol=2e-6 * scale)


@pytest.mark.parametrize("make", [lambda: Semicircle(0.0), lambda: MarchenkoPastur(-1.0)])
def test_parameters_are_checked(make):
    with pytest.raises(ValueError, match=r"(radius|ratio)=.* must be positive"):
        make()


def test_bad_arguments_are_named():
    law = Semicircle(1.0)
    with pytest.raises(ValueError, match=r"order=-1"):
        law.moment(-1)
    with pytest.raises(ValueError, match=r"q=1\.5"):
        law.quantile(1.5)
    with pytest.raises(ValueError, match=r"center=nan"):
        Semicircle(1.0, np.nan)
    with pytest.raises(ValueError, match=r"method='mle'"):
        Semicircle.fit([1.0, 2.0], method="mle")
    with pytest.raises(ValueError, match="bulk without width"):
        Semicircle.fit(np.zeros(5))
    with pytest.raises(ValueError, match="bulk without width"):
        MarchenkoPastur.fit(np.ones(5))
    with pytest.raises(ValueError, match="fit a Semicircle"):
        MarchenkoPastur.fit(-np.linspace(1, 2, 9))
    with pytest.raises(ValueError, match="1 of 2 eigenvalues that are NaN"):
        goodness_of_fit([1.0, np.nan], law)
    with pytest.raises(TypeError, match="complex"):
        goodness_of_fit([1j], law)
    with pytest.raises(ValueError, match="at least one"):
        goodness_of_fit([], law)


def test_simulated_matrices_follow_their_law():
    # Rigidity: the distance is of order log(n) / n, far below n^(-1/2) = 0.05.
    fit = goodness_of_fit(gaussian_ensemble(400, seed=1), Semicircle(2.0))
    assert fit.kolmogorov_smirnov < 0.01
    assert fit.wasserstein < 0.02
    for n, samples in ((400, 800), (400, 400), (400, 160)):
        fit = goodness_of_fit(
            wishart(n, samples, 2, variance=3.0), MarchenkoPastur(n / samples, variance=3.0)
        )
        assert fit.kolmogorov_smirnov < 0.012, (n, samples)
        assert fit.wasserstein < 0.03
    wrong = goodness_of_fit(wishart(400, 800, 2), Semicircle(1.4, center=1.0))
    assert wrong.kolmogorov_smirnov > 0.05


@BULK_LAWS
def test_distances_agree_with_brute_force(law):
    values = np.sort(np.random.default_rng(4).choice(law.quantile(np.linspace(0, 1, 30)), 12))
    values = np.append(values, law.support[1] * 1.5 + 1)
    x = np.union1d(np.linspace(values.min() - 1, values.max() + 1, 200001), values)
    empirical = np.searchsorted(np.sort(values), x, side="right") / values.size
    difference = np.abs(empirical - law.cdf(x))
    step = x[1:] - x[:-1]
    fit = goodness_of_fit(values, law)
    assert fit.wasserstein == pytest.approx(float(difference[:-1] @ step), rel=1e-3, abs=1e-4)
    assert fit.kolmogorov_smirnov == pytest.approx(float(difference.max()), abs=5e-3)


def test_distances_of_weighted_and_signed_measures():
    measure = hand_made([[-1.0, 1.0], [-1.0, 1.0]], [[0.25, 0.75], [0.75, 0.25]])
    values = goodness_of_fit([-1.0, 1.0], Semicircle(2.0))
    assert goodness_of_fit(measure, Semicircle(2.0)) == pytest.approx(values)
    signed = hand_made([[-1.0, 0.0, 1.0]], [[0.6, -0.1, 0.5]])
    assert goodness_of_fit(signed, Semicircle(2.0)).wasserstein > 0


@pytest.mark.parametrize("method", ["quantiles", "moments"])
def test_fits_recover_the_parameters(method):
    law = Semicircle.fit(gaussian_ensemble(500, 3) * 1.5 - 2.0, method=method)
    assert law.radius == pytest.approx(3.0, rel=0.01)
    assert law.center == pytest.approx(-2.0, abs=0.02)
    ratios = [(500, 2000), (400, 400)] if method == "quantiles" else [(500, 2000), (400, 160)]
    for n, samples in ratios:
        law = MarchenkoPastur.fit(wishart(n, samples, 4, variance=2.0), method=method)
        assert law.ratio == pytest.approx(n / samples, rel=0.02)
        assert law.variance == pytest.approx(2.0, rel=0.02)


def test_quantile_fit_takes_the_atom_from_the_zeros():
    eigenvalues = wishart(400, 160, 4, variance=2.0)
    law = MarchenkoPastur.fit(eigenvalues)
    assert law.ratio == pytest.approx(2.5, rel=1e-12)
    assert law.variance == pytest.approx(2.0, rel=0.01)
    assert MarchenkoPastur.fit(eigenvalues, ratio=2.5).variance == pytest.approx(2.0, rel=0.01)
    # A few zeros of another origin, such as directions projected out, are no atom.
    law = MarchenkoPastur.fit(np.append(wishart(400, 800, 5), np.zeros(4)))
    assert law.ratio == pytest.approx(0.5, rel=0.05)


def test_outliers_do_not_move_fits_by_quantiles():
    for fit, bulk in (
        (Semicircle.fit, gaussian_ensemble(400, 6)),
        (MarchenkoPastur.fit, wishart(400, 800, 6)),
    ):
        clean, spoiled = fit(bulk), fit(np.append(bulk, np.geomspace(10, 1e4, 4)))
        assert spoiled.support == pytest.approx(clean.support, abs=0.08)
        moments = fit(np.append(bulk, np.geomspace(10, 1e4, 4)), method="moments")
        assert moments.support[1] > 100 * clean.support[1]


def test_a_measure_is_fitted_like_its_eigenvalues():
    eigenvalues = wishart(600, 1200, 7)
    measure = slq(diagonal(eigenvalues), num_probes=10, num_steps=40, seed=1)
    law = MarchenkoPastur.fit(measure)
    assert law.ratio == pytest.approx(0.5, abs=0.05)
    assert law.variance == pytest.approx(1.0, abs=0.03)
    assert goodness_of_fit(measure, law).wasserstein < 0.05
