"""Operators made of operators, against dense linear algebra, on every library."""

import numpy as np
import pytest
import scipy.sparse.linalg
import torch

from specdens import (
    VectorSpace,
    aslinearoperator,
    low_rank,
    on_backend,
    project_out,
    restrict,
    shift,
    slq,
    to_scipy,
)
from specdens.algebra import transfer
from specdens.backends import dtype_name
from tests.cases import LIBRARIES, dense, device_of, home, import_library, move

_N = 8
_MATRIX = dense(np.linspace(-1.0, 3.0, _N))
_HERMITIAN = dense(np.linspace(-1.0, 3.0, _N), complex_=True)
_RNG = np.random.default_rng(11)
_BLOCK = _RNG.standard_normal((_N, 3))


@pytest.fixture(params=[_MATRIX, _HERMITIAN], ids=["real", "complex"])
def matrix(request):
    return request.param


def assert_acts_like(operator, matrix, library):
    """Compare with a dense matrix, and see that results stay in the library and on its device."""
    space = operator.space
    assert space.dimension == len(matrix)
    block = _BLOCK[: len(matrix)].astype(matrix.dtype)
    if np.iscomplexobj(matrix):
        block = block * (1 + 2j)
    for x in (block[:, 0], block):
        there = move(np.ascontiguousarray(x), library)
        if library == "torch":  # an operator that came from CuPy has its vectors there
            there = there.to(space.device)
        y = operator @ there
        assert type(y) is type(there)
        assert device_of(y) == device_of(there)
        assert y.dtype == space.dtype
        np.testing.assert_allclose(home(y), matrix @ x, rtol=1e-12, atol=1e-12)


def test_shift(library, matrix):
    A = move(matrix, library)  # noqa: N806
    assert_acts_like(shift(A, -0.75), matrix - 0.75 * np.eye(_N), library)
    assert_acts_like(2 * shift(shift(A, 1.0), 2.0), 2 * matrix + 6 * np.eye(_N), library)


def test_shift_by_what_is_not_real_is_refused():
    for c in (1j, np.inf):
        with pytest.raises(ValueError, match=r"c=.* must be real and finite"):
            shift(_MATRIX, c)


def test_low_rank(library, matrix):
    Q = (_BLOCK + (1j * _BLOCK[::-1] if np.iscomplexobj(matrix) else 0)).astype(matrix.dtype)  # noqa: N806
    values = np.array([2.0, -1.0, 0.5])
    expected = Q @ np.diag(values) @ Q.conj().T
    there = move(Q, library)
    assert_acts_like(low_rank(there, values), expected, library)
    assert_acts_like(low_rank(there, [2, -1, 0.5]), expected, library)
    assert_acts_like(low_rank(there, move(values, library)), expected, library)
    assert_acts_like(
        aslinearoperator(move(matrix, library)) - low_rank(there, values),
        matrix - expected,
        library,
    )


@pytest.mark.parametrize(
    ("Q", "values", "text"),
    [
        (np.ones((4, 2)), [1.0], r"Q has shape \(4, 2\) and values \(1,\); expected"),
        (np.ones(4), [1.0], r"Q has shape \(4,\) and values \(1,\)"),
        (np.ones((4, 1)), [1j], "values must be real"),
    ],
)
def test_low_rank_checks_its_arguments(Q, values, text):  # noqa: N803
    with pytest.raises(ValueError, match=text):
        low_rank(Q, values)


def test_project_out(library, matrix):
    Q = (_BLOCK[:, :2] + (1j * _BLOCK[:, 1:] if np.iscomplexobj(matrix) else 0)).astype(  # noqa: N806
        matrix.dtype
    )
    P = np.eye(_N) - Q @ np.linalg.pinv(Q)  # noqa: N806
    A = move(matrix, library)  # noqa: N806
    assert_acts_like(project_out(A, move(Q, library)), P @ matrix @ P, library)
    p = np.eye(_N) - np.outer(Q[:, 0], Q[:, 0].conj()) / np.vdot(Q[:, 0], Q[:, 0])
    one = move(np.ascontiguousarray(Q[:, 0]), library)
    assert_acts_like(project_out(A, one), p @ matrix @ p, library)


