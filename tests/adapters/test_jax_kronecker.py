"""Kronecker factors of JAX layers against dense per-example Jacobians and Gauss-Newton blocks.

Every case is compiled for itself, so most are slow; `test_structure_agreement` compares one of
each kind with PyTorch in the ordinary suite.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from specdens.testing import check_operator
from specdens_jax import GaussNewton, Risk, SquaredError, next_token_loss
from specdens_jax.kronecker_factors import KroneckerFactors
from tests.adapters.jax_kronecker_cases import (
    CASES,
    CLASSES,
    FLAT,
    LABELS,
    TEXT,
    Reference,
    assert_factors,
    batches,
    dense,
    in_leaf_order,
    numbers,
    risk_of,
    rows_first,
    slow,
    smoothed,
    with_head,
)

pytestmark = pytest.mark.usefixtures("doubles")


@pytest.mark.parametrize(
    ("name", "sharing"),
    [
        ("convolution", "expand"),
        slow("rows", "expand"),
        slow("heads", "reduce"),
        slow("convolution", "reduce"),
        slow("channels", "expand"),
    ],
)
def test_factors_are_averages_of_dense_matrices(name, sharing):
    left, right = Reference(name).factors(sharing, slice(None))
    factors = KroneckerFactors(risk_of(name), "w", weight_sharing=sharing)
    assert_factors(factors, (left, right))
    assert factors.shape == (len(left), len(right))
    expected = in_leaf_order(name, left, right)
    np.testing.assert_allclose(dense(factors.operator()), expected, atol=1e-12)
    found = factors.eigsh(4)
    np.testing.assert_allclose(found.eigenvalues, np.linalg.eigvalsh(expected)[:-5:-1], atol=1e-12)
    vectors = np.asarray(found.eigenvectors)
    np.testing.assert_allclose(expected @ vectors, vectors * found.eigenvalues, atol=1e-12)


@pytest.mark.slow
def test_ragged_batches_are_added_up():
    factors = KroneckerFactors(risk_of("rows", batch_size=5, accumulate="compensated"), "w")
    assert_factors(factors, Reference("rows").factors("expand", slice(None)))


@pytest.mark.parametrize("name", ["columns", "convolution"])
@pytest.mark.slow
def test_a_bias_is_a_weight_of_one_more_input(name):
    left, right = Reference(name).factors("expand", slice(None), bias=True)
    factors = KroneckerFactors(risk_of(name), "w", bias=True)
    np.testing.assert_allclose(factors.right, right, atol=1e-12)
    m, d = len(left), len(right)
    entries = np.arange(m * d).reshape(m, d)  # those of the bias come last
    order = np.concatenate([CASES[name][5](entries[:, :-1]).ravel(), entries[:, -1]])
    expected = np.kron(left, right)[np.ix_(order, order)]
    np.testing.assert_allclose(dense(factors.operator()), expected, atol=1e-12)


@pytest.mark.parametrize(("name", "reduction"), [("rows", "sum"), ("columns", "mean")])
@pytest.mark.slow
def test_one_example_is_exact(name, reduction):
    factors = KroneckerFactors(risk_of(name, examples=[1], reduction=reduction), "w")
    block = GaussNewton(factors.risk)
    assert factors.space == block.space
    expected = dense(block)
    assert np.abs(expected).max() > 1e-3
    np.testing.assert_allclose(dense(factors.operator()), expected, atol=1e-12)
    vectors = np.linalg.eigh(expected)[1][:, ::-1][:, :2]
    np.testing.assert_allclose(factors.rank_ratio(vectors).ratio, 1, atol=1e-10)
    matrices = factors.correspondence(vectors)
    np.testing.assert_allclose(matrices.left[:2], np.eye(2), atol=1e-10)
    np.testing.assert_allclose(matrices.right[0], 1, atol=1e-10)


@pytest.mark.slow
def test_the_output_layer_has_a_null_vector():
    factors = KroneckerFactors(risk_of("rows"), "v")
    np.testing.assert_allclose(factors.left @ np.ones(CLASSES), 0, atol=1e-14)
    assert np.linalg.matrix_rank(factors.left, tol=1e-10) == CLASSES - 1


@pytest.mark.parametrize(("name", "sharing"), [("heads", "expand"), ("convolution", "reduce")])
@pytest.mark.slow
def test_factors_by_class(name, sharing):
    reference = Reference(name)
    factors = KroneckerFactors(risk_of(name), "w", per_class=True, weight_sharing=sharing)
    shares, lefts, rights = factors.class_factors
    expected = 0
    for c in range(CLASSES):
        left, right = reference.factors(sharing, c == LABELS)
        np.testing.assert_allclose(lefts[c], left, atol=1e-12)
        np.testing.assert_allclose(rights[c], right, atol=1e-12)
        own = reference.weights[c == LABELS].sum() / reference.weights.sum()
        np.testing.assert_allclose(shares[c], own, atol=1e-14)
        expected = expected + in_leaf_order(name, left, right)
    np.testing.assert_allclose(dense(factors.operator()), expected, atol=1e-12)
    assert_factors(factors, reference.factors(sharing, slice(None)))
    found = factors.eigsh(3)
    np.testing.assert_allclose(found.eigenvalues, np.linalg.eigvalsh(expected)[:-4:-1], atol=1e-10)
    assert found.pairs is None


@pytest.mark.slow
def test_one_example_of_each_class_is_exact_by_class():
    some = [0, 1]  # of classes 0 and 2, and none of class 1
    factors = KroneckerFactors(risk_of("rows", examples=some), "w", per_class=True)
    expected = dense(GaussNewton(factors.risk))
    np.testing.assert_allclose(dense(factors.operator()), expected, atol=1e-12)
    assert not factors.class_factors[1][1].any()
    apart = dense(KroneckerFactors(risk_of("rows", examples=some), "w").operator())
    assert np.abs(apart - expected).max() > 1e-4


@pytest.mark.parametrize("name", ["rows", "heads"])
@pytest.mark.slow
def test_corrected_eigenvalues_are_the_diagonal_in_the_eigenvectors(name):
    factors = KroneckerFactors(risk_of(name), "w")
    block = dense(GaussNewton(factors.risk))
    corrected = factors.corrected()
    vectors = np.asarray(factors.eigsh(factors.space.dimension).eigenvectors)
    diagonal = np.diag(vectors.T @ block @ vectors)
    expected = (vectors * diagonal) @ vectors.T
    np.testing.assert_allclose(dense(corrected), expected, atol=1e-12)
    np.testing.assert_allclose(corrected.eigenvalues.sum(), np.trace(block), rtol=1e-12)
    found = corrected.eigsh(2)
    np.testing.assert_allclose(found.eigenvalues, np.sort(diagonal)[:-3:-1], atol=1e-12)
    nearer = np.linalg.norm(expected - block)
    assert nearer < np.linalg.norm(dense(factors.operator()) - block)
    check_operator(corrected)
    check_operator(factors.operator())


def other_softmax(outputs, labels):
    """Return the loss of `risk_of` as a function that nothing is known about."""
    return smoothed()(outputs, labels)


@pytest.mark.slow
def test_any_loss_by_its_exact_hessian():
    factors = KroneckerFactors(risk_of("heads", other_softmax), "w")
    assert_factors(factors, Reference("heads").factors("expand", slice(None)))


def test_losses_other_than_softmax_cross_entropy():
    data = jnp.asarray(FLAT[:1]), jnp.zeros((1, 3))
    risk = Risk(rows_first, SquaredError(), risk_of("rows").params, data)
    factors = KroneckerFactors(risk, "w")
    np.testing.assert_allclose(
        dense(factors.operator()), dense(GaussNewton(factors.risk)), atol=1e-12
    )


@pytest.mark.slow
def test_next_tokens_as_terms_of_their_examples():
    tokens = np.random.default_rng(0).integers(3, size=(4, 5))
    tokens[1, 3:] = -100
    model = lambda params, x: jnp.cumsum(x @ params["w"], axis=1) @ params["v"]  # noqa: E731
    params = with_head(numbers(2, 3))
    data = batches(TEXT[:4], tokens)
    other = Risk(model, lambda f, y: next_token_loss(f, y), params, data)
    expected = KroneckerFactors(other, "w", weight_sharing="reduce")
    risk = Risk(model, next_token_loss, params, data)
    found = KroneckerFactors(risk, "w", per_class=True, weight_sharing="reduce")
    np.testing.assert_allclose(found.left, expected.left, atol=1e-14)
    x = TEXT[:4].mean(1)
    weights = np.array([4, 2, 4, 4])
    np.testing.assert_allclose(found.right, (x.T * weights) @ x / 14, atol=1e-14)
    counts = np.bincount(tokens[:, 1:][tokens[:, 1:] >= 0], minlength=3)
    np.testing.assert_allclose(found.class_factors[0], counts / counts.sum(), atol=1e-14)


def test_wrong_arguments_are_explained():
    risk = risk_of("rows")
    with pytest.raises(ValueError, match="matches no leaf; close to it"):
        KroneckerFactors(risk, "weight")
    with pytest.raises(ValueError, match=r"stands for \['v', 'w'\]"):
        KroneckerFactors(risk, "?")
    with pytest.raises(ValueError, match="must be one of expand, reduce"):
        KroneckerFactors(risk, "w", weight_sharing="sum")
    with pytest.raises(ValueError, match="softmax cross-entropy"):
        KroneckerFactors(risk_of("rows", SquaredError()), "w", per_class=True)
    with pytest.raises(ValueError, match="k=13 must lie between 1 and 12"):
        KroneckerFactors(risk, "w", per_class=True).eigsh(13)
    with pytest.raises(TypeError, match="expected a Risk"):
        KroneckerFactors(rows_first, "w")


def test_at_other_parameters_nothing_is_traced_again():
    traces = []

    def model(params, x):
        traces.append(x.shape)
        return rows_first(params, x)

    at = risk_of("rows")
    half = {"w": at.params["w"] / 2, "v": at.params["v"]}
    risk = Risk(model, at.loss, half, batches(FLAT))
    first = KroneckerFactors(risk, "w").left
    before = len(traces)
    second = KroneckerFactors(risk.at(at.params), "w").left
    assert traces[before:] == [(8, 4), (4, 4), (4, 4)]  # the check of a risk at new parameters
    expected, _ = Reference("rows").factors("expand", slice(None))
    np.testing.assert_allclose(second, expected, atol=1e-12)
    assert np.abs(first - second).max() > 1e-4


@pytest.mark.slow
def test_single_precision():
    with jax.enable_x64(False):
        params = with_head(numbers(4, 3), jnp.float32)
        data = [(x.astype(jnp.float32), y) for x, y in batches(FLAT)]
        loss = smoothed()
        factors = KroneckerFactors(Risk(rows_first, loss, params, data), "w")
        assert (factors.operator() @ jnp.ones(12, jnp.float32)).dtype == jnp.float32
        left, right = factors.left, factors.right
    expected = Reference("rows").factors("expand", slice(None))
    np.testing.assert_allclose(left, expected[0], atol=1e-6)
    np.testing.assert_allclose(right, expected[1], atol=1e-6)
