"""Operators made from matrices, functions and other people's objects, against dense ones."""

import jax.experimental.sparse as jax_sparse
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse
import scipy.sparse.linalg
import torch

from specdens import FunctionOperator, VectorSpace, aslinearoperator
from tests.cases import dense_case, device_of, home, move
from tests.small_matrix import BLOCK, MATRIX, assert_multiplies_like


def test_dense_arrays_of_every_library(library):
    matrix = move(MATRIX, library)
    operator = aslinearoperator(matrix)
    assert_multiplies_like(operator, MATRIX)
    assert device_of(operator @ operator.space.from_numpy(BLOCK)) == device_of(matrix)


def test_complex_hermitian_arrays_of_every_library(library):
    matrix = dense_case("hermitian")
    operator = aslinearoperator(move(matrix, library))
    assert operator.space.is_complex
    x = np.linspace(0, 1, 40) + 1j
    np.testing.assert_allclose(home(operator @ operator.space.from_numpy(x)), matrix @ x)


@pytest.mark.parametrize("kind", [np.int32, np.int64, np.uint8, np.bool_])
def test_integers_and_booleans_are_promoted(library, kind):
    matrix = np.array([[1, 0, 1], [0, 1, 0], [1, 0, 0]], dtype=kind)
    operator = aslinearoperator(move(matrix, library))
    assert_multiplies_like(operator, matrix.astype(float))


def test_numpy_matrix_objects_act_as_arrays():
    with pytest.warns(PendingDeprecationWarning):
        matrix = np.matrix(MATRIX)
    assert_multiplies_like(aslinearoperator(matrix), MATRIX)


@pytest.mark.parametrize("layout", ["csr", "csc", "coo", "bsr", "dia", "lil", "dok"])
@pytest.mark.parametrize("flavour", ["array", "matrix"])
def test_scipy_sparse(layout, flavour):
    make = getattr(scipy.sparse, f"{layout}_{flavour}")
    assert_multiplies_like(aslinearoperator(make(MATRIX)), MATRIX)


@pytest.mark.parametrize("kind", [np.int64, np.bool_, np.float32, np.complex128])
def test_scipy_sparse_of_other_dtypes(kind):
    matrix = (np.abs(MATRIX) > 0.4).astype(kind)
    operator = aslinearoperator(scipy.sparse.csr_array(matrix))
    expected = np.dtype(kind) if np.dtype(kind).kind in "fc" else np.dtype("float64")
    assert operator.space.dtype == expected
    assert_multiplies_like(operator, matrix.astype(expected), rtol=1e-6)


def test_scipy_linear_operators():
    wrapped = scipy.sparse.linalg.aslinearoperator(MATRIX)
    assert_multiplies_like(aslinearoperator(wrapped), MATRIX)
    only_matvec = scipy.sparse.linalg.LinearOperator((6, 6), matvec=lambda x: MATRIX @ x)
    assert_multiplies_like(aslinearoperator(only_matvec), MATRIX)


@pytest.mark.filterwarnings("ignore:Sparse (CSR|invariant):UserWarning")
@pytest.mark.parametrize("layout", ["coo", "csr"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.int64])
def test_torch_sparse(layout, dtype):
    matrix = MATRIX if dtype is torch.float64 else np.rint(2 * MATRIX)
    tensor = torch.tensor(matrix, dtype=dtype)
    sparse = tensor.to_sparse() if layout == "coo" else tensor.to_sparse_csr()
    operator = aslinearoperator(sparse)
    assert operator.space.dtype == torch.float64
    assert_multiplies_like(operator, matrix)


@pytest.mark.parametrize("kind", [np.float64, np.int64, np.bool_])
def test_jax_sparse(kind):
    matrix = np.rint(2 * MATRIX).astype(kind)
    sparse = jax_sparse.BCOO.fromdense(jnp.asarray(matrix))
    operator = aslinearoperator(sparse)
    assert operator.space.backend.name == "jax"
    y = operator @ operator.space.from_numpy(BLOCK)
    np.testing.assert_allclose(home(y), matrix.astype(float) @ BLOCK, rtol=1e-6)


class _Duck:
    """An object that only has a shape, and what a subclass adds."""

    shape = (6, 6)


class _OnlyMatvec(_Duck):
    def matvec(self, x):
        assert x.ndim == 1
        return MATRIX @ x


class _OnlyMatmat(_Duck):
    def matmat(self, x):
        assert x.ndim == 2
        return MATRIX @ x


class _OnlyAt(_Duck):
    def __matmul__(self, x):
        return MATRIX @ x


class _OnlyAtOfVectors(_Duck):
    def __matmul__(self, x):
        if x.ndim != 1:
            raise ValueError("vectors only")  # noqa: EM101
        return MATRIX @ x


class _Both(_OnlyMatvec, _OnlyMatmat):
    dtype = np.dtype("float64")


@pytest.mark.parametrize("kind", [_OnlyMatvec, _OnlyMatmat, _OnlyAt, _OnlyAtOfVectors, _Both])
def test_objects_with_a_shape_and_a_product(kind):
    assert_multiplies_like(aslinearoperator(kind()), MATRIX)


def test_the_dtype_of_an_object_decides_its_vectors():
    class Single(_Duck):
        dtype = torch.float32

        def matvec(self, x):
            return torch.tensor(MATRIX, dtype=torch.float32) @ x

    operator = aslinearoperator(Single())
    assert operator.space.dtype == torch.float32
    assert_multiplies_like(operator, MATRIX, rtol=1e-5)


