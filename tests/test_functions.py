"""f(A) x: against dense functions, exactness, early stopping, and what it refuses."""

import numpy as np
import pytest
import scipy.linalg
from hypothesis import given
from hypothesis import strategies as st

from specdens import FunctionOperator, VectorSpace
from specdens.functions import MatrixFunction, apply_function, evaluate
from specdens.operators import aslinearoperator
from specdens.testing import check_operator
from tests.cases import SPECTRA, CountingOperator, dense, dense_case, device_of, home, move


def dense_function(f, matrix):
    """Return f of a Hermitian matrix, from all its eigenvalues."""
    theta, vectors = np.linalg.eigh(matrix)
    return (vectors * f(theta)) @ vectors.conj().T


def vectors(n, p, *, complex_=False, seed=5):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, p))
    return x + 1j * rng.standard_normal((n, p)) if complex_ else x


def test_agrees_with_the_dense_function(library, spectrum):
    matrix = dense_case(spectrum)
    x = vectors(40, 3, complex_=np.iscomplexobj(matrix))
    operator, right = move(matrix, library), move(x, library)
    y = apply_function(np.tanh, operator, right, num_steps=40)
    np.testing.assert_allclose(home(y), dense_function(np.tanh, matrix) @ x, atol=1e-10)
    assert type(y) is type(right)
    assert device_of(y) == device_of(right)
    assert y.dtype == right.dtype
    one = apply_function(np.tanh, operator, right[:, 1], num_steps=40)
    np.testing.assert_allclose(home(one), home(y)[:, 1], atol=1e-10)


def test_agrees_with_scipy_on_the_exponential():
    matrix = dense(SPECTRA["indefinite"])
    x = vectors(40, 2)
    y = apply_function(np.exp, matrix, x)
    np.testing.assert_allclose(y, scipy.linalg.expm(matrix) @ x, rtol=1e-11, atol=1e-11)


def test_a_complex_function_of_a_complex_operator_is_unitary():
    matrix = dense_case("hermitian")
    x = vectors(40, 1, complex_=True)[:, 0]
    y = apply_function(lambda t: np.exp(-1j * t), matrix, x)
    np.testing.assert_allclose(y, scipy.linalg.expm(-1j * matrix) @ x, atol=1e-11)
    with pytest.raises(TypeError, match="the operator is real"):
        apply_function(lambda t: np.exp(-1j * t), matrix.real, x.real)


@pytest.mark.parametrize("num_steps", [1, 2, 5])
def test_polynomials_of_lower_degree_than_steps_are_exact(num_steps):
    matrix = dense(SPECTRA["uniform"])
    x = vectors(40, 2)
    y = apply_function(lambda t: t ** (num_steps - 1), matrix, x, num_steps=num_steps)
    exact = np.linalg.matrix_power(matrix, num_steps - 1) @ x
    np.testing.assert_allclose(y, exact, rtol=1e-12, atol=1e-12)
    if num_steps > 1:  # one degree more is not: the bound is sharp
        above = apply_function(lambda t: t**num_steps, matrix, x, num_steps=num_steps)
        assert np.abs(above - matrix @ exact).max() > 1e-6


def test_an_invariant_subspace_ends_the_run_with_the_exact_value():
    matrix = dense(SPECTRA["degenerate"])  # five eigenvalues
    counted = CountingOperator(aslinearoperator(matrix))
    x = vectors(40, 1)[:, 0]
    y = apply_function(np.sign, counted, x)
    np.testing.assert_allclose(y, dense_function(np.sign, matrix) @ x, atol=1e-12)
    assert len(counted.shapes) <= 8  # five, and as many as show that nothing changes any more


def test_columns_share_their_krylov_space():
    matrix = dense(np.geomspace(1e-3, 1.0, 200))
    x = vectors(200, 10)
    exact = dense_function(np.sqrt, matrix) @ x
    block = apply_function(np.sqrt, matrix, x, num_steps=10)
    alone = np.stack([apply_function(np.sqrt, matrix, v, num_steps=10) for v in x.T], axis=1)
    assert np.linalg.norm(block - exact) < 0.5 * np.linalg.norm(alone - exact)


