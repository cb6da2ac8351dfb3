"""Curvature matrices of JAX functions against dense derivatives; compilation, precision."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import specdens_jax
from specdens import slq
from specdens.testing import check_operator
from specdens_jax import (
    CrossEntropy,
    Fisher,
    GaussNewton,
    Hessian,
    Residual,
    Risk,
    SquaredError,
    TangentKernel,
    layerwise,
    risk_value,
)

MATRICES = {
    name: getattr(specdens_jax, name)
    for name in (
        "Hessian", "GaussNewton", "Residual", "GradientSecondMoment", "GradientCovariance",
        "Fisher", "TangentKernel",
    )
}  # fmt: skip
#: All of them, most only in the slow tests: what takes long is compiling.
FEW = [
    name if name in ("Hessian", "Fisher") else pytest.param(name, marks=pytest.mark.slow)
    for name in MATRICES
]
WEIGHTS = (1.0, 3.0, 0.5)

pytestmark = pytest.mark.usefixtures("doubles")


def numbers(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


LABELS = jnp.asarray(np.random.default_rng(3).integers(3, size=7)).at[2].set(-100)
FLAT = numbers(7, 4, seed=1)
TEXT = numbers(7, 3, 2, seed=1)  # examples, places, channels


def mlp(params, inputs, act=jnp.tanh):
    return act(inputs @ params["w"] + params["b"]) @ params["v"]


def relu(params, inputs):
    return mlp(params, inputs, jax.nn.relu)


def convolution(params, inputs):
    hidden = jax.lax.conv_general_dilated(
        inputs, params["kernel"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
    )
    return jnp.tanh(hidden).mean(1) @ params["v"]


def attention(params, inputs):
    query, key, value = jnp.split(inputs @ params["qkv"], 3, axis=-1)
    weights = jax.nn.softmax(query @ key.mT / 2**0.5)
    return (weights @ value).mean(1) @ params["v"]


def recurrent(params, inputs):
    def step(state, x):
        return jnp.tanh(x @ params["w"] + state @ params["u"]), None

    last, _ = jax.lax.scan(step, jnp.zeros((len(inputs), 2)), inputs.swapaxes(0, 1))
    return last @ params["v"]


PERCEPTRON = {"w": numbers(4, 3), "b": numbers(3, seed=2), "v": numbers(3, 3, seed=4)}
MODELS = {
    "mlp": (mlp, PERCEPTRON, FLAT),
    "relu": (relu, PERCEPTRON, FLAT),
    "convolution": (convolution, {"kernel": numbers(3, 2, 2), "v": numbers(2, 3, seed=4)}, TEXT),
    "attention": (attention, {"qkv": numbers(2, 6), "v": numbers(2, 3, seed=4)}, TEXT),
    "recurrent": (
        recurrent,
        {"w": numbers(2, 2), "u": numbers(2, 2, seed=5), "v": numbers(2, 3, seed=4)},
        TEXT,
    ),
}


def batches(inputs, size=3, targets=LABELS):
    parts = range(0, len(inputs), size)
    return [(inputs[i : i + size], targets[i : i + size]) for i in parts]


def risk_of(name, size=3, **options):
    predict, params, inputs = MODELS[name]
    loss = CrossEntropy(class_weights=WEIGHTS)
    return Risk(predict, loss, params, batches(inputs, size), **options)


def whole(operator):
    return np.asarray(operator @ jnp.eye(operator.space.dimension, dtype=operator.space.dtype))


class Dense:
    """The matrices of a model with weighted cross-entropy, from dense Jacobians and Hessians.

    Each is compiled when it is asked for: operation by operation they would take seconds.
    """

    def __init__(self, name):
        self.predict, params, self.inputs = MODELS[name]
        self.theta, self.unravel = ravel_pytree(params)
        self.kept = LABELS != -100
        self.labels = jnp.where(self.kept, LABELS, 0)
        self.weights = jnp.where(self.kept, jnp.asarray(WEIGHTS)[self.labels], 0)

    def outputs(self, theta):
        return self.predict(self.unravel(theta), self.inputs)

    def losses(self, outputs):
        log_p = jax.nn.log_softmax(outputs)
        return -jnp.take_along_axis(log_p, self.labels[:, None], 1)[:, 0] * self.kept

    def risk(self, outputs):
        return (self.weights * self.losses(outputs)).sum() / self.weights.sum()

    @functools.cached_property
    def hessian(self):
        return jax.jit(jax.hessian(lambda theta: self.risk(self.outputs(theta))))(self.theta)

    @functools.cached_property
    def jacobian(self):
        return jax.jit(jax.jacobian(self.outputs))(self.theta)  # (N, C, n)

    @functools.cached_property
    def gauss_newton(self):
        curvature = jax.jit(jax.hessian(self.risk))(self.outputs(self.theta))
        return jnp.einsum("icp,icjd,jdq->pq", self.jacobian, curvature, self.jacobian)

    @functools.cached_property
    def slopes(self):
        return jax.jit(jax.jacobian(lambda theta: self.losses(self.outputs(theta))))(self.theta)

    def matrix(self, name):
        shares = self.weights / self.weights.sum()
        second = jnp.einsum("i,ip,iq->pq", shares, self.slopes, self.slopes)
        mean = shares @ self.slopes
        rows = self.jacobian.reshape(-1, self.jacobian.shape[-1])
        return {
            "Hessian": lambda: self.hessian,
            "GaussNewton": lambda: self.gauss_newton,
            "Residual": lambda: self.hessian - self.gauss_newton,
            "GradientSecondMoment": lambda: second,
            "GradientCovariance": lambda: second - jnp.outer(mean, mean),
            "TangentKernel": lambda: rows @ rows.T,
        }[name]()


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_matrices_against_dense_derivatives(model):
    risk, dense = risk_of(model), Dense(model)
    for name in MATRICES:
        if name != "Fisher":
            expected = np.asarray(dense.matrix(name))
            scale = np.abs(expected).max()
            found = whole(MATRICES[name](risk))
            np.testing.assert_allclose(
                found, expected, rtol=1e-10, atol=1e-10 * scale, err_msg=name
            )
    top = np.linalg.eigvalsh
    hessian, rest = top(dense.hessian), whole(Residual(risk))
    shift = np.linalg.norm(rest, 2)
    assert np.abs(hessian - top(whole(GaussNewton(risk)))).max() <= shift * (1 + 1e-12)  # Weyl


def test_the_mean_of_fisher_is_gauss_newton():
    """Errors fall as the root of the number of samples; the rank is at most that of the samples."""
    risk = risk_of("mlp", size=7)  # one shape to compile
    expected = np.asarray(Dense("mlp").gauss_newton)
    errors = []
    for num_samples in (25, 2500):
        found = whole(Fisher(risk, num_samples=num_samples, seed=1))
        errors.append(np.linalg.norm(found - expected) / np.linalg.norm(expected))
    assert errors[1] < 0.05
    assert 4 < errors[0] / errors[1] < 25
    split = risk_of("mlp")
    one = whole(Fisher(split))
    assert np.linalg.matrix_rank(one) <= 6 < len(one)  # seven terms, one of them ignored
    assert not np.allclose(one, whole(Fisher(split, seed=1)))


@pytest.mark.slow
@pytest.mark.parametrize("name", MATRICES)
def test_matrices_are_operators(name):
    check_operator(MATRICES[name](risk_of("mlp", weight_decay=0.1)))


def test_blocks_of_a_relu_layer_vanish_in_the_residual():
    """Outputs are linear in every single leaf of a perceptron with ReLU."""
    residual = Residual(risk_of("relu"))
    assert np.abs(whole(residual)).max() > 0.01
    for block in layerwise(residual).values():
        assert np.abs(whole(block)).max() < 1e-14


@pytest.mark.slow
@pytest.mark.parametrize("name", FEW[:-1])
def test_layers_are_diagonal_blocks(name):
    operator = MATRICES[name](risk_of("mlp", weight_decay=0.2))
    matrix, parameters = whole(operator), operator.parameters
    for key, block in layerwise(operator).items():
        own = matrix[parameters.slices[key], parameters.slices[key]]
        np.testing.assert_allclose(whole(block), own, rtol=1e-11, atol=1e-13, err_msg=key)


def test_spectra_of_layers():
    blocks = layerwise(GaussNewton(risk_of("mlp")), by=lambda n: {"v": None}.get(n, "first"))
    assert list(blocks) == ["first"]
    assert blocks["first"].parameters.names == ("b", "w")
    spectra = blocks.spectra(num_probes=2, num_steps=40, seed=0, progress=False)
    exact = np.linalg.eigvalsh(whole(blocks["first"]))
    assert spectra["first"].support[1] == pytest.approx(exact[-1], rel=1e-8)
    with pytest.raises(ValueError, match="by='layer' is unknown"):
        layerwise(Hessian(risk_of("mlp")), by="layer")
    with pytest.raises(ValueError, match="leaves out every parameter"):
        layerwise(Hessian(risk_of("mlp")), by=lambda name: None)
    with pytest.raises(TypeError, match="operator has type TangentKernel"):
        layerwise(TangentKernel(risk_of("mlp")))


def test_outputs_that_are_not_real_arrays_are_constants():
    def predict(w, x):
        return {"logits": jnp.tanh(x @ w), "mask": jnp.arange(len(x)) < 3, "text": 3, "none": None}

    def loss(outputs, targets):
        return jnp.square(outputs["logits"] - targets) * outputs["text"]

    data, w = (FLAT, LABELS), numbers(4)
    expected = jax.hessian(lambda w: loss(predict(w, FLAT), LABELS).mean())(w)
    rows = jax.jacobian(lambda w: predict(w, FLAT)["logits"])(w)
    gauss_newton = 6 * rows.T @ rows / 7
    close = {"rtol": 1e-11, "atol": 1e-12}
    np.testing.assert_allclose(whole(GaussNewton(predict, loss, w, data)), gauss_newton, **close)
    rest = whole(Residual(predict, loss, w, data))
    np.testing.assert_allclose(rest, expected - gauss_newton, **close)
    np.testing.assert_allclose(whole(TangentKernel(predict, loss, w, data)), rows @ rows.T, **close)


class Counted:
    """A model that counts how often Python evaluates it: once a trace, and in eager checks."""

    def __init__(self):
        self.calls = 0

    def __call__(self, params, inputs):
        self.calls += 1
        return mlp(params, inputs)


def counted(predict, data=None, **options):
    return Risk(predict, CrossEntropy(), PERCEPTRON, data or batches(FLAT), **options)


def calls_of_run(name, num_probes, num_steps):
    predict = Counted()
    operator = MATRICES[name](counted(predict))
    slq(operator, num_probes=num_probes, num_steps=num_steps, block_size=1, progress=False)
    return predict.calls, operator, predict


@pytest.mark.parametrize("name", FEW)
def test_nothing_is_traced_twice(name):
    """Two shapes of batches, the last one ragged: traces do not grow with steps or probes."""
    short, operator, predict = calls_of_run(name, 1, 2)
    assert 0 < short <= 3 + 8  # the check of two halves, then at most four for either shape
    assert calls_of_run(name, 3, 6)[0] == short
    slq(operator, num_probes=2, num_steps=5, block_size=1, progress=False)
    assert predict.calls == short
    x = jnp.ones((operator.space.dimension, 4))
    events = []

    def listen(event, seconds, **details):
        events.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        operator @ x  # a block of another width is compiled
        assert any("backend_compile" in event for event in events)
        events.clear()
        operator @ x
        assert not any("compile" in event for event in events)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


@pytest.mark.slow
@pytest.mark.parametrize("name", FEW)
def test_other_parameters_compile_nothing(name):
    predict = Counted()
    risk = counted(predict)
    first = whole(MATRICES[name](risk))
    before = predict.calls
    params = jax.tree.map(lambda leaf: 0.5 * leaf, PERCEPTRON)
    other = MATRICES[name](risk.at(params))
    found = whole(other)
    assert predict.calls == before + 3  # the check, without compilation
    expected = whole(MATRICES[name](Risk(mlp, CrossEntropy(), params, batches(FLAT))))
    np.testing.assert_array_equal(found, expected)
    assert not np.allclose(found, first)
    np.testing.assert_array_equal(whole(MATRICES[name](risk)), first)


def test_wrong_vectors_are_refused():
    for operator in (Hessian(risk_of("mlp")), TangentKernel(risk_of("mlp"))):
        n = operator.space.dimension
        with pytest.raises(TypeError, match="x has type ndarray"):
            operator @ np.ones(n)
        with pytest.raises(TypeError, match="x has dtype float32; the operator has float64"):
            operator @ jnp.ones(n, jnp.float32)
        for shape in ((n + 1,), (3, n), (n, 1, 1), ()):
            with pytest.raises(ValueError, match="x has shape"):
                operator @ jnp.ones(shape)


def test_a_product_that_is_not_finite_stops_a_run():
    risk = Risk(lambda w, x: jnp.sqrt(jnp.abs(x @ w)), SquaredError(), jnp.zeros(4), (FLAT, LABELS))
    assert np.isfinite(risk_value(risk))
    with pytest.raises(ValueError, match="finite"):
        slq(Hessian(risk), num_probes=1, num_steps=2, progress=False)


@pytest.mark.slow
@pytest.mark.parametrize("name", FEW)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_lower_precision(name, dtype):
    half = dtype == "bfloat16"
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), PERCEPTRON)
    with jax.enable_x64(False):
        data = batches(FLAT.astype(dtype), targets=LABELS.astype("int32"))
        operator = MATRICES[name](Risk(mlp, CrossEntropy(), params, data))
        assert operator.space.dtype == jnp.dtype(dtype)
        identity = jnp.eye(operator.space.dimension, dtype=dtype)
        product = operator @ identity
        assert product.dtype == jnp.dtype(dtype)
        assert (operator @ identity[:, 0]).dtype == jnp.dtype(dtype)
        assert product.devices() == identity.devices()
    exact = [jax.tree.map(lambda leaf: leaf.astype("float64"), tree) for tree in (params, data[0])]
    doubles = [(x.astype("float64"), y) for x, y in data]
    expected = whole(MATRICES[name](Risk(mlp, CrossEntropy(), exact[0], doubles)))
    scale = np.abs(expected).max()
    error = np.abs(np.asarray(product, dtype=np.float64) - expected).max() / scale
    assert 0 < error < (0.05 if half else 1e-5)
