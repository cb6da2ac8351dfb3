"""Deflation: known eigenpairs out, the rest measured, and every mass where it belongs."""

from types import SimpleNamespace

import numpy as np
import pytest

from specdens import eigsh, from_vectors, kpm, load, rademacher, slq
from specdens.testing import matrix_with_spectrum
from tests.cases import move

#: A bulk, and outliers of both signs: a Hessian in small.
VALUES = np.sort(np.concatenate([np.random.default_rng(0).normal(0, 0.1, 200), [-3.0, 4.0, 9.0]]))


def _known(matrix, indices):
    """Return exact eigenpairs of a NumPy matrix."""
    values, vectors = np.linalg.eigh(matrix)
    return SimpleNamespace(
        eigenvalues=values[indices],
        eigenvectors=vectors[:, indices],
        residuals=np.zeros(len(indices)),
    )


def _run(name, matrix, **options):
    if name == "slq":
        return slq(matrix, num_probes=4, num_steps=15, **options)
    if name == "slq without a basis":
        return slq(matrix, num_probes=4, num_steps=15, reorthogonalize=False, **options)
    return kpm(matrix, num_probes=4, num_moments=30, **options)


@pytest.mark.parametrize("name", ["slq", "slq without a basis", "kpm"])
def test_masses_and_signs_are_exact(name):
    matrix = matrix_with_spectrum(VALUES)
    measure = _run(name, matrix, deflate=_known(matrix, [0, -2, -1]))
    np.testing.assert_allclose(measure.weights.sum(axis=1), 1)
    for value in (-3.0, 4.0, 9.0):
        for tail in (1e-9, 0.5):
            assert measure.count(value - tail, value + tail).value == pytest.approx(1)
            assert measure.count(value - tail, value + tail).stderr == pytest.approx(0, abs=1e-12)
    assert set(np.round(measure.outliers.eigenvalues, 9)) >= {-3.0, 4.0, 9.0}
    assert abs(measure.trace().value - VALUES.sum()) <= 4 * measure.trace().stderr


@pytest.mark.parametrize("name", ["slq", "kpm"])
def test_deflation_brings_the_measure_closer(name):
    matrix = matrix_with_spectrum(VALUES)
    whole, rest = _run(name, matrix), _run(name, matrix, deflate=_known(matrix, [0, -2, -1]))
    assert rest.distance(VALUES) <= 1.05 * whole.distance(VALUES)
    if name == "kpm":  # resolution is a part of the interval, and the interval is the bulk's now
        assert rest.distance(VALUES) < whole.distance(VALUES) / 3


def test_every_library(library):
    host = matrix_with_spectrum(VALUES)
    matrix = move(host, library)
    pairs = eigsh(matrix, 2, which="LA", tol=1e-10)
    measure = slq(matrix, num_probes=3, num_steps=12, deflate=pairs)
    assert measure.count(3.9, 9.1).value == pytest.approx(2)
    assert measure.distance(VALUES) < 0.02


def test_given_probes_stay_on_the_device(library):
    matrix = move(matrix_with_spectrum(VALUES), library)
    vectors = np.random.default_rng(0).standard_normal((len(VALUES), 2))
    pairs = eigsh(matrix, 2, which="LA", tol=1e-10)
    runs = [
        slq(matrix, num_probes=2, num_steps=12, deflate=pairs, probes=from_vectors(v))
        for v in (vectors, move(vectors, library))
    ]
    np.testing.assert_allclose(runs[0].nodes, runs[1].nodes, atol=1e-9)


def test_the_band_of_a_deflated_measure_covers():
    matrix = matrix_with_spectrum(VALUES)
    x = np.linspace(-3.5, 9.5, 200)
    exact = np.searchsorted(VALUES, x, side="right") / len(VALUES)
    for residual in (0.0, 1e-3):
        known = _known(matrix, [0, -2, -1])
        known.residuals = known.residuals + residual
        for seed in range(5):
            measure = slq(matrix, num_probes=4, num_steps=15, seed=seed, deflate=known)
            lower, upper = measure.cdf_band(x)
            assert (lower <= exact + 1e-12).all()
            assert (exact <= upper + 1e-12).all()
    with pytest.raises(ValueError, match="no certified band"):
        kpm(matrix, num_moments=20, deflate=known).cdf_band(x)


