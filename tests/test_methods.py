"""Both Lanczos iterations: exact moments of every probe, orthogonality, memory, restarts."""

import functools
import tracemalloc

import numpy as np
import pytest
import torch

from specdens import FunctionOperator, VectorSpace, aslinearoperator, slq
from specdens.methods import columns
from specdens.methods.block import BlockLanczos, orthonormalize
from specdens.methods.lanczos import Lanczos
from specdens.probes import draw, sphere
from tests.cases import (
    SPECTRA,
    dense,
    dense_case,
    device_of,
    home,
    move,
    probe_matrix,
    probe_moments,
)

_STEPS, _PROBES, _SEED = 6, 3, 1


@functools.cache
def _exact_moments(spectrum):
    """Return every probe's moments (12, 3), scaled by the norm to the power of the degree."""
    matrix = dense_case(spectrum) / np.abs(SPECTRA[spectrum]).max()
    probes = probe_matrix(matrix, _PROBES, _SEED)
    return np.array([probe_moments(matrix, k, probes) for k in range(2 * _STEPS)])


def _moments(nodes, weights, scale):
    return np.array([(weights * (nodes / scale) ** k).sum(axis=1) for k in range(2 * _STEPS)])


@pytest.mark.parametrize("reorthogonalize", [True, False])
def test_moments_of_every_probe_are_exact_to_degree_2m_minus_1(library, spectrum, reorthogonalize):
    matrix = move(dense_case(spectrum), library)
    expected, scale = _exact_moments(spectrum), np.abs(SPECTRA[spectrum]).max()
    for block_size in (1, 2, 3):
        measure = slq(
            matrix,
            num_probes=_PROBES,
            num_steps=_STEPS,
            seed=_SEED,
            block_size=block_size,
            reorthogonalize=reorthogonalize,
        )
        plain, shared = measure.plain(), measure.rule.shared
        assert plain.nodes.shape == (_PROBES, _STEPS)
        for rule in (plain, shared):
            found = _moments(rule.nodes, rule.weights, scale)
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)
        if not len(measure.outliers):
            found = _moments(measure.nodes, measure.weights, scale)
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("reorthogonalize", [True, False])
def test_the_default_measure_is_exact_where_nothing_is_resolved(reorthogonalize):
    matrix, scale = dense(np.linspace(0.1, 3.0, 300)), 3.0
    probes = probe_matrix(matrix / scale, _PROBES, _SEED)
    measure = slq(
        matrix, num_probes=3, num_steps=_STEPS, seed=_SEED, reorthogonalize=reorthogonalize
    )
    assert len(measure.outliers) == 0
    found = _moments(measure.nodes, measure.weights, scale)
    for k in range(2 * _STEPS):
        expected = probe_moments(matrix / scale, k, probes)
        np.testing.assert_allclose(found[k], expected, rtol=0, atol=1e-12)


def test_degree_2m_is_not_exact():
    matrix = dense(np.linspace(0.1, 3.0, 300))
    measure = slq(matrix, num_probes=1, num_steps=3).plain()
    expected = probe_moments(matrix, 6, probe_matrix(matrix, 1, 0))
    assert abs((measure.weights * measure.nodes**6).sum() - expected[0]) > 1e-2


@pytest.mark.parametrize("reorthogonalize", [True, False])
def test_blocks_change_neither_probes_nor_their_gauss_rules(reorthogonalize):
    matrix = dense(np.linspace(-1, 3, 60))
    rules = [
        slq(matrix, num_probes=5, num_steps=8, block_size=b, reorthogonalize=reorthogonalize)
        for b in (1, 2, 5)
    ]
    for measure in rules[1:]:
        np.testing.assert_allclose(measure.plain().nodes, rules[0].plain().nodes, atol=1e-11)
        np.testing.assert_allclose(measure.plain().weights, rules[0].plain().weights, atol=1e-11)


def test_both_methods_find_the_same_gauss_rule():
    matrix = dense(np.linspace(-1, 3, 60))
    first, second = (
        slq(matrix, num_probes=4, num_steps=8, reorthogonalize=keep).plain()
        for keep in (True, False)
    )
    np.testing.assert_allclose(first.nodes, second.nodes, atol=1e-11)
    np.testing.assert_allclose(first.weights, second.weights, atol=1e-11)


