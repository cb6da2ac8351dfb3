"""Linear operators of other libraries: stand-ins that multiply as they do, and the real ones.

The real libraries are optional; the stand-ins have their members, and refuse what they refuse.
"""

import importlib
import types
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from specdens import aslinearoperator, slq
from specdens.foreign import foreign_product
from specdens.testing import check_operator
from tests.cases import dense, home

_VALUES = np.linspace(-1.0, 2.0, 6)
_MATRIX = dense(_VALUES)
_BLOCK = np.random.default_rng(2).standard_normal((6, 3))
_ARRAYS = {"numpy": np.asarray, "torch": torch.tensor, "jax": jnp.asarray}


def assert_is_usable(operator, matrix, backend, dtype="float64"):
    """Compare products with the dense matrix, and run what the estimators need."""
    space = operator.space
    assert (space.dimension, space.backend.name) == (len(matrix), backend)
    tolerance = 1e-12 if dtype == "float64" else 1e-5
    for x in (_BLOCK[:, 0], _BLOCK[:, :1], _BLOCK):
        x = np.resize(x, (len(matrix), *x.shape[1:]))
        y = operator @ space.from_numpy(x)
        assert str(y.dtype).endswith(dtype)
        assert not getattr(y, "requires_grad", False)
        np.testing.assert_allclose(home(y), matrix @ x, rtol=tolerance, atol=tolerance)
    check_operator(operator)
    measure = slq(operator, num_probes=3, seed=1)
    np.testing.assert_allclose(
        np.sort(measure.outliers.eigenvalues),
        np.unique(np.linalg.eigvalsh(matrix).round(6)),
        atol=1e-5,
    )


# Stand-ins.


class _LikePyLops:
    """Vectors by matvec, blocks by matmat; NumPy, flat vectors of an N-D model."""

    shape, dims, dimsd, dtype = (6, 6), (2, 3), (2, 3), np.dtype("float64")

    def matvec(self, x):
        assert isinstance(x, np.ndarray)
        assert x.shape in ((6,), (6, 1))
        return (_MATRIX @ x.reshape(6)).reshape(x.shape)

    def matmat(self, X):  # noqa: N803
        assert X.ndim == 2
        return np.stack([self.matvec(column) for column in X.T], axis=1)

    def _matvec(self, x):
        return self.matvec(x)

    def __matmul__(self, x):
        return (self.matvec if x.ndim == 1 else self.matmat)(x)


class _LikeColaLeaf:
    xnp = None

    def __init__(self, array):
        self.annotations, self.options, self.array = {"scale": np.float64(1)}, [], array


class _LikeCola:
    """Every product by ``_matmat``; says its library by ``xnp`` and by the arrays it holds."""

    def __init__(self, library, leaves=True):
        array = _ARRAYS[library](_MATRIX)
        self.shape, self.dtype, self.kind = (6, 6), array.dtype, type(array)
        self.device = jax.devices()[0] if library == "numpy" else array.device
        self.parts = (_LikeColaLeaf(array),) if leaves else ()
        self.product = lambda x: array @ x
        self.xnp = types.SimpleNamespace(zeros=lambda shape, dtype, device: 0.0 * array[0])

    def _matmat(self, X):  # noqa: N803
        assert X.ndim == 2
        assert type(X) is self.kind
        return self.product(X)

    def __matmul__(self, x):
        assert x.shape[0] == 6, "dimension mismatch"
        return self._matmat(x.reshape(-1, 1)).reshape(-1) if x.ndim == 1 else self._matmat(x)


class _LikeLineax:
    """One product, ``mv`` of exactly the declared structure; ``@`` composes operators."""

    def __init__(self, shape=(6,), dtype=jnp.float64):
        self.structure = jax.ShapeDtypeStruct(shape, dtype)

    def in_structure(self):
        return self.structure

    out_structure = in_structure

    def in_size(self):
        return 6

    out_size = in_size

    def mv(self, x):
        assert (x.shape, x.dtype) == (self.structure.shape, self.structure.dtype)
        return (jnp.asarray(_MATRIX, dtype=x.dtype) @ x.reshape(-1)).reshape(x.shape)

    def as_matrix(self):
        raise AssertionError("the matrix must never be formed")  # noqa: EM101

    def __matmul__(self, other):
        if not isinstance(other, _LikeLineax):
            raise ValueError("can only compose AbstractLinearOperators together.")  # noqa: EM101
        return self