def test_projected_eigenvalues_turn_to_zero():
    values, vectors = np.linalg.eigh(_MATRIX)
    projected = project_out(_MATRIX, vectors[:, -2:])
    left = np.linalg.eigvalsh(projected @ np.eye(_N))
    np.testing.assert_allclose(left, np.sort([*values[:-2], 0, 0]), atol=1e-13)


@pytest.mark.parametrize(
    ("Q", "text"),
    [
        (np.ones((5, 2)), r"Q has shape \(5, 2\); expected \(8,\) or \(8, k\)"),
        (np.ones((8, 1, 1)), r"Q has shape \(8, 1, 1\)"),
        (np.ones((8, 2)), "Q has linearly dependent columns"),
        (np.eye(8, 9), "Q has linearly dependent columns"),
        (np.zeros((8, 1)), "Q has linearly dependent columns"),
    ],
)
def test_project_out_checks_its_columns(Q, text):  # noqa: N803
    with pytest.raises(ValueError, match=text):
        project_out(_MATRIX, Q)


_CHOICES = {
    "slice": slice(1, 7, 2),
    "backward": slice(None, None, -1),
    "integers": [5, 0, 3],
    "negative": np.array([-1, 2]),
    "mask": np.arange(_N) % 3 == 0,
    "one": [4],
}


@pytest.mark.parametrize("choice", _CHOICES)
def test_restrict(library, matrix, choice):
    indices = _CHOICES[choice]
    places = np.arange(_N)[indices]
    expected = matrix[np.ix_(places, places)]
    assert_acts_like(restrict(move(matrix, library), indices), expected, library)


@pytest.mark.parametrize(
    ("indices", "text"),
    [
        ([0, 8], "indices reach from 0 to 8; expected -8 to 7"),
        ([-9], "indices reach from -9 to -9"),
        ([1, 1], "indices are repeated"),
        ([1, -7], "indices are repeated"),
        ([], "indices=.* must be a slice, integers or 8 booleans, at least one chosen"),
        (slice(3, 3), "at least one chosen"),
        (np.zeros(8, bool), "at least one chosen"),
        (np.ones(5, bool), "must be a slice, integers or 8 booleans"),
        ([[0, 1]], "must be a slice, integers"),
    ],
)
def test_restrict_checks_its_indices(indices, text):
    with pytest.raises(ValueError, match=text):
        restrict(_MATRIX, indices)


@pytest.mark.parametrize("indices", [[0.5, 1.0], "ab", None, [[0], [1, 2]]])
def test_restrict_wants_integers(indices):
    with pytest.raises(TypeError, match=r"indices=.* must be a slice, integers or 8 booleans"):
        restrict(_MATRIX, indices)


def _other_libraries():
    return [name for name in LIBRARIES if name != "strict:device1"]


@pytest.mark.parametrize(
    "target", [pytest.param(n, marks=[pytest.mark.gpu] * (n == "cupy")) for n in _other_libraries()]
)
def test_on_backend_between_all_pairs(library, target, matrix):
    import_library(target)
    moved = on_backend(move(matrix, library), target)
    assert moved.space.backend.name == target
    assert_acts_like(moved, matrix, target)
    assert_acts_like(2 * moved + moved, 3 * matrix, target)


def test_on_backend_takes_a_device():
    import array_api_strict

    device = array_api_strict.Device("device1")
    moved = on_backend(_MATRIX, "strict", device)
    assert moved.space.device == device
    assert_acts_like(moved, _MATRIX, "strict:device1")


def test_moved_operators_give_the_same_measure():
    here = slq(_MATRIX, num_probes=2, num_steps=4)
    there = slq(on_backend(_MATRIX, "torch"), num_probes=2, num_steps=4)
    np.testing.assert_allclose(there.plain().nodes, here.plain().nodes, atol=1e-12)


