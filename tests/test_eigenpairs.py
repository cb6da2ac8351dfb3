"""Eigenpairs against dense answers and SciPy, multiplicities, cost; intervals that hold it all."""

import numpy as np
import pytest
import scipy.sparse
import scipy.sparse.linalg
from hypothesis import given
from hypothesis import strategies as st

from specdens import FunctionOperator, VectorSpace
from specdens.eigenpairs import eigsh, spectral_interval
from specdens.testing import spiked_spectrum
from tests.cases import (
    SPECTRA,
    CountingOperator,
    dense,
    dense_case,
    device_of,
    diagonal,
    home,
    move,
)

ENDS = ("LA", "SA", "LM", "BE")


def wanted(eigenvalues, count, which):
    """Return what `eigsh` must find, from all eigenvalues."""
    values = np.sort(eigenvalues)
    low = {"LA": 0, "SA": count, "BE": count // 2}
    if which == "LM":
        return np.sort(values[np.argsort(-np.abs(values), kind="stable")[:count]])
    return np.concatenate([values[: low[which]], values[len(values) - count + low[which] :]])


def check(result, matrix, expected, tol=1e-6, precision=2.3e-16):
    """Check values, true residuals and orthonormality of a result, by dense arithmetic."""
    vectors = home(result.eigenvectors).astype(np.result_type(matrix, np.float64))
    norm = max(np.abs(expected).max(), np.linalg.norm(matrix, 2)) if matrix.size else 1.0
    assert result.converged.all()
    np.testing.assert_allclose(result.eigenvalues, expected, rtol=0, atol=5 * tol * norm)
    true = np.linalg.norm(matrix @ vectors - vectors * result.eigenvalues, axis=0)
    assert (np.abs(true - result.residuals) <= 50 * precision * norm).all()
    gram = vectors.conj().T @ vectors
    orthonormal = max(1e-10 if precision < 1e-10 else 0.0, 50 * precision)
    np.testing.assert_allclose(gram, np.eye(len(expected)), rtol=0, atol=orthonormal)


@pytest.mark.parametrize("which", ENDS)
def test_pairs_of_every_spectrum(spectrum, which):
    matrix = dense_case(spectrum)
    for count in (1, 5):
        result = eigsh(matrix, count, which=which, tol=1e-9)
        found, expected = result.eigenvalues, wanted(SPECTRA[spectrum], count, which)
        if which == "LM":  # eigenvalues of one magnitude and either sign are equally wanted
            expected = np.sort(np.abs(expected)) * np.sign(found[np.argsort(np.abs(found))])
            expected = np.sort(expected)
        check(result, matrix, expected, 1e-9)


def test_every_library(library):
    for spectrum in ("degenerate", "hermitian"):
        matrix = move(dense_case(spectrum), library)
        result = eigsh(matrix, 4)
        assert type(result.eigenvectors) is type(matrix)
        assert device_of(result.eigenvectors) == device_of(matrix)
        assert tuple(result.eigenvectors.shape) == (40, 4)
        check(result, dense_case(spectrum), wanted(SPECTRA[spectrum], 4, "LA"))


def test_single_precision(library):
    matrix = dense_case("outliers").astype(np.float32)
    result = eigsh(move(matrix, library), 4)
    check(result, matrix, wanted(SPECTRA["outliers"], 4, "LA"), precision=1.2e-7)


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_half_precision(name):
    torch = pytest.importorskip("torch")
    values = np.concatenate([np.random.default_rng(0).uniform(-1, 1, 297), [5.0, 4.0, -3.0]])
    matrix = torch.tensor(dense(values)).to(getattr(torch, name))
    exact = matrix.double().numpy()
    result = eigsh(matrix, 3, which="LM")
    assert result.converged.all()
    assert result.eigenvectors.dtype == torch.float32
    roundoff = torch.finfo(matrix.dtype).eps
    np.testing.assert_allclose(result.eigenvalues, [-3.0, 4.0, 5.0], atol=5 * roundoff)
    vectors = result.eigenvectors.double().numpy()
    true = np.linalg.norm(exact @ vectors - vectors * result.eigenvalues, axis=0)
    assert (true <= result.residuals + 5 * roundoff).all()
    low, high = spectral_interval(matrix)
    assert low <= -3.0
    assert high >= 5.0


@pytest.mark.parametrize("block_size", [1, 2, 3, 5])
@pytest.mark.parametrize("which", ["LA", "BE"])
def test_multiplicities_whatever_the_block(block_size, which):
    values = np.repeat([3.0, 2.5, 0.5, -1.0, -4.0], [3, 2, 60, 40, 2])
    for seed in range(10):
        result = eigsh(dense(values), 6, which=which, seed=seed, block_size=block_size)
        np.testing.assert_allclose(result.eigenvalues, wanted(values, 6, which), atol=1e-5)
        assert result.converged.all()


@given(
    st.integers(1, 40).flatmap(lambda n: st.lists(st.integers(-4, 4), min_size=n, max_size=n)),
    st.integers(1, 8),
    st.sampled_from(["LA", "SA", "BE"]),
    st.integers(1, 3),
)
def test_repeated_integers(values, count, which, block_size):
    values = np.array(values, dtype=float)
    count = min(count, len(values))
    result = eigsh(np.diag(values), count, which=which, block_size=block_size)
    np.testing.assert_allclose(result.eigenvalues, wanted(values, count, which), atol=1e-4)


def laplacian(size):
    return scipy.sparse.diags([-1.0, 2.0, -1.0], [-1, 0, 1], shape=(size, size)).tocsr()


def cube(size):
    line, one = laplacian(size), scipy.sparse.identity(size)
    parts = ([line, one, one], [one, line, one], [one, one, line])
    return sum(scipy.sparse.kron(scipy.sparse.kron(*p[:2]), p[2]) for p in parts).tocsr()


def scipy_reaches(matrix, which, tol):
    """Return SciPy's products and the largest residual it reaches, relative to the norm."""
    count = 0

    def product(x):
        nonlocal count
        count += 1
        return matrix @ x

    operator = scipy.sparse.linalg.LinearOperator(matrix.shape, product, dtype=float)
    start = np.random.default_rng(0).standard_normal(matrix.shape[0])
    values, vectors = scipy.sparse.linalg.eigsh(operator, 6, which=which, tol=tol, v0=start)
    residuals = np.linalg.norm(matrix @ vectors - vectors * values, axis=0)
    return count, residuals.max() / scipy.sparse.linalg.norm(matrix, 1), np.sort(values)


@pytest.mark.parametrize(
    ("matrix", "which", "tol"),
    [
        (laplacian(400), "SA", 1e-6),
        (laplacian(400), "LA", 1e-6),
        (cube(12), "SA", 1e-10),
        (scipy.sparse.diags(spiked_spectrum()).tocsr(), "LA", 1e-6),
    ],
    ids=["line-SA", "line-LA", "cube", "spiked"],
)
def test_no_more_products_than_scipy_at_equal_accuracy(matrix, which, tol):
    count, reached, values = scipy_reaches(matrix, which, tol)
    result = eigsh(matrix, 6, which=which, tol=reached)
    assert result.converged.all()
    np.testing.assert_allclose(result.eigenvalues, values, rtol=0, atol=1e-9 * abs(values).max())
    assert result.num_products <= 1.1 * count


@pytest.mark.parametrize("which", ["SA", "LA"])
def test_the_cube_with_its_multiplicities(which):
    line = 2 - 2 * np.cos(np.pi * np.arange(1, 11) / 11)
    values = (line[:, None, None] + line[:, None] + line).ravel()
    result = eigsh(cube(10), 8, which=which)
    np.testing.assert_allclose(result.eigenvalues, wanted(values, 8, which), atol=1e-8)


def test_products_are_counted_by_columns():
    counting = CountingOperator(diagonal(spiked_spectrum(300, 10)))
    result = eigsh(counting, 4, block_size=3)
    assert {shape[1] for shape in counting.shapes} <= {1, 2, 3}
    assert result.num_products == sum(shape[1] for shape in counting.shapes)
    assert len(counting.shapes) < 15


def test_a_start_of_exact_eigenvectors_is_accepted(library):
    matrix = dense_case("outliers")
    exact = np.linalg.eigh(matrix)[1][:, -4:]
    result = eigsh(move(matrix, library), 4, start=move(exact, library))
    check(result, matrix, wanted(SPECTRA["outliers"], 4, "LA"))
    assert result.num_products <= 4 + 6  # one each, and a search for what they may have missed


def test_all_columns_of_an_approximate_start_are_used():
    values = spiked_spectrum(1000, 8)
    matrix = np.diag(values)
    start = np.eye(1000)[:, -8:] + 1e-4 * np.random.default_rng(0).standard_normal((1000, 8))
    cold, warm = eigsh(matrix, 8, tol=1e-9), eigsh(matrix, 8, tol=1e-9, start=start)
    np.testing.assert_allclose(warm.eigenvalues, values[-8:], atol=1e-7)
    assert warm.converged.all()
    rough = eigsh(matrix, 8, tol=1e-2, start=start)
    np.testing.assert_allclose(rough.eigenvalues, values[-8:], atol=1e-2)
    assert rough.num_products <= 8 + 3
    assert cold.converged.all()


def test_the_columns_of_a_start_are_multiplied_before_anything_else():
    values = np.append(np.linspace(0, 1, 300) ** 4, 3.0)
    start = np.eye(301)[:, -3:] + 1e-5 * np.random.default_rng(0).standard_normal((301, 3))
    for budget in (3, 8, 12):
        result = eigsh(np.diag(values), 3, start=start, tol=1e-9, max_products=budget)
        np.testing.assert_allclose(result.eigenvalues, values[-3:], atol=1e-6)


@pytest.mark.parametrize("columns", [slice(0, 3), slice(20, 21), slice(10, 40)])
def test_a_misleading_start_does_no_harm(columns):
    matrix = dense_case("outliers")
    start = np.linalg.eigh(matrix)[1][:, columns]
    check(eigsh(matrix, 3, start=start), matrix, wanted(SPECTRA["outliers"], 3, "LA"))


def test_products_that_run_out():
    matrix = laplacian(500)
    result = eigsh(matrix, 4, which="SA", max_products=30)
    assert result.num_products == 30
    assert len(result.eigenvalues) == 4
    assert not result.converged.any()
    vectors = result.eigenvectors
    true = np.linalg.norm(matrix @ vectors - vectors * result.eigenvalues, axis=0)
    np.testing.assert_allclose(result.residuals, true, atol=1e-13)
    assert len(eigsh(matrix, 4, max_products=2).eigenvalues) == 2


def test_residuals_are_true_after_many_restarts():
    matrix = dense(np.linspace(0, 1, 400) ** 0.5)
    for tol in (1e-4, 1e-8, 1e-14):
        result = eigsh(matrix, 5, which="LA", tol=tol, max_products=1500)
        assert result.num_products > 70
        vectors = result.eigenvectors
        true = np.linalg.norm(matrix @ vectors - vectors * result.eigenvalues, axis=0)
        np.testing.assert_allclose(result.residuals, true, rtol=1e-6, atol=2e-14)
        np.testing.assert_allclose(vectors.T @ vectors, np.eye(5), atol=1e-12)


def test_residuals_tell_that_an_operator_is_not_quite_hermitian():
    matrix = np.diag(np.arange(50.0)) + 1e-6 * np.random.default_rng(0).standard_normal((50, 50))
    operator = FunctionOperator(lambda x: matrix @ x, VectorSpace.like(matrix), blocks=True)
    result = eigsh(operator, 3, tol=1e-10, max_products=45)
    vectors = result.eigenvectors
    true = np.linalg.norm(matrix @ vectors - vectors * result.eigenvalues, axis=0)
    assert true.min() > 1e-6
    assert not result.converged.any()
    np.testing.assert_allclose(result.residuals, true, rtol=1e-6)


def test_a_small_memory_budget_costs_products_only():
    values = np.linspace(0, 1, 2000) ** 0.2
    operator = diagonal(values)
    lean = eigsh(operator, 3, which="SA", tol=1e-8, memory_budget=25 * 2000 * 8)
    rich = eigsh(operator, 3, which="SA", tol=1e-8)
    np.testing.assert_allclose(lean.eigenvalues, values[:3], atol=1e-7)
    assert lean.num_products >= rich.num_products
    assert eigsh(operator, 3, which="SA", memory_budget=1).converged.all()


@pytest.mark.parametrize("count", [40, 60])
def test_all_pairs(library, count):
    matrix = dense_case("hermitian")
    result = eigsh(move(matrix, library), count)
    check(result, matrix, np.sort(SPECTRA["hermitian"]))
    assert result.num_products == 40


@pytest.mark.parametrize("values", [[2.0], [0.0] * 9, [1.0] * 9, [0.0] * 8 + [1.0]])
@pytest.mark.parametrize("which", ENDS)
def test_few_distinct_eigenvalues(values, which):
    matrix = np.diag(values)
    for count in (1, 5):
        count = min(count, len(values))
        result = eigsh(matrix, count, which=which)
        assert result.converged.all()
        np.testing.assert_allclose(result.eigenvalues, wanted(values, count, which), atol=1e-12)


def test_the_same_seed_gives_the_same_bits_and_a_clear_text():
    first, second = (eigsh(dense_case("uniform"), 2, seed=5) for _ in range(2))
    assert first.eigenvectors.tobytes() == second.eigenvectors.tobytes()
    assert repr(first).startswith("EigenResult(eigenvalues=[2.925641 3.      ], 2 of 2 converged")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_eigenvalues": 0}, "num_eigenvalues=0"),
        ({"which": "XX"}, "which='XX'"),
        ({"tol": -1.0}, r"tol=-1\.0"),
        ({"tol": np.nan}, "tol=nan"),
        ({"block_size": 0}, "block_size=0"),
        ({"max_products": 0}, "max_products=0"),
        ({"seed": -1}, "seed=-1"),
        ({"start": np.ones(7)}, r"start has shape \(7,\)"),
        ({"start": np.ones((40, 41))}, "start has 41 columns"),
        ({"start": np.zeros(40)}, "start has norm 0.0"),
        ({"start": np.full(40, np.nan)}, "start has norm nan"),
        ({"start": np.ones((40, 0))}, r"start has shape \(40, 0\)"),
    ],
)
def test_errors_name_the_argument(options, message):
    with pytest.raises(ValueError, match=message):
        eigsh(dense_case("uniform"), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"which": 3}, "which=3 is unknown; expected one of 'LA'"),
        ({"tol": "small"}, "tol='small' must be a real number"),
        ({"start": np.ones(40) * 1j}, "start is complex"),
        ({"start": [1.0] * 40}, "start has type list"),
        ({"num_eigenvalues": 2.5}, "num_eigenvalues=2.5 must be an integer"),
        ({"memory_budget": 1e9}, "memory_budget=1000000000.0 must be an integer"),
    ],
)
def test_arguments_of_the_wrong_type_are_named(options, message):
    with pytest.raises(TypeError, match=message):
        eigsh(dense_case("uniform"), **options)


