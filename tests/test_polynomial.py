"""The kernel polynomial method: textbook moments and densities, intervals, dampings, extensions."""

import numpy as np
import pytest

from specdens import (
    Chebyshev,
    Checkpoint,
    FunctionOperator,
    LorentzDamping,
    VectorSpace,
    fejer,
    jackson,
    kpm,
    lanczos_sigma,
    load,
    rademacher,
    slq,
    sphere,
    undamped,
)
from specdens.methods.chebyshev import ritz_extremes
from specdens.testing import matrix_with_spectrum
from tests.cases import SPECTRA, dense, dense_case, home, move, probe_matrix

_INTERVAL = (-2.2, 3.1)
_VALUES = np.sort(np.random.default_rng(0).uniform(-2, 3, 150))


def _textbook_moments(matrix, probes, count, interval):
    """Return v^T T_r(A) v for r < count, one product a moment: (p, count)."""
    center, half = sum(interval) / 2, (interval[1] - interval[0]) / 2
    scaled = (matrix - center * np.eye(len(matrix))) / half
    before, now = probes, scaled @ probes
    moments = []
    for _ in range(count):
        moments.append(np.einsum("ip,ip->p", probes.conj(), before).real)
        before, now = now, 2 * scaled @ now - before
    return np.array(moments).T


def _textbook_density(moments, interval, x, factors):
    """Weisse et al. 2006, eq. 76, term by term."""
    center, half = sum(interval) / 2, (interval[1] - interval[0]) / 2
    y = (x - center) / half
    series = factors[0] * moments[:, :1] + 2 * sum(
        factors[r] * moments[:, r : r + 1] * np.cos(r * np.arccos(y))
        for r in range(1, moments.shape[1])
    )
    return (series / (np.pi * half * np.sqrt(1 - y**2))).mean(axis=0)


@pytest.mark.parametrize("num_moments", [2, 3, 40, 41])
def test_moments_and_density_are_the_textbooks(library, num_moments):
    host = matrix_with_spectrum(_VALUES)
    measure = kpm(
        move(host, library), num_probes=3, num_moments=num_moments, interval=_INTERVAL, block_size=2
    )
    probes = probe_matrix(host, 3, 0)
    moments = _textbook_moments(host, probes, num_moments, _INTERVAL)
    assert measure.rule.moments.shape == (3, num_moments)
    np.testing.assert_allclose(measure.rule.moments, moments, atol=1e-12)
    x = np.linspace(-2.1, 3.0, 9)
    expected = _textbook_density(moments, _INTERVAL, x, jackson(num_moments - 1))
    np.testing.assert_allclose(measure.pdf(x).value, expected, atol=1e-10)


def test_complex_hermitian_moments():
    host = matrix_with_spectrum(_VALUES, like=np.zeros(1, complex))
    measure = kpm(host, num_probes=2, num_moments=30, interval=_INTERVAL)
    moments = _textbook_moments(host, probe_matrix(host, 2, 0), 30, _INTERVAL)
    np.testing.assert_allclose(measure.rule.moments, moments, atol=1e-12)


def test_single_precision_moments_are_stable():
    host = matrix_with_spectrum(_VALUES)
    low, high = (kpm(host.astype(t), num_moments=512, interval=_INTERVAL) for t in ("f4", "f8"))
    np.testing.assert_allclose(low.rule.moments, high.rule.moments, atol=2e-5)


@pytest.mark.parametrize("damping", [jackson, fejer, LorentzDamping(3.5), lanczos_sigma, undamped])
def test_damping_is_chosen_afterwards_for_moments_and_gauss_rules_alike(damping):
    host = matrix_with_spectrum(_VALUES)
    moments = kpm(host, num_probes=3, num_moments=40, interval=_INTERVAL)
    gauss = slq(host, num_probes=3, num_steps=20).plain()  # knows moments up to degree 39
    smoothing = Chebyshev(39, _INTERVAL, damping)
    x = np.linspace(-2.1, 3.0, 9)
    expected = _textbook_density(moments.rule.moments, _INTERVAL, x, damping(39))
    for measure in (moments, gauss):
        np.testing.assert_allclose(measure.pdf(x, smoothing).value, expected, atol=1e-10)
        cumulative = measure.cdf(np.array([-2.2, 3.1]), smoothing).value
        np.testing.assert_allclose(cumulative, [0, 1], atol=1e-10)


