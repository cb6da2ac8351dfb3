"""The recipes of docs/howto/jax_models.md: Flax, Equinox and optax against dense Hessians."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from specdens_jax import CrossEntropy, Hessian, SquaredError, gradient, layerwise, risk_value

INPUTS = np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32)
LABELS = np.random.default_rng(1).integers(2, size=6)


@pytest.fixture(autouse=True)
def singles():
    # Graphics processors multiply float32 matrices with ten bits of each number unless told not to.
    with jax.enable_x64(False), jax.default_matmul_precision("highest"):
        yield


def cross_entropy(logits):
    return -jax.nn.log_softmax(logits)[jnp.arange(len(LABELS)), LABELS].mean()


def assert_hessian(operator, mean_loss, params):
    """Compare with the dense Hessian of a function of the pytree, in its own order of leaves."""
    flat, unravel = ravel_pytree(params)
    dense = np.asarray(jax.jit(jax.hessian(lambda vector: mean_loss(unravel(vector))))(flat))
    assert np.abs(dense).max() > 1e-3
    found = np.asarray(operator @ jnp.eye(len(flat)))
    np.testing.assert_allclose(found, dense, rtol=1e-4, atol=1e-5 * np.abs(dense).max())


def test_plain_jax():
    keys = jax.random.split(jax.random.key(0), 2)
    params = {
        "hidden": jax.random.normal(keys[0], (3, 4)),
        "head": jax.random.normal(keys[1], (4, 2)),
    }

    def predict(params, inputs):
        return jnp.tanh(inputs @ params["hidden"]) @ params["head"]

    hessian = Hessian(predict, CrossEntropy(), params, (INPUTS, LABELS), batch_size=4)
    assert_hessian(hessian, lambda p: cross_entropy(predict(p, jnp.asarray(INPUTS))), params)
    assert list(layerwise(hessian)) == ["head", "hidden"]


def test_flax_linen():
    nn = pytest.importorskip("flax.linen")

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            x = nn.Dense(4)(x)
            x = nn.BatchNorm(use_running_average=not train)(x)
            x = nn.Dropout(0.5, deterministic=not train)(nn.tanh(x))
            return nn.Dense(2)(x)

    model = Model()
    variables = model.init(jax.random.key(0), INPUTS, train=False)
    statistics = {"mean": jnp.full(4, 0.3), "var": jnp.full(4, 2.0)}
    params, constants = variables["params"], {"batch_stats": {"BatchNorm_0": statistics}}

    def predict(params, inputs):
        return model.apply({"params": params, **constants}, inputs, train=False)

    hessian = Hessian(predict, CrossEntropy(), params, (INPUTS, LABELS), batch_size=4)
    assert_hessian(hessian, lambda p: cross_entropy(predict(p, INPUTS)), params)
    assert "Dense_0.kernel" in hessian.parameters.names

    def training(params, inputs):
        variables = {"params": params, **constants}
        rngs = {"dropout": jax.random.key(1)}
        return model.apply(variables, inputs, train=True, rngs=rngs, mutable="batch_stats")[0]

    with pytest.raises(ValueError, match="couples the examples of a batch"):
        risk_value(Hessian(training, CrossEntropy(), params, (INPUTS, LABELS)).risk)


def test_flax_nnx():
    nnx = pytest.importorskip("flax.nnx")

    class Model(nnx.Module):
        def __init__(self, rngs):
            self.hidden = nnx.Linear(3, 4, rngs=rngs)
            self.norm = nnx.BatchNorm(4, rngs=rngs)
            self.dropout = nnx.Dropout(0.5, rngs=rngs)
            self.head = nnx.Linear(4, 2, rngs=rngs)

        def __call__(self, x):
            return self.head(self.dropout(nnx.tanh(self.norm(self.hidden(x)))))

    model = Model(nnx.Rngs(0))
    model.eval()  # no dropout, running statistics
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def predict(params, inputs):
        return nnx.merge(graph, params, rest)(inputs)

    hessian = Hessian(predict, CrossEntropy(), params, (INPUTS, LABELS), batch_size=4)
    assert_hessian(hessian, lambda p: cross_entropy(predict(p, INPUTS)), params)
    assert any("hidden.kernel" in name for name in hessian.parameters.names)


@pytest.mark.parametrize("partitioned", [True, False])
def test_equinox(partitioned):
    """A module works whole, too: leaves that are no arrays are constants."""
    eqx = pytest.importorskip("equinox")
    model = eqx.nn.MLP(3, 2, width_size=4, depth=1, activation=jnp.tanh, key=jax.random.key(0))
    arrays, static = eqx.partition(model, eqx.is_inexact_array)

    def predict(params, inputs):
        return jax.vmap(eqx.combine(params, static))(inputs)

    def whole(model, inputs):
        return jax.vmap(model)(inputs)

    data = (INPUTS, LABELS)
    hessian = (
        Hessian(predict, CrossEntropy(), arrays, data, batch_size=4)
        if partitioned
        else Hessian(whole, CrossEntropy(), model, data, batch_size=4)
    )
    assert_hessian(hessian, lambda p: cross_entropy(predict(p, INPUTS)), arrays)
    assert set(layerwise(hessian, by="module")) == {"layers.0", "layers.1"}
    step = hessian.parameters.unravel(gradient(hessian.risk))
    moved = eqx.apply_updates(model, jax.tree.map(lambda leaf: -0.1 * leaf, step))
    after = hessian.risk.at(eqx.partition(moved, eqx.is_inexact_array)[0] if partitioned else moved)
    assert risk_value(after) < risk_value(hessian.risk)


def test_optax():
    optax = pytest.importorskip("optax")
    params = {"w": jax.random.normal(jax.random.key(0), (3, 2))}

    def predict(params, inputs):
        return inputs @ params["w"]

    data = (INPUTS, LABELS)
    own = Hessian(predict, CrossEntropy(), params, data)
    loss = optax.softmax_cross_entropy_with_integer_labels
    theirs = Hessian(predict, loss, params, data, batch_size=4)
    identity = jnp.eye(6)
    np.testing.assert_allclose(theirs @ identity, own @ identity, rtol=1e-4, atol=1e-6)
    assert_hessian(theirs, lambda p: cross_entropy(predict(p, jnp.asarray(INPUTS))), params)

    targets = np.ones((6, 2), np.float32)
    half = Hessian(predict, optax.l2_loss, params, (INPUTS, targets))  # l2_loss is half the square
    full = Hessian(predict, SquaredError(), params, (INPUTS, targets))
    np.testing.assert_allclose(2 * (half @ identity), full @ identity, rtol=1e-5, atol=1e-6)
