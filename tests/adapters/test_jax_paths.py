"""Lines between solutions of JAX models: closed forms, every kind of point, and compilation."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from specdens_jax import CrossEntropy, Hessian, Risk, SquaredError, gradient
from specdens_jax.paths import LinePath, along_line

ALPHAS = np.linspace(-0.5, 1.5, 9)

pytestmark = pytest.mark.usefixtures("doubles")


def numbers(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def product_risk(**options):
    """The risk (u v - 1)^2 of a product of two weights."""
    data = jnp.ones((3, 1)), jnp.ones((3, 1))
    return Risk(
        lambda p, x: p["u"] * p["v"] * x, SquaredError(), {"u": 1.0, "v": 1.0}, data, **options
    )


def test_two_minima_and_the_barrier_between_them():
    risk, start, end = product_risk(), jnp.ones(2), -jnp.ones(2)
    path = along_line(risk, start, end, ALPHAS)
    weights = 1 - 2 * ALPHAS
    np.testing.assert_allclose(path.values, (weights**2 - 1) ** 2, atol=1e-14)
    assert path.values.dtype == path.alphas.dtype == np.float64
    np.testing.assert_array_equal(path.ends, [0, 0])
    assert path.barrier == 1.0
    assert repr(path) == "LinePath(9 points from -0.5 to 1.5, barrier 1. above the chord)"
    # A pytree is as good as a vector, and the risk itself has not moved.
    trees = [{"u": jnp.asarray(sign), "v": jnp.asarray(sign)} for sign in (1.0, -1.0)]
    np.testing.assert_array_equal(along_line(risk, *trees, ALPHAS).values, path.values)
    assert float(risk.params["u"]) == 1.0


def test_ends_that_are_not_asked_for():
    risk = product_risk()
    path = along_line(risk, jnp.zeros(2), jnp.array([2.0, 1.0]), [0.5])
    np.testing.assert_array_equal(path.values, [0.25])
    np.testing.assert_array_equal(path.ends, [1, 1])
    np.testing.assert_array_equal(path.chord, [1])
    assert path.barrier == 0


def test_barrier_is_measured_from_the_chord():
    path = LinePath(np.array([0.0, 0.5, 1.0, 2.0]), np.array([4.0, 3.0, 0.0, 9.0]), [4.0, 0.0])
    np.testing.assert_array_equal(path.chord, [4, 2, 0, -4])
    assert path.barrier == 1.0  # beyond the ends nothing counts


def test_only_what_varies_moves():
    risk = product_risk(parameters="u")
    path = along_line(risk, np.array([0.0]), np.array([3.0]), [0, 1], quantity=gradient)
    np.testing.assert_array_equal(path.values, [[-2], [4]])


def test_any_quantity_without_compilation():
    """Curvature at every point as at parameters of their own; one compilation for all."""
    inputs, labels = numbers(5, 3, seed=1), jnp.array([0, 1, 1, 0, 1])
    params = [{"w": numbers(3, 2, seed=seed)} for seed in (3, 4)]
    traces = []

    def predict(p, x):
        traces.append(1)
        return jnp.sin(x @ p["w"])

    def hessian_of(risk):
        return Hessian(risk) @ jnp.eye(6)

    def dense(w):
        def risk(flat):
            log_p = jax.nn.log_softmax(jnp.sin(inputs @ flat.reshape(3, 2)))
            return -log_p[jnp.arange(5), labels].mean()

        return jax.jit(jax.hessian(risk))(w.reshape(-1))

    risk = Risk(predict, CrossEntropy(), params[0], (inputs, labels))
    along_line(risk, *params, [0, 1], quantity=hessian_of)
    traced = len(traces)
    path = along_line(risk, *params, [0, 0.3, 1], quantity=hessian_of)
    assert len(traces) == traced + 3 * 3  # at each point the check of two halves, and no more
    expected = [dense((1 - a) * params[0]["w"] + a * params[1]["w"]) for a in path.alphas]
    np.testing.assert_allclose(path.values, expected, atol=1e-13)
    assert path.barrier.shape == (6, 6)


class Normalized:
    """A perceptron with batch norm, whose statistics are constants of the risk."""

    def __init__(self):
        self.inputs = numbers(9, 3, seed=1)
        self.labels = jnp.array([0, 1, 1, 0, 1, 0, 0, 1, 1])
        self.params = {"w": numbers(3, 4), "v": numbers(4, 2, seed=2)}
        self.kept = {"mean": jnp.zeros(4), "variance": jnp.ones(4)}
        self.traces = 0

    def predict(self, params, x):
        self.traces += 1
        hidden = (x @ params["w"] - params["mean"]) / jnp.sqrt(params["variance"] + 1e-5)
        return jnp.tanh(hidden) @ params["v"]

    def statistics(self, params):
        hidden = self.inputs @ params["w"]
        return {**params, "mean": hidden.mean(0), "variance": hidden.var(0)}

    def risk(self):
        params, data = {**self.params, **self.kept}, (self.inputs, self.labels)
        return Risk(self.predict, CrossEntropy(), params, data, ["w", "v"], batch_size=4)

    def training_risk(self, w, v):
        """The risk with all data as one batch, which is normalized by itself."""
        hidden = self.inputs @ w
        hidden = (hidden - hidden.mean(0)) / jnp.sqrt(hidden.var(0) + 1e-5)
        log_p = jax.nn.log_softmax(jnp.tanh(hidden) @ v)
        return -log_p[jnp.arange(9), self.labels].mean()


def test_statistics_are_recomputed_at_every_point():
    model = Normalized()
    risk, start = model.risk(), model.params
    end = {"w": -5 * start["w"] + 1, "v": start["v"] + numbers(4, 2, seed=3)}
    trees = [{**point, "mean": None, "variance": None} for point in (start, end)]
    alphas = [0.25, 0.7, 1.5]
    path = along_line(risk, *trees, alphas, statistics=model.statistics)
    between = [jax.tree.map(lambda a, b, t=t: (1 - t) * a + t * b, start, end) for t in alphas]
    np.testing.assert_allclose(path.values, [model.training_risk(**p) for p in between], rtol=1e-13)
    np.testing.assert_allclose(
        path.ends, [model.training_risk(**p) for p in (start, end)], rtol=1e-13
    )
    kept = along_line(risk, *trees, alphas)
    assert np.abs(kept.values - path.values).min() > 0.01
    np.testing.assert_array_equal(risk.params["mean"], np.zeros(4))
    traced = model.traces
    again = along_line(risk, *trees, alphas, statistics=model.statistics)
    assert model.traces == traced + 5 * 3  # at each point the check of two halves, and no more
    np.testing.assert_array_equal(again.values, path.values)


def test_recomputed_statistics_are_constants_of_the_curvature():
    model = Normalized()
    found = along_line(
        model.risk(), *(jnp.full(20, 0.5), -jnp.ones(20)), [0],
        quantity=lambda risk: Hessian(risk) @ jnp.eye(20), statistics=model.statistics,
    )  # fmt: skip
    half = {"v": jnp.full((4, 2), 0.5), "w": jnp.full((3, 4), 0.5)}
    there = model.statistics({**half, **model.kept})

    def mean_loss(flat):
        params = {**there, "v": flat[:8].reshape(4, 2), "w": flat[8:].reshape(3, 4)}
        log_p = jax.nn.log_softmax(model.predict(params, model.inputs))
        return -log_p[jnp.arange(9), model.labels].mean()

    expected = jax.jit(jax.hessian(mean_loss))(jnp.full(20, 0.5))
    np.testing.assert_allclose(found.values[0], expected, atol=1e-13)


def test_statistics_of_flax():
    nn = pytest.importorskip("flax.linen")

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            norm = nn.BatchNorm(use_running_average=not train, momentum=0.0)
            return nn.Dense(2)(nn.tanh(norm(nn.Dense(4)(x))))

    own, model = Normalized(), Model()
    inputs, data = own.inputs, (own.inputs, own.labels)
    ends = [model.init(jax.random.key(seed), inputs, train=False) for seed in (0, 1)]

    def statistics(variables):
        _, new = model.apply(variables, inputs, train=True, mutable="batch_stats")
        return {**variables, **new}

    def predict(variables, x):
        return model.apply(variables, x, train=False)

    risk = Risk(predict, CrossEntropy(), ends[0], data, "params", batch_size=4)
    path = along_line(risk, *ends, [0, 0.5, 1], statistics=statistics)
    for value, alpha in zip(path.values, path.alphas, strict=True):
        point = jax.tree.map(lambda a, b, t=alpha: (1 - t) * a + t * b, *ends)
        logits, _ = model.apply(point, inputs, train=True, mutable="batch_stats")
        log_p = jax.nn.log_softmax(logits.astype("float64"))
        expected = -log_p[jnp.arange(9), own.labels].mean()
        assert value == pytest.approx(float(expected), rel=1e-5)  # parameters of Flax are float32


def test_statistics_that_are_refused():
    risk, ends = Normalized().risk(), (jnp.zeros(20), jnp.ones(20))
    with pytest.raises(TypeError, match="statistics='recomputed' cannot be called; pass a functi"):
        along_line(risk, *ends, [0], statistics="recomputed")
    with pytest.raises(ValueError, match=r"statistics\(params\) must return a pytree like"):
        along_line(risk, *ends, [0], statistics=lambda params: params["mean"])


def test_single_precision_ends_are_exact():
    with jax.enable_x64(False):
        data = np.ones((3, 1), np.float32), np.ones((3, 1), np.float32)
        risk = Risk(lambda w, x: w * x, SquaredError(), jnp.float32(0.1), data)
        path = along_line(risk, jnp.array([0.1]), jnp.array([0.7]), [0, 1])
        expected = [np.square(np.float32(w) - np.float32(1)) for w in (0.1, 0.7)]
        np.testing.assert_allclose(path.values, expected, rtol=2e-7)
        assert path.values.dtype == np.float64


def test_what_is_refused():
    risk = product_risk()
    with pytest.raises(ValueError, match=r"start is neither a vector of shape \(2,\) nor a pytree"):
        along_line(risk, jnp.ones(3), jnp.ones(2), [0.0])
    for alphas in ([], [0.0, np.nan], [[0.0]]):
        with pytest.raises(ValueError, match="must be finite numbers in one row"):
            along_line(risk, jnp.ones(2), jnp.ones(2), alphas)
