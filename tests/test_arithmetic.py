"""Sums, differences and multiples of operators against those of dense matrices."""

import numpy as np
import pytest
import scipy.sparse
import scipy.sparse.linalg
import torch

from specdens import aslinearoperator, shift
from specdens.operators import LinearCombination
from tests.cases import CountingOperator, dense, device_of, move
from tests.small_matrix import BLOCK, MATRIX, assert_multiplies_like


def test_sums_and_multiples_on_every_library(library):
    other = dense(np.linspace(1.0, 2.0, 6), seed=8)
    A, B = (aslinearoperator(move(m, library)) for m in (MATRIX, other))  # noqa: N806
    cases = [
        (A + B, MATRIX + other),
        (A - B, MATRIX - other),
        (2.0 * A, 2 * MATRIX),
        (A * 3, 3 * MATRIX),
        (A / 4, MATRIX / 4),
        (-A, -MATRIX),
        (2 * (A - 3 * B) - (B - A) / 2, 2.5 * MATRIX - 6.5 * other),
        (np.float64(2.0) * A, 2 * MATRIX),
        (np.float32(2.0) * A + np.int64(1) * B, 2 * MATRIX + other),
        (np.array(2.0) * A, 2 * MATRIX),
    ]
    for operator, expected in cases:
        assert_multiplies_like(operator, expected)
        assert device_of(operator @ A.space.from_numpy(BLOCK)) == device_of(move(BLOCK, library))


def test_operators_and_raw_arrays_add_in_either_order(library):
    raw = move(MATRIX, library)
    operator = 2.0 * aslinearoperator(raw)
    assert_multiplies_like(operator + raw, 3 * MATRIX)
    assert_multiplies_like(operator - raw, MATRIX)
    if library != "strict" and not library.startswith("strict:"):  # it refuses foreign operands
        assert_multiplies_like(raw + operator, 3 * MATRIX)
        assert_multiplies_like(raw - operator, -MATRIX)


def test_operators_and_sparse_matrices_add_in_either_order():
    sparse = scipy.sparse.csr_array(MATRIX)
    operator = 2.0 * aslinearoperator(sparse)
    assert_multiplies_like(sparse + operator, 3 * MATRIX)
    assert_multiplies_like(operator - sparse, MATRIX)
    assert_multiplies_like(scipy.sparse.linalg.aslinearoperator(sparse) - operator, -MATRIX)


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
        aslinearoperator(MATRIX) + other


def test_operators_on_different_devices_do_not_add():
    first, second = (aslinearoperator(move(MATRIX, f"strict:{d}")) for d in ("device1", "device2"))
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
    A, B = CountingOperator(aslinearoperator(MATRIX)), aslinearoperator(np.eye(6))  # noqa: N806
    total = 2.0 * shift(A, 1.0) + B - 0.5 * shift(A, 4.0) + B
    assert [factor for factor, _ in total.terms] == [1.5, 2.0]
    assert_multiplies_like(total, 1.5 * MATRIX + 2 * np.eye(6))
    assert A.shapes == [(6,), (6, 3)]


def test_equal_matrices_in_different_operators_are_not_merged():
    A, B = aslinearoperator(MATRIX), aslinearoperator(MATRIX.copy())  # noqa: N806
    assert len((A + B).terms) == 2


def test_operators_that_cancel_cost_no_product(library):
    A = aslinearoperator(move(MATRIX, library))  # noqa: N806
    counting = CountingOperator(A)
    left = shift(counting, 3.0) + A - counting
    assert_multiplies_like(left, MATRIX + 3 * np.eye(6))
    assert counting.shapes == []
    assert_multiplies_like(A - A, np.zeros((6, 6)))
    assert_multiplies_like(sum([shift(A, 1.0), -A]), np.eye(6))


def test_zero_is_the_only_number_that_adds():
    A = aslinearoperator(MATRIX)  # noqa: N806
    for total in (0 + A, A + 0, A - 0, 0.0 + A, sum([A])):
        assert_multiplies_like(total, MATRIX)
    assert_multiplies_like(0 - A, -MATRIX)
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
        aslinearoperator(MATRIX) * factor


def test_dividing_by_zero_is_an_error():
    with pytest.raises((ValueError, ZeroDivisionError)):
        aslinearoperator(MATRIX) / 0
