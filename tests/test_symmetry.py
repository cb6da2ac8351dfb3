"""Matrices that are no Hermitian ones, and how much of a sparse one is looked at."""

import numpy as np
import pytest
import scipy.sparse

from specdens import aslinearoperator, symmetry

LARGE = 4000  # rows, of which about 20 000 entries are more than are compared


def sparse(n, kind=np.float64):
    rng = np.random.default_rng(0)
    half = scipy.sparse.random_array((n, n), density=min(1.0, 2.5 / n), rng=rng, dtype=np.float64)
    half = half.astype(kind)
    if np.iscomplexobj(half):
        half = half * np.exp(0.7j)
    return (half + half.conj().T + scipy.sparse.eye_array(n)).tocsr()


@pytest.mark.parametrize("kind", [np.float32, np.float64, np.complex128])
@pytest.mark.parametrize("n", [1, 60, LARGE])
def test_hermitian_sparse_matrices_are_taken(n, kind):
    matrix = sparse(n, kind)
    x = np.random.default_rng(1).normal(size=(n, 2)).astype(kind)
    for layout in (matrix.tocsr(), matrix.tocsc(), matrix.tocoo()):
        np.testing.assert_allclose(aslinearoperator(layout) @ x, matrix @ x, rtol=1e-5, atol=1e-6)


WRONG = {
    "one triangle": scipy.sparse.triu,
    "a directed graph": lambda matrix: (scipy.sparse.triu(matrix, 1) != 0).astype(np.int64),
    "rows that add up to one": lambda matrix: (
        scipy.sparse.diags_array(1 / matrix.sum(axis=1)) @ matrix
    ),
    "an antisymmetric part": lambda matrix: matrix + scipy.sparse.triu(matrix, 1) * 1e-3,
}


@pytest.mark.parametrize("n", [60, LARGE])
@pytest.mark.parametrize("name", WRONG)
def test_other_sparse_matrices_are_refused(name, n):
    wrong = WRONG[name](sparse(n))
    apart = abs(wrong - wrong.T).max()
    assert apart > 1e-4
    with pytest.raises(
        ValueError, match=r"operator is not Hermitian: max \|A - A\^H\| = "
    ) as caught:
        aslinearoperator(wrong)
    found = float(str(caught.value).split(" = ")[1].split()[0])
    assert found <= apart * 1.01
    if n == 60:  # all entries of a small one are compared
        assert found == pytest.approx(apart, rel=5e-3)


def test_complex_symmetric_sparse_matrices_are_refused():
    wrong = sparse(60).astype(np.complex128) * 1j
    with pytest.raises(ValueError, match="not Hermitian"):
        aslinearoperator(wrong)


def test_one_entry_of_a_small_matrix_is_found():
    wrong = sparse(60).tolil()
    wrong[3, 57] = 7.0
    with pytest.raises(ValueError, match=r"max \|A - A\^H\| = 7 against max \|A\| = 7;"):
        aslinearoperator(wrong)


def test_rounding_entries_that_are_stored_twice_and_nan_are_not_asymmetry():
    matrix = sparse(60)
    matrix.data *= 1 + 1e-14 * np.random.default_rng(0).normal(size=matrix.nnz)
    aslinearoperator(matrix)
    once = scipy.sparse.csr_array(np.array([[1.0, 2.0], [2.0, 5.0]]))
    twice = scipy.sparse.csr_array(  # 0.5 + 1.5 in one corner, 2 in the other
        (np.array([1.0, 0.5, 1.5, 2.0, 5.0]), np.array([0, 1, 1, 0, 1]), np.array([0, 3, 5]))
    )
    x = np.array([3.0, -1.0])
    np.testing.assert_allclose(aslinearoperator(twice) @ x, once @ x)
    broken = sparse(60)
    broken.data[5] = np.nan
    aslinearoperator(broken)  # the first product reports it


def test_few_entries_of_a_large_matrix_are_looked_at(monkeypatch):
    looked_at = []
    entries = symmetry._entries
    monkeypatch.setattr(symmetry, "_entries", lambda *a: looked_at.append(len(a[1])) or entries(*a))
    matrix = sparse(LARGE)
    aslinearoperator(matrix)
    assert looked_at == [2**11, 2**11]
    assert matrix.nnz > 8 * 2**11


@pytest.mark.parametrize("n", [1, 7, 300])
def test_dense_matrices_are_compared_in_blocks(n, monkeypatch):
    """Wherever the wrong entry is, and whether or not the number of blocks divides the rows."""
    monkeypatch.setattr(symmetry, "_ENTRIES_AT_ONCE", 1)
    rng = np.random.default_rng(0)
    matrix = rng.normal(size=(n, n))
    matrix = matrix + matrix.T
    np.testing.assert_array_equal(aslinearoperator(matrix) @ np.eye(n), matrix)
    for i, j in ((0, n - 1), (n - 1, n // 2)):
        if i == j:
            continue
        wrong = matrix.copy()
        wrong[i, j] += 100.0
        with pytest.raises(ValueError, match=r"max \|A - A\^H\| = 100 "):
            aslinearoperator(wrong)