def test_inexact_eigenvectors_move_the_band_by_their_residuals():
    matrix = matrix_with_spectrum(VALUES)
    pairs = eigsh(matrix, 2, which="LA", tol=1e-3)
    measure = slq(matrix, num_probes=4, num_steps=15, deflate=pairs)
    x = np.linspace(-3.5, 9.5, 500)
    exact = np.searchsorted(VALUES, x, side="right") / len(VALUES)
    lower, upper = measure.cdf_band(x)
    assert ((lower <= exact + 1e-12) & (exact <= upper + 1e-12)).all()


@pytest.mark.parametrize("name", ["slq", "kpm"])
def test_files_plain_and_extend(tmp_path, name):
    matrix = matrix_with_spectrum(VALUES)
    known = _known(matrix, [-1])
    interval = {} if name == "slq" else {"interval": (-3.5, 9.5)}
    first, second = (_run(name, matrix, seed=s, deflate=known, **interval) for s in (0, 1))
    first.save(tmp_path / "m.npz")
    again = load(tmp_path / "m.npz")
    np.testing.assert_array_equal(again.nodes, first.nodes)
    np.testing.assert_array_equal(again.plain().weights, first.plain().weights)
    np.testing.assert_allclose(first.plain().weights.sum(axis=1), 1)
    near = pytest.approx(1, abs=0.5 if name == "kpm" else 1e-9)  # a cut series rings
    assert first.plain().count(8.9, 9.1).value == near
    both = again.extend(second)
    assert both.num_probes == 8
    assert both.count(8.9, 9.1).value == near
    other = _run(name, matrix, seed=2, deflate=_known(matrix, [-2]), **interval)
    with pytest.raises(ValueError, match="deflated of different eigenvalues"):
        first.extend(other)
    with pytest.raises(ValueError, match="another kind of rule"):
        first.extend(_run(name, matrix, seed=3))


def test_a_run_deflated_of_others_is_not_resumed(tmp_path):
    matrix, path = matrix_with_spectrum(VALUES), tmp_path / "run.npz"
    slq(matrix, num_probes=2, num_steps=5, deflate=_known(matrix, [-1]), checkpoint=path)
    with pytest.raises(ValueError, match="deflated="):
        slq(matrix, num_probes=2, num_steps=5, deflate=_known(matrix, [0]), resume=path)


def test_complex_hermitian_and_rademacher_probes():
    matrix = matrix_with_spectrum(VALUES, like=np.zeros(1, complex))
    known = _known(matrix, [0, -1])
    measure = slq(matrix, num_probes=3, num_steps=15, deflate=known, probes=rademacher)
    assert measure.count(8.9, 9.1).value == pytest.approx(1)
    assert measure.distance(VALUES) < 0.02


def test_steps_are_cut_to_what_is_left():
    matrix = np.diag([1.0, 2.0, 3.0, 4.0])
    measure = slq(matrix, num_steps=4, deflate=_known(matrix, [0, 1]))
    np.testing.assert_allclose(measure.distance([1.0, 2.0, 3.0, 4.0]), 0, atol=1e-12)


def test_bad_eigenpairs():
    matrix = np.diag([1.0, 2.0, 3.0])
    good = _known(matrix, [0, 1])
    for field, value, message in [
        ("eigenvectors", np.eye(3), r"eigenvectors of shape \(3, 3\), 2 eigenvalues"),
        ("residuals", np.zeros(3), "3 residuals"),
        ("eigenvalues", np.array([1.0, np.nan]), "not finite"),
    ]:
        bad = SimpleNamespace(**{**vars(good), field: value})
        with pytest.raises(ValueError, match=message):
            slq(matrix, deflate=bad)
    with pytest.raises(ValueError, match=r"deflate holds 3 of 3 eigenvectors"):
        slq(matrix, deflate=_known(matrix, [0, 1, 2]))
