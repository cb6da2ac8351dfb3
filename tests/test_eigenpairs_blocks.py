"""Blocks that multiply only what is needed, the proof that nothing is hidden, and what it costs."""

import numpy as np
import pytest
import scipy.sparse.linalg
import tqdm

from specdens import eigsh
from specdens.methods.eigensolver import Eigensolver, Goal
from specdens.methods.thick_restart import (
    Decomposition,
    Targets,
    append,
    component_density,
    expand,
    hideable,
    ritz_pairs,
    steer,
)
from specdens.operators import aslinearoperator
from specdens.probes import draw, sphere
from tests.cases import CountingOperator, dense, diagonal, home, move


def curvature(n=2000):
    """Return eigenvalues like those of a trained Hessian: outliers, a decaying bulk, zeros."""
    values = np.zeros(n)
    values[:6] = [1.0, 0.65, 0.54, 0.41, 0.31, 0.23]
    stop = min(n, 150)
    values[6:stop] = 0.2 * np.arange(1, stop - 5) ** -1.2
    return values


def solver(matrix, count, which="LA", tol=1e-6, block_size=4, max_products=1000):
    """Return an unused solver for a dense matrix."""
    return Eigensolver(
        aslinearoperator(matrix),
        Goal(count, which, tol),
        capacity=min(len(matrix), 120),
        block_size=block_size,
        max_products=max_products,
        seed=0,
        bar=tqdm.tqdm(disable=True),
    )


def all_vectors(state):
    return home(state.basis)[: state.size].T


@pytest.mark.parametrize(("block_size", "saved"), [(4, 0.03), (6, 0.1), (10, 0.15)])
def test_blocks_leave_out_what_is_not_needed(block_size, saved):
    values = curvature()
    counting = CountingOperator(diagonal(values))
    result = eigsh(counting, 6, tol=1e-6, block_size=block_size)
    np.testing.assert_allclose(result.eigenvalues, np.sort(values)[-6:], atol=1e-6)
    columns = [shape[1] for shape in counting.shapes]
    assert result.num_products == sum(columns)
    assert max(columns) == block_size
    assert sum(columns) <= (1 - saved) * block_size * len(columns)


def test_a_block_of_two_needs_half_the_passes_and_hardly_more_columns():
    single, double = (CountingOperator(diagonal(curvature())) for _ in range(2))
    one, two = eigsh(single, 6, block_size=1), eigsh(double, 6, block_size=2)
    assert two.num_products <= 1.15 * one.num_products
    assert len(double.shapes) <= 0.6 * len(single.shapes)


def test_no_more_products_than_scipy_at_equal_tolerance_on_curvature():
    values, tol, count = curvature(), 1e-6, 0

    def product(x):
        nonlocal count
        count += 1
        return values * x.ravel()

    operator = scipy.sparse.linalg.LinearOperator((2000, 2000), product, dtype=float)
    start = np.random.default_rng(0).standard_normal(2000)
    found = scipy.sparse.linalg.eigsh(operator, 6, which="LA", tol=tol, v0=start)[0]
    # SciPy's tolerance is relative to each eigenvalue.
    result = eigsh(diagonal(values), 6, tol=tol * values[5])
    assert (result.residuals <= tol * values[5]).all()
    np.testing.assert_allclose(result.eigenvalues, np.sort(found), atol=1e-6)
    assert result.num_products <= 1.1 * count


@pytest.mark.parametrize("complex_", [False, True])
def test_the_random_vectors_stay_where_they_were_through_turns_and_omissions(complex_):
    matrix = dense(curvature(200), complex_=complex_)
    run = solver(matrix, 6, tol=1e-4, block_size=4)
    run.solve(None)
    assert run.num_products % 4 > 0  # at least one product was with fewer columns
    random = home(draw(sphere, run.A.space, 0, range(4)))
    assert run.num_own == 4
    seen = all_vectors(run.state)[:, :4]  # orthonormal vectors that span the random ones
    targets = run.own_targets()
    assert targets.seen.shape == (1, run.state.size, 2)
    np.testing.assert_array_equal(all_vectors(run.state) @ targets.seen[0], seen[:, :2])
    np.testing.assert_allclose(seen.conj().T @ seen, np.eye(4), atol=1e-12)
    np.testing.assert_allclose(seen @ (seen.conj().T @ random), random, atol=1e-12)


