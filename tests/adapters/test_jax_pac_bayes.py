"""PAC-Bayes bounds of JAX classifiers: dense covariances, the digits, and what is refused."""

from __future__ import annotations

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import ortho_group
from sklearn.datasets import load_digits

from specdens.certificates import gaussian_kl
from specdens_jax import BinaryCrossEntropy, CrossEntropy, GaussNewton, Risk, layerwise
from specdens_jax.classifier import Classifier
from specdens_jax.pac_bayes import pac_bayes
from specdens_jax.parameters import FlatParameters
from specdens_jax.posterior import (
    GaussianPosterior,
    choose_bases,
    coordinates_of,
    transferred,
)

SHORT = {"epochs": 3, "num_monte_carlo": 10, "batch_size": 10}

pytestmark = pytest.mark.usefixtures("doubles")


def orthogonal(order, seed):
    return jnp.asarray(ortho_group.rvs(order, random_state=seed))


def numbers(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def perceptron(params, inputs):
    return jnp.maximum(inputs @ params["in"] + params["bias"], 0) @ params["out"]


@cache
def case(**options):
    """Return a risk of a softmax classifier and its parameters before training."""
    before = {"in": numbers(4, 4), "bias": numbers(4, seed=1), "out": numbers(4, 3, seed=2)}
    params = jax.tree.map(lambda leaf: leaf + 0.1, before)
    labels = jnp.asarray(np.random.default_rng(3).integers(3, size=20))
    data = numbers(20, 4, seed=4), labels
    return Risk(perceptron, CrossEntropy(), params, data, **options), before


def dense_q(basis):
    return jnp.kron(*basis) if isinstance(basis, tuple) else basis


@pytest.mark.parametrize("kind", ["pair", "matrix"])
def test_bases_give_the_covariance_and_take_it_along(kind):
    flat = FlatParameters(jnp.zeros((3, 4)))
    old, new = (
        [(orthogonal(3, i), orthogonal(4, i)) if kind == "pair" else orthogonal(12, i)]
        for i in (0, 1)
    )
    scales = jnp.linspace(0.2, 2.0, 12)
    posterior = GaussianPosterior(flat, jnp.zeros(12), old, scales)
    root = jnp.stack([posterior.noise(row) for row in jnp.eye(12)], axis=1)
    sigma, q, p = root @ root.T, dense_q(old[0]), dense_q(new[0])
    np.testing.assert_allclose(sigma, q @ jnp.diag(scales**2) @ q.T, atol=1e-12)
    x = jnp.linspace(-1, 2, 12)
    np.testing.assert_allclose(coordinates_of(flat, old, x), q.T @ x, atol=1e-12)
    moved = transferred(flat, old, scales, new)
    np.testing.assert_allclose(moved**2, jnp.diag(p.T @ sigma @ p), rtol=1e-10)
    assert gaussian_kl(x, moved, 0 * x, 0.3) < gaussian_kl(x, scales, 0 * x, 0.3)


@pytest.mark.slow
def test_curvature_bases_diagonalize():
    risk, _ = case()
    exact = choose_bases(risk, "exact")
    for q, block in zip(exact, layerwise(GaussNewton(risk)).values(), strict=True):
        rotated = q.T @ (block @ jnp.eye(block.space.dimension)).astype(q.dtype) @ q
        np.testing.assert_allclose(rotated, jnp.diag(jnp.diag(rotated)), atol=1e-12)
    _, inputs_first, _ = choose_bases(risk, "kronecker")  # of a square leaf
    x = numbers(20, 4, seed=4)
    rotated = inputs_first[0].T @ (x.T @ x) @ inputs_first[0]
    np.testing.assert_allclose(rotated, jnp.diag(jnp.diag(rotated)), atol=1e-10)


@cache
def trained():
    """Return a trained network's risk on 1,000 digits, its initial parameters and other digits."""
    inputs, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(inputs))
    x = jnp.asarray(inputs[order] / 16, jnp.float32)
    y = jnp.asarray(labels[order] > 4, jnp.float32)[:, None]
    before = {
        "in": jax.random.normal(jax.random.key(0), (64, 8), jnp.float32) / 8,
        "bias": jnp.zeros(8, jnp.float32),
        "out": jax.random.normal(jax.random.key(1), (8, 1), jnp.float32) / 8**0.5,
    }

    def loss(params):
        return BinaryCrossEntropy()(perceptron(params, x[:1000]), y[:1000]).mean()

    def step(_, state):
        params, velocity = state
        velocity = jax.tree.map(lambda v, g: 0.9 * v - 0.3 * g, velocity, jax.grad(loss)(params))
        return jax.tree.map(jnp.add, params, velocity), velocity

    start = before, jax.tree.map(jnp.zeros_like, before)
    params, _ = jax.jit(lambda state: jax.lax.fori_loop(0, 150, step, state))(start)
    risk = Risk(perceptron, BinaryCrossEntropy(), params, (x[:1000], y[:1000]))
    unseen = Risk(perceptron, BinaryCrossEntropy(), params, (x[1000:], y[1000:]))
    return risk, before, Classifier.of(unseen)


