"""Features and errors of single layers by class in JAX: products, batches and refusals."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from specdens_jax import ClassStructure, CrossEntropy, GaussNewton, Risk, class_means

RNG = np.random.default_rng(0)
PARAMS = {"inner": RNG.normal(size=(4, 4)), "head": RNG.normal(size=(4, 3))}
X = RNG.normal(size=(7, 4))
SOFT = RNG.dirichlet(np.ones(3), size=7)
LABELS = np.array([0, 1, -100, 0, 0, 1, 1])  # one without a class, and a class without examples

pytestmark = pytest.mark.usefixtures("doubles")


def predict(params, x):
    return jnp.tanh(x @ params["inner"]) @ params["head"]


def risk_of(data, function=predict, parameters=None):
    params = jax.tree.map(jnp.asarray, PARAMS)
    return Risk(function, CrossEntropy(label_smoothing=0.1), params, data, parameters)


@pytest.mark.parametrize(("name", "weighting"), [("inner", "uniform"), ("head", "probability")])
def test_one_example_makes_a_kronecker_product(name, weighting):
    risk = risk_of((X[:1], SOFT[:1]), parameters=name)
    found = ClassStructure(risk, weighting=weighting).layer(name)
    product = np.kron(found.feature_second_moment, found.error_second_moment)
    dense = GaussNewton(risk) @ jnp.eye(len(product))
    np.testing.assert_allclose(product, dense, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("targets", [SOFT, LABELS], ids=["soft", "labels"])
def test_batches_add_up_to_the_weights_of_the_whole(targets):
    """Errors of a head are p - e, and its features the activations; here written out."""
    batches = [(X[:4], targets[:4]), (X[4:], targets[4:])]
    structure = ClassStructure(risk_of(batches))
    found = structure.layer("head")
    p = np.asarray(jax.nn.softmax(predict(PARAMS, X)))
    members = SOFT if targets is SOFT else (LABELS[:, None] == np.arange(3))
    count = members.sum()
    omega = members[:, :, None] * p[:, None, :] / count
    errors = p[:, None, :] - np.eye(3)  # (N, C', m)
    sums = np.einsum("ncd,ndm->mcd", omega, errors)
    weights = omega.sum(0)
    means = np.divide(sums, weights, out=np.zeros_like(sums), where=weights > 0)
    close = {"rtol": 1e-10, "atol": 1e-14}
    np.testing.assert_allclose(found.pair_weights, weights, **close)
    np.testing.assert_allclose(found.pair_weights, structure.pair_weights, **close)
    np.testing.assert_allclose(found.error_means, means, **close)
    square = np.einsum("ncd,nda,ndb->ab", omega, errors, errors)
    np.testing.assert_allclose(found.error_second_moment, square, **close)
    x, kappa = np.tanh(X @ PARAMS["inner"]), members.sum(1) / count
    np.testing.assert_allclose(found.class_shares, members.sum(0) / count, **close)
    np.testing.assert_allclose(found.feature_mean, kappa @ x, **close)
    np.testing.assert_allclose(found.feature_second_moment, (x.T * kappa) @ x, **close)


def test_layers_before_all_that_varies_have_errors_too():
    whole = ClassStructure(risk_of((X, SOFT))).layer("inner")
    frozen = ClassStructure(risk_of((X, SOFT), parameters="head")).layer("inner")
    for field in dataclasses.fields(whole)[1:]:
        np.testing.assert_array_equal(getattr(frozen, field.name), getattr(whole, field.name))
    assert np.abs(whole.error_means).max() > 0.1
    assert repr(frozen) == "LayerStructure('inner', 4 inputs, 4 outputs, 3 classes)"


def test_refusals_say_what_is_expected(monkeypatch):
    def twice(params, x):
        return predict(params, jnp.tanh(x @ params["inner"]))

    def pooled(params, x):
        return predict(params, jnp.stack([x, -x], axis=1)).mean(axis=1)

    with pytest.raises(ValueError, match=r"'inner' is used 2 times"):
        ClassStructure(risk_of((X, SOFT), twice)).layer("inner")
    with pytest.raises(ValueError, match=r"name='head': the layer returned \(7, 2, 3\) for 7 rows"):
        ClassStructure(risk_of((X, SOFT), pooled)).layer("head")
    with pytest.raises(ValueError, match=r"'body'"):
        ClassStructure(risk_of((X, SOFT))).layer("body")
    with pytest.raises(ValueError, match="targets has rows of class probabilities that are neg"):
        ClassStructure(risk_of((X, SOFT - 0.3))).layer("head")
    monkeypatch.setattr(class_means, "MEMORY_BUDGET", 199)
    with pytest.raises(ValueError, match=r"name='head': the second moments .* 200 bytes"):
        ClassStructure(risk_of((X, SOFT))).layer("head")