@pytest.mark.parametrize("complex_", [False, True])
@pytest.mark.parametrize("sign", [1, -1])
def test_what_an_eigenvector_sees_of_the_random_vectors(sign, complex_):
    # z* X = (z* F) left, exactly, for an eigenvector whose eigenvalue is beyond all Ritz values.
    values = sign * np.concatenate([curvature(60)[:59], [1.5]])
    matrix = dense(values, complex_=complex_)
    eigenvalues, eigenvectors = np.linalg.eigh(matrix)
    at = np.argmax(sign * eigenvalues)
    z = eigenvectors[:, at]
    operator = aslinearoperator(matrix)
    # Vectors that hardly see z: it stays unknown for a few steps.
    weak = home(draw(sphere, operator.space, 0, range(3)))
    weak = weak - 0.999999 * np.outer(z, z.conj() @ weak)
    state = append(Decomposition.empty(operator.space, 60), weak)
    for count in (3, 2, 1):
        state = expand(operator, state, count)
        rotation = np.linalg.qr(np.random.default_rng(count).standard_normal((3, 3)))[0]
        state = steer(state, rotation)
    pairs, own = ritz_pairs(state), np.eye(state.size, 3)
    places = np.array([sign * eigenvalues[at]])
    targets = Targets(np.array([sign]), places, own[None])
    assert (sign * pairs.values < places).all()
    basis = all_vectors(state)
    expected = z.conj() @ basis @ own
    found = z.conj() @ basis[:, state.pending] @ targets.left(state, pairs)[0]
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-14)
    bound = targets.missed(state, pairs, np.zeros(len(pairs.values), dtype=bool))
    assert np.linalg.norm(expected) <= bound[0] * (1 + 1e-6)


def test_a_block_that_has_converged_has_also_proved_that_nothing_is_left():
    matrix = dense(curvature(300))
    run = solver(matrix, 6, tol=1e-2, block_size=6)
    run.solve(None)
    targets = run.own_targets()
    done = run.pairs.residuals <= run.threshold
    missed = targets.missed(run.state, run.pairs, done)
    assert missed.shape == (1,)
    assert missed[0] * component_density(300, targets.seen.shape[2]) <= 1e-3


@pytest.mark.parametrize("block_size", [2, 4])
@pytest.mark.parametrize("tol", [3e-2, 1e-5])
def test_copies_are_found_by_blocks_at_any_tolerance(block_size, tol):
    values = curvature(300)
    values[-2:] = values[[2, 4]]
    for seed in range(25):
        result = eigsh(diagonal(values), 6, tol=tol, block_size=block_size, seed=seed)
        np.testing.assert_allclose(result.eigenvalues, np.sort(values)[-6:], atol=3 * tol)


def test_close_pairs_are_told_apart_whatever_is_hidden_from_a_search():
    for distance in (1e-5, 1e-4, 1e-3, 1e-2):
        values = curvature(400)
        values[-2:] = values[[1, 3]] - distance
        for seed in range(4):
            result = eigsh(diagonal(values), 6, tol=1e-6, seed=seed)
            np.testing.assert_allclose(result.eigenvalues, np.sort(values)[-6:], atol=5e-6)


