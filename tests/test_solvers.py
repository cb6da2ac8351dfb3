"""Inverse operators by conjugate gradients and MINRES, against dense solves and SciPy."""

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
from hypothesis import given
from hypothesis import strategies as st

from specdens import FunctionOperator, VectorSpace, aslinearoperator, slq
from specdens.solvers import METHODS, inverse, solve
from specdens.testing import check_operator
from tests.cases import CountingOperator, dense, device_of, home, move

_POSITIVE = np.geomspace(0.05, 4.0, 30)
_INDEFINITE = np.concatenate([-np.geomspace(0.2, 3.0, 14), np.geomspace(0.1, 4.0, 16)])
_CASES = [("cg", _POSITIVE), ("minres", _POSITIVE), ("minres", _INDEFINITE)]
_IDS = ["cg", "minres", "minres-indefinite"]


def right_hand_sides(n, columns, complex_=False, seed=3):
    rng = np.random.default_rng(seed)
    b = rng.standard_normal((n, columns)) * np.geomspace(1e-3, 1e3, columns)
    return b * (1 + 2j) + rng.standard_normal(b.shape) * 1j if complex_ else b


@pytest.fixture(params=[False, True], ids=["real", "complex"])
def complex_(request):
    return request.param


@pytest.mark.parametrize(("method", "values"), _CASES, ids=_IDS)
def test_solutions_on_every_library(library, method, values, complex_):
    matrix = dense(values, complex_=complex_)
    b = right_hand_sides(len(values), 3, complex_)
    A, there = move(matrix, library), move(b, library)  # noqa: N806
    solution = solve(A, there, tol=1e-10, method=method)
    assert type(solution.x) is type(there)
    assert device_of(solution.x) == device_of(there)
    x = home(solution.x)
    measured = np.linalg.norm(matrix @ x - b, axis=0) / np.linalg.norm(b, axis=0)
    np.testing.assert_allclose(solution.residuals, measured, atol=1e-13)
    assert (measured <= 1e-10).all()
    # |x - x*| <= |A^-1| |residual|, and |b| <= |A| |x*|.
    exact, condition = np.linalg.solve(matrix, b), np.linalg.cond(matrix)
    errors = np.linalg.norm(x - exact, axis=0) / np.linalg.norm(exact, axis=0)
    assert (errors <= 1.01e-10 * condition).all()


@pytest.mark.parametrize("method", METHODS)
def test_vectors_and_blocks_agree_and_keep_their_shape(library, method):
    b = right_hand_sides(30, 2)
    operator = inverse(move(dense(_POSITIVE), library), tol=1e-12, method=method)
    both = operator @ move(b, library)
    for j in range(2):
        single = operator @ move(b[:, j].copy(), library)
        assert (tuple(single.shape), single.dtype) == ((30,), both.dtype)
        exact = np.linalg.solve(dense(_POSITIVE), b[:, j])
        for x in (home(single), home(both)[:, j]):
            np.testing.assert_allclose(x, exact, rtol=0, atol=2e-10 * np.linalg.norm(exact))