@pytest.mark.slow
def test_curvature_improves_the_bound_and_the_bound_holds():
    with jax.enable_x64(False):
        risk, before, unseen = trained()
        options = {"epochs": 50, "learning_rate": 0.03, "num_monte_carlo": 100}
        standard = pac_bayes(risk, before, **options)
        kronecker = pac_bayes(risk, before, basis="kronecker", **options)
        for result in (standard, kronecker):
            assert unseen.errors(result.posterior.sample(20, seed=1).T).mean() < result.bound
            assert result.history["kl"][-1] == pytest.approx(result.kl, rel=0.02)
            assert result.confidence == pytest.approx(0.965)
    assert standard.bound < 0.75
    assert kronecker.bound <= 0.9 * standard.bound


@pytest.mark.slow
def test_seeds_reproduce():
    risk, before = case()
    own = {"in": (orthogonal(4, 0), None), "out": orthogonal(12, 1)}
    options = {"basis": lambda risk: own, "refresh_every": 2, **SHORT}
    first, again, other = (pac_bayes(risk, before, seed=seed, **options) for seed in (5, 5, 6))
    assert first.bound == again.bound
    assert (first.posterior.mean == again.posterior.mean).all()
    assert (first.posterior.mean != other.posterior.mean).any()


def test_own_bases():
    risk, before = case()
    own = {"in": (orthogonal(4, 0), None), "out": orthogonal(12, 1)}
    result = pac_bayes(risk, before, basis=own, **SHORT)
    made = pac_bayes(risk, before, basis=lambda risk: own, refresh_every=5, **SHORT)
    assert result.bound == made.bound
    assert pac_bayes(risk, risk.parameters.ravel(before), basis=own, **SHORT).bound == made.bound


@pytest.mark.parametrize("labels", ["-1 and 1", pytest.param("classes", marks=pytest.mark.slow)])
def test_errors_and_surrogates_of_a_linear_classifier(labels):
    x, y = jnp.array([[1.0], [2.0], [-3.0], [0.5]]), jnp.array([1, 0, 0, 1])
    if labels == "classes":
        model, w, targets = lambda w, x: x * w, jnp.array([0.0, 1.0]), y
    else:
        model, w, targets = lambda w, x: x @ w, jnp.ones(1), y if labels[0] == "0" else 2 * y - 1
    loss = CrossEntropy() if labels == "classes" else BinaryCrossEntropy()
    classifier = Classifier.of(Risk(model, loss, w, (x, targets)))
    assert classifier.errors([w, -w, 0 * w]).tolist() == [0.25, 0.75, 1.0]
    chosen = jnp.array([0, 2])
    found = classifier.surrogate(w, [None], x[chosen], classifier.labels[chosen])
    expected = jnp.log2(1 + jnp.exp(-(2 * y - 1) * x[:, 0]))[chosen].mean()
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def refused():
    def options(**changes):
        return lambda: (*case(), changes)

    def of_the_trained():
        risk, _ = case()
        return risk, risk.params, {}

    def trained_elsewhere():
        risk, before = case(parameters="out")
        return risk, before, {}

    def regression():
        risk, before = case()
        data = numbers(20, 4), numbers(20, 3)
        return Risk(perceptron, BinaryCrossEntropy(), risk.params, data), before, {}

    return {
        "prior_mean equals the risk's": of_the_trained,
        "prior_mean has shape": lambda: (case()[0], jnp.zeros(5), {}),
        "leaves that do not vary": trained_elsewhere,
        "no classifier": regression,
        "basis of 'bias' is not orthonormal": options(basis={"bias": jnp.ones((4, 4))}),
        "expected \\(12, 12\\)": options(basis={"out": jnp.eye(4)}),
        "basis names \\['wrong'\\]": options(basis={"wrong": None}),
        "basis='hessian' is unknown": options(basis="hessian"),
        "refresh_every=3 makes": options(refresh_every=3),
        "epochs=0": options(epochs=0),
        "learning_rate=1e\\+200": options(learning_rate=1e200),
    }


@pytest.mark.parametrize("named", refused())
def test_what_would_not_hold_is_refused(named):
    risk, prior, options = refused()[named]()
    with pytest.raises(ValueError, match=named):
        pac_bayes(risk, prior, **{**SHORT, **options})
