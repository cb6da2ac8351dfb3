"""How estimates show themselves: value and error to the same place."""

from __future__ import annotations

import inspect
import re

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from specdens import Estimate, SpectralMeasure

SHOWN = {
    (3.14159, 0.012): "3.142 ± 0.012",
    (1234.5678, 12.3): "1235 ± 12",
    (60229.4, 300.0): "60230 ± 300",
    (9.99, 9.96): "10 ± 10",  # two digits also where rounding makes the error a power of ten
    (2.0, 1.2e-7): "2.00000000 ± 1.2e-07",
    (4292.2134567891, 6.4e-6): "4292.2134568 ± 6.4e-06",
    (-1e-9, 0.5): "0.00 ± 0.50",
    (1.23456e-9, 1.2e-11): "1.235e-09 ± 1.2e-11",
    (-1.23456e12, 3.4e9): "-1.2346e+12 ± 3.4e+09",
    (0.0, 1e-9): "0.0e+00 ± 1.0e-09",
    # Without an error, or below the rounding of the value: all digits that it has.
    (2.0, 0.0): "2 ± 0",
    (0.0, 0.0): "0 ± 0",
    (4292.2134567891, 6e-12): "4292.21345679 ± 6e-12",
    (5.000000000000004, 4e-15): "5 ± 4e-15",
    (1 + 2j, 0.25): "1.00+2.00j ± 0.25",
    (np.inf, 1.0): "inf ± 1",
    (2.5, np.nan): "2.5 (one probe: no standard error)",
    (np.nan, np.nan): "nan ± nan",
}


@pytest.mark.parametrize("number", SHOWN)
def test_value_and_error_end_at_the_same_digit(number):
    estimate = Estimate(*map(np.asarray, number))
    assert str(estimate) == SHOWN[number]
    assert repr(estimate) == f"Estimate({SHOWN[number]})"


def last_place(text: str) -> int:
    """Return the power of ten of the last digit that is written."""
    mantissa, _, exponent = text.partition("e")
    return int(exponent or 0) - len(mantissa.partition(".")[2])


@given(st.floats(-1e15, 1e15), st.floats(1e-12, 1e12))
@example(1.0, 9.96e-5)
@example(99999.96, 0.1)
@example(9999999.6, 12.0)
def test_what_is_shown_is_the_estimate_rounded_at_the_second_digit_of_the_error(value, stderr):
    found, error = str(Estimate(np.asarray(value), np.asarray(stderr))).split(" ± ")
    if stderr < 2e-10 * abs(value):  # close to the rounding of the value, or below
        assert float(error) == pytest.approx(stderr, rel=0.34)
        assert float(found) == pytest.approx(value, rel=2e-11)
        return
    assert float(error) == float(f"{stderr:.1e}")
    unit = 10.0 ** (int(f"{stderr:.1e}".split("e")[1]) - 1)
    assert float(found) == pytest.approx(value, abs=0.501 * unit, rel=1e-15)
    if "e" not in found and unit < 1:  # otherwise the last digits written are zeros
        assert last_place(found) == last_place(error)
    digits = re.sub(r"[-.]|e.*", "", found).lstrip("0")
    assert len(digits) <= 12


def test_arrays_show_both_arrays():
    assert repr(Estimate(np.ones(2), np.zeros(2))) == "Estimate(value=[1. 1.], stderr=[0. 0.])"


@pytest.mark.parametrize("method", ["integrate", "trace", "moment", "count", "pdf", "cdf"])
def test_methods_of_measures_return_estimates_and_say_so(method):
    measure = SpectralMeasure(np.array([[1.0, 3.0], [2.0, 4.0]]), np.full((2, 2), 0.5), 4)
    arguments = {"integrate": (np.square,), "trace": (), "count": (0, 3)}.get(method, (2,))
    found = getattr(measure, method)(*arguments)
    expected = {"integrate": 7.5, "trace": 10, "moment": 7.5, "count": 3}
    if method in expected:
        assert found.value == expected[method]
    assert isinstance(found, Estimate)
    assert re.search(r"Returns\n-{7}\nEstimate\n", inspect.getdoc(getattr(measure, method)) + "\n")
