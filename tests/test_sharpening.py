"""Resolved eigenvalues as atoms: accuracy of the measure, and multiplicities that are right."""

import numpy as np
import pytest

from specdens import SpectralMeasure, lanczos, rademacher, slq
from specdens.testing import spiked_spectrum
from tests.cases import dense, diagonal, move

_BULK = np.linspace(-1.0, 1.0, 200)
_REPEATED = np.concatenate([_BULK, [5.0] * 2, [9.0] * 3, [12.0]])


def _found(measure, eigenvalue):
    """Return multiplicity and standard error of the outlier at an eigenvalue."""
    outliers = measure.outliers
    at = np.flatnonzero(np.abs(outliers.eigenvalues - eigenvalue) < 1e-8)
    assert len(at) == 1, f"{eigenvalue} was found {len(at)} times in {outliers.eigenvalues}"
    return float(outliers.multiplicities[at[0]]), float(outliers.stderr[at[0]])


def _mass(measure, eigenvalue):
    """Return the mass (p,) that every row has at an eigenvalue."""
    return (measure.weights * (np.abs(measure.nodes - eigenvalue) < 1e-8)).sum(axis=1)


def _assert_mass_is_kept(measure):
    np.testing.assert_allclose(measure.weights.sum(axis=1), 1, rtol=1e-13)
    assert (measure.weights >= 0).all()


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_spiked_spectrum_is_found_to_one_part_in_ten_thousand(seed):
    spectrum = spiked_spectrum(2000, 20)
    measure = slq(diagonal(spectrum), num_probes=10, num_steps=60, seed=seed)
    plain = measure.plain().distance(spectrum)
    assert 1e-3 < plain < 3e-2
    assert measure.distance(spectrum) <= 1e-4
    assert measure.distance(spectrum) <= plain / 20
    _assert_mass_is_kept(measure)
    for eigenvalue in spectrum[-20:]:
        assert _found(measure, eigenvalue) == (1, 0)
        np.testing.assert_allclose(_mass(measure, eigenvalue), 1 / 2000, rtol=1e-13)


def test_a_spiked_spectrum_without_reorthogonalization():
    spectrum = spiked_spectrum(2000, 20)
    measure = slq(diagonal(spectrum), num_probes=10, num_steps=60, reorthogonalize=False)
    plain = measure.plain().distance(spectrum)
    assert measure.distance(spectrum) <= min(3e-4, plain / 20)
    assert len(measure.outliers) == 20
    for eigenvalue in spectrum[-20:]:
        assert _found(measure, eigenvalue) == (1, 0)


def test_a_spiked_spectrum_in_single_precision():
    spectrum = spiked_spectrum(500, 10).astype(np.float32)
    measure = slq(np.diag(spectrum), num_probes=10, num_steps=60)
    assert measure.distance(spectrum) <= measure.plain().distance(spectrum) / 20
    large = measure.outliers.eigenvalues > 0.05  # the bulk is not much wider than single rounding
    rounding = np.finfo(np.float32).eps * 50.0  # backward stable: to the precision of the largest
    np.testing.assert_allclose(
        measure.outliers.eigenvalues[large], spectrum[-10:], rtol=1e-6, atol=rounding
    )
    assert (measure.outliers.multiplicities[large] == 1).all()


@pytest.mark.parametrize("reorthogonalize", [True, False])
def test_a_decaying_spectrum_is_at_least_twice_as_near(reorthogonalize):
    spectrum = 10.0 / np.arange(1, 1001) ** 1.5  # like the Hessian of a small classifier
    distances = []
    for seed in range(3):
        measure = slq(
            diagonal(spectrum),
            num_probes=10,
            num_steps=40,
            seed=seed,
            reorthogonalize=reorthogonalize,
        )
        distances.append([measure.distance(spectrum), measure.plain().distance(spectrum)])
    sharpened, plain = np.mean(distances, axis=0)
    assert sharpened <= plain / 2


@pytest.mark.parametrize("complex_", [False, True], ids=["real", "complex"])
@pytest.mark.parametrize(
    "options",
    [{}, {"block_size": 5}, {"block_size": 1}, {"reorthogonalize": False}],
    ids=["default", "block5", "block1", "without"],
)
def test_repeated_eigenvalues_are_counted_exactly(options, complex_):
    matrix = dense(_REPEATED, complex_=complex_)
    measure = slq(matrix, num_probes=10, num_steps=40, **options)
    for eigenvalue, multiplicity in ((5.0, 2), (9.0, 3), (12.0, 1)):
        assert _found(measure, eigenvalue) == (multiplicity, 0)
        np.testing.assert_allclose(_mass(measure, eigenvalue), multiplicity / 206, rtol=1e-12)
    _assert_mass_is_kept(measure)
    assert measure.distance(_REPEATED) < 0.7 * measure.plain().distance(_REPEATED)


def test_repeated_eigenvalues_are_counted_on_every_library(library):
    measure = slq(move(dense(_REPEATED), library), num_probes=4, num_steps=30)
    assert [_found(measure, at)[0] for at in (5.0, 9.0, 12.0)] == [2, 3, 1]


