"""Traces and diagonals: published orderings, honest standard errors, exact cases, refusals."""

import numpy as np
import pytest

from specdens import (
    FunctionOperator,
    VectorSpace,
    aslinearoperator,
    from_vectors,
    rademacher,
    shift,
    slq,
    sphere,
)
from specdens.krylov_aware import krylov_density
from specdens.methods.leave_one_out import xnystrace
from specdens.traces import diagonal, logdet, trace
from tests.cases import SPECTRA, CountingOperator, dense, dense_case, move
from tests.cases import diagonal as diagonal_operator

METHODS = ("hutchinson", "hutch++", "xtrace", "xnystrace")
SEEDS = range(30)
DECAYS = {
    "flat": np.linspace(1.0, 3.0, 200),
    "polynomial": np.arange(1, 201.0) ** -2,
    "exponential": 0.7 ** np.arange(200),
    "indefinite": np.linspace(-1.0, 2.0, 200),
}


def errors(eigenvalues, **options):
    """Return errors and standard errors of the trace over all seeds."""
    matrix = dense(eigenvalues)
    estimates = [trace(matrix, num_products=60, seed=seed, **options) for seed in SEEDS]
    values = np.array([e.value for e in estimates]) - eigenvalues.sum()
    return values, np.array([e.stderr for e in estimates])


def rms(x):
    return float(np.sqrt(np.mean(np.square(x))))


# Published behavior


def test_flat_spectra_gain_nothing_from_deflation():
    rms_error = {m: rms(errors(DECAYS["flat"], method=m)[0]) for m in METHODS}
    for method in ("hutch++", "xtrace", "xnystrace"):
        assert 0.5 < rms_error[method] / rms_error["hutchinson"] < 2.5


def test_polynomial_decay_orders_the_methods():
    rms_error = {m: rms(errors(DECAYS["polynomial"], method=m)[0]) for m in METHODS}
    assert rms_error["xnystrace"] < rms_error["xtrace"] < rms_error["hutch++"]
    assert rms_error["hutch++"] < 0.1 * rms_error["hutchinson"]


def test_exponential_decay_orders_the_methods_by_orders_of_magnitude():
    rms_error = {m: rms(errors(DECAYS["exponential"], method=m)[0]) for m in METHODS}
    assert rms_error["hutch++"] < 0.01 * rms_error["hutchinson"]
    assert rms_error["xtrace"] < 0.1 * rms_error["hutch++"]
    assert rms_error["xnystrace"] < 0.01 * rms_error["xtrace"]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", DECAYS)
@pytest.mark.parametrize("probes", [sphere, rademacher])
def test_estimates_are_unbiased_and_their_standard_errors_calibrated(name, method, probes):
    if (name, method) == ("indefinite", "xnystrace"):
        return  # refused, below
    error, stderr = errors(DECAYS[name], method=method, probes=probes)
    if rms(error) < 1e-11:
        return  # rounding, which no spread of samples knows
    assert abs(error.mean()) < 4 * error.std(ddof=1) / len(error) ** 0.5
    low, high = (0.9, 10) if method == "xnystrace" else (0.5, 1.8)
    assert low < rms(stderr) / rms(error) < high


def test_dividing_out_the_norm_helps_where_nothing_decays():
    divided, _ = errors(DECAYS["flat"], method="xtrace")
    plain, _ = errors(
        DECAYS["flat"], method="xtrace", probes=lambda space, seed, i: sphere(space, seed, i)
    )
    assert rms(divided) < 0.5 * rms(plain)


# Exact cases


@pytest.mark.parametrize("method", ["hutch++", "xtrace", "xnystrace"])
def test_low_rank_is_exact(library, method):
    for sign in (1, -1) if method != "xnystrace" else (1,):
        eigenvalues = sign * np.r_[np.zeros(90), np.arange(1.0, 11.0)]
        estimate = trace(move(dense(eigenvalues), library), method=method, num_products=60)
        np.testing.assert_allclose(estimate.value, sign * 55.0, rtol=1e-12)
        assert estimate.stderr < 1e-11


@pytest.mark.parametrize("method", METHODS)
def test_zero_and_identity_are_exact(library, method):
    for scale in (0.0, 1.0):
        estimate = trace(move(scale * np.eye(50), library), method=method, num_products=12)
        np.testing.assert_allclose(estimate.value, 50.0 * scale, rtol=1e-12)
        assert estimate.stderr <= 1e-12