def test_hidden_vectors_lower_an_eigenvalue_by_no_more_than_is_allowed_for():
    rng = np.random.default_rng(0)
    for _ in range(20):
        values = rng.standard_normal(30)
        matrix, largest = np.diag(values), values.max()
        # A random space, lest the residuals miss the eigenvector.
        basis = np.linalg.qr(rng.standard_normal((30, 6)))[0]
        theta, s = np.linalg.eigh(basis.T @ matrix @ basis)
        y = basis @ s
        residuals = np.linalg.norm(matrix @ y - y * theta, axis=0)
        distances = np.array([largest - theta, largest + 1 - theta])
        picked, hidden = hideable(distances, residuals, 100.0, 30)
        assert sorted(picked) == list(range(6))
        rest = np.eye(30) - y @ y.T
        seen = np.linalg.eigvalsh(rest @ matrix @ rest).max()
        assert largest - hidden[0] <= seen < largest
        assert hidden[1] < hidden[0]


def test_as_many_vectors_are_hidden_as_cost_a_tenth_of_the_way():
    distances, residuals = np.array([[0.5, 1.0, 2.0, -1.0]]), np.array([0.1, 0.1, 0.3, 0.0])
    picked, hidden = hideable(distances, residuals, 0.0, 5)
    assert list(picked) == [1, 0]  # 0.01 and 0.02 of 0.05; the third would add 0.045
    assert hidden[0] == pytest.approx(0.03)
    assert list(hideable(distances, residuals, 0.08, 5)[0]) == [1, 0, 2]
    assert list(hideable(distances, residuals, 0.0, 1)[0]) == [1]
    assert hideable(-distances[:, :3], residuals[:3], 1.0, 5)[1] == [0.0]


def test_the_bound_on_what_hiding_costs_is_reached():
    # The residual of the only Ritz vector points at the eigenvector.
    coupling = 0.2
    exact = np.linalg.eigvalsh([[0.0, coupling], [coupling, 1.0]])[-1]
    _, hidden = hideable(np.array([[exact]]), np.array([coupling]), 1.0, 5)
    assert exact - hidden[0] == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_random_vectors_see_every_copy(count):
    rng, n, bound = np.random.default_rng(0), 50, 0.01
    gaussian = rng.standard_normal((20000, n, count))
    frames = np.linalg.qr(gaussian)[0][:, :count, :]
    smallest = np.linalg.svd(frames, compute_uv=False)[:, -1]
    chance = (smallest <= bound).mean()
    assert 0 < chance <= component_density(n, count) * bound + 4 * (chance / 20000) ** 0.5


@pytest.mark.parametrize("library", ["torch", "strict:device1"])
def test_blocks_of_other_libraries(library):
    pytest.importorskip({"torch": "torch"}.get(library, "array_api_strict"))
    matrix = dense(curvature(150), complex_=True)
    result = eigsh(move(matrix, library), 6, block_size=5, tol=1e-8)
    reference = eigsh(matrix, 6, block_size=5, tol=1e-8)
    np.testing.assert_allclose(result.eigenvalues, np.sort(curvature(150))[-6:], atol=1e-9)
    assert result.num_products == reference.num_products
    vectors = home(result.eigenvectors)
    true = np.linalg.norm(matrix @ vectors - vectors * result.eigenvalues, axis=0)
    np.testing.assert_allclose(true, result.residuals, atol=1e-13)


def test_a_search_after_restarts_is_short():
    line = 2 - 2 * np.cos(np.pi * np.arange(1, 401) / 401)
    for seed in range(2):
        first = Eigensolver(
            diagonal(line),
            Goal(6, "LA", 1e-6),
            capacity=68,
            block_size=1,
            max_products=4000,
            seed=seed,
            bar=tqdm.tqdm(disable=True),
        )
        first.add_random()
        first.run(np.inf)
        assert first.num_products > 68  # it had to restart
        whole = eigsh(diagonal(line), 6, seed=seed)
        np.testing.assert_allclose(whole.eigenvalues, line[-6:], atol=1e-5)
        assert first.num_products < whole.num_products <= 1.25 * first.num_products