def _laplacian(n=6):
    shift = np.roll(np.eye(n), 1, axis=0)
    return 2 * np.eye(n) - shift - shift.T


def _rolls(x):
    return 2 * x - np.roll(x, 1) - np.roll(x, -1)  # wrong for blocks: no axis


def test_functions_of_one_vector_are_called_column_by_column():
    operator = FunctionOperator(_rolls, VectorSpace.like(np.zeros(6)))
    assert_multiplies_like(operator, _laplacian())


def test_a_single_column_does_not_decide_how_blocks_are_multiplied():
    operator = FunctionOperator(_rolls, VectorSpace.like(np.zeros(6)))
    for columns in (1, 3, 1, 2):
        x = BLOCK[:, :columns]
        np.testing.assert_allclose(operator @ x, _laplacian() @ x, atol=1e-14)


def test_functions_of_blocks_are_called_once_per_block():
    shapes = []

    def function(x):
        shapes.append(x.shape)
        return MATRIX @ x

    operator = FunctionOperator(function, VectorSpace.like(np.zeros(6)))
    for _ in range(3):
        assert_multiplies_like(operator, MATRIX)
    # The first block is compared with its first column; afterwards there is one call for each.
    assert shapes == [(6,), (6,), (6, 3), (6,), (6, 3), (6,), (6, 3)]


def test_blocks_can_be_declared():
    space = VectorSpace.like(np.zeros(6))
    shapes = []

    def function(x):
        shapes.append(x.shape)
        return MATRIX @ x

    FunctionOperator(function, space, blocks=False) @ BLOCK
    assert shapes == [(6,)] * 3
    shapes.clear()
    FunctionOperator(function, space, blocks=True) @ BLOCK
    assert shapes == [(6, 3)]


def test_functions_of_every_library(library):
    matrix = move(MATRIX, library)
    operator = FunctionOperator(lambda x: matrix @ x, VectorSpace.like(matrix))
    assert_multiplies_like(operator, MATRIX)


def test_an_error_inside_a_function_is_not_swallowed():
    def broken(x):
        raise RuntimeError("no memory left")  # noqa: EM101

    operator = FunctionOperator(broken, VectorSpace.like(np.zeros(6)))
    with pytest.raises(RuntimeError, match="no memory left"):
        operator @ BLOCK


@pytest.mark.parametrize(
    ("function", "space", "text"),
    [
        (3, VectorSpace.like(np.zeros(2)), "function=3 cannot be called"),
        (np.sin, 5, "space=5 must be a VectorSpace"),
    ],
)
def test_function_operators_check_their_arguments(function, space, text):
    with pytest.raises(TypeError, match=text):
        FunctionOperator(function, space)


class _WithoutProduct:
    shape = (3, 3)


@pytest.mark.parametrize(
    ("thing", "error", "text"),
    [
        (3.0, TypeError, "operator has type float; expected an object with .space and @"),
        ([1.0, 2.0], ValueError, r"operator has shape \(2,\)"),
        (None, TypeError, "operator has type NoneType"),
        (_WithoutProduct(), TypeError, "has .shape but neither @ nor matvec nor matmat"),
        (np.zeros((2, 3)), ValueError, r"operator has shape \(2, 3\); a spectrum needs a square"),
        (np.zeros(4), ValueError, r"operator has shape \(4,\)"),
        (np.zeros((2, 2, 2)), ValueError, r"operator has shape \(2, 2, 2\)"),
        (np.zeros((0, 0)), ValueError, r"operator has shape \(0, 0\): there is no spectrum"),
        (scipy.sparse.csr_array((2, 3)), ValueError, r"operator has shape \(2, 3\)"),
        (np.array([["a"]]), TypeError, "operator has dtype <U1; expected numbers"),
        (np.array([[None]]), TypeError, "operator has dtype object; expected numbers"),
    ],
)
def test_what_is_no_square_matrix_is_refused(thing, error, text):
    with pytest.raises(error, match=text):
        aslinearoperator(thing)


def test_dense_matrices_must_be_hermitian(library):
    for host in (np.triu(np.ones((3, 3))), np.eye(3) + 1j * np.ones((3, 3))):
        with pytest.raises(ValueError, match=r"operator is not Hermitian: max \|A - A\^H\| ="):
            aslinearoperator(move(host, library))


def test_roundings_of_symmetry_are_accepted():
    rounded = MATRIX * (1 + 1e-12 * np.random.default_rng(5).standard_normal((6, 6)))
    assert_multiplies_like(aslinearoperator(rounded), rounded)


def test_operators_print_what_they_are():
    operator = aslinearoperator(MATRIX)
    assert repr(operator) == "MatrixOperator(ndarray, n=6, float64)"
    other = aslinearoperator(-MATRIX)
    assert repr(2 * operator - other) == f"2 * {operator!r} + -1 * {other!r}"
    assert repr(2 * operator - operator) == f"1 * {operator!r}"
    assert repr(aslinearoperator(_Both())) == "FunctionOperator(_Both, n=6)"
    function = FunctionOperator(_rolls, VectorSpace.like(np.zeros(6)))
    assert repr(function) == "FunctionOperator(_rolls, n=6)"
