"""XTrace, XNysTrace and XDiag: equal to their definitions, one decomposition for every sample."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from specdens import aslinearoperator
from specdens.methods.leave_one_out import left_out_directions, xdiag, xnystrace, xtrace
from tests.cases import dense_case, home, move


def orthonormal_basis(y):
    """Return a basis of the range of Y, from its singular vectors."""
    u, sigma, _ = np.linalg.svd(y, full_matrices=False)
    return u[:, sigma > 1e-12 * sigma.max(initial=1e-300)]


def others(v, i):
    return np.delete(v, i, axis=1)


def naive_xtrace(matrix, v, resphere):
    """Return the samples of XTrace as its paper defines them, one decomposition each."""
    samples = []
    for i in range(v.shape[1]):
        q = orthonormal_basis(matrix @ others(v, i))
        left = v[:, i] - q @ (q.conj().T @ v[:, i])
        c = (len(matrix) - q.shape[1]) / np.vdot(left, left) if resphere else len(matrix)
        samples.append(np.trace(q.conj().T @ matrix @ q) + c * np.vdot(left, matrix @ left))
    return np.real(samples)


def naive_xnystrace(matrix, v, resphere):
    """Return the samples of XNysTrace as its paper defines them."""
    samples = []
    for i in range(v.shape[1]):
        rest = others(v, i)
        y = matrix @ rest
        nystrom = y @ np.linalg.solve(rest.conj().T @ y, y.conj().T)
        q = orthonormal_basis(rest)
        left = v[:, i] - q @ (q.conj().T @ v[:, i])
        c = (len(matrix) - q.shape[1]) / np.vdot(left, left) if resphere else len(matrix)
        samples.append(np.trace(nystrom) + c * np.vdot(v[:, i], (matrix - nystrom) @ v[:, i]))
    return np.real(samples)


def naive_xdiag(matrix, v):
    """Return the samples of XDiag as its paper defines them, their real parts."""
    samples = []
    for i in range(v.shape[1]):
        q = orthonormal_basis(matrix @ others(v, i))
        deflated = q @ (q.conj().T @ matrix)
        left = (matrix - deflated) @ v[:, i]
        samples.append(np.diagonal(deflated) + len(matrix) * v[:, i].conj() * left)
    return np.real(samples)


def unit_columns(n, p, *, complex_=False, seed=2):
    rng = np.random.default_rng(seed)
    v = rng.standard_normal((n, p))
    v = v + 1j * rng.standard_normal((n, p)) if complex_ else v
    return v / np.linalg.norm(v, axis=0)


@pytest.mark.parametrize("resphere", [True, False])
def test_xtrace_is_its_definition(library, spectrum, resphere):
    matrix = dense_case(spectrum)
    v = unit_columns(40, 7, complex_=np.iscomplexobj(matrix))
    found = xtrace(aslinearoperator(move(matrix, library)), move(v, library), resphere=resphere)
    np.testing.assert_allclose(found, naive_xtrace(matrix, v, resphere), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("resphere", [True, False])
@pytest.mark.parametrize("name", ["uniform", "rank_deficient", "hermitian"])
def test_xnystrace_is_its_definition(library, name, resphere):
    matrix = dense_case(name)
    matrix = matrix + 1.2 * np.eye(40) if name == "hermitian" else matrix
    v = unit_columns(40, 7, complex_=np.iscomplexobj(matrix))
    operator = aslinearoperator(move(matrix, library))
    found, without_one = xnystrace(operator, move(v, library), resphere=resphere)
    np.testing.assert_allclose(found, naive_xnystrace(matrix, v, resphere), rtol=1e-10)
    fewer = [naive_xnystrace(matrix, others(v, i), resphere).mean() for i in range(7)]
    np.testing.assert_allclose(without_one, fewer, rtol=1e-10)


def test_xdiag_is_its_definition(library, spectrum):
    matrix = dense_case(spectrum)
    v = unit_columns(40, 7, complex_=np.iscomplexobj(matrix))
    found = home(xdiag(aslinearoperator(move(matrix, library)), move(v, library)))
    np.testing.assert_allclose(found, naive_xdiag(matrix, v), rtol=1e-10, atol=1e-10)


@given(st.integers(1, 6), st.integers(1, 8), st.integers(0, 2**16), st.booleans())
def test_left_out_directions_are_what_the_range_loses(rank, columns, seed, repeat):
    rng = np.random.default_rng(seed)
    y = rng.integers(-3, 4, (8, min(rank, columns))) @ rng.integers(-2, 3, (rank, columns))[
        : min(rank, columns)
    ].astype(float)
    if repeat and columns > 1:
        y[:, 1] = y[:, 0]
    q = orthonormal_basis(y)
    if not q.shape[1]:
        return
    s = left_out_directions(q.T @ y, 1e-10)
    for i in range(columns):
        rest = orthonormal_basis(others(y, i))
        kept = q @ (np.eye(q.shape[1]) - np.outer(s[:, i], s[:, i])) @ q.T
        np.testing.assert_allclose(kept, rest @ rest.T, atol=1e-8)
