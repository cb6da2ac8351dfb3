"""Rank ratios, correspondences and eigenpairs of Kronecker products against dense matrices."""

import numpy as np
import pytest

from specdens.kronecker_structure import (
    correspondence,
    eigenbasis,
    kronecker_diagonal,
    kronecker_eigenpairs,
    reshaped_rank_ratio,
)
from tests.cases import device_of, home, move

M, D = 3, 4


def symmetric(size, seed, dtype="float64"):
    x = np.random.default_rng(seed).standard_normal((size, 2 * size))
    return (x @ x.T).astype(dtype)


def factors(library, dtype="float64"):
    return [move(symmetric(size, seed, dtype), library) for size, seed in ((M, 1), (D, 2))]


def precision(dtype):
    return 100 * float(np.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_leading_eigenpairs_are_those_of_the_dense_product(library, dtype):
    A, B = factors(library, dtype)  # noqa: N806
    dense = np.kron(home(A), home(B)).astype("float64")
    found = kronecker_eigenpairs(eigenbasis(A), eigenbasis(B), 5)
    exact = np.linalg.eigvalsh(dense)[::-1]
    np.testing.assert_allclose(found.eigenvalues, exact[:5], rtol=precision(dtype))
    assert device_of(found.eigenvectors) == device_of(A)
    assert found.eigenvectors.dtype == A.dtype
    vectors = home(found.eigenvectors)
    residual = np.abs(dense @ vectors - vectors * found.eigenvalues).max()
    assert residual < precision(dtype) * exact[0]
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(5), atol=precision(dtype))


def test_every_eigenvalue_comes_once_in_descending_order():
    A, B = factors("numpy")  # noqa: N806
    whole = kronecker_eigenpairs(eigenbasis(A), eigenbasis(-B), M * D)
    exact = np.linalg.eigvalsh(np.kron(A, -B))[::-1]
    np.testing.assert_allclose(whole.eigenvalues, exact, rtol=1e-12)
    assert len({tuple(pair) for pair in whole.pairs.tolist()}) == M * D


def test_equal_eigenvalues_come_in_the_order_of_their_pairs():
    left, right = (np.array([1.0, 2.0, 2.0]), np.eye(3)), (np.array([2.0, 1.0]), np.eye(2))
    found = kronecker_eigenpairs(left, right, 4)
    assert found.eigenvalues.tolist() == [4, 4, 2, 2]
    assert found.pairs.tolist() == [[1, 0], [2, 0], [0, 0], [1, 1]]
    assert np.argmax(found.eigenvectors, axis=0).tolist() == [2, 4, 0, 3]  # i * d + j


def test_own_eigenvalues_replace_the_products():
    U, V = eigenbasis(symmetric(M, 3))[1], eigenbasis(symmetric(D, 4))[1]  # noqa: N806
    values = np.arange(12.0).reshape(M, D)
    found = kronecker_eigenpairs((None, U), (None, V), 2, eigenvalues=values)
    assert found.pairs.tolist() == [[2, 3], [2, 2]]
    np.testing.assert_allclose(found.eigenvectors[:, 0], np.kron(U[:, 2], V[:, 3]))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_diagonal_in_a_kronecker_basis_is_the_dense_congruence(library, dtype):
    A, B = factors(library, dtype)  # noqa: N806
    U, V = eigenbasis(A)[1], eigenbasis(B)[1]  # noqa: N806
    values = np.random.default_rng(5).standard_normal((M, D)).astype(dtype)
    operator = kronecker_diagonal(U, V, move(values, library))
    assert operator.space.dimension == M * D
    Q = np.kron(home(U), home(V))  # noqa: N806
    dense = (Q * values.ravel()) @ Q.T
    x = np.random.default_rng(6).standard_normal((M * D, 2)).astype(dtype)
    atol = precision(dtype) * np.abs(dense).sum()
    np.testing.assert_allclose(home(operator @ move(x, library)), dense @ x, atol=atol)
    one = operator @ move(x[:, 0], library)
    assert one.dtype == A.dtype
    np.testing.assert_allclose(home(one), dense @ x[:, 0], atol=atol)


