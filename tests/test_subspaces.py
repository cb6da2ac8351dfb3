"""Overlaps, angles and energies against dense answers, on every library and device."""

import numpy as np
import pytest
import scipy.linalg
from hypothesis import given
from hypothesis import strategies as st

from specdens.subspaces import (
    energy_curve,
    energy_in,
    orthonormalize,
    overlap_curve,
    principal_angles,
    random_overlap,
    subspace_overlap,
)
from tests.cases import device_of, home, move

DTYPES = pytest.mark.parametrize("dtype", ["float32", "float64", "complex64", "complex128"])


def gaussian(n, k, seed, dtype="float64"):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, k))
    if dtype.startswith("complex"):
        x = x + 1j * rng.standard_normal((n, k))
    return x.astype(dtype)


def basis(n, k, seed, dtype="float64"):
    """Return orthonormal columns whose span is uniformly random."""
    wide = "complex128" if dtype.startswith("complex") else "float64"
    return np.linalg.qr(gaussian(n, k, seed, wide))[0].astype(dtype)


def tilted(n, angles, seed, dtype="float64"):
    """Return two bases with these angles, in random directions and mixed among themselves."""
    k = len(angles)
    Q = basis(n, 2 * k, seed, dtype)  # noqa: N806
    V = Q[:, :k] * np.cos(angles) + Q[:, k:] * np.sin(angles)  # noqa: N806
    mix = [basis(k, k, seed + j, dtype) for j in (1, 2)]
    return Q[:, :k] @ mix[0], V @ mix[1]


def projector_overlap(U, V):  # noqa: N803
    traces = np.trace(U @ U.conj().T @ V @ V.conj().T).real
    return traces / min(U.shape[1], V.shape[1])


def precision(dtype):
    return float(np.finfo(dtype).eps)


@DTYPES
@pytest.mark.parametrize(("k", "l"), [(3, 3), (2, 5), (5, 2), (1, 1)])
def test_overlap_is_the_trace_of_projectors(library, dtype, k, l):  # noqa: E741
    U, V = basis(40, k, 1, dtype), basis(40, l, 2, dtype)  # noqa: N806
    result = subspace_overlap(move(U, library), move(V, library))
    assert isinstance(result, float)
    assert result == pytest.approx(projector_overlap(U, V), abs=20 * precision(dtype))
    assert subspace_overlap(move(U, library), move(U, library)) == pytest.approx(1, abs=1e-5)


def test_vectors_are_single_columns(library):
    u, v = np.array([1.0, 0.0, 0.0]), np.array([0.6, 0.8, 0.0])
    assert subspace_overlap(move(u, library), move(v, library)) == pytest.approx(0.36)
    angles = principal_angles(move(u, library), move(v, library))
    np.testing.assert_allclose(angles, [np.arctan2(0.8, 0.6)])


def test_the_whole_space_of_one_dimension():
    one = np.ones((1, 1))
    assert subspace_overlap(one, -one) == 1
    assert principal_angles(one, -one).tolist() == [0.0]
    assert random_overlap(1, 1, 1) == (1.0, 0.0)
    assert energy_in(one, np.array([-3.0])) == 1


@DTYPES
def test_curve_compares_leading_columns(library, dtype):
    U, V = basis(30, 6, 3, dtype), basis(30, 4, 4, dtype)  # noqa: N806
    curve = overlap_curve(move(U, library), move(V, library))
    expected = [projector_overlap(U[:, :j], V[:, :j]) for j in range(1, 5)]
    np.testing.assert_allclose(curve.overlap, expected, atol=20 * precision(dtype))
    np.testing.assert_allclose(curve.baseline, np.arange(1, 5) / 30)
    exact = [random_overlap(30, j, j, is_complex=dtype.startswith("complex")) for j in range(1, 5)]
    np.testing.assert_allclose(curve.deviation, [entry.deviation for entry in exact])


