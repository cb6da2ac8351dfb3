"""Lines between solutions of JAX models: closed forms, every kind of point, and compilation."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from specdens_jax import CrossEntropy, Hessian, Risk, SquaredError, gradient
from specdens_jax.paths import LinePath, along_line

ALPHAS = np.linspace(-0.5, 1.5, 9)


@pytest.fixture(autouse=True)
def doubles():
    with jax.enable_x64(True):
        yield


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