def test_a_checkpointed_run_counts_as_well(tmp_path):
    options = {"num_probes": 5, "num_steps": 30, "checkpoint": tmp_path / "run.npz"}
    measure = slq(dense(_REPEATED), **options)
    assert _found(measure, 5.0) == (2, 0)
    multiplicity, stderr = _found(measure, 9.0)  # more than half the number of blocks
    assert abs(multiplicity - 3) < 4 * stderr


@pytest.mark.parametrize("num_probes", [2, 3, 10])
@pytest.mark.parametrize("options", [{}, {"block_size": 2}, {"reorthogonalize": False}])
def test_a_multiplicity_is_known_with_certainty_or_has_an_error(num_probes, options):
    for seed in range(4):
        measure = slq(dense(_REPEATED), num_probes=num_probes, num_steps=30, seed=seed, **options)
        for eigenvalue, multiplicity in ((5.0, 2), (9.0, 3), (12.0, 1)):
            found, stderr = _found(measure, eigenvalue)
            assert found == multiplicity or stderr > 0
        assert _found(measure, 12.0) == (1, 0)
        _assert_mass_is_kept(measure)


def test_a_single_probe_takes_every_outlier_for_simple():
    measure = slq(dense(_REPEATED), num_probes=1, num_steps=30)
    assert _found(measure, 12.0)[0] == 1
    _assert_mass_is_kept(measure)


@pytest.mark.parametrize(
    "options",
    [{}, {"block_size": 4}, {"reorthogonalize": False}, {"block_size": 1}],
    ids=["default", "block4", "without", "block1"],
)
def test_an_eigenspace_larger_than_the_block_is_estimated(options):
    spectrum = np.concatenate([_BULK, np.full(15, 4.0), [9.0]])
    measure = slq(diagonal(spectrum), num_probes=10, num_steps=40, **options)
    multiplicity, stderr = _found(measure, 4.0)
    assert 0 < stderr < 3
    assert abs(multiplicity - 15) < 4 * stderr
    assert _mass(measure, 4.0).mean() == pytest.approx(multiplicity / 216, abs=0.01)
    assert _found(measure, 9.0) == (1, 0)
    _assert_mass_is_kept(measure)


def test_an_eigenspace_smaller_than_the_block_is_counted():
    spectrum = np.concatenate([_BULK, np.full(15, 4.0), [9.0]])
    measure = slq(diagonal(spectrum), num_probes=20, num_steps=40)
    assert _found(measure, 4.0) == (15, 0)


@pytest.mark.parametrize("options", [{}, {"reorthogonalize": False}, {"block_size": 3}])
def test_a_large_null_space_is_not_miscounted(options):
    spectrum = np.concatenate([np.zeros(300), np.linspace(2.0, 3.0, 100)])
    for seed in range(3):
        measure = slq(diagonal(spectrum), num_probes=10, num_steps=40, seed=seed, **options)
        multiplicity, stderr = _found(measure, 0.0)
        assert 0 < stderr < 10
        assert abs(multiplicity - 300) < 4 * stderr
        zeros = measure.count(-1e-6, 1e-6)
        assert abs(zeros.value - 300) < 4 * stderr
        _assert_mass_is_kept(measure)


@pytest.mark.parametrize("reorthogonalize", [True, False])
def test_a_null_space_beside_a_few_eigenvalues_has_what_is_left(reorthogonalize):
    spectrum = np.concatenate([np.zeros(300), [1.0, 2.0, 3.0, 4.0]])
    measure = slq(diagonal(spectrum), reorthogonalize=reorthogonalize)
    assert [_found(measure, at) for at in (1.0, 2.0, 3.0, 4.0)] == [(1, 0)] * 4
    np.testing.assert_allclose(_mass(measure, 0.0), 300 / 304, rtol=1e-12)
    assert measure.distance(spectrum) < 1e-12


@pytest.mark.parametrize("reorthogonalize", [True, False])
def test_two_large_eigenspaces_are_estimated(reorthogonalize):
    spectrum = np.repeat([1.0, 4.0], [30, 10])
    measure = slq(diagonal(spectrum), reorthogonalize=reorthogonalize)
    for eigenvalue, expected in ((1.0, 30), (4.0, 10)):
        multiplicity, stderr = _found(measure, eigenvalue)
        assert 0 < stderr < 3
        assert abs(multiplicity - expected) < 4 * stderr


def test_ghosts_are_one_outlier():
    spectrum = np.concatenate([np.linspace(0, 1, 300), [50.0, 100.0]])
    measure = slq(diagonal(spectrum), num_probes=4, num_steps=120, reorthogonalize=False)
    row = measure.rule.gauss.nodes[0]
    assert (np.abs(row - 100) < 1e-8).sum() > 1, "no ghosts appeared: the test shows nothing"
    assert _found(measure, 100.0) == (1, 0)
    np.testing.assert_allclose(_mass(measure, 100.0), 1 / 302, rtol=1e-12)


