"""Operators made from other people's objects, and their sums and multiples, against dense ones."""

import jax.experimental.sparse as jax_sparse
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse
import scipy.sparse.linalg
import torch

from specdens import FunctionOperator, VectorSpace, aslinearoperator, shift
from specdens.operators import LinearCombination
from tests.cases import CountingOperator, dense, dense_case, device_of, home, move

_RNG = np.random.default_rng(5)
_MATRIX = dense(np.linspace(-1.0, 2.0, 6)).round(2)
_MATRIX = np.where(np.abs(_MATRIX) > 0.2, _MATRIX, 0.0)
_BLOCK = _RNG.standard_normal((6, 3))


def assert_multiplies_like(operator, matrix, rtol=1e-13):
    """Compare products of one vector and of a block with the dense matrix."""
    space = operator.space
    assert space.dimension == len(matrix)
    for x in (_BLOCK[: len(matrix), 0], _BLOCK[: len(matrix)]):
        y = operator @ space.from_numpy(x)
        assert tuple(y.shape) == x.shape
        assert y.dtype == space.dtype
        np.testing.assert_allclose(home(y), matrix @ x, rtol=rtol, atol=rtol)


def test_dense_arrays_of_every_library(library):
    matrix = move(_MATRIX, library)
    operator = aslinearoperator(matrix)
    assert_multiplies_like(operator, _MATRIX)
    assert device_of(operator @ operator.space.from_numpy(_BLOCK)) == device_of(matrix)


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
        matrix = np.matrix(_MATRIX)
    assert_multiplies_like(aslinearoperator(matrix), _MATRIX)


@pytest.mark.parametrize("layout", ["csr", "csc", "coo", "bsr", "dia", "lil", "dok"])
@pytest.mark.parametrize("flavour", ["array", "matrix"])
def test_scipy_sparse(layout, flavour):
    make = getattr(scipy.sparse, f"{layout}_{flavour}")
    assert_multiplies_like(aslinearoperator(make(_MATRIX)), _MATRIX)


@pytest.mark.parametrize("kind", [np.int64, np.bool_, np.float32, np.complex128])
def test_scipy_sparse_of_other_dtypes(kind):
    matrix = (np.abs(_MATRIX) > 0.4).astype(kind)
    operator = aslinearoperator(scipy.sparse.csr_array(matrix))
    expected = np.dtype(kind) if np.dtype(kind).kind in "fc" else np.dtype("float64")
    assert operator.space.dtype == expected
    assert_multiplies_like(operator, matrix.astype(expected), rtol=1e-6)


def test_scipy_linear_operators():
    wrapped = scipy.sparse.linalg.aslinearoperator(_MATRIX)
    assert_multiplies_like(aslinearoperator(wrapped), _MATRIX)
    only_matvec = scipy.sparse.linalg.LinearOperator((6, 6), matvec=lambda x: _MATRIX @ x)
    assert_multiplies_like(aslinearoperator(only_matvec), _MATRIX)


@pytest.mark.filterwarnings("ignore:Sparse (CSR|invariant):UserWarning")
@pytest.mark.parametrize("layout", ["coo", "csr"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.int64])
def test_torch_sparse(layout, dtype):
    matrix = _MATRIX if dtype is torch.float64 else np.rint(2 * _MATRIX)
    tensor = torch.tensor(matrix, dtype=dtype)
    sparse = tensor.to_sparse() if layout == "coo" else tensor.to_sparse_csr()
    operator = aslinearoperator(sparse)
    assert operator.space.dtype == torch.float64
    assert_multiplies_like(operator, matrix)


@pytest.mark.parametrize("kind", [np.float64, np.int64, np.bool_])
def test_jax_sparse(kind):
    matrix = np.rint(2 * _MATRIX).astype(kind)
    sparse = jax_sparse.BCOO.fromdense(jnp.asarray(matrix))
    operator = aslinearoperator(sparse)
    assert operator.space.backend.name == "jax"
    y = operator @ operator.space.from_numpy(_BLOCK)
    np.testing.assert_allclose(home(y), matrix.astype(float) @ _BLOCK, rtol=1e-6)


class _Duck:
    """An object that only has a shape, and what a subclass adds."""

    shape = (6, 6)


class _OnlyMatvec(_Duck):
    def matvec(self, x):
        assert x.ndim == 1
        return _MATRIX @ x


class _OnlyMatmat(_Duck):
    def matmat(self, x):
        assert x.ndim == 2
        return _MATRIX @ x


class _OnlyAt(_Duck):
    def __matmul__(self, x):
        return _MATRIX @ x