def test_a_small_memory_budget_takes_columns_one_by_one():
    matrix = dense(SPECTRA["uniform"])
    counted = CountingOperator(aslinearoperator(matrix))
    x = vectors(40, 3)
    y = apply_function(np.exp, counted, x, memory_budget=1)
    np.testing.assert_allclose(y, scipy.linalg.expm(matrix) @ x, rtol=1e-10)
    assert set(counted.shapes) == {(40, 1)}


def test_stops_when_approximations_agree():
    matrix = dense(np.linspace(1.0, 2.0, 300))
    x = vectors(300, 2)
    exact = dense_function(np.log, matrix) @ x
    steps = []
    for tol in (1e-3, 1e-6, 1e-12):
        counted = CountingOperator(aslinearoperator(matrix))
        y = apply_function(np.log, counted, x, tol=tol)
        assert np.linalg.norm(y - exact) < tol * np.linalg.norm(exact)
        steps.append(len(counted.shapes))
    assert steps[0] < steps[1] < steps[2] < 30


def test_says_so_when_the_tolerance_is_not_reached():
    matrix = dense(np.geomspace(1e-6, 1.0, 300))
    with pytest.warns(RuntimeWarning, match=r"tol=1e-10 is not reached.* after 10 steps"):
        apply_function(np.sqrt, matrix, vectors(300, 1), num_steps=10, tol=1e-10)


def test_zero_columns_zero_matrices_and_one_dimension(library):
    x = vectors(6, 3)
    x[:, 1] = 0
    for matrix in (np.zeros((6, 6)), np.eye(6), np.diag(np.arange(6.0))):
        y = apply_function(np.exp, move(matrix, library), move(x, library))
        np.testing.assert_allclose(home(y), scipy.linalg.expm(matrix) @ x, rtol=1e-12)
    nothing = apply_function(np.exp, move(np.eye(6), library), move(0 * x, library))
    assert not home(nothing).any()
    one = apply_function(np.sqrt, move(np.full((1, 1), 9.0), library), move(np.ones(1), library))
    np.testing.assert_allclose(home(one), [3.0])


def test_columns_of_any_size_and_dependent_columns():
    matrix = dense(SPECTRA["uniform"])
    x = vectors(40, 3)
    x[:, 1] = 1e-200 * x[:, 0]
    x[:, 2] *= 1e100
    y = apply_function(np.sqrt, matrix, x)
    exact = dense_function(np.sqrt, matrix) @ x
    assert (np.abs(y - exact).max(axis=0) < 1e-10 * np.abs(exact).max(axis=0)).all()


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.complex64])
def test_low_precision(dtype):
    matrix = dense(SPECTRA["uniform"]).astype(dtype)
    x = vectors(40, 2).astype(np.float32)
    y = apply_function(np.sqrt, matrix, x)
    assert y.dtype == (np.complex64 if dtype is np.complex64 else np.float32)
    exact = dense_function(np.sqrt, matrix.astype(complex)) @ x
    tolerance = 2e-2 if dtype is np.float16 else 2e-5
    assert np.linalg.norm(y - exact) < tolerance * np.linalg.norm(exact)


def test_host_vectors_go_to_the_operators_library(library):
    matrix, x = dense(SPECTRA["uniform"]), vectors(40, 2)
    y = apply_function(np.sqrt, move(matrix, library), x)
    assert type(y) is type(move(x, library))
    np.testing.assert_allclose(home(y), dense_function(np.sqrt, matrix) @ x, atol=1e-10)


def test_a_logarithm_of_an_indefinite_operator_names_the_ritz_value():
    with pytest.raises(ValueError, match=r"f\(-[0-9.]+\) = nan.* Ritz value"):
        apply_function(np.log, dense(SPECTRA["indefinite"]), vectors(40, 1))


