"""Gauss rules from Jacobi matrices, against rules and recurrences known in closed form."""

import numpy as np
import pytest

from specdens.quadrature import (
    KrylovRule,
    QuadratureRule,
    gauss_rule,
    jacobi_matrix,
    rounding,
)
from tests.cases import dense


def _legendre(m):
    """Return the Jacobi coefficients of the uniform measure on [-1, 1]."""
    k = np.arange(1, m + 1)
    return np.zeros((1, m)), (k / np.sqrt(4 * k**2 - 1))[None]


@pytest.mark.parametrize("m", [1, 2, 5, 12])
def test_gauss_legendre_from_its_jacobi_matrix(m):
    rule, _ = gauss_rule(*_legendre(m))
    nodes, weights = np.polynomial.legendre.leggauss(m)
    np.testing.assert_allclose(rule.nodes[0], nodes, atol=1e-13)
    np.testing.assert_allclose(rule.weights[0], weights / 2, atol=1e-13)


def test_residuals_are_those_of_the_ritz_pairs():
    m, n = 4, 9
    alphas, betas = np.full((1, n), 2.0), np.ones((1, n))
    tridiagonal = np.diag(alphas[0]) + np.diag(betas[0, :-1], 1) + np.diag(betas[0, :-1], -1)
    rule, vectors = gauss_rule(alphas[:, :m], betas[:, :m])
    for j, theta in enumerate(rule.nodes[0]):
        y = np.pad(vectors[0][:, j], (0, n - m))
        residual = np.linalg.norm(tridiagonal @ y - theta * y)
        assert rule.residuals[0, j] == pytest.approx(residual, abs=1e-14)


def test_a_zero_ends_a_row_and_the_rest_is_padding():
    alphas = np.array([[1.0, 1.0, 5.0, 5.0], [2.0, 2.0, 2.0, 2.0]])
    betas = np.array([[0.5, 0.0, 9.0, 9.0], [1.0, 1.0, 1.0, 1.0]])
    rule, _ = gauss_rule(alphas, betas)
    np.testing.assert_allclose(rule.nodes[0], [0.5, 1.5, 1.5, 1.5])
    np.testing.assert_allclose(rule.weights[0], [0.5, 0.5, 0, 0])
    np.testing.assert_allclose(rule.residuals[0], [0, 0, np.inf, np.inf], atol=1e-15)
    np.testing.assert_allclose(rule.weights.sum(axis=1), 1)


def test_rules_of_different_lengths_are_stacked_with_padding():
    short = QuadratureRule(np.array([[3.0]]), np.ones((1, 1)), np.zeros((1, 1)))
    long = QuadratureRule(np.array([[1.0, 2.0]]), np.full((1, 2), 0.5), np.ones((1, 2)))
    both = QuadratureRule.concatenate([short, long])
    np.testing.assert_array_equal(both.nodes, [[3, 3], [1, 2]])
    np.testing.assert_array_equal(both.weights, [[1, 0], [0.5, 0.5]])
    np.testing.assert_array_equal(both.residuals, [[0, np.inf], [1, 1]])


@pytest.mark.parametrize("complex_", [False, True])
def test_recurrence_coefficients_of_a_vector_from_a_full_eigenbasis(complex_):
    n, m = 12, 7
    matrix = dense(np.linspace(-1, 2, n), complex_=complex_)
    values, vectors = np.linalg.eigh(matrix)
    v = np.ones(n) / n**0.5
    alphas, betas = jacobi_matrix(values, vectors.conj().T @ v, np.zeros((1, n)), m, 1e-13)
    q, before, beta = v.astype(matrix.dtype), 0 * v, 0.0
    for j in range(m):  # textbook Lanczos
        w = matrix @ q - beta * before
        alpha = np.vdot(q, w).real
        w = w - alpha * q
        before, beta = q, np.linalg.norm(w)
        assert alphas[j] == pytest.approx(alpha, abs=1e-10)
        assert betas[j] == pytest.approx(beta, abs=1e-10)
        q = w / beta


def test_recurrence_of_an_invariant_space_ends_with_a_zero():
    alphas, betas = jacobi_matrix(
        np.array([1.0, 3.0, 7.0]), np.array([1.0, 1.0, 0.0]), np.zeros((1, 3)), 3, 1e-13
    )
    np.testing.assert_allclose(alphas, [2, 2], atol=1e-14)
    np.testing.assert_allclose(betas, [1, 0], atol=1e-14)


def test_recurrence_ends_where_a_product_leaves_the_space():
    tails = np.array([[0.0, 0.0, 2.0, 0.0]])
    nodes, amplitudes = np.array([1.0, 1.0, 3.0, 3.0]), np.array([1.0, 0.0, 1.0, 0.0])
    alphas, betas = jacobi_matrix(nodes, amplitudes, tails, 4, 1e-13)
    # The first vector, (1, 0, 1, 0) / sqrt(2), has a tail of norm sqrt(2) and 1 inside.
    np.testing.assert_allclose(alphas, [2.0])
    np.testing.assert_allclose(betas, [(1 + 2) ** 0.5])


def test_gauss_rules_of_unequal_length_are_padded():
    rule, _ = gauss_rule([np.array([2.0]), np.array([0.0, 0.0])], [np.ones(1), np.ones(2)])
    np.testing.assert_allclose(rule.nodes, [[2, 2], [-1, 1]])
    np.testing.assert_allclose(rule.weights, [[1, 0], [0.5, 0.5]])
    np.testing.assert_allclose(rule.residuals, [[1, np.inf], [0.5**0.5, 0.5**0.5]])


def test_residuals_that_leave_the_space_count_in_the_last_coefficient():
    tails = np.array([[0.0, 4.0]])  # A y_2 - theta_2 y_2 has norm 4
    alphas, betas = jacobi_matrix(np.array([1.0, 1.0]), np.array([0.0, 1.0]), tails, 1, 1e-13)
    assert alphas[0] == 1
    assert betas[0] == 4


def _krylov_rule(p, m, sketch):
    part = QuadratureRule(np.arange(p * m, dtype=float).reshape(p, m), np.full((p, m), 1 / m),
                          np.zeros((p, m)))  # fmt: skip
    blocks = np.zeros(p, dtype=int)
    return KrylovRule(part, part, part, blocks, np.ones((p, m, sketch), np.float32), 1e-9 * m)


def test_joined_runs_keep_their_blocks_apart():
    joined = KrylovRule.concatenate([_krylov_rule(2, 3, 4), _krylov_rule(1, 2, 0)])
    np.testing.assert_array_equal(joined.blocks, [0, 0, 1])
    assert joined.shared.nodes.shape == joined.gauss.nodes.shape == (3, 3)
    assert joined.sketches.shape == (3, 3, 0)
    assert joined.resolution == pytest.approx(3e-9)


def test_rules_survive_being_taken_apart():
    rule = _krylov_rule(2, 3, 4)
    again = KrylovRule.from_arrays(rule.to_arrays())
    np.testing.assert_array_equal(again.shared.nodes, rule.shared.nodes)
    np.testing.assert_array_equal(again.gauss.residuals, rule.gauss.residuals)
    np.testing.assert_array_equal(again.sketches, rule.sketches)
    assert again.resolution == rule.resolution


def test_rounding_follows_the_largest_node():
    assert rounding(1e-16, np.array([-5.0, 2.0])) == pytest.approx(8e-15)
