"""Block diagonals, Kronecker products, congruences and powers, against dense linear algebra."""

import functools

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given
from hypothesis import strategies as st

from specdens import FunctionOperator, VectorSpace, aslinearoperator, shift, slq
from specdens.structured import block_diagonal, congruence, kronecker, power
from specdens.testing import check_operator
from tests.cases import CountingOperator, dense, device_of, home, move

_RNG = np.random.default_rng(4)


def hermitian(n, seed=0, complex_=False):
    return dense(np.linspace(-1.0, 2.0, n), seed=seed, complex_=complex_)


@pytest.fixture(params=[False, True], ids=["real", "complex"])
def complex_(request):
    return request.param


def assert_acts_like(operator, expected, library):
    """Compare vectors and blocks with a dense matrix; dtype, library and device stay."""
    n, space = len(expected), operator.space
    assert space.dimension == n
    for columns in ((), (1,), (3,)):
        x = _RNG.standard_normal((n, *columns)).astype(expected.dtype)
        if np.iscomplexobj(expected):
            x = x + 1j * _RNG.standard_normal(x.shape)
        there = move(x, library)
        y = operator @ there
        assert type(y) is type(there)
        assert (device_of(y), y.dtype) == (device_of(there), there.dtype)
        np.testing.assert_allclose(home(y), expected @ x, rtol=1e-12, atol=1e-12)
    check_operator(operator)


def test_block_diagonal(library, complex_):
    matrices = [hermitian(n, n, complex_) for n in (3, 1, 4)]
    blocks = [move(m, library) for m in matrices]
    expected = scipy.linalg.block_diag(*matrices)
    assert_acts_like(block_diagonal(blocks), expected, library)
    operators = tuple(aslinearoperator(block) for block in blocks)
    nested = block_diagonal([block_diagonal(operators[:2]), 2.0 * operators[2]])
    expected[4:, 4:] *= 2
    assert_acts_like(nested, expected, library)


def test_eigenvalues_of_blocks_are_those_of_the_whole():
    values = np.array([-2.0, 0.5, 1.0, 3.0, 4.0])
    whole = block_diagonal([dense(values[:2]), dense(values[2:])])
    np.testing.assert_allclose(np.sort(slq(whole).outliers.eigenvalues), values, atol=1e-10)


def test_a_block_diagonal_needs_blocks():
    with pytest.raises(ValueError, match="blocks is empty"):
        block_diagonal([])


def test_kronecker(library, complex_):
    left, right = hermitian(3, 1, complex_), hermitian(5, 2, complex_)
    operator = kronecker(move(left, library), aslinearoperator(move(right, library)))
    assert_acts_like(operator, np.kron(left, right), library)


def test_kronecker_of_three_factors(library):
    factors = [hermitian(n, n) for n in (2, 3, 2)]
    a, b, c = (move(f, library) for f in factors)
    expected = functools.reduce(np.kron, factors)
    assert_acts_like(kronecker(a, kronecker(b, c)), expected, library)
    assert_acts_like(kronecker(kronecker(a, b), c), expected, library)


@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 4))
def test_kronecker_of_any_size(m, n, columns):
    left, right = hermitian(m, m), hermitian(n, n + 10)
    x = np.random.default_rng(m * n).standard_normal((m * n, columns))
    np.testing.assert_allclose(
        kronecker(left, right) @ x, np.kron(left, right) @ x, rtol=1e-12, atol=1e-12
    )


def test_kronecker_multiplies_each_factor_once():
    left, right = (CountingOperator(aslinearoperator(hermitian(n))) for n in (3, 5))
    kronecker(left, right) @ np.ones((15, 4))
    assert left.shapes == [(3, 20)]
    assert right.shapes == [(5, 12)]