@pytest.mark.parametrize("damping", [0.7, -0.3])
def test_damping_shifts_the_spectrum(library, damping, complex_):
    matrix = dense(_INDEFINITE, complex_=complex_)
    b = right_hand_sides(30, 2, complex_)
    operator = inverse(move(matrix, library), damping=damping, tol=1e-12)
    expected = np.linalg.solve(matrix + damping * np.eye(30), b)
    np.testing.assert_allclose(home(operator @ move(b, library)), expected, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("method", METHODS)
def test_each_column_stops_by_its_own_residual(method):
    values, vectors = np.linalg.eigh(dense(_POSITIVE))
    easy = vectors[:, -1]  # one step
    harder = vectors[:, :3].sum(axis=1)  # three
    hard = np.random.default_rng(0).standard_normal(30)
    b = np.stack([easy, np.zeros(30), harder, hard], axis=1)
    operator = CountingOperator(aslinearoperator(dense(_POSITIVE)))
    solution = solve(operator, b, tol=1e-9, method=method)
    assert set(operator.shapes) == {(30, 4)}
    assert len(operator.shapes) == solution.num_products
    alone = [solve(dense(_POSITIVE), b[:, j], tol=1e-9, method=method) for j in range(4)]
    counts = [one.num_products for one in alone]
    assert counts[:3] == [2, 0, 4]  # and one product each to measure the residual
    assert abs(solution.num_products - max(counts)) <= 1  # blocks round in another order
    np.testing.assert_array_equal(solution.x[:, 1], np.zeros(30))
    np.testing.assert_allclose(solution.x[:, 0], easy / values[-1], atol=1e-9)
    for j in range(4):
        np.testing.assert_allclose(solution.x[:, j], alone[j].x, atol=1e-7)


def test_minres_needs_no_more_products_than_that_of_scipy():
    for values in (_POSITIVE, _INDEFINITE):
        matrix, b = dense(values), right_hand_sides(30, 1)[:, 0]
        count = [0]
        scipy.sparse.linalg.minres(
            matrix,
            b,
            rtol=1e-13,
            callback=lambda x, count=count: count.__setitem__(0, count[0] + 1),
        )
        assert solve(matrix, b, tol=1e-8).num_products <= count[0] + 1


def test_minres_residual_is_the_smallest_over_the_krylov_space():
    matrix = dense(_INDEFINITE)
    b = right_hand_sides(30, 1)[:, 0]
    b /= np.linalg.norm(b)
    A = aslinearoperator(matrix)  # noqa: N806
    for steps in (1, 2, 5, 11):
        x, used = METHODS["minres"](A, b[:, None], 0.0, 0.0, steps)
        assert used == steps
        krylov = [b]
        for _ in range(steps):
            new = matrix @ krylov[-1]
            krylov.append(new / np.linalg.norm(new))
        basis = np.linalg.qr(np.stack(krylov[:steps], axis=1))[0]
        best = np.linalg.lstsq(matrix @ basis, b)[0]
        smallest = np.linalg.norm(b - matrix @ basis @ best)
        np.testing.assert_allclose(np.linalg.norm(b - matrix @ x[:, 0]), smallest, rtol=1e-7)


def test_conjugate_gradients_minimize_the_energy_norm_over_the_krylov_space():
    matrix = dense(_POSITIVE)
    b = right_hand_sides(30, 1)[:, 0]
    b /= np.linalg.norm(b)
    for steps in (1, 2, 5, 11):
        x, _ = METHODS["cg"](aslinearoperator(matrix), b[:, None], 0.0, 0.0, steps)
        krylov = [b]
        for _ in range(steps - 1):
            new = matrix @ krylov[-1]
            krylov.append(new / np.linalg.norm(new))
        basis = np.linalg.qr(np.stack(krylov, axis=1))[0]
        best = basis @ np.linalg.solve(basis.T @ matrix @ basis, basis.T @ b)  # Galerkin
        np.testing.assert_allclose(x[:, 0], best, rtol=0, atol=1e-8 * np.linalg.norm(best))


@given(
    st.lists(st.floats(0.1, 10.0), min_size=1, max_size=12),
    st.integers(1, 4),
    st.sampled_from(sorted(METHODS)),
)
def test_any_positive_definite_matrix(values, columns, method):
    matrix, b = dense(np.array(values)), right_hand_sides(len(values), columns)
    x = solve(matrix, b, tol=1e-10, method=method, max_products=200).x
    residuals = np.linalg.norm(matrix @ x - b, axis=0)
    assert (residuals <= 1.001e-10 * np.linalg.norm(b, axis=0)).all()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "matrix", [np.array([[-0.0 + 3e-3]]), np.eye(5), 7.0 * np.eye(4), np.diag([1.0, 1, 2, 2, 2])]
)
def test_small_and_repeated_eigenvalues_end_early(matrix, method):
    distinct = len(np.unique(np.diag(matrix)))
    b = np.ones(len(matrix))
    solution = solve(matrix, b, method=method)
    np.testing.assert_allclose(solution.x, b / np.diag(matrix), rtol=1e-14)
    assert solution.num_products == distinct + 1