class _OnlyAtOfVectors(_Duck):
    def __matmul__(self, x):
        if x.ndim != 1:
            raise ValueError("vectors only")  # noqa: EM101
        return _MATRIX @ x


class _Both(_OnlyMatvec, _OnlyMatmat):
    dtype = np.dtype("float64")


@pytest.mark.parametrize("kind", [_OnlyMatvec, _OnlyMatmat, _OnlyAt, _OnlyAtOfVectors, _Both])
def test_objects_with_a_shape_and_a_product(kind):
    assert_multiplies_like(aslinearoperator(kind()), _MATRIX)


def test_the_dtype_of_an_object_decides_its_vectors():
    class Single(_Duck):
        dtype = torch.float32

        def matvec(self, x):
            return torch.tensor(_MATRIX, dtype=torch.float32) @ x

    operator = aslinearoperator(Single())
    assert operator.space.dtype == torch.float32
    assert_multiplies_like(operator, _MATRIX, rtol=1e-5)


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
        x = _BLOCK[:, :columns]
        np.testing.assert_allclose(operator @ x, _laplacian() @ x, atol=1e-14)


def test_functions_of_blocks_are_called_once_per_block():
    shapes = []

    def function(x):
        shapes.append(x.shape)
        return _MATRIX @ x

    operator = FunctionOperator(function, VectorSpace.like(np.zeros(6)))
    for _ in range(3):
        assert_multiplies_like(operator, _MATRIX)
    # The first block is compared with its first column; afterwards there is one call for each.
    assert shapes == [(6,), (6,), (6, 3), (6,), (6, 3), (6,), (6, 3)]


def test_blocks_can_be_declared():
    space = VectorSpace.like(np.zeros(6))
    shapes = []

    def function(x):
        shapes.append(x.shape)
        return _MATRIX @ x

    FunctionOperator(function, space, blocks=False) @ _BLOCK
    assert shapes == [(6,)] * 3
    shapes.clear()
    FunctionOperator(function, space, blocks=True) @ _BLOCK
    assert shapes == [(6, 3)]


def test_functions_of_every_library(library):
    matrix = move(_MATRIX, library)
    operator = FunctionOperator(lambda x: matrix @ x, VectorSpace.like(matrix))
    assert_multiplies_like(operator, _MATRIX)


def test_an_error_inside_a_function_is_not_swallowed():
    def broken(x):
        raise RuntimeError("no memory left")  # noqa: EM101

    operator = FunctionOperator(broken, VectorSpace.like(np.zeros(6)))
    with pytest.raises(RuntimeError, match="no memory left"):
        operator @ _BLOCK


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


def test_sums_and_multiples_on_every_library(library):
    other = dense(np.linspace(1.0, 2.0, 6), seed=8)
    A, B = (aslinearoperator(move(m, library)) for m in (_MATRIX, other))  # noqa: N806
    cases = [
        (A + B, _MATRIX + other),
        (A - B, _MATRIX - other),
        (2.0 * A, 2 * _MATRIX),
        (A * 3, 3 * _MATRIX),
        (A / 4, _MATRIX / 4),
        (-A, -_MATRIX),
        (2 * (A - 3 * B) - (B - A) / 2, 2.5 * _MATRIX - 6.5 * other),
        (np.float64(2.0) * A, 2 * _MATRIX),
        (np.float32(2.0) * A + np.int64(1) * B, 2 * _MATRIX + other),
        (np.array(2.0) * A, 2 * _MATRIX),
    ]
    for operator, expected in cases:
        assert_multiplies_like(operator, expected)
        assert device_of(operator @ A.space.from_numpy(_BLOCK)) == device_of(move(_BLOCK, library))


def test_operators_and_raw_arrays_add_in_either_order(library):
    raw = move(_MATRIX, library)
    operator = 2.0 * aslinearoperator(raw)
    assert_multiplies_like(operator + raw, 3 * _MATRIX)
    assert_multiplies_like(operator - raw, _MATRIX)
    if library != "strict" and not library.startswith("strict:"):  # it refuses foreign operands
        assert_multiplies_like(raw + operator, 3 * _MATRIX)
        assert_multiplies_like(raw - operator, -_MATRIX)


def test_operators_and_sparse_matrices_add_in_either_order():
    sparse = scipy.sparse.csr_array(_MATRIX)
    operator = 2.0 * aslinearoperator(sparse)
    assert_multiplies_like(sparse + operator, 3 * _MATRIX)
    assert_multiplies_like(operator - sparse, _MATRIX)
    assert_multiplies_like(scipy.sparse.linalg.aslinearoperator(sparse) - operator, -_MATRIX)


