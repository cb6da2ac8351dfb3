"""Laws that every estimator obeys whatever the spectrum, on spectra that hypothesis draws."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from specdens import SpectralMeasure, block_diagonal, density, kpm, lanczos, logdet, slq, trace
from tests.cases import dense, move, probe_matrix, probe_moments

#: Name -> estimator of a matrix and a seed, with fewer steps than it takes to know everything.
ESTIMATORS = {
    "slq": lambda a, seed: slq(a, num_probes=3, num_steps=_steps(a), seed=seed),
    "slq without a basis": lambda a, seed: slq(
        a, num_probes=3, num_steps=_steps(a), seed=seed, reorthogonalize=False
    ),
    "slq by blocks": lambda a, seed: slq(
        a, num_probes=3, num_steps=_steps(a), seed=seed, block_size=1
    ),
    "lanczos": lambda a, seed: lanczos(a, num_steps=_steps(a), seed=seed),
    "density": lambda a, seed: density(a, tolerance=0.1, seed=seed),
    "kpm": lambda a, seed: kpm(a, num_probes=3, num_moments=16, seed=seed),
}
_EQUIVARIANT = [name for name in ESTIMATORS if name != "kpm"]

seeds = st.integers(0, 2**31)
#: Zeros, integers (so repeats) and anything else, of both signs.
eigenvalue = st.one_of(
    st.just(0.0), st.integers(-4, 4).map(float), st.floats(-10, 10, allow_subnormal=False)
)


def spectra(smallest=5, largest=60):
    return st.lists(eigenvalue, min_size=smallest, max_size=largest).map(np.array)


def _steps(matrix):
    return min(8, matrix.shape[0])


def _size(values):
    return max(float(np.abs(values).max()), 1e-300)


def _mapped(measure, scale, shift):
    """Return the measure of scale * eigenvalue + shift, by arithmetic on the nodes."""
    return SpectralMeasure(scale * measure.nodes + shift, measure.weights, measure.dimension)


def _assert_same(measure, original, scale, shift, size):
    """Compare a measure with another one whose nodes are mapped."""
    if original.accuracy is not None:  # rounding may tip a decision to go on: both are within 0.1
        bound = 0.2 * abs(scale) * np.ptp(original.support)
        assert measure.distance(_mapped(original, scale, shift)) <= bound + 1e-7 * size
        return
    plain = measure.plain().distance(_mapped(original.plain(), scale, shift))
    assert max(plain, measure.distance(_mapped(original, scale, shift))) <= 1e-7 * size


@pytest.mark.parametrize("name", ESTIMATORS)
@settings(max_examples=8)
@given(values=spectra(), seed=seeds)
def test_distribution_functions_rise_from_0_to_1_and_rows_have_mass_1(name, values, seed):
    measure = ESTIMATORS[name](dense(values), seed)
    for form in (measure, measure.plain()):
        np.testing.assert_allclose(form.weights.sum(axis=1), 1, atol=1e-12)
    size = _size(values)
    cdf = measure.cdf(np.linspace(-3 * size, 3 * size, 301)).value  # kpm: damped by Jackson
    assert np.diff(cdf).min() >= -1e-12
    assert cdf.min() >= -1e-12
    assert cdf.max() <= 1 + 1e-12
    if name == "kpm" and np.ptp(values) == 0:
        return  # its interval has a width of its own then
    low, high = measure.support
    reach = 0.5 * size if name == "kpm" else 1e-12 * size
    assert values.min() - reach <= low <= high <= values.max() + reach


@pytest.mark.parametrize("name", _EQUIVARIANT)
@settings(max_examples=8)
@given(values=spectra(), seed=seeds, shift=st.floats(-10, 10))
def test_a_shift_of_the_operator_shifts_the_measure(name, values, seed, shift):
    matrix = dense(values.round(1))  # as below
    shifted = ESTIMATORS[name](matrix + shift * np.eye(len(values)), seed)
    expected = ESTIMATORS[name](matrix, seed)
    _assert_same(shifted, expected, 1, shift, _size(values) + abs(shift))


@pytest.mark.parametrize("name", _EQUIVARIANT)
@settings(max_examples=8)
@given(
    values=spectra(),
    seed=seeds,
    scale=st.one_of(st.floats(-1e4, -1e-4), st.floats(1e-4, 1e4)),
)
def test_a_multiple_of_the_operator_scales_the_measure(name, values, seed, scale):
    # Of 6e-8 beside 0 rounding decides whether they are resolved, and so their masses.
    matrix = dense(values.round(1))
    scaled, expected = ESTIMATORS[name](scale * matrix, seed), ESTIMATORS[name](matrix, seed)
    _assert_same(scaled, expected, scale, 0, abs(scale) * _size(values))


@settings(max_examples=8)
@given(
    values=spectra(),
    seed=seeds,
    scale=st.one_of(st.floats(-1e4, -1e-4), st.floats(1e-4, 1e4)),
    shift=st.floats(-10, 10),
)
def test_moments_follow_the_operator_on_a_given_interval(values, seed, scale, shift):
    interval = np.array([-11.0, 12.0])
    matrix = dense(values)
    there = np.sort(scale * interval + shift)
    options = {"num_probes": 3, "num_moments": 16, "seed": seed}
    moved = kpm(
        scale * matrix + shift * np.eye(len(values)), interval=(there[0], there[1]), **options
    )
    expected = kpm(matrix, interval=(interval[0], interval[1]), **options)
    signs = np.sign(scale) ** np.arange(16)  # T_r(-x) = (-1)^r T_r(x)
    roundings = 1e-11 * (1 + abs(shift / scale))
    np.testing.assert_allclose(moved.rule.moments, signs * expected.rule.moments, atol=roundings)


@settings(max_examples=8)
@given(first=spectra(3, 12), second=spectra(3, 12), seed=seeds)
def test_exact_measures_add_over_blocks(first, second, seed):
    values = np.concatenate([first, second])
    operator = block_diagonal([dense(first, seed=1), dense(second, seed=2)])
    n, size = len(values), _size(values)
    whole = slq(operator, num_probes=n + 1, num_steps=n, seed=seed)
    parts = [slq(dense(v), num_probes=len(v) + 1, num_steps=len(v)) for v in (first, second)]
    assert whole.distance(values) <= 1e-7 * size
    for order in range(4):
        total = sum(float(part.trace(lambda x, k=order: x**k).value) for part in parts)
        moment = n * float(whole.moment(order).value)
        assert moment == pytest.approx(total, abs=1e-7 * n * size**order)
    cut = _gap(values)
    counts = [float(m.count(-2 * size, cut).value) for m in (whole, *parts)]
    assert counts[0] == pytest.approx(counts[1] + counts[2], abs=1e-6)
    assert counts[0] == pytest.approx(np.sum(values <= cut), abs=1e-6)


def _gap(values):
    """Return the middle of the widest gap."""
    ascending = np.sort(values)
    widest = int(np.argmax(np.diff(ascending)))
    return float(ascending[widest : widest + 2].mean())


@settings(max_examples=8)
@given(first=spectra(20, 30), second=spectra(5, 30), seed=st.integers(0, 1000))
def test_estimates_add_over_blocks_within_their_errors(first, second, seed):
    def measure(matrix, at):
        return slq(matrix, num_probes=30, num_steps=5, seed=at, block_size=1)

    matrices = dense(first, seed=1), dense(second, seed=2)
    whole = measure(block_diagonal(matrices), seed)
    parts = [measure(matrix, seed + 1001 * (i + 1)) for i, matrix in enumerate(matrices)]
    size = _size(np.concatenate([first, second]))
    for order in (1, 2, 3):
        mine, *theirs = (m.trace(lambda x, k=order: x**k) for m in (whole, *parts))
        error = abs(mine.value - sum(part.value for part in theirs))
        spread = np.sqrt(sum(part.stderr**2 for part in (mine, *theirs)))
        # 40 spectra x 3 orders, each beyond 6 of Student's standard deviations at most 2e-6.
        assert error <= 6 * spread + 1e-7 * len(first) * size**order


@settings(max_examples=8)
@given(values=spectra(), seed=seeds, block_size=st.integers(2, 5))
def test_moments_of_every_probe_do_not_depend_on_the_block(values, seed, block_size):
    matrix, steps = dense(values), _steps(values)
    options = {"num_probes": 5, "num_steps": steps, "seed": seed}
    probes = probe_matrix(matrix, 5, seed)
    runs = [
        slq(matrix, block_size=size, reorthogonalize=kept, **options).plain()
        for size in (1, block_size)
        for kept in (True, False)
    ]
    size = _size(values)
    for order in range(2 * steps):
        expected = probe_moments(matrix / size, order, probes)
        for run in runs:
            moments = (run.weights * (run.nodes / size) ** order).sum(axis=1)
            np.testing.assert_allclose(moments, expected, atol=1e-10)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=4)
@given(values=spectra(5, 30), seed=seeds)
def test_moments_do_not_depend_on_the_library(library, values, seed):
    # The mass of an eigenvalue is only as certain as rounding compared with its nearest neighbor.
    values = np.round(values / _size(values), 5)
    matrix, steps = dense(values), _steps(values)
    options = {"num_probes": 3, "num_steps": steps, "seed": seed}
    for kept in (True, False):
        here = slq(move(matrix, library), reorthogonalize=kept, **options)
        there = slq(matrix, reorthogonalize=kept, **options)
        for mine, theirs in ((here, there), (here.plain(), there.plain())):
            moments = [[m.moment(k).value for k in range(2 * steps)] for m in (mine, theirs)]
            np.testing.assert_allclose(*moments, atol=1e-10)
    here, there = (
        kpm(a, num_probes=3, num_moments=12, interval=(-1.1, 1.2), seed=seed)
        for a in (move(matrix, library), matrix)
    )
    np.testing.assert_allclose(here.rule.moments, there.rule.moments, atol=1e-10)


@settings(max_examples=8)
@given(values=spectra(5, 20), seed=seeds)
def test_exact_quantities_do_not_depend_on_the_eigenvectors(values, seed):
    n, size = len(values), _size(values)
    shifted = values + 2 * size  # positive definite, for the logarithm
    for matrix in (np.diag(values), dense(values, seed=1), dense(values, complex_=True)):
        measure = slq(matrix, num_probes=n + 1, num_steps=n, seed=seed)
        assert measure.distance(values) <= 1e-7 * size
        total = trace(matrix, num_products=n, seed=seed)
        assert total.value == pytest.approx(values.sum(), abs=1e-12 * n * size)
        assert total.stderr == 0
        exact = logdet(matrix + 2 * size * np.eye(n), num_probes=n, seed=seed)
        assert exact.value == pytest.approx(np.log(shifted).sum(), abs=1e-11 * n)
        assert exact.stderr == 0


@pytest.mark.parametrize("name", ESTIMATORS)
@settings(max_examples=8)
@given(values=spectra(), seed=seeds, a=st.floats(-5, 5), b=st.floats(-5, 5))
def test_the_trace_of_a_measure_is_linear_in_the_function(name, values, seed, a, b):
    measure = ESTIMATORS[name](dense(values), seed)
    both = measure.trace(lambda x: a * np.sin(x) + b * np.abs(x)).value
    apart = a * measure.trace(np.sin).value + b * measure.trace(np.abs).value
    assert both == pytest.approx(apart, abs=1e-11 * len(values) * (1 + _size(values)))


@settings(max_examples=8)
@given(values=spectra(20, 60), seed=seeds, a=st.floats(-5, 5), b=st.floats(-5, 5))
def test_traces_by_independent_probes_are_linear_in_the_function(values, seed, a, b):
    def estimate(f):
        options = {"num_products": 16, "num_steps": 4, "seed": seed}
        return trace(dense(values), f, method="hutchinson", **options).value

    both = estimate(lambda x: a * np.sin(x) + b * np.abs(x))
    apart = a * estimate(np.sin) + b * estimate(np.abs)
    assert both == pytest.approx(apart, abs=1e-10 * len(values) * (1 + _size(values)))