@pytest.mark.parametrize("method", [*METHODS, "krylov"])
def test_enough_products_are_exact(library, spectrum, method):
    matrix = dense_case(spectrum)
    estimate = trace(move(matrix, library), method=method, num_products=40)
    np.testing.assert_allclose(estimate.value, np.trace(matrix).real, rtol=1e-12)
    assert estimate.stderr == 0
    one = trace(move(np.full((1, 1), -2.0), library), method=method, num_products=1)
    assert (one.value, one.stderr) == (-2, 0)
    exact = np.sum(np.cos(np.linalg.eigvalsh(matrix)))
    both = trace(move(matrix, library), np.cos, method=method)
    np.testing.assert_allclose(both.value, exact, rtol=1e-12)


@pytest.mark.parametrize("method", ["xtrace", "xnystrace", "hutch++"])
@pytest.mark.parametrize("num_products", [36, 38, 39])
def test_nearly_as_many_products_as_dimensions(method, num_products):
    """What is left beside a sketch of all but one dimension must not be rounding errors."""
    matrix = dense(SPECTRA["uniform"])
    estimates = [trace(matrix, method=method, num_products=num_products, seed=s) for s in SEEDS]
    error = rms([e.value - 62.0 for e in estimates])
    assert error < (1.0 if method == "xnystrace" else 6.0)
    assert 0.5 < rms([e.stderr for e in estimates]) / error < 15


def test_probes_that_see_nothing_are_no_trouble():
    matrix = np.zeros((9, 9))
    matrix[0, 0] = 2.0
    probes = from_vectors(np.eye(9))  # the second of them sees nothing
    for method in METHODS:
        count = 6 if method in ("xtrace", "hutch++") else 3
        estimate = trace(matrix, method=method, num_products=count, probes=probes)
        assert np.isfinite(estimate).all()
    _, without_one = xnystrace(aslinearoperator(matrix), np.eye(9)[:, :3], resphere=False)
    assert np.isfinite(without_one).all()


# Every library, precision and kind of number


@pytest.mark.parametrize("method", [*METHODS, "krylov"])
def test_libraries_agree(library, method):
    matrix = dense(np.geomspace(0.01, 1.0, 80))
    f, options = (np.sqrt, {"num_steps": 6}) if method == "krylov" else (None, {})
    here = trace(move(matrix, library), f, method=method, num_products=60, seed=3, **options)
    reference = trace(matrix, f, method=method, num_products=60, seed=3, **options)
    np.testing.assert_allclose(here.value, reference.value, rtol=1e-9)
    np.testing.assert_allclose(here.stderr, reference.stderr, rtol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_complex_hermitian(method):
    matrix = dense(DECAYS["polynomial"], complex_=True)
    estimate = trace(matrix, method=method, num_products=60, seed=1)
    assert abs(estimate.value - DECAYS["polynomial"].sum()) < 4 * estimate.stderr


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.complex64])
@pytest.mark.parametrize("method", METHODS)
def test_low_precision(method, dtype):
    matrix = dense(DECAYS["exponential"]).astype(dtype)
    estimate = trace(matrix, method=method, num_products=60)
    exact = np.trace(matrix.astype(complex)).real
    rounding = (0.1 if dtype is np.float16 else 1e-4) * exact
    assert abs(estimate.value - exact) < 4 * estimate.stderr + rounding
    assert estimate.value.dtype == np.float64


def test_a_seed_repeats_an_estimate_and_another_changes_it():
    matrix = dense(DECAYS["flat"])
    first, again, other = (trace(matrix, seed=seed) for seed in (4, 4, 5))
    assert first == again
    assert first.value != other.value
    for method in ("hutchinson", "xnystrace"):
        assert np.isnan(trace(matrix, method=method, num_products=1).stderr)
    assert np.isnan(trace(matrix, method="xtrace", num_products=3).stderr)


# Functions


@pytest.mark.parametrize("method", [*METHODS, "krylov"])
def test_traces_of_functions(method):
    eigenvalues = 3 * 0.9 ** np.arange(300)
    counted = CountingOperator(diagonal_operator(eigenvalues))
    estimate = trace(counted, np.expm1, method=method, num_products=240, num_steps=10)
    assert abs(estimate.value - np.expm1(eigenvalues).sum()) < 4 * estimate.stderr + 1e-8
    assert estimate.stderr < 40
    assert sum(shape[1] for shape in counted.shapes) <= 240