@pytest.mark.parametrize(
    ("other", "text"),
    [
        (np.eye(5), "dimension 6 and 5, in"),
        (torch.eye(6, dtype=torch.float64), "library numpy and torch, in"),
        (np.eye(6, dtype=np.float32), "dtype float64 and float32, in MatrixOperator.*n=6, float64"),
        (np.eye(6, dtype=np.complex128), "dtype float64 and complex128, in"),
    ],
)
def test_operators_on_different_spaces_do_not_add(other, text):
    with pytest.raises(ValueError, match=f"operators act on different spaces: .*{text}"):
        aslinearoperator(_MATRIX) + other


def test_operators_on_different_devices_do_not_add():
    first, second = (aslinearoperator(move(_MATRIX, f"strict:{d}")) for d in ("device1", "device2"))
    with pytest.raises(ValueError, match=r"different spaces: device .*device1.* and .*device2"):
        first + second


def test_sums_of_many_operators_are_one_flat_combination(library):
    matrices = [dense(np.linspace(-1.0, 1.0 + i, 6), seed=i) for i in range(50)]
    operators = [CountingOperator(aslinearoperator(move(m, library))) for m in matrices]
    total = sum(2.0 * shift(A, 0.0) for A in operators)
    assert isinstance(total, LinearCombination)
    assert [part for _, part in total.terms] == operators
    assert_multiplies_like(total, 2 * sum(matrices), rtol=1e-11)
    assert all(A.shapes == [(6,), (6, 3)] for A in operators)


def test_the_same_operator_is_multiplied_once():
    A, B = CountingOperator(aslinearoperator(_MATRIX)), aslinearoperator(np.eye(6))  # noqa: N806
    total = 2.0 * shift(A, 1.0) + B - 0.5 * shift(A, 4.0) + B
    assert [factor for factor, _ in total.terms] == [1.5, 2.0]
    assert_multiplies_like(total, 1.5 * _MATRIX + 2 * np.eye(6))
    assert A.shapes == [(6,), (6, 3)]


def test_equal_matrices_in_different_operators_are_not_merged():
    A, B = aslinearoperator(_MATRIX), aslinearoperator(_MATRIX.copy())  # noqa: N806
    assert len((A + B).terms) == 2


def test_operators_that_cancel_cost_no_product(library):
    A = aslinearoperator(move(_MATRIX, library))  # noqa: N806
    counting = CountingOperator(A)
    left = shift(counting, 3.0) + A - counting
    assert_multiplies_like(left, _MATRIX + 3 * np.eye(6))
    assert counting.shapes == []
    assert_multiplies_like(A - A, np.zeros((6, 6)))
    assert_multiplies_like(sum([shift(A, 1.0), -A]), np.eye(6))


def test_zero_is_the_only_number_that_adds():
    A = aslinearoperator(_MATRIX)  # noqa: N806
    for total in (0 + A, A + 0, A - 0, 0.0 + A, sum([A])):
        assert_multiplies_like(total, _MATRIX)
    assert_multiplies_like(0 - A, -_MATRIX)
    for number in (2.0, 1j, np.float64(1)):
        with pytest.raises(TypeError, match=r"ambiguous; shift\(A, .*\) adds"):
            A + number
        with pytest.raises(TypeError, match="ambiguous"):
            number - A


@pytest.mark.parametrize(
    ("factor", "error"),
    [
        (1j, ValueError),
        (np.nan, ValueError),
        (np.inf, ValueError),
        (True, TypeError),
        ([1.0, 2.0], TypeError),
        (np.ones(6), TypeError),
        ("2", TypeError),
    ],
)
def test_factors_must_be_real_numbers(factor, error):
    with pytest.raises(error, match=r"factor=.* must be (a )?real|unsupported operand"):
        aslinearoperator(_MATRIX) * factor


def test_dividing_by_zero_is_an_error():
    with pytest.raises((ValueError, ZeroDivisionError)):
        aslinearoperator(_MATRIX) / 0


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
    rounded = _MATRIX * (1 + 1e-12 * _RNG.standard_normal((6, 6)))
    assert_multiplies_like(aslinearoperator(rounded), rounded)


def test_operators_print_what_they_are():
    operator = aslinearoperator(_MATRIX)
    assert repr(operator) == "MatrixOperator(ndarray, n=6, float64)"
    other = aslinearoperator(-_MATRIX)
    assert repr(2 * operator - other) == f"2 * {operator!r} + -1 * {other!r}"
    assert repr(2 * operator - operator) == f"1 * {operator!r}"
    assert repr(aslinearoperator(_Both())) == "FunctionOperator(_Both, n=6)"
    function = FunctionOperator(_rolls, VectorSpace.like(np.zeros(6)))
    assert repr(function) == "FunctionOperator(_rolls, n=6)"