def test_the_cut_series_has_the_moments_of_the_probes():
    host = matrix_with_spectrum(_VALUES)
    measure = kpm(host, num_probes=2, num_moments=12, interval=_INTERVAL)
    probes = probe_matrix(host, 2, 0)
    for order in range(12):
        expected = np.einsum("ip,ip->p", probes, np.linalg.matrix_power(host, order) @ probes)
        found = (measure.weights * measure.nodes**order).sum(axis=1)
        np.testing.assert_allclose(found, expected, atol=1e-9)


def test_the_density_comes_close_to_the_eigenvalues():
    values = np.linspace(-1, 1, 2000)
    operator = FunctionOperator(
        lambda x: values[:, None] * x, VectorSpace.like(values), blocks=True
    )
    measure = kpm(operator, num_moments=128)
    x = np.linspace(-0.8, 0.8, 50)
    # Jackson's kernel is pi / 128 wide; probes scatter each bin of that width by about 6 %.
    np.testing.assert_allclose(measure.pdf(x).value, 0.5, atol=0.1)
    assert abs(measure.trace().value) < 4 * measure.trace().stderr
    np.testing.assert_allclose(measure.quantile([0.25, 0.5]), [-0.5, 0.0], atol=0.05)


@pytest.mark.parametrize("interval", [(-1.0, 3.1), (-2.2, 2.5), (-1.9, 3.1), (-2.2, 2.97), (5, 6)])
def test_an_interval_that_misses_part_of_the_spectrum_raises(interval):
    with pytest.raises(ValueError, match=r"interval=.* misses part of the spectrum: .* Widen it"):
        kpm(matrix_with_spectrum(_VALUES), num_moments=64, interval=interval)


def test_an_interval_that_misses_one_outlier_by_little_raises():
    values = np.append(np.linspace(-1, 1, 300), 1.5)
    with pytest.raises(ValueError, match=r"eigenvalue near 1\.5|vectors grow"):
        kpm(dense(values), num_moments=64, interval=(-1.01, 1.49))


@pytest.mark.parametrize("interval", [(1.0, -1.0), (0.0, np.inf), (np.nan, 1.0)])
def test_empty_intervals_are_refused(interval):
    with pytest.raises(ValueError, match=r"interval=.* must be finite with low < high"):
        kpm(np.diag([0.1, 0.2]), interval=interval)


def test_the_exact_interval_is_enough():
    values = np.linspace(-1, 1, 100)
    for dtype in (np.float32, np.float64):
        kpm(np.diag(values).astype(dtype), num_moments=512, interval=(-1.0, 1.0))


@pytest.mark.parametrize("spectrum", SPECTRA)
def test_the_interval_is_found(spectrum):
    measure = kpm(dense_case(spectrum), num_moments=32)
    low, high = measure.smoothing.interval
    assert low <= SPECTRA[spectrum].min()
    assert high >= SPECTRA[spectrum].max()
    exact = SPECTRA[spectrum].sum()
    assert abs(measure.trace().value - exact) <= 5 * measure.trace().stderr + 1e-9


@pytest.mark.parametrize("matrix", [np.zeros((4, 4)), np.eye(3), [[2.0]], -np.eye(2)])
def test_multiples_of_the_identity(matrix):
    measure = kpm(matrix, num_moments=16)
    assert measure.trace().value == pytest.approx(np.trace(matrix))