def test_a_negative_function_of_an_indefinite_operator():
    eigenvalues = np.linspace(-1.0, 2.0, 300)
    for method in ("hutchinson", "hutch++", "xtrace", "krylov"):
        estimate = trace(
            diagonal_operator(eigenvalues),
            lambda t: -np.cosh(t),
            method=method,
            num_products=280,
            num_steps=10,
        )
        assert abs(estimate.value + np.cosh(eigenvalues).sum()) < 4 * estimate.stderr
        assert estimate.stderr < 20


# Diagonals


@pytest.mark.parametrize("method", ["xdiag", "hutchinson"])
@pytest.mark.parametrize("name", ["flat", "polynomial", "indefinite"])
def test_diagonals_are_unbiased_and_their_errors_calibrated(method, name):
    matrix = dense(DECAYS[name])
    estimates = [diagonal(matrix, method=method, num_products=60, seed=s) for s in SEEDS]
    error = np.array([e.value for e in estimates]) - np.diagonal(matrix)
    bias = np.abs(error.mean(axis=0)) / (error.std(axis=0, ddof=1) / len(SEEDS) ** 0.5)
    assert bias.max() < 5  # of 200
    assert 0.7 < rms([e.stderr for e in estimates]) / rms(error) < 1.5


def test_xdiag_wins_where_eigenvalues_decay():
    matrix = dense(DECAYS["exponential"])
    found = {m: diagonal(matrix, method=m, num_products=60) for m in ("xdiag", "hutchinson")}
    error = {m: rms(e.value - np.diagonal(matrix)) for m, e in found.items()}
    assert error["xdiag"] < 1e-3 * error["hutchinson"]


def test_exact_diagonals(library):
    estimate = diagonal(
        move(np.diag(np.arange(60.0)), library), method="hutchinson", num_products=8
    )
    np.testing.assert_allclose(estimate.value, np.arange(60.0), atol=1e-11)
    for method in ("xdiag", "hutchinson"):
        zero = diagonal(move(np.zeros((60, 60)), library), method=method, num_products=8)
        assert not zero.value.any()
        assert not zero.stderr.any()
    low_rank = dense(np.r_[np.zeros(90), -np.arange(1.0, 11.0)])
    estimate = diagonal(move(low_rank, library), num_products=60)
    np.testing.assert_allclose(estimate.value, np.diagonal(low_rank), atol=1e-11)
    few = dense_case("hermitian")
    np.testing.assert_allclose(diagonal(move(few, library)).value, np.diagonal(few).real)
    np.testing.assert_allclose(
        diagonal(move(few, library), np.square).value, np.diagonal(few @ few).real
    )


@pytest.mark.parametrize("method", ["xdiag", "hutchinson"])
@pytest.mark.parametrize("complex_", [True, False])
def test_diagonals_of_functions(method, complex_):
    matrix = dense(3 * 0.8 ** np.arange(200), complex_=complex_)
    estimate = diagonal(matrix, np.square, method=method, num_products=180, num_steps=6)
    exact = np.diagonal(matrix @ matrix).real
    assert estimate.value.shape == estimate.stderr.shape == (200,)
    assert estimate.value.dtype == np.float64
    assert rms((estimate.value - exact) / estimate.stderr) < 1.6
    assert np.isnan(diagonal(matrix, method="hutchinson", num_products=1).stderr).all()


# Log-determinants


@pytest.mark.parametrize("complex_", [True, False])
def test_logdet_agrees_with_slogdet(library, complex_):
    matrix = dense(np.linspace(0.5, 3.0, 150), complex_=complex_)
    sign, exact = np.linalg.slogdet(matrix)
    assert np.real(sign) > 0
    estimate = logdet(move(matrix, library), num_probes=6, num_steps=20)
    assert abs(estimate.value - exact) < 4 * estimate.stderr
    assert estimate.stderr < 10
    small = logdet(move(matrix, library), num_probes=15, num_steps=10)
    np.testing.assert_allclose(small.value, exact, rtol=1e-12)
    assert small.stderr == 0


@pytest.mark.parametrize("f", [np.log, np.sqrt])
def test_quadrature_with_shared_spaces_beats_deflation_for_equal_products(f):
    """The reason why `logdet` takes `slq`."""
    eigenvalues = 1e-3 + np.arange(1, 1001.0) ** -1.5
    operator = diagonal_operator(eigenvalues)
    exact = f(eigenvalues).sum()
    found = {"slq": [], "krylov": [], "xtrace": []}
    for seed in range(5):
        found["slq"].append(slq(operator, num_probes=20, num_steps=15, seed=seed).trace(f))
        for method in ("krylov", "xtrace"):
            options = {"num_products": 300, "num_steps": 15, "seed": seed}
            found[method].append(trace(operator, f, method=method, **options))
    error = {m: rms([e.value - exact for e in estimates]) for m, estimates in found.items()}
    assert error["slq"] < error["krylov"] < error["xtrace"]