def test_singular_operators_have_a_square_root_and_no_logarithm():
    matrix = dense(SPECTRA["rank_deficient"])
    x = vectors(40, 2)
    y = apply_function(np.sqrt, matrix, x)
    exact = dense_function(lambda t: np.sqrt(np.maximum(t, 0)), matrix) @ x
    np.testing.assert_allclose(y, exact, atol=1e-7)
    for f in (np.log, lambda t: 1 / t):
        with pytest.raises(ValueError, match=r"f\(0\) = -?inf"):
            apply_function(f, matrix, x)


def test_refuses_what_is_no_vector_of_the_operator():
    matrix, x = dense(SPECTRA["uniform"]), vectors(40, 1)
    with pytest.raises(ValueError, match=r"x has shape \(39, 1\); expected \(40,\)"):
        apply_function(np.exp, matrix, x[1:])
    with pytest.raises(ValueError, match=r"x has shape \(40, 0\)"):
        apply_function(np.exp, matrix, x[:, :0])
    with pytest.raises(TypeError, match="x is complex"):
        apply_function(np.exp, matrix, 1j * x)
    x[3] = np.nan
    with pytest.raises(ValueError, match="x is not finite: column 0"):
        apply_function(np.exp, matrix, x)


def test_refuses_bad_settings_and_products():
    matrix, x = dense(SPECTRA["uniform"]), vectors(40, 1)
    with pytest.raises(ValueError, match="num_steps=41 exceeds"):
        apply_function(np.exp, matrix, x, num_steps=41)
    with pytest.raises(ValueError, match="tol=0 must be positive"):
        apply_function(np.exp, matrix, x, tol=0)
    with pytest.raises(ValueError, match="memory_budget=0"):
        apply_function(np.exp, matrix, x, memory_budget=0)
    with pytest.raises(ValueError, match="f returns shape"):
        apply_function(lambda t: t[:1], matrix, x, num_steps=5)
    broken = FunctionOperator(lambda v: v * np.nan, VectorSpace.like(x[:, 0]))
    with pytest.raises(ValueError, match="operator @ x is not finite"):
        apply_function(np.exp, broken, x)


def test_x_and_the_operators_own_arrays_are_left_alone():
    x = vectors(5, 2)
    before = x.copy()
    cached = vectors(5, 2)
    kept = cached.copy()
    constant = FunctionOperator(lambda v: v, VectorSpace.like(x[:, 0]), blocks=True)  # returns x
    np.testing.assert_allclose(apply_function(np.exp, constant, x), np.e * x)
    apply_function(np.exp, np.eye(5), cached)
    assert np.array_equal(x, before)
    assert np.array_equal(cached, kept)


def test_a_function_of_an_operator_is_an_operator(library):
    operator = aslinearoperator(move(dense(SPECTRA["uniform"]), library))
    check_operator(MatrixFunction(np.sqrt, operator, num_steps=40), tolerance=1e-10)


@given(
    st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=8),
    st.floats(-2.0, 2.0),
)
def test_diagonal_operators_apply_f_entry_by_entry(eigenvalues, factor):
    values = np.array(eigenvalues)
    y = apply_function(lambda t: factor * np.abs(t), np.diag(values), np.ones(len(values)))
    scale = np.abs(values).max() * len(values)
    np.testing.assert_allclose(y, factor * np.abs(values), atol=1e-11 * scale)


def test_values_that_are_zero_to_rounding_are_taken_as_zero():
    theta = np.array([-1e-17, 0.0, 1e-17, 0.5, 1.0])
    np.testing.assert_array_equal(evaluate(np.sqrt, theta, 2.2e-16), np.sqrt([0, 0, 0, 0.5, 1]))
    np.testing.assert_array_equal(evaluate(lambda t: 2.0, theta, 2.2e-16), np.full(5, 2.0))