def test_ritz_extremes_are_those_of_the_krylov_space():
    host = matrix_with_spectrum(_VALUES)
    moments = kpm(host, num_probes=1, num_moments=41, interval=_INTERVAL).rule.moments[0]
    center, half = sum(_INTERVAL) / 2, (_INTERVAL[1] - _INTERVAL[0]) / 2
    theta = center + half * ritz_extremes(moments, 2.0**-52)
    ritz = slq(host, num_probes=1, num_steps=20).plain().nodes[0, [0, -1]]
    np.testing.assert_allclose(theta, ritz, atol=1e-6)


def test_the_first_product_is_with_the_probes():
    seen = []

    def product(x):
        seen.append(np.array(x))
        return _VALUES[:, None] * x

    operator = FunctionOperator(product, VectorSpace.like(_VALUES), blocks=True)
    for interval in (_INTERVAL, None):
        seen.clear()
        kpm(operator, num_probes=3, num_moments=8, interval=interval)
        np.testing.assert_allclose(
            np.linalg.svd(np.hstack([seen[0], probe_matrix(np.diag(_VALUES), 3, 0)]))[1][3:],
            0,
            atol=1e-12,
        )  # the same span: Lanczos may have orthonormalized it
    assert [x.shape[1] for x in seen] == [3] * len(seen)


def test_two_moments_from_every_product():
    seen = []

    def product(x):
        seen.append(x.shape)
        return _VALUES[:, None] * x

    operator = FunctionOperator(product, VectorSpace.like(_VALUES), blocks=True)
    kpm(operator, num_probes=5, num_moments=64, interval=_INTERVAL, block_size=5)
    assert seen == [(150, 5)] * 32


def test_more_moments_cost_only_the_new_products(tmp_path):
    path, calls = tmp_path / "run.npz", []

    def product(x):
        calls.append(1)
        return _VALUES[:, None] * x

    operator = FunctionOperator(product, VectorSpace.like(_VALUES), blocks=True)
    run = {"num_probes": 4, "interval": _INTERVAL}
    whole = kpm(operator, num_moments=96, **run)
    kpm(operator, num_moments=40, checkpoint=Checkpoint(path, vectors=True), block_size=4, **run)
    calls.clear()
    more = kpm(operator, num_moments=96, resume=path, **run)
    assert len(calls) == 48 - 20
    np.testing.assert_array_equal(more.rule.moments, whole.rule.moments)


def test_more_moments_need_the_vectors(tmp_path):
    path = tmp_path / "run.npz"
    host = np.diag(_VALUES)
    kpm(host, num_moments=20, interval=_INTERVAL, checkpoint=path)
    with pytest.raises(ValueError, match=r"num_moments=30, .* kept no vectors to go on from"):
        kpm(host, num_moments=30, interval=_INTERVAL, resume=path)


def test_a_run_resumes_in_the_middle_to_the_same_bits():
    host, states = dense(_VALUES), []
    options = {"num_probes": 5, "num_moments": 20, "interval": _INTERVAL, "block_size": 2}
    whole = kpm(host, callback=lambda progress: states.append(progress.state), **options)
    for state in states[::4]:
        again = kpm(host, resume=state, **options)
        np.testing.assert_array_equal(again.rule.moments, whole.rule.moments)


def test_more_probes_extend_a_run():
    host = dense(_VALUES)
    first, second = (
        kpm(host, num_probes=3, num_moments=20, interval=_INTERVAL, seed=seed) for seed in (0, 1)
    )
    both = first.extend(second)
    assert both.num_probes == 6
    np.testing.assert_array_equal(both.rule.moments[3:], second.rule.moments)
    x = np.linspace(-1, 2, 5)
    mean = (first.pdf(x).value + second.pdf(x).value) / 2
    np.testing.assert_allclose(both.pdf(x).value, mean)
    other = kpm(host, num_probes=3, num_moments=20, interval=(-3, 4), seed=2)
    with pytest.raises(ValueError, match="interval="):
        first.extend(other)
    other = kpm(host, num_probes=3, num_moments=22, interval=_INTERVAL, seed=2)
    with pytest.raises(ValueError, match="num_moments=22"):
        first.extend(other)
    with pytest.raises(ValueError, match="method"):
        first.extend(slq(host, num_probes=2, num_steps=5, seed=4))