@pytest.mark.parametrize("num_steps", [1, 2, 5, 20])
@pytest.mark.parametrize("options", [{}, {"block_size": 1}, {"reorthogonalize": False}])
def test_nothing_is_resolved_in_a_continuous_spectrum(num_steps, options):
    spectrum = np.random.default_rng(0).uniform(0, 1, 2000)
    measure = slq(diagonal(spectrum), num_probes=4, num_steps=num_steps, **options)
    assert len(measure.outliers) == 0
    plain = measure.plain()
    for order in range(2 * num_steps):
        assert measure.moment(order).value == pytest.approx(plain.moment(order).value, rel=1e-11)


@pytest.mark.parametrize("options", [{}, {"block_size": 1}, {"reorthogonalize": False}])
@pytest.mark.parametrize("outlier", [10.0, 30.0, 100.0, 300.0])
def test_a_blurred_bulk_beside_a_far_outlier_is_not_one_eigenvalue(options, outlier):
    spectrum = np.concatenate([np.random.default_rng(0).uniform(0, 1, 2000), [outlier]])
    measure = slq(diagonal(spectrum), num_probes=4, num_steps=20, **options)
    np.testing.assert_allclose(measure.outliers.eigenvalues, [outlier])
    assert _found(measure, outlier) == (1, 0)


@pytest.mark.parametrize("reorthogonalize", [True, False])
def test_a_single_probe_does_not_take_a_null_space_for_one_eigenvalue(reorthogonalize):
    spectrum = np.concatenate([np.zeros(300), np.linspace(2.0, 3.0, 100)])
    measure = slq(diagonal(spectrum), num_probes=1, num_steps=40, reorthogonalize=reorthogonalize)
    multiplicity, stderr = _found(measure, 0.0)
    assert 250 < multiplicity < 350
    assert np.isnan(stderr)
    assert _mass(measure, 0.0)[0] == pytest.approx(multiplicity / 400, rel=1e-6)


@pytest.mark.parametrize("options", [{}, {"block_size": 1}, {"reorthogonalize": False}])
@pytest.mark.parametrize("num_probes", [10, 64])
def test_a_multiple_of_the_identity_is_one_eigenvalue(num_probes, options):
    measure = slq(dense(np.full(200, 3.0)), num_probes=num_probes, num_steps=20, **options)
    assert len(measure.outliers) == 1
    assert measure.outliers.eigenvalues[0] == pytest.approx(3, rel=1e-13)
    assert measure.outliers.multiplicities[0] == pytest.approx(200)


@pytest.mark.parametrize("reorthogonalize", [True, False])
def test_a_close_pair_is_never_sharpened_into_one(reorthogonalize):
    for gap in (1e-3, 1e-6, 1e-9):
        spectrum = np.concatenate([_BULK, [8.0, 8.0 + gap]])
        measure = slq(
            diagonal(spectrum), num_probes=10, num_steps=25, reorthogonalize=reorthogonalize
        )
        count = measure.count(7.9, 8.1)
        spread = measure.plain().count(7.9, 8.1).stderr
        assert abs(count.value - 2) < 4 * spread


def test_bounds_contain_an_eigenvalue(library):
    host = dense(np.concatenate([_BULK, [3.0, 6.0]]))
    exact = np.linalg.eigvalsh(host)
    for reorthogonalize in (True, False):
        measure = slq(
            move(host, library), num_probes=4, num_steps=25, reorthogonalize=reorthogonalize
        )
        assert len(measure.outliers) >= 2
        for eigenvalue, bound in zip(
            measure.outliers.eigenvalues, measure.outliers.bounds, strict=True
        ):
            assert np.abs(exact - eigenvalue).min() <= bound


def test_outliers_of_one_vector_keep_their_weights():
    host = dense(np.concatenate([_BULK, [3.0, 6.0]]))
    values, vectors = np.linalg.eigh(host)
    start = vectors[:, -1] + 0.1 * vectors[:, -2] + vectors[:, 50] + vectors[:, 100]
    measure = lanczos(host, start, num_steps=4)
    exact = (vectors.T @ start) ** 2 / (start @ start)
    for j in (-1, -2, 50, 100):
        assert _mass(measure, values[j])[0] == pytest.approx(exact[j], rel=1e-9)
        assert np.isnan(_found(measure, values[j])[0])


def test_rademacher_probes_are_sharpened_too():
    measure = slq(dense(_REPEATED), num_probes=6, num_steps=40, probes=rademacher)
    assert [_found(measure, at)[0] for at in (5.0, 9.0, 12.0)] == [2, 3, 1]


def test_plain_is_the_rule_as_computed():
    measure = slq(dense(_REPEATED), num_probes=4, num_steps=30)
    plain = measure.plain()
    assert isinstance(plain, SpectralMeasure)
    assert len(plain.outliers) == 0
    np.testing.assert_array_equal(plain.nodes, measure.rule.gauss.nodes)
    np.testing.assert_array_equal(plain.weights, measure.rule.gauss.weights)
