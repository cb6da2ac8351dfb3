"""Power-law tails: recovered, plausible for their own samples, rejected for others."""

import numpy as np
import pytest
import scipy.stats
from scipy.integrate import quad

from specdens import slq
from specdens.laws import PowerLaw, goodness_of_fit
from tests.cases import diagonal, hand_made


def power_samples(alpha, size, seed, x_min=2.0):
    return x_min * np.random.default_rng(seed).random(size) ** (-1 / (alpha - 1))


@pytest.mark.parametrize("alpha", [1.5, 2.0, 2.7, 4.0])
def test_power_law_functions(alpha):
    law = PowerLaw(alpha, 2.0)
    for x in (2.0, 3.0, 50.0):
        assert float(law.cdf(x)) == pytest.approx(quad(law.pdf, 2.0, x)[0], abs=1e-8)
    q = np.linspace(0, 0.999, 7)
    np.testing.assert_allclose(law.cdf(law.quantile(q)), q, atol=1e-12)
    for level in (0.3, 0.9):
        expected = quad(law.quantile, 0, level)[0]
        assert float(law.mean_up_to(level)) == pytest.approx(expected, rel=1e-8)
    assert law.moment(0) == 1
    assert law.moment(1) == pytest.approx(float(law.mean_up_to(1.0)))
    assert law.cdf(1.0) == law.pdf(1.0) == 0
    assert law.quantile(1.0) == np.inf


def test_power_law_maximum_likelihood_agrees_with_scipy():
    x = power_samples(2.6, 500, 1)
    law = PowerLaw.fit(x, x_min=2.0)
    index = scipy.stats.pareto.fit(x, floc=0, fscale=2.0)[0]
    assert law.alpha - 1 == pytest.approx(index, rel=1e-6)
    distance = scipy.stats.kstest(x, scipy.stats.pareto(index, scale=2.0).cdf).statistic
    assert law.distance == pytest.approx(distance, rel=1e-6)
    assert goodness_of_fit(x, law).kolmogorov_smirnov == pytest.approx(law.distance, rel=1e-9)
    assert law.stderr == pytest.approx((law.alpha - 1) / np.sqrt(500))


def test_power_law_exponent_within_its_standard_error():
    scores = []
    for seed in range(100):
        law = PowerLaw.fit(power_samples(2.5, 400, seed), x_min=2.0)
        scores.append((law.alpha - 2.5) / law.stderr)
    assert np.abs(scores).max() < 4
    assert 0.8 < np.std(scores) < 1.2


def test_power_law_finds_where_the_tail_begins():
    rng = np.random.default_rng(5)
    x = np.concatenate([rng.uniform(-3.0, 2.0, 1500), power_samples(2.5, 1000, 5)])
    law = PowerLaw.fit(x)
    assert law.selected
    assert 1.8 < law.x_min < 3.0
    assert abs(law.alpha - 2.5) < 4 * law.stderr
    assert law.p_value(x, num_samples=99, seed=1) > 0.02
    assert PowerLaw.fit(x, x_min=1.0).p_value(x, num_samples=99) < 0.02  # a part of the body
    assert law.p_value(x, num_samples=20, seed=1) == law.p_value(x, num_samples=20, seed=1)


def test_power_law_p_values_are_uniform_under_the_law():
    p_values = []
    for seed in range(150):
        x = power_samples(2.5, 100, seed)
        p_values.append(PowerLaw.fit(x, x_min=2.0).p_value(x, num_samples=99, seed=seed))
    assert scipy.stats.kstest(p_values, "uniform").pvalue > 0.01
    assert np.mean(np.array(p_values) <= 0.1) < 0.17  # expected 0.1, standard deviation 0.025


def test_power_law_p_values_with_a_chosen_start_do_not_reject_too_often():
    p_values = []
    for seed in range(30):
        x = power_samples(2.5, 150, seed)
        law = PowerLaw.fit(x, num_candidates=20)
        p_values.append(law.p_value(x, num_samples=39, seed=seed, num_candidates=20))
    assert np.mean(np.array(p_values) <= 0.1) <= 0.25
    assert np.median(p_values) > 0.25