def test_congruence_with_a_hermitian_operator(library, complex_):
    outer, inner = hermitian(6, 1, complex_), hermitian(6, 2, complex_)
    C = shift(move(outer, library), 0.5)  # noqa: N806
    C_dense = outer + 0.5 * np.eye(6)  # noqa: N806
    assert_acts_like(congruence(C, move(inner, library)), C_dense @ inner @ C_dense, library)


@pytest.mark.parametrize("rank", [1, 2, 6, 8])
def test_congruence_with_a_matrix_of_any_shape(library, complex_, rank):
    inner = hermitian(6, 2, complex_)
    C = _RNG.standard_normal((6, rank)).astype(inner.dtype)  # noqa: N806
    C = C + (1j * _RNG.standard_normal(C.shape) if complex_ else 0)  # noqa: N806
    operator = congruence(move(C, library), move(inner, library))
    assert_acts_like(operator, C.conj().T @ inner @ C, library)


def test_congruence_with_functions(library, complex_):
    inner = hermitian(6, 2, complex_)
    host = _RNG.standard_normal((6, 4)).astype(inner.dtype) * (1j if complex_ else 1)
    C, adjoint = move(host, library), move(host.conj().T.copy(), library)  # noqa: N806
    pair = (lambda x: C @ x, lambda y: adjoint @ y)
    like = move(np.zeros(4, inner.dtype), library)
    operator = congruence(pair, move(inner, library), space=VectorSpace.like(like))
    assert_acts_like(operator, host.conj().T @ inner @ host, library)


def test_congruence_keeps_the_inertia():
    values = np.array([-3.0, -1.0, 0.0, 0.0, 2.0, 5.0])
    C = np.tril(_RNG.standard_normal((6, 6))) + 4 * np.eye(6)  # noqa: N806
    found = np.linalg.eigvalsh(congruence(C, dense(values)) @ np.eye(6))
    assert [(found < -1e-9).sum(), (found > 1e-9).sum()] == [2, 2]


@pytest.mark.parametrize(
    ("C", "options", "error", "text"),
    [
        (np.ones((4, 2)), {}, ValueError, "C has 4 rows and A dimension 6"),
        (np.eye(6)[0], {}, ValueError, r"C has shape \(6,\); expected \(n, k\)"),
        (np.ones((6, 0)), {}, ValueError, r"C has shape \(6, 0\)"),
        (torch.ones(6, 2), {}, ValueError, "C is float32 of torch on cpu, A is float64 of numpy"),
        (np.ones((6, 2), np.float32), {}, ValueError, "C is float32 .*, A is float64"),
        ((np.sin, np.cos), {}, TypeError, "needs two callables.*and space=VectorSpace"),
        ((np.sin,), {"space": VectorSpace.like(np.ones(2))}, TypeError, "needs two callables"),
        (np.ones((6, 2)), {"space": VectorSpace.like(np.ones(3))}, ValueError, "leave it out"),
    ],
)
def test_congruence_checks_its_arguments(C, options, error, text):  # noqa: N803
    with pytest.raises(error, match=text):
        congruence(C, hermitian(6), **options)


def test_a_pair_that_returns_the_wrong_length_is_found():
    pair = (lambda x: x, lambda y: y)
    operator = congruence(pair, hermitian(6), space=VectorSpace.like(np.ones(4)))
    with pytest.raises(ValueError, match=r"C x has shape \(4,\) for x of shape \(4,\); \(6,\)"):
        operator @ np.ones(4)


@pytest.mark.parametrize("exponent", [1, 2, 5])
def test_power(library, complex_, exponent):
    matrix = hermitian(6, 3, complex_)
    expected = np.linalg.matrix_power(matrix, exponent)
    assert_acts_like(power(move(matrix, library), exponent), expected, library)


@pytest.mark.parametrize(
    ("exponent", "error", "text"),
    [
        (0, ValueError, "exponent=0 must be at least 1"),
        (-1, ValueError, r"exponent=-1 must be at least 1; inverse\(A\)"),
        (0.5, TypeError, "exponent=0.5 must be an integer; apply_function"),
    ],
)
def test_power_checks_its_exponent(exponent, error, text):
    with pytest.raises(error, match=text):
        power(np.eye(2), exponent)


