"""Vector spaces, and the product that every method goes through."""

import array_api_strict
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from specdens import LinearOperator, VectorSpace, aslinearoperator
from specdens.backends import dtype_name
from specdens.spaces import multiply
from tests.cases import CountingOperator, device_of, move


def test_space_takes_length_dtype_device_and_library_from_an_example(library):
    example = move(np.zeros((5, 2), dtype=np.float32), library)
    space = VectorSpace.like(example)
    assert space.dimension == 5
    assert dtype_name(space.dtype) == "float32"
    assert space.backend.name == library.partition(":")[0]
    there = space.from_numpy(np.arange(5.0))
    assert device_of(there) == device_of(example)
    np.testing.assert_array_equal(space.to_numpy(there), np.arange(5))


@pytest.mark.parametrize("kind", [np.int64, np.bool_])
def test_integers_and_booleans_stand_for_the_default_floating_dtype(library, kind):
    assert dtype_name(VectorSpace.like(move(np.ones(3, dtype=kind), library)).dtype) == "float64"


def test_spaces_of_equal_fields_are_equal():
    assert VectorSpace.like(np.zeros(3)) == VectorSpace.like(np.ones((3, 2)))
    assert VectorSpace.like(np.zeros(3)) != VectorSpace.like(np.zeros(4))
    assert VectorSpace.like(np.zeros(3)) != VectorSpace.like(torch.zeros(3, dtype=torch.float64))


@pytest.mark.parametrize(
    ("dtype", "working", "wide", "num_bytes", "precision"),
    [
        (torch.bfloat16, "float32", "float64", 40, 2.0**-7),
        (torch.float16, "float32", "float64", 40, 2.0**-10),
        (torch.float32, "float32", "float64", 40, 2.0**-23),
        (torch.float64, "float64", "float64", 80, 2.0**-52),
        (torch.complex64, "complex64", "complex128", 80, 2.0**-23),
        (torch.complex128, "complex128", "complex128", 160, 2.0**-52),
    ],
)
def test_precision_of_products_vectors_and_inner_products(
    dtype, working, wide, num_bytes, precision
):
    space = VectorSpace.like(torch.zeros(10, dtype=dtype))
    assert dtype_name(space.working_dtype) == working
    assert dtype_name(space.wide_dtype) == wide
    assert space.vector_bytes == num_bytes
    assert space.precision == precision
    assert space.is_complex == working.startswith("complex")


@pytest.mark.parametrize(
    ("dimension", "dtype", "error", "text"),
    [
        (0, "float64", ValueError, "dimension=0 must be at least 1"),
        (-2, "float64", ValueError, "dimension=-2 must be at least 1"),
        (2.5, "float64", TypeError, "dimension=2.5 must be an integer"),
        (True, "float64", TypeError, "dimension=True must be an integer"),
        (3, "int64", TypeError, "dtype=int64 must be one of float16"),
    ],
)
def test_impossible_spaces_are_refused(dimension, dtype, error, text):
    backend = VectorSpace.like(np.zeros(1)).backend
    with pytest.raises(error, match=text):
        VectorSpace(dimension, np.dtype(dtype), "cpu", backend)


def test_scalars_and_cubes_are_no_vectors():
    for shape in ((), (2, 2, 2)):
        with pytest.raises(ValueError, match="vector has shape"):
            VectorSpace.like(np.zeros(shape))


def test_two_members_make_an_operator():
    operator = CountingOperator(aslinearoperator(np.eye(2)))
    assert isinstance(operator, LinearOperator)
    assert aslinearoperator(operator) is operator
    assert not isinstance(np.eye(2), LinearOperator)


class _Returning:
    """An operator whose product is whatever `product` says."""

    def __init__(self, product, space):
        self.product, self.space = product, space

    def __matmul__(self, x):
        return self.product(x)


@pytest.mark.parametrize(
    ("product", "error", "text"),
    [
        (lambda x: x[:2], ValueError, r"operator @ x has shape \(2, 2\) for x of shape \(3, 2\)"),
        (lambda x: x[:, 0], ValueError, r"operator @ x has shape \(3,\) for x of shape \(3, 2\)"),
        (lambda x: None, ValueError, r"operator @ x has shape \(\) for x"),
        (lambda x: 1j * x, TypeError, "operator @ x is complex128 for a float64 vector"),
    ],
)
def test_wrong_products_are_refused(product, error, text):
    operator = _Returning(product, VectorSpace.like(np.zeros(3)))
    with pytest.raises(error, match=text):
        multiply(operator, np.ones((3, 2)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_operators_see_their_own_dtype(dtype):
    seen = []

    def product(x):
        seen.append(x.dtype)
        return 2 * x

    operator = _Returning(product, VectorSpace.like(torch.zeros(3, dtype=dtype)))
    y = multiply(operator, torch.ones((3, 2)))
    assert seen == [dtype]
    assert y.dtype == torch.float32
    assert torch.equal(y, torch.full((3, 2), 2.0))


def test_real_products_in_a_complex_space_are_promoted():
    operator = _Returning(lambda x: x.real, VectorSpace.like(np.zeros(3, complex)))
    assert multiply(operator, np.ones((3, 1), complex)).dtype == np.complex128


def test_spaces_know_their_library():
    assert VectorSpace.like(jnp.zeros(2)).backend.name == "jax"
    assert VectorSpace.like(array_api_strict.zeros(2)).backend.name == "strict"