@pytest.mark.parametrize("num_probes", [2, 40])
def test_logdet_refuses_what_has_none(num_probes):
    spectrum = np.linspace(-0.5, 3.0, 200)
    with pytest.raises(ValueError, match=r"not positive definite: it has the Ritz value -0\."):
        logdet(dense(spectrum), num_probes=num_probes, num_steps=20)
    singular = dense(np.r_[np.zeros(50), np.linspace(1.0, 3.0, 150)])
    with pytest.raises(ValueError, match=r"Ritz value .*e-1.*, 0 being anything"):
        logdet(singular, num_probes=num_probes, num_steps=60)
    assert np.isfinite(logdet(shift(singular, 0.1), num_probes=num_probes, num_steps=60).value)


# Refusals


def test_xnystrace_refuses_indefinite_operators():
    with pytest.raises(ValueError, match=r"Ritz value -0\.\d+ .*use method='xtrace'"):
        trace(dense(DECAYS["indefinite"]), method="xnystrace", num_products=30)
    with pytest.raises(ValueError, match="not positive semidefinite"):
        trace(-dense(DECAYS["exponential"]), method="xnystrace", num_products=30)


@pytest.mark.parametrize("method", [*METHODS[:3], "krylov"])
def test_logarithms_of_singular_or_indefinite_operators_raise(method):
    options = {"method": method, "num_products": 180, "num_steps": 30}
    for low in (0.0, -0.5):
        matrix = dense(np.r_[np.full(50, low), np.linspace(1.0, 3.0, 150)])
        with pytest.raises(ValueError, match=r"f\((0|-0\.\d+)\) = (-inf|nan)"):
            trace(matrix, np.log, **options)
    with pytest.raises(ValueError, match=r"f\(0\) = -inf"):
        trace(np.diag([0.0, 1.0]), np.log, method=method)


def test_refuses_settings_that_make_no_sense():
    matrix = dense(DECAYS["flat"])
    with pytest.raises(ValueError, match="method='hutch' is unknown; expected one of 'xtrace'"):
        trace(matrix, method="hutch")
    with pytest.raises(
        ValueError, match="method='xtrace' is unknown; expected 'xdiag' or 'hutchinson'"
    ):
        diagonal(matrix, method="xtrace")
    with pytest.raises(ValueError, match="num_products=1 must be at least 2"):
        trace(matrix, num_products=1)
    with pytest.raises(ValueError, match=r"num_products=50 must be at least 60 .* 2 columns of 30"):
        trace(matrix, np.exp, num_products=50)
    with pytest.raises(ValueError, match="at least 3 \\* num_steps = 60"):
        krylov_density(matrix, num_products=59, num_steps=20)
    with pytest.raises(ValueError, match="num_steps=5 is for functions"):
        trace(matrix, num_steps=5)
    with pytest.raises(ValueError, match="num_products=0"):
        trace(matrix, num_products=0)
    with pytest.raises(TypeError, match="f returns complex128"):
        trace(matrix, lambda t: np.exp(1j * t), num_products=60, num_steps=5)
    with pytest.raises(ValueError, match="probes=sphere only"):
        trace(matrix, method="krylov", probes=from_vectors(np.eye(200)))
    with pytest.raises(ValueError, match="seed=-1"):
        trace(matrix, seed=-1)


@pytest.mark.parametrize("num_products", [30, 300])
def test_products_that_are_not_finite_are_reported(num_products):
    broken = FunctionOperator(lambda v: v * np.nan, VectorSpace.like(np.zeros(200)), blocks=True)
    for method in METHODS:
        with pytest.raises(ValueError, match="operator @ x is not finite"):
            trace(broken, method=method, num_products=num_products)
    for method in ("xdiag", "hutchinson"):
        with pytest.raises(ValueError, match="operator @ x is not finite"):
            diagonal(broken, method=method, num_products=num_products)


@pytest.mark.parametrize("method", METHODS)
def test_arrays_that_the_operator_returns_are_not_written_to(method):
    same = FunctionOperator(lambda v: v, VectorSpace.like(np.zeros(60)), blocks=True)
    estimate = trace(same, method=method, num_products=12)  # the identity returns its argument
    np.testing.assert_allclose(estimate.value, 60.0)
