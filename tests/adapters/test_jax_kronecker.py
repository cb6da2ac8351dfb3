"""Kronecker factors of JAX layers against dense per-example Jacobians and Gauss-Newton blocks."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from specdens.testing import check_operator
from specdens_jax import (
    CrossEntropy,
    GaussNewton,
    Risk,
    SquaredError,
    next_token_loss,
)
from specdens_jax.kronecker_factors import KroneckerFactors
from specdens_jax.tapping import tapped

WEIGHTS = (1.0, 3.0, 0.5)
CLASSES = 3


@pytest.fixture(autouse=True)
def doubles():
    with jax.enable_x64(True):
        yield


def numbers(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


LABELS = np.array([0, 2, -100, 1, 0, 2, 2])
FLAT, TEXT = numbers(7, 4, seed=1), numbers(7, 5, 2, seed=1)
HEAD = numbers(3, CLASSES, seed=4)


# Models whose layer "w" is written twice: as a function of a change of its outputs, too.


def rows_first(params, x, change=0.0):  # as in Flax: (inputs, outputs)
    return jnp.tanh(x @ params["w"] + change + 0.3) @ params["v"]


def columns_first(params, x, change=0.0):  # as in PyTorch: (outputs, inputs)
    return jnp.tanh((params["w"] @ x.T).T + change) @ params["v"]


def heads(params, x, change=0.0):  # inputs between two axes of outputs; places share the weight
    z = jnp.einsum("nsd,hdk->nshk", x, params["w"]) + change
    return jnp.tanh(z).mean(1).reshape(len(x), -1) @ params["v"]


def convolution(params, x, change=0.0):
    z = jax.lax.conv_general_dilated(
        x, params["w"], (2,), [(1, 0)], rhs_dilation=(2,), dimension_numbers=("NWC", "WIO", "NWC")
    )
    return jnp.tanh(z + change).sum(1) @ params["v"]


def channels_first(params, x, change=0.0):
    z = jax.lax.conv_general_dilated(
        x.swapaxes(1, 2), params["w"], (2,), [(1, 0)], rhs_dilation=(2,)
    )
    return jnp.tanh(z.swapaxes(1, 2) + change).sum(1) @ params["v"]


def patches(x):
    """Write out what the convolutions above multiply, (places, window * channels)."""
    padded = np.concatenate([np.zeros((1, 2)), x])
    return np.stack([padded[[start, start + 2]].ravel() for start in (0, 2)])


KERNEL = numbers(2, 2, 3, seed=5)  # window, channels, outputs
CASES = {  # model, w, inputs, what is multiplied, shape of z, leaf from (m, d)
    "rows": (rows_first, numbers(4, 3), FLAT, lambda x: x[None], (1, 3), lambda a: a.T),
    "columns": (columns_first, numbers(3, 4), FLAT, lambda x: x[None], (1, 3), lambda a: a),
    "heads": (
        heads, numbers(3, 2, 1), TEXT, lambda x: x, (5, 3, 1), lambda a: a.reshape(3, 1, 2).mT
    ),
    "convolution": (convolution, KERNEL, TEXT, patches, (2, 3), lambda a: a.T),
    "channels": (
        channels_first, KERNEL.transpose(2, 1, 0), TEXT,
        lambda x: patches(x).reshape(2, 2, 2).swapaxes(1, 2).reshape(2, 4), (2, 3), lambda a: a,
    ),
}  # fmt: skip


def batches(inputs, targets=LABELS, size=7):
    cuts = range(0, len(inputs), size)
    return [(jnp.asarray(inputs[i : i + size]), jnp.asarray(targets[i : i + size])) for i in cuts]


def risk_of(name, loss=None, examples=slice(None), **options):
    model, w, inputs, *_ = CASES[name]
    params = {"w": jnp.asarray(w), "v": jnp.asarray(HEAD)}
    loss = CrossEntropy(class_weights=WEIGHTS, label_smoothing=0.1) if loss is None else loss
    return Risk(model, loss, params, batches(inputs[examples], LABELS[examples]), **options)


def dense(operator):
    return np.asarray(operator @ jnp.eye(operator.space.dimension, dtype=operator.space.dtype))


@functools.cache
class Reference:
    """M (N, S, m, S, m) and x (N, S, d) of every example, and weights, from dense derivatives."""

    def __init__(self, name):
        model, w, inputs, rows, shape, _ = CASES[name]
        params = {"w": jnp.asarray(w), "v": jnp.asarray(HEAD)}
        kept, own = LABELS >= 0, np.array(WEIGHTS)
        soft = 0.9 * np.eye(CLASSES)[LABELS * kept] * own[LABELS * kept, None] + 0.1 / 3 * own

        def curvature(x, mixed):
            def outputs(z):
                return model(params, x[None], z)[0]

            zero = jnp.zeros(shape[-1:] if shape[0] == 1 else shape)
            slopes = jax.jacrev(outputs)(zero).reshape(CLASSES, -1)
            loss = lambda f: -(mixed * jax.nn.log_softmax(f)).sum()  # noqa: E731
            return slopes.T @ jax.hessian(loss)(outputs(zero)) @ slopes

        self.weights = np.where(kept, own[LABELS * kept], 0)
        self.x = np.stack([rows(x) for x in inputs])
        found = jax.jit(jax.vmap(curvature))(inputs, soft * kept[:, None])
        places, outputs = self.x.shape[1], found.shape[1] // self.x.shape[1]
        self.curvature = np.asarray(found).reshape(-1, places, outputs, places, outputs)

    def factors(self, sharing, some, *, bias=False):
        """Return sum of M over sum of all weights, and the average of x x^T, of some examples."""
        x, curvature, weights = self.x[some], self.curvature[some], self.weights[some]
        if bias:
            x = np.concatenate([x, np.ones((*x.shape[:2], 1))], axis=2)
        if sharing == "reduce":
            left, x = curvature.sum((0, 1, 3)), x.mean(1, keepdims=True)
        else:
            left = np.einsum("nsasb->ab", curvature)
        right = np.einsum("n,nsd,nse->de", weights, x, x) / (weights.sum() * x.shape[1])
        return left / self.weights.sum(), right


def in_leaf_order(name, left, right):
    """Return left kron right with rows and columns in the order of the leaf."""
    m, d = len(left), len(right)
    order = CASES[name][5](np.arange(m * d).reshape(m, d)).ravel()
    return np.kron(left, right)[np.ix_(order, order)]


@pytest.mark.parametrize(
    ("name", "sharing"),
    [
        ("rows", "expand"), ("heads", "reduce"), ("convolution", "expand"),
        ("convolution", "reduce"), ("channels", "expand"),
    ],
)  # fmt: skip
def test_factors_are_averages_of_dense_matrices(name, sharing):
    left, right = Reference(name).factors(sharing, slice(None))
    factors = KroneckerFactors(risk_of(name), "w", weight_sharing=sharing)
    np.testing.assert_allclose(factors.left, left, atol=1e-12)
    np.testing.assert_allclose(factors.right, right, atol=1e-12)
    assert factors.shape == (len(left), len(right))
    expected = in_leaf_order(name, left, right)
    np.testing.assert_allclose(dense(factors.operator()), expected, atol=1e-12)
    found = factors.eigsh(4)
    np.testing.assert_allclose(found.eigenvalues, np.linalg.eigvalsh(expected)[:-5:-1], atol=1e-12)
    vectors = np.asarray(found.eigenvectors)
    np.testing.assert_allclose(expected @ vectors, vectors * found.eigenvalues, atol=1e-12)


def test_ragged_batches_are_added_up():
    left, right = Reference("rows").factors("expand", slice(None))
    factors = KroneckerFactors(risk_of("rows", batch_size=4, accumulate="compensated"), "w")
    np.testing.assert_allclose(factors.left, left, atol=1e-12)
    np.testing.assert_allclose(factors.right, right, atol=1e-12)


@pytest.mark.parametrize("name", ["columns", "convolution"])
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


def test_the_output_layer_has_a_null_vector():
    factors = KroneckerFactors(risk_of("rows"), "v")
    np.testing.assert_allclose(factors.left @ np.ones(CLASSES), 0, atol=1e-14)
    assert np.linalg.matrix_rank(factors.left, tol=1e-10) == CLASSES - 1


@pytest.mark.parametrize(("name", "sharing"), [("heads", "expand"), ("convolution", "reduce")])
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
    left, right = reference.factors(sharing, slice(None))
    np.testing.assert_allclose(factors.left, left, atol=1e-12)
    np.testing.assert_allclose(factors.right, right, atol=1e-12)
    found = factors.eigsh(3)
    np.testing.assert_allclose(found.eigenvalues, np.linalg.eigvalsh(expected)[:-4:-1], atol=1e-10)
    assert found.pairs is None


def test_one_example_of_each_class_is_exact_by_class():
    some = [0, 1]  # of classes 0 and 2, and none of class 1
    factors = KroneckerFactors(risk_of("rows", examples=some), "w", per_class=True)
    expected = dense(GaussNewton(factors.risk))
    np.testing.assert_allclose(dense(factors.operator()), expected, atol=1e-12)
    assert not factors.class_factors[1][1].any()
    apart = dense(KroneckerFactors(risk_of("rows", examples=some), "w").operator())
    assert np.abs(apart - expected).max() > 1e-4


@pytest.mark.parametrize("name", ["columns", "heads"])
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
    return CrossEntropy(class_weights=WEIGHTS, label_smoothing=0.1)(outputs, labels)


def test_any_loss_by_its_exact_hessian():
    left, right = Reference("heads").factors("expand", slice(None))
    factors = KroneckerFactors(risk_of("heads", other_softmax), "w")
    np.testing.assert_allclose(factors.left, left, atol=1e-12)
    np.testing.assert_allclose(factors.right, right, atol=1e-12)
    data = jnp.asarray(FLAT[:1]), jnp.zeros((1, 3))
    risk = Risk(rows_first, SquaredError(), risk_of("rows").params, data)
    factors = KroneckerFactors(risk, "w")
    np.testing.assert_allclose(
        dense(factors.operator()), dense(GaussNewton(factors.risk)), atol=1e-12
    )


def test_next_tokens_as_terms_of_their_examples():
    tokens = np.random.default_rng(0).integers(3, size=(4, 5))
    tokens[1, 3:] = -100
    model = lambda params, x: jnp.cumsum(x @ params["w"], axis=1) @ params["v"]  # noqa: E731
    params = {"w": jnp.asarray(numbers(2, 3)), "v": jnp.asarray(HEAD)}
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


def single(params, x):
    return rows_first(params, x[None])[0]


@jax.custom_jvp
def with_rule(w, x):
    return x @ w


with_rule.defjvp(lambda values, slopes: (with_rule(*values), slopes[1] @ values[0]))
WRAPPED = {
    "jit": jax.jit(rows_first),
    "nested": jax.jit(lambda p, x: jax.jit(rows_first)({**p, "w": jnp.copy(p["w"])}, x)),
    "vmap": jax.vmap(single, in_axes=(None, 0)),
    "remat": jax.checkpoint(rows_first),
    "rule": lambda p, x: jnp.tanh(with_rule(p["w"], x) + 0.3) @ p["v"],
    "rearranged": lambda p, x: (
        jnp.tanh(x[:, ::-1] @ jnp.flip(p["w"].T[None].mT[0], 0) + 0.3) @ p["v"]
    ),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_functions_in_functions_are_followed(name):
    params, x = {"w": jnp.asarray(CASES["rows"][1]), "v": jnp.asarray(HEAD)}, jnp.asarray(FLAT)

    def function(w, rest, inputs):
        return [WRAPPED[name]({**rest, "w": w}, inputs)]

    found = tapped(function, (params["w"], {"v": params["v"]}, x), "w")
    np.testing.assert_array_equal(found.product.places, np.arange(12).reshape(4, 3).T)
    change = numbers(7, 3, seed=8)
    own = jnp.asarray(change).reshape(found.shape)
    (outputs,), multiplied = found.run(own)
    np.testing.assert_allclose(outputs, rows_first(params, x, change), atol=1e-14)
    np.testing.assert_array_equal(found.product.input_rows(multiplied, 7)[:, 0], FLAT)
    np.testing.assert_array_equal(found.product.output_rows(own, 7)[:, 0], change)


def test_outputs_may_be_a_pytree():
    def model(params, x):
        return {"logits": jax.jit(rows_first)(params, x), "steps": len(x), "name": "net"}

    left, right = Reference("rows").factors("expand", slice(None))
    loss = CrossEntropy(class_weights=WEIGHTS, label_smoothing=0.1)
    factors = KroneckerFactors(Risk(model, loss, risk_of("rows").params, batches(FLAT)), "w")
    np.testing.assert_allclose(factors.left, left, atol=1e-12)
    np.testing.assert_allclose(factors.right, right, atol=1e-12)


def tied(params, x):
    return jnp.tanh(x @ params["w"]) @ params["w"].T[:, :3] @ params["v"]


def looped(params, x):
    return jax.lax.scan(lambda h, _: (jnp.tanh(h @ params["w"]), None), x, None, length=2)[0]


REFUSED = {
    "tied": (lambda p, x: tied(p, x[:, :3]), r"'w' is used 2 times .*dot_general.*leaf of its own"),
    "looped": (lambda p, x: looped(p, x[:, :3]), r"'w' is used inside scan"),
    "unused": (lambda p, x: x[:, :3], r"'w' has no effect"),
    "looked up": (lambda p, x: p["w"][jnp.argmax(x[:, :3], 1)], r"used by gather, not as one"),
    "scaled": (lambda p, x: x[:, :3] @ (2 * p["w"]), r"used by mul, not as one"),
    "batched": (
        lambda p, x: jnp.einsum("ni,io->nio", x[:, :3], p["w"]).sum(1), r"used by|used 2 times"
    ),
    "grouped": (
        lambda p, x: jax.lax.conv_general_dilated(
            x[:, :3, None], p["w"][:, None], (1,), "SAME", feature_group_count=3
        )[:, :, 0], r"conv_general_dilated, not as one",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_layers_that_are_no_single_product_are_refused(name):
    model, message = REFUSED[name]
    params = {"w": jnp.eye(3), "v": jnp.asarray(HEAD)}
    risk = Risk(model, SquaredError(), params, (jnp.asarray(FLAT), jnp.zeros((7, 3))))
    with pytest.raises(ValueError, match=message):
        _ = KroneckerFactors(risk, "w").shape


def time_major(params, x):
    z = x.swapaxes(0, 1) @ params["w"]
    return jnp.tanh(z).mean(0) @ params["v"]


def test_the_axis_of_examples_is_found_or_refused():
    params = {"w": jnp.asarray(numbers(2, 3)), "v": jnp.asarray(HEAD)}
    batch_major = lambda p, x: jnp.tanh(x @ p["w"]).mean(1) @ p["v"]  # noqa: E731
    expected, found = (
        KroneckerFactors(Risk(model, CrossEntropy(), params, batches(TEXT[:6], LABELS, 3)), "w")
        for model in (batch_major, time_major)
    )
    np.testing.assert_allclose(found.left, expected.left, atol=1e-14)
    np.testing.assert_allclose(found.right, expected.right, atol=1e-14)
    risk = Risk(time_major, CrossEntropy(), params, batches(TEXT[:5], LABELS, 5))
    with pytest.raises(ValueError, match="depend on what the layer does for others"):
        _ = KroneckerFactors(risk, "w").left


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
    assert traces[before:] == [(7, 4), (3, 4), (4, 4)]  # the check of a risk at new parameters
    expected, _ = Reference("rows").factors("expand", slice(None))
    np.testing.assert_allclose(second, expected, atol=1e-12)
    assert np.abs(first - second).max() > 1e-4


def test_single_precision():
    with jax.enable_x64(False):
        params = {"w": jnp.asarray(numbers(4, 3), jnp.float32), "v": jnp.asarray(HEAD, jnp.float32)}
        data = [(x.astype(jnp.float32), y) for x, y in batches(FLAT)]
        loss = CrossEntropy(class_weights=WEIGHTS, label_smoothing=0.1)
        factors = KroneckerFactors(Risk(rows_first, loss, params, data), "w")
        assert (factors.operator() @ jnp.ones(12, jnp.float32)).dtype == jnp.float32
        left, right = factors.left, factors.right
    expected = Reference("rows").factors("expand", slice(None))
    np.testing.assert_allclose(left, expected[0], atol=1e-6)
    np.testing.assert_allclose(right, expected[1], atol=1e-6)


def test_flax_layers():
    linen = pytest.importorskip("flax.linen")

    class Network(linen.Module):
        @linen.compact
        def __call__(self, x):
            x = linen.tanh(linen.Conv(3, (5,), padding="VALID")(x))  # one place
            return linen.Dense(CLASSES)(x.reshape(len(x), -1))

    network = Network()
    params = network.init(jax.random.key(0), jnp.asarray(TEXT[:1]))
    risk = Risk(network.apply, CrossEntropy(), params, batches(TEXT[:1], LABELS[:1]))
    for layer in ("params.Conv_0", "params.Dense_0"):
        factors = KroneckerFactors(risk, f"{layer}.kernel", bias=True)
        block = dense(GaussNewton(risk.restricted(layer)))  # the bias comes first
        order = np.roll(np.arange(len(block)), factors.shape[0])
        np.testing.assert_allclose(
            dense(factors.operator())[np.ix_(order, order)], block, atol=1e-6
        )