@pytest.mark.parametrize("is_complex", [False, True])
@pytest.mark.parametrize(("n", "k", "l"), [(6, 1, 1), (8, 3, 2), (12, 2, 7), (5, 4, 4)])
def test_random_overlap_in_simulation(n, k, l, is_complex):  # noqa: E741
    dtype = "complex128" if is_complex else "float64"
    fixed = np.eye(n, l, dtype=dtype)
    samples = [projector_overlap(basis(n, k, 100 + seed, dtype), fixed) for seed in range(3000)]
    exact = random_overlap(n, k, l, is_complex=is_complex)
    assert exact.mean == max(k, l) / n
    error = exact.deviation / np.sqrt(3000)
    assert np.mean(samples) == pytest.approx(exact.mean, abs=4 * error)
    assert np.std(samples) == pytest.approx(exact.deviation, rel=0.07)


@given(st.integers(1, 60), st.data())
def test_random_overlap_is_symmetric_and_certain_in_the_whole_space(n, data):
    k, l = data.draw(st.integers(1, n)), data.draw(st.integers(1, n))  # noqa: E741
    assert random_overlap(n, k, l) == random_overlap(n, l, k)
    assert random_overlap(n, k, n) == (1.0, 0.0)
    # The overlap of complements is fixed by that of the subspaces: so are the deviations.
    if k < n and l < n:
        here, there = random_overlap(n, k, l), random_overlap(n, n - k, n - l)
        assert here.deviation * min(k, l) == pytest.approx(there.deviation * min(n - k, n - l))


@pytest.mark.parametrize("k", [0, 6])
def test_random_overlap_checks_dimensions(k):
    with pytest.raises(ValueError, match=f"k={k} must lie between 1 and n=5"):
        random_overlap(5, k, 2)


@DTYPES
@pytest.mark.parametrize(("k", "l"), [(3, 3), (2, 5), (5, 2)])
def test_angles_agree_with_scipy(library, dtype, k, l):  # noqa: E741
    U, V = basis(20, k, 5, dtype), basis(20, l, 6, dtype)  # noqa: N806
    angles = principal_angles(move(U, library), move(V, library))
    assert angles.dtype == np.float64
    expected = np.sort(scipy.linalg.subspace_angles(U.astype(complex), V.astype(complex)))
    np.testing.assert_allclose(angles, expected, atol=50 * precision(dtype))


def test_small_and_large_angles_are_accurate_together(library):
    angles = np.array([1e-14, 1e-12, 1e-9, 1e-8, 1e-5, 0.3, 0.8, np.pi / 2 - 1e-9, np.pi / 2])
    U, V = tilted(60, angles, 7)  # noqa: N806
    found = principal_angles(move(U, library), move(V, library))
    np.testing.assert_allclose(found, angles, rtol=1e-9, atol=2e-15)
    # What cosines alone would say: nothing below 1e-8.
    cosines = np.minimum(np.linalg.svd(U.T @ V, compute_uv=False), 1)
    assert (np.abs(np.arccos(cosines) - angles) / angles)[:3].max() > 0.5


def test_small_angles_of_complex_subspaces(library):
    angles = np.array([1e-12, 1e-7, 1.2])
    U, V = tilted(30, angles, 8, "complex128")  # noqa: N806
    found = principal_angles(move(U, library), move(V, library))
    np.testing.assert_allclose(found, angles, rtol=1e-8, atol=2e-15)


@given(st.integers(1, 12), st.data())
def test_angles_and_overlap_tell_the_same(n, data):
    k, l = data.draw(st.integers(1, n)), data.draw(st.integers(1, n))  # noqa: E741
    seed = data.draw(st.integers(0, 1000))
    U, V = basis(n, k, seed), basis(n, l, seed + 1)  # noqa: N806
    angles = principal_angles(U, V)
    assert angles.shape == (min(k, l),)
    assert (np.diff(angles) >= 0).all()
    assert (np.cos(angles) ** 2).mean() == pytest.approx(subspace_overlap(U, V), abs=1e-12)
    np.testing.assert_allclose(principal_angles(V, U), angles, atol=1e-12)
    forced = max(0, k + l - n)  # dimensions that two subspaces of this size must share
    assert np.abs(angles[:forced]).max(initial=0) < 1e-13


