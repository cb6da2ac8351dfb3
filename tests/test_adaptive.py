"""`density` keeps what it promises, and `plan` what it foretells."""

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from specdens import FunctionOperator, VectorSpace, density, load, plan, slq
from specdens.adaptive import _Check, _Search
from specdens.interpolation import interpolated, statistical_distance
from specdens.probes import draw, sphere
from specdens.testing import matrix_with_spectrum, spiked_spectrum
from tests.cases import dense, home, move


def diagonal(values, calls=None):
    def product(x):
        if calls is not None:
            calls.append(x.shape[1])
        return values[:, None] * x

    return FunctionOperator(product, VectorSpace.like(values), blocks=True)


def _spectrum(kind, n, rng):
    """Return one of five kinds of spectrum of about n eigenvalues."""
    if kind == "uniform":
        return np.sort(rng.uniform(-1, 1, n)) * rng.uniform(0.1, 10)
    if kind == "gapped":
        return np.concatenate([rng.uniform(0, 1, n // 2), rng.uniform(2, 4, n - n // 2)])
    if kind == "rank-deficient":
        return np.concatenate([np.zeros(n // 2), rng.exponential(size=n - n // 2)])
    if kind == "repeated":
        return np.repeat(rng.standard_normal(6), n // 6)
    return np.concatenate([1e-3 * rng.standard_normal(n - 10), rng.uniform(0.1, 5, 10)])


_KINDS = ("uniform", "gapped", "rank-deficient", "repeated", "outliers")


def test_the_tolerance_is_met_in_95_of_100_spectra():
    missed = []
    for case in range(100):
        rng = np.random.default_rng(case)
        values = _spectrum(_KINDS[case % 5], int(rng.integers(500, 2500)), rng)
        measure = density(diagonal(values), tolerance=0.01, seed=case)
        assert measure.accuracy.converged
        if measure.distance(values) > 0.01 * np.ptp(values):
            missed.append((case, measure.distance(values) / np.ptp(values)))
    assert len(missed) <= 5, missed


@pytest.mark.parametrize(
    "kind", [*_KINDS[:2], *(pytest.param(kind, marks=pytest.mark.slow) for kind in _KINDS[2:])]
)
def test_fewer_than_twice_the_products_of_the_best_fixed_choice(kind):
    """The best of p x m runs of slq that meet the tolerance with twenty seeds of twenty."""
    values = _spectrum(kind, 1500, np.random.default_rng(1))
    operator, size = diagonal(values), np.ptp(values)
    best = 2000
    for num_probes in (1, 2, 4, 8, 12):
        for num_steps in (3, 6, 10, 16, 25, 40):
            if num_probes * num_steps >= best:
                continue
            runs = (
                slq(operator, num_probes=num_probes, num_steps=num_steps, seed=seed)
                for seed in range(20)
            )
            if all(run.distance(values) <= 0.01 * size for run in runs):
                best = num_probes * num_steps
    spent = [density(operator, seed=seed).accuracy.num_products for seed in range(5)]
    assert np.mean(spent) < 2 * best, (spent, best)


@pytest.mark.parametrize("tolerance", [0.1, 0.03, pytest.param(0.003, marks=pytest.mark.slow)])
def test_other_tolerances(tolerance):
    values = np.sort(np.random.default_rng(0).standard_normal(3000))
    for seed in range(3):
        measure = density(diagonal(values), tolerance=tolerance, seed=seed)
        assert measure.accuracy.converged
        assert measure.distance(values) <= tolerance * np.ptp(values)


def test_tighter_tolerances_cost_more():
    values = np.linspace(-1, 1, 4000)
    spent = [
        density(diagonal(values), tolerance=t).accuracy.num_products for t in (0.1, 0.02, 0.01)
    ]
    assert spent[0] < spent[1] < spent[2]


def test_products_are_counted_and_limited():
    values = np.linspace(-1, 1, 2000)
    calls = []
    measure = density(diagonal(values, calls), tolerance=0.02)
    assert measure.accuracy.num_products == sum(calls)
    calls.clear()
    measure = density(diagonal(values, calls), tolerance=0.001, max_products=60)
    assert sum(calls) <= 60
    assert measure.accuracy.num_products == sum(calls)
    assert not measure.accuracy.converged
    assert measure.accuracy.total > 0.001
    calls.clear()
    assert density(diagonal(values, calls), max_products=1).accuracy.num_products == sum(calls) == 1


def test_limited_runs_say_converged_only_when_they_are():
    """Blocks that the limit cut short once counted as if they had taken all steps."""
    for values in (np.linspace(-1, 1, 1500), 1 / np.arange(1, 1501.0)):
        for tolerance in (0.03, 0.01, 0.004):
            for limit in (20, 40, 80, 160):
                for seed in range(2):
                    calls = []
                    operator = diagonal(values, calls)
                    run = density(operator, tolerance=tolerance, max_products=limit, seed=seed)
                    assert sum(calls) == run.accuracy.num_products <= limit
                    if run.accuracy.converged:
                        assert run.distance(values) <= tolerance * np.ptp(values)


def _limited(kind, n):
    """Return spectra of which some are carried by few eigenvalues, and some are smooth."""
    if kind == "power law":
        return 1 / np.arange(1, n + 1.0)
    if kind == "spiked":
        return spiked_spectrum(n)
    if kind == "semicircle":
        return _semicircle(n)
    return np.repeat(np.linspace(0, 1, 12) ** 2, n // 12) + 1e-4 * np.sin(np.arange(n // 12 * 12))


def _semicircle(n):
    """Return the quantiles of the semicircle law, by its distribution function on a grid."""
    x = np.linspace(-1, 1, 100_001)
    cdf = 0.5 + (x * np.sqrt(1 - x**2) + np.arcsin(x)) / np.pi
    return np.interp((np.arange(n) + 0.5) / n, cdf, x)


@pytest.mark.parametrize("limit", [80, 320])
@pytest.mark.parametrize("kind", ["power law", "spiked", "semicircle", "clusters"])
def test_a_limit_is_spent_as_well_as_by_slq(kind, limit):
    """Means of four seeds, against 8 probes; 20 % more for the noise of both."""
    values = _limited(kind, 1500)
    operator = diagonal(values)
    chosen, fixed = [], []
    for seed in range(4):
        chosen.append(density(operator, tolerance=1e-6, max_products=limit, seed=seed))
        fixed.append(slq(operator, num_probes=8, num_steps=limit // 8, seed=seed))
        assert chosen[-1].accuracy.num_products <= limit
    ours, theirs = (np.mean([run.distance(values) for run in runs]) for runs in (chosen, fixed))
    assert ours <= 1.2 * theirs + 1e-6 * np.ptp(values)


def test_steps_resolve_eigenvalues_and_probes_average():
    """The one where many eigenvalues are found, the other where the density is smooth."""
    for seed in range(3):
        steps, probes = (
            density(diagonal(_limited(kind, 1500)), tolerance=1e-6, max_products=320, seed=seed)
            for kind in ("power law", "semicircle")
        )
        assert steps.provenance["num_probes"] == 4
        assert steps.provenance["num_steps"] == 80
        assert probes.provenance["num_probes"] >= 8
        assert len(steps.outliers) > 50


@given(
    statistical=st.floats(0.01, 100),
    resolving=st.floats(0, 2),
    quadrature=st.floats(0.01, 100),
    converging=st.floats(0.1, 4),
    steps=st.integers(8, 200),
    before=st.floats(2, 4),
)
def test_steps_go_on_while_the_error_at_the_limit_falls(
    statistical, resolving, quadrature, converging, steps, before
):
    """Powers of the steps, for which the derivative of the total error is known."""
    limit = 1000

    def check(m):
        left, half = (quadrature * x**-converging for x in (m, m / 2))
        return _Check(m, statistical * m**-resolving, half - left)

    slope = (0.5 - resolving) * statistical * steps**-resolving * (steps / limit) ** 0.5
    fall = converging * quadrature * steps**-converging
    assume(abs(slope - fall) > 1e-9 * fall)
    search = _Search(np.eye(1), 0.01, 0.95, 0, 1, limit)
    assert search.steps_pay(check(steps / before), check(steps)) == (slope < fall)
    assert search.steps_pay(None, check(steps))


@pytest.mark.parametrize("limit", [60, 400])
def test_a_limit_beyond_the_dimension(limit):
    """All eigenvalues are found, for no more products than that takes."""
    values = np.linspace(0, 1, 50) ** 2
    calls = []
    measure = density(diagonal(values, calls), tolerance=1e-6, max_products=limit)
    assert measure.accuracy.converged
    assert sum(calls) <= 52  # a last block of three
    assert measure.distance(values) <= 1e-6 * np.ptp(values)


@pytest.mark.parametrize("n", [1, 2, 5, 40])
def test_small_matrices_are_solved_exactly(library, n):
    values = np.linspace(-1, 2, n)
    matrix = move(matrix_with_spectrum(values), library)
    measure = density(matrix, tolerance=1e-6)
    assert measure.accuracy.converged
    assert measure.distance(values) <= 1e-6 * max(np.ptp(values), 1.0)
    assert home(matrix).shape == (n, n)


@pytest.mark.parametrize("matrix", [np.zeros((50, 50)), np.eye(50), -3 * np.eye(20)])
def test_multiples_of_the_identity(matrix):
    measure = density(matrix)
    assert measure.accuracy.converged
    assert measure.trace().value == pytest.approx(np.trace(matrix))


def test_complex_hermitian_and_single_precision():
    values = np.sort(np.random.default_rng(0).standard_normal(800))
    for example in (np.zeros(1, np.complex128), np.zeros(1, np.float32)):
        measure = density(matrix_with_spectrum(values, like=example), tolerance=0.02)
        assert measure.accuracy.converged
        assert measure.distance(values) <= 0.02 * np.ptp(values)


def test_without_memory_for_a_basis():
    values = np.linspace(-1, 1, 3000)
    measure = density(diagonal(values), tolerance=0.02, memory_budget=100_000)
    assert not measure.provenance["reorthogonalize"]
    assert measure.accuracy.converged
    assert measure.distance(values) <= 0.02 * 2


def test_the_result_is_a_measure_like_any_other(tmp_path):
    values = np.concatenate([np.linspace(0, 1, 990), np.linspace(3, 9, 10)])
    measure = density(dense(values), tolerance=0.003)
    lower, upper = measure.cdf_band(np.linspace(0, 9, 30))
    exact = np.searchsorted(values, np.linspace(0, 9, 30), side="right") / 1000
    assert ((lower <= exact) & (exact <= upper)).all()
    assert len(measure.outliers) >= 10
    measure.save(tmp_path / "m.npz")
    again = load(tmp_path / "m.npz")
    assert again.accuracy == measure.accuracy
    np.testing.assert_array_equal(again.nodes, measure.nodes)
    both = measure.extend(density(dense(values), tolerance=0.02, seed=1))
    assert both.accuracy is None
    assert slq(dense(values), num_steps=5).accuracy is None


def test_the_same_seed_gives_the_same_measure():
    values = np.linspace(-1, 1, 1000)
    first, second = (density(diagonal(values), tolerance=0.02, seed=3) for _ in range(2))
    np.testing.assert_array_equal(first.nodes, second.nodes)


@pytest.mark.parametrize("option", ["tolerance", "confidence"])
@pytest.mark.parametrize("value", [0.0, 1.0, -0.1, np.nan])
def test_bad_arguments(option, value):
    with pytest.raises(ValueError, match=f"{option}=.* must lie between 0 and 1"):
        density(np.eye(3), **{option: value})


def test_bad_limits_and_products():
    with pytest.raises(ValueError, match="max_products=0 must be at least 1"):
        density(np.eye(3), max_products=0)
    operator = FunctionOperator(lambda x: x * np.nan, VectorSpace.like(np.zeros(9)), blocks=True)
    with pytest.raises(ValueError, match="not finite"):
        density(operator)


def test_interpolation_is_closer_to_a_smooth_spectrum_and_leaves_atoms_alone():
    smooth, spiked = np.linspace(-1, 1, 3000), spiked_spectrum(1000, 10)
    for values, factor in ((smooth, 2.5), (spiked, 0.99)):
        run = slq(diagonal(values), num_probes=6, num_steps=25)
        nodes, weights, _ = interpolated(run.rule, len(values))
        np.testing.assert_allclose(weights.sum(axis=1), 1)
        finer = type(run)(nodes, weights, len(values))
        assert finer.distance(values) <= run.distance(values) / factor


def test_interpolation_keeps_tight_clusters():
    values = np.concatenate([c + 1e-5 * np.linspace(-1, 1, 100) for c in (-2.0, 0.0, 1.0, 4.0)])
    run = slq(diagonal(values), num_probes=3, num_steps=8)
    nodes, weights, _ = interpolated(run.rule, 400)
    far = np.abs(nodes[..., None] - [-2.0, 0.0, 1.0, 4.0]).min(axis=-1) > 1e-3
    assert weights[far].sum() < 1e-6


@pytest.mark.parametrize("num_probes", [1, 4])
@pytest.mark.parametrize("kind", ["uniform", "gapped", "rank-deficient"])
def test_the_statistical_part_is_a_quantile_of_the_true_law(kind, num_probes):
    """Against the distances of 400 draws of probes, whose masses are known exactly."""
    n, p = 400, num_probes
    values = np.sort(_spectrum(kind, n, np.random.default_rng(0)))
    space = VectorSpace.like(values)
    exact = np.arange(1, n + 1) / n
    off = []
    for draw_number in range(400):
        probes = draw(sphere, space, draw_number, range(p))
        seen = np.cumsum((probes**2).mean(axis=1))
        off.append(np.abs(seen - exact)[:-1] @ np.diff(values))
    told = statistical_distance(
        np.tile(values, (p, 1)), np.full((p, n), 1 / n), np.zeros(0), n, 0.95
    )
    # 400 draws and 2000 simulated ones leave a standard error of about 4 % in the quantile.
    assert told == pytest.approx(np.quantile(off, 0.95), rel=0.15)


def test_plan_foretells_what_slq_does(capsys):
    values, calls = np.linspace(0, 1, 3000), []
    options = {"num_probes": 5, "num_steps": 12, "block_size": 2}
    cost = plan(diagonal(values, calls), **options)
    assert len(calls) == 2
    table = capsys.readouterr().out
    assert "passes over the data" in table
    assert "36" in table
    calls.clear()
    slq(diagonal(values, calls), **options)
    assert (len(calls), sum(calls)) == (cost.num_passes, cost.num_products) == (36, 60)
    assert cost.reorthogonalize
    assert cost.num_bytes == (4 + 12) * 2 * 8 * 3000
    assert cost.seconds == pytest.approx(cost.seconds_per_product * 60)
    assert cost.seconds > 0


def test_plan_follows_the_memory_budget(capsys):
    cost = plan(np.eye(1000), num_probes=8, memory_budget=4 * 8 * 1000 * 4, verbose=False)
    assert not cost.reorthogonalize
    assert (cost.block_size, cost.num_passes, cost.num_bytes) == (4, 160, 128_000)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("option", ["num_probes", "num_steps", "block_size"])
def test_plan_refuses_bad_counts(option):
    with pytest.raises(ValueError, match=f"{option}=0"):
        plan(np.eye(5), **{option: 0})