@pytest.mark.parametrize("method", METHODS)
def test_right_hand_sides_of_extreme_size(method):
    matrix, b = dense(_POSITIVE), right_hand_sides(30, 1)
    for scale in (1e-200, 1e150):
        x = solve(matrix, scale * b, tol=1e-10, method=method).x
        np.testing.assert_allclose(x / scale, np.linalg.solve(matrix, b), rtol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_single_precision_goes_on_where_the_recurrence_is_spoiled(method):
    values = np.geomspace(1e-3, 1.0, 100)
    matrix, b = (a.astype(np.float32) for a in (dense(values), right_hand_sides(100, 3)))
    matrix = (matrix + matrix.T) / 2
    solution = solve(matrix, b, tol=1e-5, method=method)
    assert solution.x.dtype == np.float32
    residual = matrix.astype(float) @ solution.x.astype(float) - b.astype(float)
    assert (np.linalg.norm(residual, axis=0) <= 1.1e-5 * np.linalg.norm(b, axis=0)).all()


def test_half_precision():
    matrix = torch.tensor(dense(np.linspace(1.0, 2.0, 40)), dtype=torch.bfloat16)
    matrix = (matrix + matrix.T) / 2
    y = inverse(matrix, tol=0.03) @ torch.ones(40, dtype=torch.bfloat16)
    assert y.dtype == torch.bfloat16
    residual = matrix.double() @ y.double() - 1.0
    assert float(residual.norm()) < 0.05 * 40**0.5
    with pytest.raises(np.linalg.LinAlgError, match="it stopped falling"):
        inverse(matrix, tol=1e-6) @ torch.ones(40, dtype=torch.bfloat16)


def test_negative_curvature_is_named():
    matrix = dense(_INDEFINITE)
    b = right_hand_sides(30, 2)
    with pytest.raises(ValueError, match=r"met zero or negative curvature: <p, \(A\) p> .* = -"):
        inverse(matrix, method="cg") @ b
    with pytest.raises(ValueError, match=r"\(A \+ 1 I\) p> .*Pass method='minres', or a damping"):
        inverse(matrix, method="cg", damping=1.0) @ b
    x = inverse(matrix, method="cg", damping=3.5, tol=1e-12) @ b
    np.testing.assert_allclose(x, np.linalg.solve(matrix + 3.5 * np.eye(30), b), rtol=1e-8)


@pytest.mark.parametrize("matrix", [np.zeros((3, 3)), np.diag([0.0, 1.0, 2.0])])
def test_singular_matrices_are_named(matrix):
    with pytest.raises(np.linalg.LinAlgError, match=r"relative residual .* add damping"):
        inverse(matrix) @ np.ones(3)
    with pytest.raises(ValueError, match="zero or negative curvature"):
        inverse(matrix, method="cg") @ np.ones(3)
    damped = inverse(matrix, damping=0.5, tol=1e-12)
    np.testing.assert_allclose(damped @ np.ones(3), 1 / (np.diag(matrix) + 0.5))


def test_singular_but_solvable_systems_are_solved():
    b = np.array([0.0, 1.0, 3.0])
    np.testing.assert_allclose(inverse(np.diag([0.0, 1.0, 2.0])) @ b, [0.0, 1.0, 1.5])


@pytest.mark.parametrize("method", METHODS)
def test_errors_name_the_residual_reached(method):
    matrix, b = dense(_POSITIVE), right_hand_sides(30, 2)
    with pytest.raises(np.linalg.LinAlgError) as raised:
        solve(matrix, b, tol=1e-10, method=method, max_products=6)
    text = str(raised.value)
    assert f"the solve by {method} did not converge" in text
    assert "after 6 products, tol=1e-10 (max_products is used up" in text
    unit = b / np.linalg.norm(b, axis=0)
    x, _ = METHODS[method](aslinearoperator(matrix), unit, 0.0, 0.0, 5)
    reached = np.linalg.norm(unit - matrix @ x, axis=0).max()
    assert f"relative residual {reached:.3g} " in text


@pytest.mark.parametrize("method", METHODS)
def test_a_tolerance_beyond_the_precision_ends_soon(method):
    matrix = dense(np.geomspace(1e-4, 1.0, 60)).astype(np.float32)
    b = right_hand_sides(60, 1).astype(np.float32)
    with pytest.raises(np.linalg.LinAlgError, match="did not converge"):
        solve((matrix + matrix.T) / 2, b, tol=1e-12, method=method)


@pytest.mark.parametrize("method", METHODS)
def test_products_that_are_not_finite_are_errors(method):
    operator = FunctionOperator(lambda x: x * np.nan, VectorSpace.like(np.zeros(4)))
    with pytest.raises(ValueError, match="not finite"):
        inverse(operator, method=method) @ np.ones(4)
    with pytest.raises(ValueError, match="b is not finite: column 0"):
        inverse(np.eye(4), method=method) @ np.array([1.0, np.nan, 0.0, 0.0])


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"tol": 0.0}, ValueError, "tol=0.0 must lie between 0 and 1"),
        ({"tol": 1.0}, ValueError, "tol=1.0 must lie between 0 and 1"),
        ({"tol": "small"}, TypeError, "tol='small' must be a real number"),
        ({"method": "gmres"}, ValueError, "method='gmres' is unknown; expected 'cg' or 'minres'"),
        ({"max_products": 1}, ValueError, "max_products=1 must be at least 2"),
        ({"max_products": 2.5}, TypeError, "max_products=2.5 must be an integer"),
        ({"damping": 1j}, ValueError, "damping=1j must be real"),
        ({"damping": np.nan}, ValueError, "damping=nan must be real and finite"),
    ],
)
def test_arguments_are_checked(options, error, text):
    with pytest.raises(error, match=text):
        inverse(np.eye(3), **options)