@DTYPES
def test_energy_of_vectors_and_blocks(library, dtype):
    U, g = basis(50, 4, 9, dtype), gaussian(50, 3, 10, dtype)  # noqa: N806
    parts = np.abs(U.conj().T @ g) ** 2 / (np.abs(g) ** 2).sum(axis=0)
    moved = move(U, library), move(g, library)
    tolerance = 20 * precision(dtype)
    np.testing.assert_allclose(energy_in(*moved), parts.sum(axis=0), atol=tolerance)
    np.testing.assert_allclose(energy_curve(*moved), np.cumsum(parts, axis=0), atol=tolerance)
    single = energy_in(moved[0], move(g[:, 1].copy(), library))
    assert isinstance(single, float)
    assert single == pytest.approx(parts[:, 1].sum(), abs=tolerance)
    assert energy_curve(moved[0], move(g[:, 1].copy(), library)).shape == (4,)
    assert energy_in(moved[0], moved[0][:, 0]) == pytest.approx(1, abs=1e-5)


def test_energy_of_all_magnitudes(library):
    U = basis(20, 3, 11)  # noqa: N806
    g = gaussian(20, 1, 12)
    expected = energy_in(U, g[:, 0])
    for size in (1e-200, 1e-30, 1e30, 1e200):
        scaled = energy_in(move(U, library), move(size * g[:, 0], library))
        assert scaled == pytest.approx(expected, rel=1e-12)


def test_single_precision_is_accumulated_in_double(library):
    n = 2**17
    u, g = (gaussian(n, 1, seed, "float32") for seed in (24, 25))
    u = (u / np.linalg.norm(u)).astype(np.float32)
    wide = u.astype(np.float64), (g + u).astype(np.float64)
    expected = (wide[0].T @ wide[1]).item() ** 2 / (wide[1] ** 2).sum()
    assert energy_in(move(u, library), move(g + u, library)) == pytest.approx(expected, rel=1e-11)
    expected = (wide[0] ** 2).sum() ** 2
    both = move(u, library), move(u.copy(), library)
    assert subspace_overlap(*both) == pytest.approx(expected, rel=1e-12)


def test_half_precision(library):
    if library.startswith("strict"):
        pytest.skip("array-api-strict has no half precision")
    U, g = basis(64, 3, 26).astype("float16"), gaussian(64, 1, 27).astype("float16")  # noqa: N806
    wide = U.astype(np.float64), g.astype(np.float64)[:, 0]
    expected = np.linalg.norm(wide[0].T @ wide[1]) ** 2 / np.linalg.norm(wide[1]) ** 2
    moved = move(U, library), move(g, library)
    assert energy_in(moved[0], moved[1][:, 0]) == pytest.approx(expected, rel=1e-11)
    assert orthonormalize(moved[0]).dtype == moved[0].dtype
    assert principal_angles(*[orthonormalize(moved[0])] * 2).max() < 0.01


def test_real_and_complex_bases_can_be_compared(library):
    U, V = basis(10, 2, 13), basis(10, 3, 14, "complex128")  # noqa: N806
    both = move(U, library), move(V, library)
    assert subspace_overlap(*both) == pytest.approx(projector_overlap(U, V))
    assert subspace_overlap(*both[::-1]) == pytest.approx(projector_overlap(U, V))
    np.testing.assert_allclose(principal_angles(*both), principal_angles(*both[::-1]), atol=1e-12)
    expected = np.linalg.norm(U.T @ V[:, 0]) ** 2
    assert energy_in(both[0], both[1][:, 0]) == pytest.approx(expected)