@pytest.mark.parametrize("method", [BlockLanczos, Lanczos])
def test_state_stays_on_the_device(library, method):
    matrix = move(dense(np.linspace(0, 1, 20)), library)
    seen = []

    def product(x):
        seen.append((type(x), device_of(x)))
        return matrix @ x

    operator = FunctionOperator(product, VectorSpace.like(matrix), blocks=True)
    iteration = method(3)
    state = iteration.init(operator, draw(sphere, operator.space, 0, range(2)))
    while not iteration.done(state):
        state = iteration.step(operator, state)
    vectors = state.basis if method is BlockLanczos else (state.q, state.q_prev, state.signs)
    for array in vectors:
        assert type(array) is type(matrix)
        assert device_of(array) == device_of(matrix)
    assert seen == [(type(matrix), device_of(matrix))] * 3


def test_ritz_residuals_are_true_residuals():
    host = dense(np.linspace(0, 1, 40))
    measure = slq(host, num_probes=2, num_steps=5)
    shared = measure.rule.shared
    basis = probe_matrix(host, 2, 0)
    krylov = np.concatenate([np.linalg.matrix_power(host, k) @ basis for k in range(5)], axis=1)
    basis = np.linalg.qr(krylov)[0]
    theta, vectors = np.linalg.eigh(basis.T @ host @ basis)
    residuals = np.linalg.norm(host @ basis @ vectors - basis @ vectors * theta, axis=0)
    np.testing.assert_allclose(shared.nodes[0], theta, atol=1e-9)
    np.testing.assert_allclose(shared.residuals[0], residuals, atol=1e-9)


@pytest.mark.parametrize("condition", [1.0, 1e5, 1e12])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_orthonormalize_factors_blocks_of_any_condition(condition, scale):
    space = VectorSpace.like(np.zeros(50))
    do = columns.kernels(space.backend, space.wide_dtype)
    rng = np.random.default_rng(0)
    left = np.linalg.qr(rng.standard_normal((50, 4)))[0]
    right = np.linalg.qr(rng.standard_normal((4, 4)))[0]
    w = scale * (left * np.geomspace(1, 1 / condition, 4)) @ right
    q, r = orthonormalize(w.T.copy(), 0.0, space, do)
    np.testing.assert_allclose(q @ q.T, np.eye(4), atol=1e-13)
    np.testing.assert_allclose(q.T @ r, w, atol=1e-14 * scale)


def test_orthonormalize_drops_directions_below_the_floor():
    space = VectorSpace.like(np.zeros(50))
    do = columns.kernels(space.backend, space.wide_dtype)
    w = np.zeros((3, 50))
    w[:, 0], w[0, 1] = 1.0, 1e-8  # three vectors along e_0, one of them slightly off
    q, r = orthonormalize(w.copy(), 1e-6, space, do)
    norms = np.linalg.norm(q, axis=1)
    np.testing.assert_allclose(np.sort(norms), [0, 0, 1], atol=1e-12)
    np.testing.assert_allclose(q.T @ r, w.T, atol=1e-7)


@pytest.mark.parametrize("size", [5, 64])
def test_sketches_sum_signed_entries_over_residue_classes(library, size):
    n = 200
    q = np.random.default_rng(0).standard_normal((n, 2))
    signs = np.random.default_rng(1).choice([-1, 1], n).astype(np.int8)
    found = home(columns.sketch(move(q, library), move(signs, library), size=size))
    expected = np.stack([(signs[:, None] * q)[j::size].sum(axis=0) for j in range(size)])
    np.testing.assert_allclose(found, expected, atol=1e-13)


def test_inner_products_of_single_precision_are_added_in_double():
    n = 200_000
    x = np.full((n, 1), 0.1, np.float32)
    exact = n * float(np.float32(0.1)) ** 2
    total = columns.inner(x.T, x.T, wide=np.float64)
    assert total.dtype == np.float64
    assert float(total[0, 0]) == pytest.approx(exact, rel=1e-12)
    _, norm = columns.subtract(x.copy(), x, np.zeros(1, np.float32), wide=np.float64)
    assert float(norm[0]) == pytest.approx(exact**0.5, rel=1e-12)


_N_LARGE = 200_000


def _peak_vectors(block_size, dtype, **options):
    """Return the largest memory at any time during a run, in vectors per probe of the block."""
    values = np.linspace(0, 1, _N_LARGE, dtype=dtype)[:, None]
    space = VectorSpace.like(values)
    operator = FunctionOperator(lambda x: values * x if x.ndim == 2 else values[:, 0] * x, space)
    run = functools.partial(slq, operator, num_probes=block_size, block_size=block_size, **options)
    # As many steps as below: what is imported or compiled the first time does not count, and the
    # third step is the first whose coefficients are not contiguous, which numba compiles anew.
    run(num_steps=4)
    peaks = []
    for _ in range(2):  # what else happens in the process can only add to one of them
        tracemalloc.start()
        try:
            run(num_steps=4)
            peaks.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
    return min(peaks) / (values.nbytes * block_size)


