"""What a measure answers: against closed forms, SciPy, numerical integration and exact laws."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.stats import wasserstein_distance

from specdens import (
    Chebyshev,
    Estimate,
    Gaussian,
    Lorentzian,
    SpectralMeasure,
    lanczos,
    load,
    slq,
)
from tests.cases import SPECTRA, dense, diagonal, hand_made, same_bits

finite = st.floats(-5, 5)


@st.composite
def measures(draw):
    """Draw measures of 1 to 3 probes with up to 5 nodes each."""
    p, m = draw(st.integers(1, 3)), draw(st.integers(1, 5))
    nodes = np.sort(np.array(draw(st.lists(finite, min_size=p * m, max_size=p * m))).reshape(p, m))
    raw = draw(st.lists(st.floats(0.1, 1.0), min_size=p * m, max_size=p * m))
    weights = np.array(raw).reshape(p, m)
    return SpectralMeasure(nodes, weights / weights.sum(axis=1, keepdims=True), 10)


@given(measures(), finite, finite)
def test_distribution_functions_rise_from_0_to_1(measure, a, b):
    low, high = min(a, b), max(a, b)
    below, above = measure.cdf([low, high]).value
    assert -1e-12 <= below <= above + 1e-12 <= 1 + 1e-11
    assert measure.cdf(1e6).value == pytest.approx(1)


@given(measures(), finite, st.sampled_from([Gaussian(0.7), Lorentzian(0.4)]))
def test_the_density_is_the_slope_of_the_distribution_function(measure, x, smoothing):
    h = 1e-5
    slope = np.diff(measure.cdf([x - h, x + h], smoothing).value)[0] / (2 * h)
    assert measure.pdf(x, smoothing).value == pytest.approx(slope, rel=1e-5, abs=1e-8)


def test_the_density_integrates_to_one():
    measure = slq(dense(SPECTRA["outliers"]), num_probes=3, num_steps=12)
    points = list(measure.outliers.eigenvalues)
    area = quad(lambda x: float(measure.pdf(x).value), -5, 25, points=points, limit=500)[0]
    assert area == pytest.approx(1, abs=1e-6)


@given(measures(), measures())
def test_distances_are_those_of_scipy(first, second):
    exact = wasserstein_distance(
        first.nodes.ravel(), second.nodes.ravel(), first.weights.ravel(), second.weights.ravel()
    )
    assert first.distance(second) == pytest.approx(exact, abs=1e-12)
    assert first.distance(first) == 0


def test_distances_to_eigenvalues():
    measure = hand_made([[0.0, 2.0]], [[0.5, 0.5]])
    assert measure.distance([0.0, 2.0]) == 0
    assert measure.distance([1.0, 1.0, 1.0]) == pytest.approx(1.0)


def test_hand_made_measures_answer_by_arithmetic():
    measure = hand_made([[1.0, 3.0], [1.0, 5.0]], [[0.5, 0.5], [0.25, 0.75]], dimension=8)
    means = np.array([2.0, 4.0])
    assert measure.moment(1) == Estimate(3.0, pytest.approx(1.0))
    assert measure.moment(0).value == 1
    assert measure.trace().value == pytest.approx(8 * means.mean())
    assert measure.trace().stderr == pytest.approx(8 * means.std(ddof=1) / 2**0.5)
    assert measure.trace(np.square).value == pytest.approx(8 * (5 + 19) / 2)
    assert measure.count(1, 3).value == pytest.approx(8 * (1 + 0.25) / 2)
    assert measure.count(3, 3).value == pytest.approx(2)
    assert measure.integrate(lambda x: 1.0).value == 1
    np.testing.assert_array_equal(
        measure.quantile([0, 0.3, 0.5, 0.625, 0.9, 1]), [1, 1, 3, 3, 5, 5]
    )
    assert measure.support == (1.0, 5.0)


def test_nodes_without_weight_are_never_evaluated():
    measure = hand_made([[0.0, 1.0]], [[0.0, 1.0]])
    assert measure.integrate(np.log).value == 0
    assert measure.support == (1.0, 1.0)


def test_one_probe_has_no_standard_error():
    estimate = hand_made([[1.0]], [[1.0]]).trace()
    assert np.isnan(estimate.stderr)


@pytest.mark.parametrize(
    ("estimate", "text"),
    [
        (Estimate(1234.5678, 12.3), "1235 ± 12"),
        (Estimate(3.14159, 0.012), "3.142 ± 0.012"),
        (Estimate(2.0, 0.0), "2 ± 0"),
        (Estimate(60229.4, 300.0), "60200 ± 300"),
    ],
)
def test_estimates_print_with_the_digits_they_have(estimate, text):
    printed = str(Estimate(np.float64(estimate.value), np.float64(estimate.stderr)))
    value, error = (float(part) for part in printed.split(" ± "))
    wanted_value, wanted_error = (float(part) for part in text.split(" ± "))
    assert value == pytest.approx(wanted_value, abs=0.5 * wanted_error)
    assert error == pytest.approx(wanted_error, rel=0.05)
    assert len(printed) <= 20


def test_logarithmic_densities_have_the_jacobian_and_both_signs():
    u = np.random.default_rng(0).normal(0.5, 1.0, 4000)
    signs = np.where(np.arange(4000) % 2, 1.0, -1.0)
    values = np.concatenate([signs * np.exp(u), np.zeros(1000)])
    weights = np.full((1, 5000), 1 / 5000)
    measure = SpectralMeasure(values[None], weights, 5000)
    grid = np.linspace(-6, 7, 2001)
    density = measure.log_pdf(grid, width=0.3).value
    assert np.trapezoid(density, grid) == pytest.approx(0.8, abs=1e-6)  # a fifth sits at zero
    normal = 0.8 * np.exp(-((grid - 0.5) ** 2) / (2 * 1.09)) / np.sqrt(2 * np.pi * 1.09)
    assert np.abs(density - normal).max() < 0.03


def test_joining_measures_is_running_all_probes():
    matrix = dense(SPECTRA["uniform"])
    first, second = (slq(matrix, num_probes=3, num_steps=6, seed=seed) for seed in (0, 1))
    joined = first.extend(second)
    assert joined.num_probes == 6
    mean = (first.plain().moment(3).value + second.plain().moment(3).value) / 2
    assert joined.plain().moment(3).value == pytest.approx(mean)
    with pytest.raises(ValueError, match="seed"):
        joined.extend(second)
    with pytest.raises(ValueError, match="dimension"):
        first.extend(slq(np.eye(5), seed=7))
    with pytest.raises(ValueError, match="method"):
        first.extend(lanczos(matrix, seed=8))


@pytest.mark.parametrize("smoothing", [Gaussian(0.3), Lorentzian(0.1), Chebyshev(30, (-1.0, 4.0))])
@pytest.mark.parametrize("reorthogonalize", [True, False])
def test_files_keep_everything(tmp_path, smoothing, reorthogonalize):
    run = slq(
        dense(SPECTRA["uniform"]), num_probes=3, num_steps=40, reorthogonalize=reorthogonalize
    )
    measure = SpectralMeasure(
        run.nodes, run.weights, 40, smoothing, run.outliers, run.rule, run.provenance
    )
    measure.save(tmp_path / "measure.npz")
    again = load(tmp_path / "measure.npz")
    assert same_bits(measure, again)
    assert again.smoothing == smoothing
    assert again.provenance == dict(measure.provenance)
    np.testing.assert_array_equal(again.outliers.multiplicities, run.outliers.multiplicities)
    x = np.linspace(0, 3, 50)
    np.testing.assert_array_equal(measure.cdf_band(x), again.cdf_band(x))
    np.testing.assert_array_equal(measure.pdf(x).value, again.pdf(x).value)


def test_a_foreign_smoothing_cannot_be_saved(tmp_path):
    measure = hand_made(
        [[0.0]], [[1.0]], smoothing=Chebyshev(5, (-1.0, 1.0), lambda n: np.ones(n + 1))
    )
    with pytest.raises(ValueError, match="smoothing="):
        measure.save(tmp_path / "measure.npz")


def test_damaged_files_are_refused(tmp_path):
    path = tmp_path / "measure.npz"
    hand_made([[0.0]], [[1.0]]).save(path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="damaged or truncated"):
        load(path)
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "nothing.npz")


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda m: m.count(2, 1), "low=2"),
        (lambda m: m.moment(-1), "order=-1"),
        (lambda m: m.quantile(1.5), "q=1.5"),
        (lambda m: m.plot(kind="pie"), "kind='pie'"),
        (lambda m: m.extend(m), "no rule"),
        (lambda m: m.pdf(0.0, Gaussian(0)), "width=0"),
        (lambda m: hand_made([[1.0, 2.0]], [[1.0]]), "shape"),
        (lambda m: hand_made([[np.nan]], [[1.0]]), "finite"),
    ],
)
def test_bad_questions_are_refused(call, text):
    with pytest.raises(ValueError, match=text):
        call(hand_made([[1.0]], [[1.0]]))


def test_it_says_what_it_is():
    text = repr(slq(diagonal(SPECTRA["outliers"]), num_probes=3, num_steps=20))
    assert "n=40" in text
    assert "3 probes" in text
    assert "trace" in text


def test_one_probe_is_said_to_have_no_standard_error():
    text = repr(slq(diagonal(SPECTRA["outliers"]), num_probes=1, num_steps=20))
    assert "1 probe x" in text
    assert "(one probe: no standard error)" in text
    assert "nan" not in text
    assert (
        str(Estimate(np.float64(2.5), np.float64(np.nan))) == "2.5 (one probe: no standard error)"
    )
    assert str(Estimate(np.float64(np.nan), np.float64(np.nan))) == "nan ± nan"


def test_what_a_given_vector_sees_is_no_trace():
    seen = lanczos(np.diag([1.0, 2.0, 3.0]), np.array([1.0, 0.0, 1.0]), num_steps=3)
    assert "mean seen 2, " in repr(seen)
