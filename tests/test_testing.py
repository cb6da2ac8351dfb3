"""`check_operator` finds each violation; matrices with prescribed spectra have them."""

import numpy as np
import pytest

from specdens import FunctionOperator, VectorSpace
from specdens.testing import check_operator, matrix_with_spectrum, spiked_spectrum
from tests.cases import SPECTRA, dense, dense_case, move

SPACE = VectorSpace.like(np.zeros(20))
MATRIX = dense(np.linspace(-1, 1, 20))


def operator(function):
    return FunctionOperator(function, SPACE, blocks=True)


def test_right_operators_pass(library, spectrum):
    check_operator(move(dense_case(spectrum), library))


def _noise():
    rng = np.random.default_rng(0)
    return lambda x: MATRIX @ x + 1e-6 * rng.standard_normal(x.shape)


@pytest.mark.parametrize(
    ("function", "property_"),
    [
        (lambda x: np.abs(x), "linear"),
        (lambda x: MATRIX @ x + 1, "linear"),
        (lambda x: np.triu(MATRIX) @ x, "Hermitian"),
        (_noise(), "repeatable"),
        (lambda x: (MATRIX @ x).astype(np.float32), "dtype"),
        (lambda x: MATRIX[:10] @ x, "shape"),
        (lambda x: MATRIX @ x * np.nan, "finite"),
        (lambda x: MATRIX @ (x if x.ndim == 1 else np.roll(x, 1)), "columns"),
    ],
)
def test_each_violation_is_named_with_its_numbers(function, property_):
    with pytest.raises(ValueError, match=property_) as info:
        check_operator(operator(function))
    assert any(character.isdigit() for character in str(info.value))


def test_the_zero_operator_passes():
    check_operator(operator(lambda x: 0 * x))


def test_small_asymmetry_passes_only_with_a_tolerance():
    tilted = MATRIX + 1e-6 * np.triu(np.ones((20, 20)), 1)
    with pytest.raises(ValueError, match="Hermitian"):
        check_operator(operator(lambda x: tilted @ x))
    check_operator(operator(lambda x: tilted @ x), tolerance=1e-3)


@pytest.mark.parametrize("kind", [np.float64, np.complex128, np.float32])
def test_prescribed_spectra_are_exact(kind):
    matrix = matrix_with_spectrum(SPECTRA["indefinite"], like=np.zeros(1, dtype=kind))
    assert matrix.dtype == kind
    np.testing.assert_array_equal(matrix, matrix.conj().T)
    atol = 1e-5 if kind == np.float32 else 1e-12
    np.testing.assert_allclose(np.linalg.eigvalsh(matrix), SPECTRA["indefinite"], atol=atol)


def test_spiked_spectra_have_a_bulk_and_outliers():
    values = spiked_spectrum(300, 7, bulk_width=1e-3, seed=2)
    assert values.shape == (300,)
    assert (np.diff(values) >= 0).all()
    np.testing.assert_allclose(values[-7:], np.geomspace(0.1, 50, 7))
    assert np.abs(values[:-7]).max() < 6e-3