class _LikeGPyTorch:
    """``@`` and ``matmul`` of tensors, recorded for differentiation by hyperparameters."""

    shape, dtype, device = torch.Size([6, 6]), torch.float64, torch.device("cpu")

    def __init__(self):
        self.root = torch.tensor(_MATRIX, requires_grad=True)

    def matmul(self, other):
        return self.root @ other

    __matmul__ = matmul

    def __array__(self):
        raise AssertionError("the matrix must never be formed")  # noqa: EM101


class _LikeCurvlinops:
    """``@`` of tensors of the parameters' dtype and device; ``_matmat`` is for lists of tensors."""

    shape, dtype, device, SELF_ADJOINT = (6, 6), torch.float64, torch.device("cpu"), True

    def _matmat(self, tensors):
        assert isinstance(tensors, list)
        return [torch.tensor(_MATRIX) @ tensors[0]]

    def __matmul__(self, x):
        return self._matmat([x])[0]


class _LikeXitorch:
    """Vectors by mv, blocks by mm."""

    shape, dtype, device = torch.Size([6, 6]), torch.float64, torch.device("cpu")

    def mv(self, x):
        assert x.ndim == 1
        return torch.tensor(_MATRIX) @ x

    def mm(self, x):
        assert x.ndim == 2
        return torch.tensor(_MATRIX) @ x


class _OfJaxDtype:
    """Only a dtype class tells whose vectors these are."""

    shape, dtype = (6, 6), jnp.float64

    def mv(self, x):
        assert isinstance(x, jax.Array)
        assert x.ndim == 1
        return jnp.asarray(_MATRIX) @ x


_STAND_INS = {
    "pylops": (_LikePyLops, "numpy"),
    "cola on numpy": (lambda: _LikeCola("numpy"), "numpy"),
    "cola on torch": (lambda: _LikeCola("torch"), "torch"),
    "cola on jax": (lambda: _LikeCola("jax"), "jax"),
    "cola without arrays": (lambda: _LikeCola("jax", leaves=False), "jax"),
    "lineax": (_LikeLineax, "jax"),
    "lineax of images": (lambda: _LikeLineax((2, 3)), "jax"),
    "gpytorch": (_LikeGPyTorch, "torch"),
    "curvlinops": (_LikeCurvlinops, "torch"),
    "xitorch": (_LikeXitorch, "torch"),
    "dtype of jax": (_OfJaxDtype, "jax"),
}


@pytest.mark.parametrize("name", _STAND_INS)
def test_stand_ins(name):
    make, backend = _STAND_INS[name]
    assert_is_usable(aslinearoperator(make()), _MATRIX, backend)


def test_columns_of_a_structure_are_one_traced_product():
    class Counting(_LikeLineax):
        calls = 0

        def mv(self, x):
            type(self).calls += 1
            return super().mv(x)

    operator = aslinearoperator(Counting())
    operator @ jnp.asarray(np.tile(_BLOCK, (1, 10)))
    assert Counting.calls == 1


def test_single_precision_structures_keep_it():
    operator = aslinearoperator(_LikeLineax(dtype=jnp.float32))
    assert_is_usable(operator, _MATRIX, "jax", "float32")


def test_structures_of_several_arrays_are_refused():
    class Nested(_LikeLineax):
        def in_structure(self):
            return {"w": self.structure}

        out_structure = in_structure

    with pytest.raises(TypeError, match=r"Nested maps \{'w': .*FunctionOperator\(function, space"):
        aslinearoperator(Nested())


def test_structures_that_are_not_mapped_to_themselves_are_refused():
    class Reshaping(_LikeLineax):
        def out_structure(self):
            return jax.ShapeDtypeStruct((3, 2), jnp.float64)

    with pytest.raises(TypeError, match=r"maps .* to .*; expected one array and the same back"):
        aslinearoperator(Reshaping())

    class Tall(_LikeLineax):
        def out_size(self):
            return 8

    with pytest.raises(ValueError, match=r"operator has shape \(8, 6\); a spectrum needs a square"):
        aslinearoperator(Tall())


def test_batches_of_operators_are_refused():
    class Batch(_LikeGPyTorch):
        shape = torch.Size([2, 6, 6])

    with pytest.raises(ValueError, match=r"operator has shape \(2, 6, 6\)"):
        aslinearoperator(Batch())


def test_what_has_no_product_is_left_alone():
    class Nothing:
        shape = (6, 6)

    assert foreign_product(Nothing()) is None