@pytest.mark.parametrize("make", [lambda A, B: block_diagonal([A, B]), kronecker])  # noqa: N803
def test_factors_of_different_kind_are_named(make):
    numpy_ = np.eye(2)
    for other, text in [
        (np.eye(2, dtype=np.float32), "float64 of numpy on cpu, .* is float32 of numpy"),
        (np.eye(2, dtype=np.complex64), "float64 of numpy on cpu, .* is complex64"),
        (torch.eye(2, dtype=torch.float64), "float64 of numpy on cpu, .* is float64 of torch"),
    ]:
        with pytest.raises(ValueError, match=text):
            make(numpy_, other)
    first, second = (move(np.eye(2), f"strict:{name}") for name in ("device1", "device2"))
    with pytest.raises(ValueError, match=r"on .*device1.* on .*device2"):
        make(first, second)


def structured_of(A):  # noqa: N803
    """Return one operator of every kind, made of one."""
    n = A.space.dimension
    made = {
        "blocks": block_diagonal([A, A]),
        "kronecker": kronecker(A, A),
        "congruence": congruence(A, A),
        "power": power(A, 2),
    }
    sizes = {"blocks": 2 * n, "kronecker": n * n, "congruence": n, "power": n}
    return [(made[name], sizes[name]) for name in made]


@pytest.mark.parametrize("matrix", [np.zeros((3, 3)), np.eye(3), np.array([[2.0]])])
def test_special_matrices(matrix):
    for operator, n in structured_of(aslinearoperator(matrix)):
        factors = {"block": 1, "krone": 2, "congr": 3, "power": 2}[repr(operator)[:5]]
        np.testing.assert_array_equal(operator @ np.eye(n), matrix[0, 0] ** factors * np.eye(n))


def test_half_precision_is_kept():
    matrix = torch.tensor(hermitian(6, 1), dtype=torch.bfloat16)
    matrix = (matrix + matrix.T) / 2
    exact = matrix.double().numpy()
    # Entries and sums are below 4; every product rounds to 8 bits, a handful of times.
    for (half, n), (double, _) in zip(
        structured_of(aslinearoperator(matrix)),
        structured_of(aslinearoperator(exact)),
        strict=True,
    ):
        y = half @ torch.ones(n, dtype=torch.bfloat16)
        assert y.dtype == torch.bfloat16
        np.testing.assert_allclose(home(y.double()), double @ np.ones(n), atol=0.05)


def test_vectors_of_another_length_are_refused():
    for operator, n in structured_of(aslinearoperator(hermitian(3))):
        for length in (n - 1, n + 1):
            with pytest.raises(ValueError, match=f"x has length {length}, .* has dimension {n}"):
                operator @ np.ones((length, 2))


def test_products_that_are_not_finite_stay_so():
    space = VectorSpace.like(np.zeros(3))
    broken = FunctionOperator(lambda x: x * np.nan, space)
    for operator, n in structured_of(broken):
        assert np.isnan(operator @ np.ones(n)).all()


def test_structured_operators_add_and_print():
    A = aslinearoperator(hermitian(2))  # noqa: N806
    total = kronecker(A, A) + 2 * block_diagonal([A, A])
    expected = np.kron(A.matrix, A.matrix) + 2 * scipy.linalg.block_diag(A.matrix, A.matrix)
    np.testing.assert_allclose(total @ np.eye(4), expected, atol=1e-14)
    assert [repr(operator) for operator, _ in structured_of(A)] == [
        f"block_diagonal([{A!r}, {A!r}])",
        f"kronecker({A!r}, {A!r})",
        f"congruence({A!r}, n=2)",
        f"power({A!r}, 2)",
    ]