@pytest.mark.parametrize("name", ["float32", "complex64"])
def test_on_backend_keeps_the_dtype(library, name):
    matrix = (_HERMITIAN if name == "complex64" else _MATRIX).astype(name)
    assert dtype_name(on_backend(move(matrix, library), "numpy").space.dtype) == name


def test_bfloat16_moves_as_float32_and_multiplies_as_bfloat16():
    matrix = torch.tensor(_MATRIX, dtype=torch.bfloat16)
    moved = on_backend(matrix, "numpy")
    assert moved.space.dtype == np.float32
    x = _BLOCK.astype(np.float32)
    expected = (matrix @ torch.tensor(x).to(torch.bfloat16)).float().numpy()
    np.testing.assert_array_equal(moved @ x, expected)


def test_transfer_shares_memory_on_one_device():
    x = torch.zeros(4, dtype=torch.float64)
    moved = transfer(x, VectorSpace.like(np.zeros(4)))
    x += 3.0
    np.testing.assert_array_equal(moved, np.full(4, 3.0))


def test_on_backend_names_unknown_libraries():
    with pytest.raises(ValueError, match="backend='mxnet' is unknown"):
        on_backend(_MATRIX, "mxnet")


def test_to_scipy_multiplies_on_the_host(library, matrix):
    wrapped = to_scipy(move(matrix, library))
    assert wrapped.shape == (_N, _N)
    assert wrapped.dtype == matrix.dtype
    for x in (_BLOCK[:, 0], _BLOCK[:, :1], _BLOCK):
        y = wrapped @ x
        assert type(y) is np.ndarray
        np.testing.assert_allclose(y, matrix @ x, atol=1e-12)
    np.testing.assert_allclose(wrapped.H @ _BLOCK, matrix.conj().T @ _BLOCK, atol=1e-12)


def test_to_scipy_multiplies_complex_vectors_by_real_matrices(library):
    x = _BLOCK[:, 0] + 1j * _BLOCK[:, 1]
    np.testing.assert_allclose(to_scipy(move(_MATRIX, library)) @ x, _MATRIX @ x, atol=1e-12)


def test_scipy_eigsh_works_on_every_library(library):
    values = np.linspace(-1, 2, 30)
    found = scipy.sparse.linalg.eigsh(
        to_scipy(move(dense(values), library)), k=3, which="LA", v0=np.ones(30)
    )[0]
    np.testing.assert_allclose(found, values[-3:], atol=1e-10)


def test_to_scipy_keeps_single_precision():
    assert to_scipy(_MATRIX.astype(np.float32)).dtype == np.float32
    assert to_scipy(torch.tensor(_MATRIX, dtype=torch.float16)).dtype == np.float32


def test_vectors_of_another_length_are_refused():
    operators = [
        shift(_MATRIX, 1.0),
        low_rank(np.eye(8, 2), [1.0, 2.0]),
        project_out(_MATRIX, np.ones(8)),
        restrict(np.eye(12), range(8)),
        aslinearoperator(_MATRIX),
        on_backend(_MATRIX, "numpy"),
    ]
    for operator in operators:
        for length in (7, 9):
            with pytest.raises(ValueError, match=r"length|mismatch"):
                operator @ np.ones((length, 2))


def test_combined_operators_print_what_they_are():
    inner = repr(aslinearoperator(_MATRIX))
    assert repr(shift(_MATRIX, 2.0)) == f"1 * {inner} + 2 * I"
    assert repr(low_rank(_BLOCK, np.ones(3))) == "low_rank(n=8, rank=3)"
    assert repr(project_out(_MATRIX, _BLOCK)) == f"project_out({inner}, rank=3)"
    assert repr(restrict(_MATRIX, [0, 1])) == f"restrict({inner}, k=2)"
    assert repr(on_backend(_MATRIX, "torch")) == f"on_backend({inner}, 'torch', cpu)"