def test_vectors_of_another_length_are_refused():
    for b in (np.ones(4), np.ones((2, 2)), np.ones((3, 1, 1))):
        with pytest.raises(ValueError, match=r"b has shape .*; expected \(3,\) or \(3, k\)"):
            inverse(np.eye(3)) @ b


def test_the_inverse_is_hermitian_to_its_tolerance(library, complex_):
    A = move(dense(_INDEFINITE, complex_=complex_), library)  # noqa: N806
    for tol in (1e-4, 1e-10):
        check_operator(inverse(A, tol=tol), tolerance=10 * tol)
    with pytest.raises(ValueError, match="operator is not"):
        check_operator(inverse(A, tol=1e-4))


def test_spectrum_of_an_inverse_is_known_to_its_tolerance():
    values = np.concatenate([-np.geomspace(0.5, 3.0, 8), np.geomspace(0.25, 4.0, 8)])
    exact = np.sort(1 / values)
    for tol in (1e-4, 1e-8, 1e-12):
        found = np.sort(slq(inverse(dense(values), tol=tol), num_probes=3).plain().nodes[0])
        errors = [np.abs(exact - node).min() for node in found]
        assert max(errors[0], errors[-1]) <= 10 * tol * np.abs(exact).max()


def test_repr():
    inner = repr(aslinearoperator(np.eye(3)))
    assert repr(inverse(np.eye(3))) == f"inverse({inner}, tol=1e-06, method='minres')"
    damped = inverse(np.eye(3), damping=0.1, method="cg")
    assert repr(damped) == f"inverse({inner}, tol=1e-06, method='cg', damping=0.1)"