@pytest.mark.parametrize("block_size", [1, 4, 10])
def test_four_vectors_per_probe_without_reorthogonalization(block_size):
    # 10 % for signs, sketches, and the blocks of rows that sums run over.
    assert _peak_vectors(block_size, np.float64, reorthogonalize=False) <= 4 * 1.1


@pytest.mark.parametrize(("block_size", "slack"), [(1, 1.35), (4, 1.15), (10, 1.15)])
def test_four_vectors_per_probe_in_single_precision(block_size, slack):
    # Blocks of rows are added in double precision; a probe alone is drawn in it, which is the peak.
    assert _peak_vectors(block_size, np.float32, reorthogonalize=False) <= 4 * slack


@pytest.mark.parametrize("block_size", [1, 4])
def test_four_vectors_and_one_per_step_with_reorthogonalization(block_size):
    assert _peak_vectors(block_size, np.float64, reorthogonalize=True) <= (4 + 4) * 1.1


@pytest.mark.parametrize("method", [BlockLanczos, Lanczos])
def test_declared_memory_is_the_memory_used(method):
    space = VectorSpace.like(torch.zeros(1000, dtype=torch.bfloat16))
    kept = 4 + (20 if method is BlockLanczos else 0)
    assert method(20).memory(space) == kept * 4000  # vectors are kept in float32


@pytest.mark.parametrize("method", [BlockLanczos, Lanczos])
def test_a_step_does_not_touch_the_state_it_starts_from(library, method):
    operator = aslinearoperator(move(dense(np.linspace(0, 1, 20)), library))
    iteration = method(5)
    state = iteration.init(operator, draw(sphere, operator.space, 0, range(2)))
    state = iteration.step(operator, state)
    before = iteration.to_arrays(operator.space, state)
    before = {name: value.copy() for name, value in before.items()}
    once = iteration.step(operator, state)
    twice = iteration.step(operator, state)
    after = iteration.to_arrays(operator.space, state)
    for name, value in before.items():
        np.testing.assert_array_equal(after[name], value)
    for name, value in iteration.to_arrays(operator.space, once).items():
        np.testing.assert_array_equal(iteration.to_arrays(operator.space, twice)[name], value)


@pytest.mark.parametrize("method", [BlockLanczos, Lanczos])
def test_states_survive_the_host_to_the_last_bit(library, method):
    operator = aslinearoperator(move(dense(np.linspace(0, 1, 20)), library))
    iteration = method(5)
    state = iteration.init(operator, draw(sphere, operator.space, 0, range(2)))
    state = iteration.step(operator, iteration.step(operator, state))
    again = iteration.from_arrays(operator.space, iteration.to_arrays(operator.space, state))
    rule, same = (iteration.finish(operator, iteration.step(operator, s)) for s in (state, again))
    for name, value in rule.to_arrays().items():
        np.testing.assert_array_equal(same.to_arrays()[name], value)


@pytest.mark.parametrize("reorthogonalize", [True, False])
def test_rows_end_where_the_krylov_space_does(library, reorthogonalize):
    matrix = move(dense(np.repeat([-1.0, 3.0], 20)), library)  # two different eigenvalues
    gauss = slq(matrix, num_probes=3, num_steps=20, reorthogonalize=reorthogonalize).rule.gauss
    assert gauss.nodes.shape == (3, 20)
    for nodes, weights, residuals in zip(gauss.nodes, gauss.weights, gauss.residuals, strict=True):
        np.testing.assert_allclose(nodes[:2], [-1.0, 3.0], atol=1e-12)
        assert weights[:2].sum() == pytest.approx(1)
        assert not weights[2:].any()
        assert np.isinf(residuals[2:]).all()


@pytest.mark.parametrize("method", [BlockLanczos, Lanczos])
def test_products_that_are_not_finite_are_reported_with_their_step(method):
    calls = []

    def product(x):
        calls.append(1)
        return x * (np.nan if len(calls) == 3 else np.linspace(1, 2, 20)[:, None])

    operator = FunctionOperator(product, VectorSpace.like(np.zeros(20)), blocks=True)
    with pytest.raises(ValueError, match=r"operator @ x is not finite: .* of step 3 is nan\. Look"):
        slq(operator, num_probes=2, num_steps=5, reorthogonalize=method is BlockLanczos)