@pytest.mark.parametrize("damping", [jackson, fejer, LorentzDamping(2.5), lanczos_sigma])
def test_files_keep_moments_and_damping(tmp_path, damping):
    from dataclasses import replace

    measure = kpm(dense(_VALUES), num_moments=20, interval=_INTERVAL)
    measure = replace(measure, smoothing=Chebyshev(19, _INTERVAL, damping))
    measure.save(tmp_path / "m.npz")
    again = load(tmp_path / "m.npz")
    np.testing.assert_array_equal(again.rule.moments, measure.rule.moments)
    np.testing.assert_array_equal(again.pdf(0.3).value, measure.pdf(0.3).value)


def test_plain_is_the_measure_itself_and_bands_are_not_offered():
    measure = kpm(dense(_VALUES), num_moments=20, interval=_INTERVAL)
    np.testing.assert_array_equal(measure.plain().weights, measure.weights)
    np.testing.assert_array_equal(measure.plain().pdf(0.5).value, measure.pdf(0.5).value)
    with pytest.raises(ValueError, match="no certified band; use slq"):
        measure.cdf_band(np.array([0.0]))


def test_bad_counts():
    for options, message in [
        ({"num_moments": 1}, "num_moments=1 must be at least 2"),
        ({"num_probes": 0}, "num_probes=0 must be at least 1"),
        ({"block_size": 0}, "block_size=0 must be at least 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            kpm(np.diag(_VALUES), interval=_INTERVAL, **options)


def test_products_that_are_not_finite_are_reported():
    operator = FunctionOperator(lambda x: x * np.nan, VectorSpace.like(_VALUES), blocks=True)
    with pytest.raises(ValueError, match="operator @ x is not finite"):
        kpm(operator, interval=_INTERVAL)


def test_dampings_start_at_one_and_fall():
    for damping in (jackson, fejer, LorentzDamping(4.0), lanczos_sigma):
        factors = damping(30)
        assert factors.shape == (31,)
        assert factors[0] == pytest.approx(1)
        assert (np.diff(factors) < 0).all()
    assert (undamped(5) == 1).all()
    with pytest.raises(ValueError, match=r"strength=0.* must be positive"):
        LorentzDamping(0.0)


@pytest.mark.parametrize("damping", [jackson, fejer])
def test_kernels_of_jackson_and_fejer_are_nowhere_negative(damping):
    smoothing = Chebyshev(40, (-1.0, 1.0), damping)
    x = np.linspace(-0.999, 0.999, 801)
    assert smoothing.density(x, np.linspace(-0.9, 0.9, 7)).min() > -1e-12


def test_a_lorentz_damped_kernel_is_nearly_lorentzian():
    smoothing = Chebyshev(511, (-1.0, 1.0), LorentzDamping(4.0))
    width = 4.0 / 512
    x = np.array([0.0, width, 3 * width])
    kernel = smoothing.density(x, np.zeros(1))[:, 0]
    lorentzian = width / np.pi / (x**2 + width**2)
    np.testing.assert_allclose(kernel, lorentzian, rtol=0.05)


def test_probes_of_both_kinds_and_libraries(library):
    host = dense(_VALUES)
    for probes in (sphere, rademacher):
        here = kpm(host, num_probes=2, num_moments=10, interval=_INTERVAL, probes=probes)
        there = kpm(
            move(host, library), num_probes=2, num_moments=10, interval=_INTERVAL, probes=probes
        )
        np.testing.assert_allclose(there.rule.moments, here.rule.moments, atol=1e-12)
    assert home(move(host, library)).shape == host.shape