@pytest.mark.parametrize("function", [eigsh, spectral_interval])
def test_products_that_are_not_finite_are_reported(function):
    operator = FunctionOperator(lambda x: x * np.nan, VectorSpace.like(np.zeros(30)), blocks=True)
    with pytest.raises(ValueError, match="not finite"):
        function(operator)


def random_spectrum(index):
    """Return one of many spectra: smooth, repeated, with outliers, indefinite or negative."""
    rng = np.random.default_rng(index)
    n = int(rng.integers(1, 400))
    values = rng.standard_normal(n)
    kind = index % 6
    if kind == 1:
        values = np.round(2 * values)
    elif kind == 2:
        values = -np.abs(values)
    elif kind == 3:
        values[0] *= 100
    elif kind == 4:
        values[: n // 2] = 0
    elif kind == 5:
        values = rng.uniform(-1, 1, n)
        values[0] = 1.1
    return values


def test_intervals_contain_the_spectrum_and_are_tight():
    widths = []
    for index in range(400):
        values = random_spectrum(index)
        low, high = spectral_interval(diagonal(values), seed=index)
        assert low <= values.min()
        assert values.max() <= high
        if np.ptp(values):
            widths.append((high - low) / np.ptp(values))
    assert max(widths) < 1.2


def test_short_runs_still_contain_the_spectrum_and_more_probes_tighten_them():
    for index in range(200):
        values = random_spectrum(index)
        steps = min(5, len(values))
        few = spectral_interval(diagonal(values), num_steps=steps, seed=index, margin=0.0)
        many = spectral_interval(
            diagonal(values), num_steps=steps, num_probes=5, seed=index, margin=0.0
        )
        for low, high in (few, many):
            assert low <= values.min()
            assert values.max() <= high
        if steps == 5 and np.ptp(values) and len(values) > 50:
            assert np.ptp(many) <= np.ptp(few)


def test_intervals_of_the_smallest_cases(library):
    assert spectral_interval(move(np.zeros((5, 5)), library)) == (0.0, 0.0)
    for matrix in (np.array([[-2.0]]), np.eye(6)):
        value = matrix[0, 0]
        low, high = spectral_interval(move(matrix, library))
        assert low <= value <= high
        assert high - low <= 1e-13
    low, high = spectral_interval(move(dense_case("hermitian"), library))
    values = SPECTRA["hermitian"]
    assert low <= values.min()
    assert values.max() <= high < values.min() + 1.2 * np.ptp(values)


def test_intervals_name_wrong_arguments():
    for options in ({"num_steps": 0}, {"num_steps": 41}, {"num_probes": 0}, {"margin": -0.1}):
        name = next(iter(options))
        with pytest.raises(ValueError, match=f"{name}="):
            spectral_interval(dense_case("uniform"), **options)