def test_rank_ratio_is_that_of_the_singular_values(library):
    x = np.random.default_rng(7).standard_normal((M * D, 3)) * [1.0, 1e-200, 1e200]
    singular = np.stack([np.linalg.svd((v / v.max()).reshape(M, D))[1] for v in x.T], axis=1)
    result = reshaped_rank_ratio(move(x, library), (M, D))
    expected = singular[0] / np.linalg.norm(singular, axis=0)
    np.testing.assert_allclose(result.ratio, expected, rtol=1e-12)
    np.testing.assert_allclose(result.stable_rank, expected**-2, rtol=1e-12)
    one = reshaped_rank_ratio(move(x[:, 1], library), (M, D))
    assert isinstance(one.ratio, float)
    np.testing.assert_allclose(one.ratio, expected[1], rtol=1e-12)


def test_rank_one_and_random_vectors_bound_the_ratio():
    rank_one = np.kron(np.arange(1.0, 51.0), np.ones(40))
    np.testing.assert_allclose(reshaped_rank_ratio(rank_one, (50, 40)).ratio, 1.0, rtol=1e-14)
    random = np.random.default_rng(8).standard_normal(2000)
    result = reshaped_rank_ratio(random, (50, 40))
    assert abs(result.ratio / result.baseline - 1) < 0.1  # fluctuates by about 50 ** (-2 / 3)
    flat = reshaped_rank_ratio(np.eye(3).ravel(), (3, 3))
    np.testing.assert_allclose(flat.stable_rank, 3.0, rtol=1e-14)
    assert flat.baseline == 1.0


def test_correspondence_is_the_squared_components(library):
    A, B = factors(library)  # noqa: N806
    U, V = eigenbasis(A)[1], eigenbasis(B)[1]  # noqa: N806
    h = np.linalg.qr(np.random.default_rng(9).standard_normal((M * D, 5)))[0]
    left, right = correspondence(move(7 * h, library), U, V)  # of any length
    components = np.kron(home(U), home(V)).T @ h
    squares = (components**2).reshape(M, D, 5)
    np.testing.assert_allclose(left, squares.sum(axis=1), rtol=1e-10)
    np.testing.assert_allclose(right, squares.sum(axis=0), rtol=1e-10)
    np.testing.assert_allclose(left.sum(axis=0), 1.0, rtol=1e-12)


def test_correspondence_of_a_products_own_eigenvectors_names_the_pairs():
    A, B = factors("numpy", "float32")  # noqa: N806
    bases = eigenbasis(A), eigenbasis(B)
    found = kronecker_eigenpairs(*bases, 6)
    left, right = correspondence(found.eigenvectors, bases[0][1], bases[1][1][:, :2])
    np.testing.assert_allclose(left, np.eye(M)[:, found.pairs[:, 0]], atol=1e-5)
    np.testing.assert_allclose(right, np.eye(D)[:2, found.pairs[:, 1]], atol=1e-5)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: reshaped_rank_ratio(np.ones(5), (2, 3)), r"length 5; expected m \* d = 2 \* 3"),
        (lambda: reshaped_rank_ratio(np.ones(6), (6,)), r"shape=\(6,\) must be \(m, d\)"),
        (lambda: reshaped_rank_ratio(np.zeros((6, 2)), (2, 3)), "column 0 has largest entry 0"),
        (lambda: correspondence(np.ones(6), np.eye(2), 2 * np.eye(3)), "right_basis of shape"),
        (lambda: correspondence(np.ones(5), np.eye(2), np.eye(3)), "eigenvectors has length 5"),
        (lambda: eigenbasis(np.ones((2, 3))), r"shape \(2, 3\); expected \(n, n\)"),
        (lambda: eigenbasis(np.full((2, 2), np.nan)), "not finite"),
        (lambda: kronecker_eigenpairs(*[eigenbasis(np.eye(2))] * 2, 5), "k=5 must lie between 1"),
        (lambda: kronecker_eigenpairs(*[eigenbasis(np.eye(2))] * 2, 0), "k=0 must lie between 1"),
        (lambda: kronecker_diagonal(np.eye(2), np.eye(3), np.ones((3, 2))), r"and \(m, d\)"),
    ],
)
def test_what_does_not_fit_is_refused(call, match):
    with pytest.raises(ValueError, match=match):
        call()