def test_exponential_samples_are_no_power_law():
    for seed in range(5):
        x = 1 + np.random.default_rng(seed).exponential(size=500)
        law = PowerLaw.fit(x, x_min=1.0)
        assert law.p_value(x, num_samples=199, seed=1) < 0.02
        ratio = law.against_exponential(x)
        assert ratio.statistic < 0
        assert ratio.p_value < 0.05


def test_power_law_beats_the_exponential_on_its_own_samples():
    x = power_samples(2.5, 500, 3)
    ratio = PowerLaw.fit(x, x_min=2.0).against_exponential(x)
    assert ratio.statistic > 2
    assert ratio.p_value < 0.05
    # Against the direct sum of log densities.
    scale = np.mean(x - 2.0)
    law = PowerLaw.fit(x, x_min=2.0)
    difference = np.log(law.pdf(x)) - scipy.stats.expon(2.0, scale).logpdf(x)
    expected = difference.sum() / (np.std(difference) * np.sqrt(500))
    assert ratio.statistic == pytest.approx(expected, rel=1e-9)


def test_power_law_of_a_measure_counts_effective_eigenvalues():
    x = power_samples(2.5, 300, 8)
    body = np.random.default_rng(8).uniform(-1, 1, 700)
    spectrum = np.concatenate([body, x])
    rows = hand_made([spectrum], [np.full(1000, 1e-3)], dimension=1000)
    law, same = PowerLaw.fit(rows, x_min=2.0), PowerLaw.fit(spectrum, x_min=2.0)
    assert law.alpha == pytest.approx(same.alpha, rel=1e-12)
    assert law.tail_size == pytest.approx(300)
    # The same weights of a matrix four times as large: half the standard error.
    larger = hand_made([spectrum], [np.full(1000, 1e-3)], dimension=4000)
    assert PowerLaw.fit(larger, x_min=2.0).stderr == pytest.approx(law.stderr / 2)
    assert PowerLaw.fit(larger, x_min=2.0).p_value(larger, num_samples=99) < law.p_value(
        rows, num_samples=99
    )


def test_power_law_of_an_estimated_density():
    spectrum = np.concatenate([np.zeros(1200), power_samples(2.2, 800, 9)])
    measure = slq(diagonal(spectrum), num_probes=10, num_steps=60, seed=2)
    exact = PowerLaw.fit(spectrum, x_min=2.0)
    law = PowerLaw.fit(measure, x_min=4.0)
    assert abs(law.alpha - exact.alpha) < 6 * law.stderr


def test_power_law_errors():
    with pytest.raises(ValueError, match="alpha=1"):
        PowerLaw(1.0, 1.0)
    with pytest.raises(ValueError, match="x_min=-1"):
        PowerLaw(2.0, -1.0)
    with pytest.raises(ValueError, match="x_min=0"):
        PowerLaw.fit([1.0, 2.0], x_min=0.0)
    with pytest.raises(ValueError, match="0 distinct positive"):
        PowerLaw.fit(np.zeros(5))
    with pytest.raises(ValueError, match="1 distinct positive"):
        PowerLaw.fit(np.ones(50))
    with pytest.raises(ValueError, match="min_tail=10"):
        PowerLaw.fit([1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match=r"PowerLaw\.fit"):
        PowerLaw(2.0, 1.0).p_value([1.0, 2.0])
    with pytest.raises(ValueError, match="num_samples=0"):
        PowerLaw.fit([1.0, 2.0], x_min=1.0).p_value([1.0, 2.0], num_samples=0)
    with pytest.raises(ValueError, match="no eigenvalue from 5"):
        PowerLaw(2.0, 5.0).against_exponential([1.0, 2.0])
    with pytest.raises(ValueError, match="two are needed"):
        PowerLaw(2.0, 2.0).against_exponential([1.0, 2.0])