@DTYPES
def test_orthonormalize_keeps_leading_spans_library_and_dtype(library, dtype):
    x = gaussian(30, 4, 15, dtype)
    moved = move(x, library)
    result = orthonormalize(moved)
    assert type(result) is type(moved)
    assert result.dtype == moved.dtype
    assert device_of(result) == device_of(moved)
    Q = home(result)  # noqa: N806
    np.testing.assert_allclose(Q.conj().T @ Q, np.eye(4), atol=20 * precision(dtype))
    for j in range(1, 5):
        outside = x[:, :j] - Q[:, :j] @ (Q[:, :j].conj().T @ x[:, :j])
        assert np.abs(outside).max() < 100 * precision(dtype)
    assert subspace_overlap(result, move(basis(30, 4, 1, dtype), library)) < 1


@pytest.mark.parametrize("x", [np.ones((5, 2)), np.zeros((4, 1)), np.ones((2, 3)), np.eye(3) * 0])
def test_dependent_columns_are_refused(x):
    with pytest.raises(ValueError, match="linearly dependent"):
        orthonormalize(x)


def test_bases_that_are_not_orthonormal_are_refused(library):
    good, bad = move(basis(10, 2, 16), library), move(1.1 * basis(10, 2, 17), library)
    for function in (subspace_overlap, overlap_curve, principal_angles):
        with pytest.raises(ValueError, match=r"V is not orthonormal: .* is 2\.10e-01.*orthonorm"):
            function(good, bad)
        with pytest.raises(ValueError, match="U is not orthonormal"):
            function(bad, good)
    with pytest.raises(ValueError, match=r"pass orthonormalize\(U\)"):
        energy_in(bad, good[:, 0])
    assert energy_in(orthonormalize(bad), bad[:, 0]) == pytest.approx(1)


def test_rounding_of_single_precision_is_allowed():
    rounded = basis(500, 8, 18, "float32") * np.float32(1 + 1e-5)
    assert subspace_overlap(rounded, rounded) == pytest.approx(1, abs=1e-3)
    with pytest.raises(ValueError, match=r"for float64 at most 1\.5e-08"):
        subspace_overlap(rounded.astype(np.float64), rounded.astype(np.float64))


def test_zero_and_broken_vectors_are_refused(library):
    U = move(basis(6, 2, 19), library)  # noqa: N806
    block = gaussian(6, 3, 20)
    for value in (0.0, np.nan, np.inf):
        broken = block.copy()
        broken[:, 1] = value
        with pytest.raises(ValueError, match=r"g has largest entry .* in column 1"):
            energy_in(U, move(broken, library))
    with pytest.raises(ValueError, match="U is not orthonormal"):
        energy_in(move(np.full((6, 1), np.nan), library), move(block, library))


def test_mismatches_are_refused():
    U = basis(6, 2, 21)  # noqa: N806
    with pytest.raises(ValueError, match="V has dimension 5, U has dimension 6"):
        subspace_overlap(U, basis(5, 2, 22))
    with pytest.raises(ValueError, match="g has dimension 5"):
        energy_in(U, np.ones(5))
    with pytest.raises(ValueError, match=r"U has shape \(6, 0\)"):
        subspace_overlap(U[:, :0], U)
    with pytest.raises(ValueError, match=r"V has shape \(1, 6, 2\)"):
        subspace_overlap(U, U[None])


def test_libraries_and_devices_are_not_mixed():
    strict = pytest.importorskip("array_api_strict")
    U = basis(6, 2, 23)  # noqa: N806
    with pytest.raises(TypeError, match="V is an array of strict, U of numpy"):
        subspace_overlap(U, strict.asarray(U))
    there = strict.asarray(U, device=strict.Device("device1"))
    with pytest.raises(ValueError, match="V has device"):
        subspace_overlap(strict.asarray(U), there)
    with pytest.raises(TypeError, match="not an array"):
        subspace_overlap(U.tolist(), U)
