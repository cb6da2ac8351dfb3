"""The outlier-gap test: its level under every null hypothesis, and the outliers it finds."""

from functools import cache

import numpy as np
import pytest
import scipy.stats

from specdens.laws import outlier_gap_test
from specdens.laws.gaps import _null
from tests.ensembles import gaussian_ensemble, spiked, wishart


@pytest.mark.parametrize("ensemble", ["gaussian", "laguerre"])
def test_simulated_edges_have_the_scale_of_tracy_widom(ensemble):
    # Means of the two largest points of the Airy process for beta = 1: -1.20653 and -3.26243
    # (Bornemann 2010, Math. Comp. 79, table 7; the first is Tracy and Widom's).
    points = _null(ensemble, 2, 2000, 3, 1.0)
    gap = points[:, 0] - points[:, 1]
    assert gap.mean() == pytest.approx(2.0559, abs=4 * gap.std() / np.sqrt(2000) + 0.03)
    # Variance of the Tracy-Widom law: 1.6078.
    assert points[:, 0].var() == pytest.approx(1.6078, rel=0.2)


@cache
def null_spectra(name):
    draw = {
        "gaussian": lambda seed: gaussian_ensemble(100, seed),
        "gaussian top": lambda seed: gaussian_ensemble(150, seed)[:30],
        "wishart 0.1": lambda seed: wishart(60, 600, seed),
        "wishart 0.5": lambda seed: wishart(80, 160, seed),
        "wishart 1": lambda seed: wishart(80, 80, seed),
        "wishart 2": lambda seed: wishart(120, 60, seed),
    }[name]
    return [draw(1000 + seed) for seed in range(200)]


NULLS = ["gaussian", "gaussian top", "wishart 0.1", "wishart 0.5", "wishart 1", "wishart 2"]


@pytest.mark.parametrize("name", NULLS)
def test_gap_test_keeps_its_level(name):
    results = [outlier_gap_test(x, num_samples=499) for x in null_spectra(name)]
    # At most 5 percent by design; 7 leaves 1.3 standard deviations of 200 draws.
    assert np.mean([result.p_value < 0.05 for result in results]) <= 0.07
    assert np.mean([result.num_outliers > 0 for result in results]) <= 0.07
    # Not idle: p-values do not pile up at 1.
    assert np.median([result.p_value for result in results]) < 0.9


@pytest.mark.parametrize("name", ["gaussian", "wishart 0.5", "wishart 1"])
def test_gap_test_with_a_given_bulk_keeps_its_level(name):
    results = [outlier_gap_test(x, bulk=x, num_samples=499) for x in null_spectra(name)[:100]]
    assert np.mean([result.p_value < 0.05 for result in results]) <= 0.09  # of 100 draws


@pytest.mark.parametrize(
    ("edge", "draw"),
    [
        ("exponential", lambda rng: rng.exponential(size=300)),
        ("power-law", lambda rng: (1 - rng.random(300)) ** -0.7),
    ],
)
def test_gap_test_keeps_its_level_without_repulsion(edge, draw):
    p_values, airy = [], []
    for seed in range(200):
        x = np.sort(draw(np.random.default_rng(seed)))[::-1][:50]
        p_values.append(outlier_gap_test(x, edge=edge, num_samples=499).p_value)
        airy.append(outlier_gap_test(x, num_samples=499).p_value)
    assert np.mean(np.array(p_values) < 0.05) <= 0.07
    assert scipy.stats.kstest(p_values, "uniform").pvalue > 0.01
    assert np.mean(np.array(airy) < 0.05) > 0.1  # another null hypothesis, and it shows


@pytest.mark.parametrize("spikes", [[2.5], [3.0, 3.5], [3, 4, 5, 6, 8], [6.0] * 10])
@pytest.mark.parametrize("given_bulk", [False, True])
def test_planted_outliers_are_counted(spikes, given_bulk):
    counts = []
    for seed in range(20):
        x = spiked(150, np.array(spikes, float), seed)
        result = outlier_gap_test(x[:40], bulk=x if given_bulk else None, num_samples=499)
        assert result.p_value < 0.05
        counts.append(result.num_outliers)
    assert np.mean(np.array(counts) == len(spikes)) >= 0.9


def test_geometric_outliers_are_counted_to_the_last():
    x = np.append(np.geomspace(1e4, 5.0, 12), gaussian_ensemble(200, 5))
    for edge in ("airy", "exponential"):
        assert outlier_gap_test(x[:60], edge=edge).num_outliers == 12
    result = outlier_gap_test(x[:60])
    assert result.p_values[11] <= 0.05 < result.p_values[12:].min()
    assert result.edge == "airy"


def test_gap_test_does_not_depend_on_origin_and_unit():
    x = spiked(100, np.array([3.0, 4.0]), 2)[:30]
    one, two = outlier_gap_test(x), outlier_gap_test(1e-4 * x + 7.0)
    np.testing.assert_allclose(one.gaps, two.gaps, rtol=1e-7)
    assert (one.p_values == two.p_values).all()
    logs = outlier_gap_test(np.log(x - x[-1] + 2), edge="exponential")
    ratios = outlier_gap_test(x - x[-1] + 2, edge="power-law")
    assert (logs.p_values == ratios.p_values).all()


def test_complex_matrices_have_their_own_null_hypothesis():
    found = []
    for seed in range(200):
        rng = np.random.default_rng(seed)
        z = rng.standard_normal((60, 60)) + 1j * rng.standard_normal((60, 60))
        x = np.linalg.eigvalsh(z + z.conj().T)[::-1]
        found.append(outlier_gap_test(x, beta=2.0, num_samples=499).p_value < 0.05)
    assert np.mean(found) <= 0.07


def test_degenerate_tops():
    assert outlier_gap_test(np.ones(20), num_samples=99).num_outliers == 0
    result = outlier_gap_test([5.0, *np.ones(20)], num_samples=99)
    assert (result.num_outliers, result.location, result.p_value) == (1, 1, 0.01)
    # A null space is no bulk: without it the sixty eigenvalues have no outliers.
    x = wishart(120, 60, 3)
    assert outlier_gap_test(x).gaps.tolist() == outlier_gap_test(x[:60]).gaps.tolist()


def test_gap_test_errors():
    x = np.linspace(3, 1, 20)
    for arguments, message in (
        ({"edge": "hard"}, "edge='hard'"),
        ({"num_samples": 0}, "num_samples=0"),
        ({"num_samples": 18}, "take 19 at least"),
        ({"significance": 1.0}, r"significance=1\.0"),
        ({"beta": 0.0}, r"beta=0\.0"),
        ({"max_outliers": 19}, "max_outliers=19"),
        ({"bulk": x, "edge": "exponential"}, "leave bulk out"),
    ):
        with pytest.raises(ValueError, match=message):
            outlier_gap_test(x, **arguments)
    with pytest.raises(ValueError, match="descending"):
        outlier_gap_test(x[::-1])
    with pytest.raises(ValueError, match="finite"):
        outlier_gap_test([np.nan, 1.0, 0.5])
    with pytest.raises(ValueError, match="0 usable"):
        outlier_gap_test(np.zeros(10))
    with pytest.raises(TypeError, match="complex"):
        outlier_gap_test(x + 0j)