# The real libraries.


def optional(name):
    """Import an optional library, whatever it warns of, or skip the test."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return importlib.import_module(name)
        except ImportError:
            return pytest.importorskip(name, reason=f"{name} is not installed")


theirs = pytest.mark.filterwarnings("ignore")  # what other libraries warn of is not ours to mend


@theirs
def test_pylops():
    pylops = optional("pylops")
    assert_is_usable(aslinearoperator(pylops.MatrixMult(_MATRIX)), _MATRIX, "numpy")
    derivative = pylops.SecondDerivative(8, edge=True)
    square = derivative.H @ derivative
    dense_square = square @ np.eye(8)
    assert_is_usable(aslinearoperator(square), dense_square, "numpy")
    both = pylops.MatrixMult(_MATRIX, otherdims=(2,))  # acts on the first axis of a (6, 2) model
    np.testing.assert_allclose(
        aslinearoperator(both) @ np.eye(12), np.kron(_MATRIX, np.eye(2)), atol=1e-14
    )


@theirs
@pytest.mark.parametrize("library", _ARRAYS)
def test_cola(library):
    ops = optional("cola.ops")
    array = _ARRAYS[library](_MATRIX)
    assert_is_usable(aslinearoperator(ops.Dense(array)), _MATRIX, library)
    small = _ARRAYS[library](np.diag([1.0, 3.0]))
    both = ops.Kronecker(ops.Dense(array), ops.Dense(small))
    expected = np.kron(_MATRIX, np.diag([1.0, 3.0]))
    operator = aslinearoperator(both)
    y = operator @ operator.space.from_numpy(np.eye(12))
    np.testing.assert_allclose(home(y), expected, atol=1e-12)


@theirs
def test_lineax():
    lineax = optional("lineax")
    matrix = lineax.MatrixLinearOperator(jnp.asarray(_MATRIX))
    assert_is_usable(aslinearoperator(matrix), _MATRIX, "jax")
    total = matrix + 2.0 * lineax.IdentityLinearOperator(jax.ShapeDtypeStruct((6,), jnp.float64))
    assert_is_usable(aslinearoperator(total), _MATRIX + 2 * np.eye(6), "jax")
    of_images = lineax.FunctionLinearOperator(
        lambda x: 2 * x - jnp.roll(x, 1, 0) - jnp.roll(x, -1, 0),
        jax.ShapeDtypeStruct((3, 2), jnp.float64),
    )
    ring = 3 * np.eye(3) - np.ones((3, 3))
    operator = aslinearoperator(of_images)
    np.testing.assert_allclose(home(operator @ jnp.eye(6)), np.kron(ring, np.eye(2)), atol=1e-14)


@theirs
def test_linear_operator():
    library = optional("linear_operator")
    operators = library.operators
    tensor = torch.tensor(_MATRIX, requires_grad=True)
    assert_is_usable(aslinearoperator(library.to_linear_operator(tensor)), _MATRIX, "torch")
    damped = library.to_linear_operator(tensor).add_diagonal(torch.tensor(2.0).double())
    assert_is_usable(aslinearoperator(damped), _MATRIX + 2 * np.eye(6), "torch")
    first_row = torch.tensor([2.0, -1.0, 0.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    toeplitz = operators.ToeplitzLinearOperator(first_row)
    second_difference = 2 * np.eye(6) - np.eye(6, k=1) - np.eye(6, k=-1)
    assert_is_usable(aslinearoperator(toeplitz), second_difference, "torch")


@theirs
@pytest.mark.parametrize("kind", ["HessianLinearOperator", "GGNLinearOperator", "sum"])
def test_curvlinops(kind):
    curvlinops = optional("curvlinops")
    torch.manual_seed(0)
    model = torch.nn.Linear(5, 1).double()
    data = [(torch.randn(7, 5).double(), torch.randn(7, 1).double())]
    arguments = (model, torch.nn.MSELoss(), list(model.parameters()), data)
    rows = torch.cat([data[0][0], torch.ones(7, 1)], dim=1).numpy()
    expected = 2 * rows.T @ rows / 7  # of a linear model, both of them
    if kind == "sum":
        foreign = 2 * curvlinops.HessianLinearOperator(*arguments)
        foreign, expected = foreign + curvlinops.GGNLinearOperator(*arguments), 3 * expected
    else:
        foreign = getattr(curvlinops, kind)(*arguments)
    assert_is_usable(aslinearoperator(foreign), expected, "torch")
