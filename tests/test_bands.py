"""Certified bands: they hold, at every point together, and they are no wider than they must be."""

import numpy as np
import pytest
import scipy.stats

from specdens import bands, lanczos, rademacher, slq
from specdens.testing import spiked_spectrum
from tests.cases import dense, diagonal, distribution, hand_made, probe_matrix


def _uniform(rng, n):
    return rng.uniform(-1, 3, n)


def _clustered(rng, n):
    return rng.choice(rng.uniform(-2, 2, 5), n) + 1e-6 * rng.standard_normal(n)


def _gapped(rng, n):
    return np.concatenate([rng.uniform(0, 1, n // 2), rng.uniform(5, 6, n - n // 2)])


def _rank_deficient(rng, n):
    return np.concatenate([np.zeros(n // 2), rng.uniform(0.1, 3, n - n // 2)])


def _repeated(rng, n):
    return rng.choice(rng.uniform(-1, 1, 12), n)


_KINDS = (_uniform, _clustered, _gapped, _rank_deficient, _repeated)


def _critical_points(spectrum):
    """Return every eigenvalue, and the number just below it: where the function jumps."""
    return np.concatenate([spectrum, np.nextafter(spectrum, -np.inf)])


@pytest.mark.parametrize("reorthogonalize", [True, False])
def test_the_band_holds_everywhere_for_95_percent_of_spectra(reorthogonalize):
    covered, widths = [], []
    for seed in range(200):
        rng = np.random.default_rng(seed)
        spectrum = np.sort(_KINDS[seed % 5](rng, int(rng.integers(50, 400))))
        measure = slq(
            diagonal(spectrum),
            num_probes=6,
            num_steps=20,
            seed=seed,
            reorthogonalize=reorthogonalize,
        )
        x = _critical_points(spectrum)
        exact = distribution(spectrum, x)
        lower, upper = measure.cdf_band(x, confidence=0.95)
        covered.append(bool(((lower <= exact) & (exact <= upper)).all()))
        widths.append(float((upper - lower).mean()))
    assert np.mean(covered) >= 0.95
    assert np.mean(widths) < 0.4  # vacuous would be 1


_PER_PROBE = {
    **{kind.__name__.strip("_"): kind for kind in _KINDS},
    "decaying": lambda rng, n: 10.0 / np.arange(1, n + 1) ** 1.5,
    "exponential": lambda rng, n: np.exp(-np.linspace(0, 15, n)),
    "spiked": lambda rng, n: np.append(
        1e-3 * rng.standard_normal(n - 10), np.geomspace(0.1, 9, 10)
    ),
}


@pytest.mark.parametrize("kind", _PER_PROBE)
@pytest.mark.parametrize("options", [{}, {"block_size": 1}, {"reorthogonalize": False}])
@pytest.mark.parametrize("complex_", [False, True], ids=["real", "complex"])
def test_quadrature_bounds_hold_for_what_the_probes_see(monkeypatch, kind, options, complex_):
    monkeypatch.setattr(bands, "probe_radius", lambda *arguments: 0.0)
    for seed, num_steps in enumerate((4, 9, 15, 30)):
        spectrum = np.sort(_PER_PROBE[kind](np.random.default_rng(seed), 80))
        matrix = np.diag(spectrum).astype(complex if complex_ else float)
        measure = slq(matrix, num_probes=3, num_steps=num_steps, seed=seed, **options)
        seen = np.mean(np.abs(probe_matrix(matrix, 3, seed)) ** 2, axis=1)
        x = _critical_points(spectrum)
        steps = np.concatenate([[0.0], np.cumsum(seen)])
        exact = steps[np.searchsorted(spectrum, x, side="right")]
        lower, upper = measure.cdf_band(x)
        assert (lower <= exact + 1e-9).all()
        assert (upper >= exact - 1e-9).all()


@pytest.mark.parametrize("options", [{}, {"block_size": 1}, {"reorthogonalize": False}])
def test_quadrature_bounds_hold_in_single_precision(monkeypatch, options):
    monkeypatch.setattr(bands, "probe_radius", lambda *arguments: 0.0)
    for seed, kind in enumerate(_PER_PROBE.values()):
        spectrum = np.sort(kind(np.random.default_rng(seed), 80)).astype(np.float32)
        matrix = np.diag(spectrum)
        measure = slq(matrix, num_probes=3, num_steps=20, seed=seed, **options)
        seen = np.mean(probe_matrix(matrix, 3, seed) ** 2, axis=1)
        x = _critical_points(spectrum.astype(float))
        steps = np.concatenate([[0.0], np.cumsum(seen)])
        exact = steps[np.searchsorted(spectrum.astype(float), x, side="right")]
        lower, upper = measure.cdf_band(x)
        assert (lower <= exact + 1e-4).all()
        assert (upper >= exact - 1e-4).all()


def test_resolved_outliers_narrow_the_band_of_the_bulk():
    spectrum = spiked_spectrum(2000, 20)
    measure = slq(diagonal(spectrum), num_probes=10, num_steps=60)
    without = slq(diagonal(spectrum), num_probes=10, num_steps=60, reorthogonalize=False)
    x = np.linspace(*np.quantile(spectrum, [0.05, 0.95]), 200)
    widths = [np.diff(m.cdf_band(x), axis=0).mean() for m in (measure, without)]
    assert widths[0] < 0.13
    assert widths[0] < 0.75 * widths[1]


def test_quadrature_bounds_are_those_of_the_inequalities(monkeypatch):
    monkeypatch.setattr(bands, "probe_radius", lambda *arguments: 0.0)
    measure = slq(diagonal(np.linspace(0, 1, 200)), num_probes=1, num_steps=6)
    nodes, weights = measure.rule.gauss.nodes[0], measure.rule.gauss.weights[0]
    for j in range(5):
        lower, upper = measure.cdf_band([(nodes[j] + nodes[j + 1]) / 2])
        assert lower[0] == pytest.approx(weights[:j].sum(), abs=1e-14)
        assert upper[0] == pytest.approx(weights[: j + 2].sum(), abs=1e-14)
    outside = measure.cdf_band([nodes[0] - 1, nodes[-1] + 1])
    np.testing.assert_allclose(outside, [[0, 1 - weights[-1]], [weights[0], 1]], atol=1e-14)


def test_an_exhausted_krylov_space_leaves_no_quadrature_error(monkeypatch):
    monkeypatch.setattr(bands, "probe_radius", lambda *arguments: 0.0)
    spectrum = np.repeat([-1.0, 0.0, 2.0], [5, 20, 15])
    for reorthogonalize in (True, False):
        measure = slq(diagonal(spectrum), num_probes=4, reorthogonalize=reorthogonalize)
        lower, upper = measure.cdf_band([-2.0, -0.5, 1.0, 3.0])
        np.testing.assert_allclose(lower, upper, atol=1e-12)


@pytest.mark.parametrize(("freedoms", "n"), [(1, 3), (1, 40), (1, 500), (2, 3), (2, 40), (2, 500)])
@pytest.mark.parametrize("confidence", [0.5, 0.95, 0.999])
def test_the_radius_covers_the_beta_law_at_every_jump(freedoms, n, confidence):
    radius = bands.probe_radius(n, 1, confidence, freedoms)
    k = np.arange(1, n)
    law = scipy.stats.beta(freedoms * k / 2, freedoms * (n - k) / 2)
    outside = law.sf(k / n + radius) + law.cdf(k / n - radius)
    assert outside.sum() <= 1 - confidence


def test_the_radius_is_the_formula():
    assert bands.probe_radius(98, 4, 0.9) == pytest.approx((np.log(1960) / 400) ** 0.5)
    assert bands.probe_radius(98, 4, 0.9, 2) == pytest.approx((np.log(1960) / 792) ** 0.5)


def test_bands_narrow_with_steps_probes_and_less_confidence():
    operator = diagonal(np.random.default_rng(0).uniform(0, 1, 2000))
    x = np.linspace(0, 1, 50)

    def width(num_probes, num_steps, confidence=0.95):
        lower, upper = slq(operator, num_probes=num_probes, num_steps=num_steps).cdf_band(
            x, confidence
        )
        assert (lower <= upper).all()
        return (upper - lower).mean()

    assert width(4, 20) < 0.75 * width(4, 10)
    assert width(16, 20) < 0.75 * width(2, 20)
    assert width(4, 20, 0.5) < width(4, 20, 0.99)
    assert width(16, 60) < 0.08


def test_bands_are_monotone_and_inside_0_and_1():
    measure = slq(dense(np.linspace(0, 1, 80)), num_probes=3, num_steps=9)
    for bound in measure.cdf_band(np.linspace(-1, 2, 400)):
        assert (np.diff(bound) >= 0).all()
        assert bound.min() >= 0
        assert bound.max() <= 1


def test_bands_of_plain_measures_are_the_same():
    measure = slq(dense(np.linspace(0, 1, 80)), num_probes=3, num_steps=9)
    x = np.linspace(0, 1, 30)
    np.testing.assert_array_equal(measure.cdf_band(x), measure.plain().cdf_band(x))


def test_joined_measures_have_a_narrower_band():
    operator = diagonal(np.linspace(0, 1, 500))
    first, second = (slq(operator, num_probes=4, num_steps=40, seed=seed) for seed in (0, 1))
    x = np.linspace(0, 1, 30)
    lower, upper = first.cdf_band(x)
    both = first.extend(second).cdf_band(x)
    assert (both[1] - both[0]).mean() < 0.9 * (upper - lower).mean()


@pytest.mark.parametrize("confidence", [0, 1, -0.5, 95, np.nan])
def test_confidence_is_a_probability(confidence):
    measure = slq(np.eye(3))
    with pytest.raises(ValueError, match=f"confidence={confidence} must lie between 0 and 1"):
        measure.cdf_band([0.0], confidence)


def test_bands_need_sphere_probes():
    matrix = dense(np.linspace(0, 1, 20))
    measures = [
        slq(matrix, num_probes=2, num_steps=5, probes=rademacher),
        lanczos(matrix, np.ones(20), num_steps=5),
        hand_made([[0.0, 1.0]], [[0.5, 0.5]]),
    ]
    for measure in measures:
        with pytest.raises(ValueError, match="the band holds for a Gauss rule of sphere probes"):
            measure.cdf_band([0.5])
