"""JAX models with a layer of every kind, and its Kronecker factors from dense derivatives."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from specdens_jax import CrossEntropy, Risk

WEIGHTS = (1.0, 3.0, 0.5)
CLASSES = 3


def numbers(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


LABELS = np.array([0, 2, -100, 1, 0, 2, 2, 1])
FLAT, TEXT = numbers(8, 4, seed=1), numbers(8, 5, 2, seed=1)
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


def batches(inputs, targets=LABELS, size=8):
    cuts = range(0, len(inputs), size)
    return [(jnp.asarray(inputs[i : i + size]), jnp.asarray(targets[i : i + size])) for i in cuts]


def smoothed():
    """Return the loss of `risk_of` and `Reference`."""
    return CrossEntropy(class_weights=WEIGHTS, label_smoothing=0.1)


def with_head(w, dtype=None):
    """Return the parameters of a model whose layer has the weight `w`."""
    return {"w": jnp.asarray(w, dtype), "v": jnp.asarray(HEAD, dtype)}


def risk_of(name, loss=None, examples=slice(None), **options):
    model, w, inputs, *_ = CASES[name]
    params = with_head(w)
    loss = smoothed() if loss is None else loss
    return Risk(model, loss, params, batches(inputs[examples], LABELS[examples]), **options)


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


def dense(operator):
    return np.asarray(operator @ jnp.eye(operator.space.dimension, dtype=operator.space.dtype))


def assert_factors(factors, expected, atol=1e-12):
    """Compare both factors with those of a `Reference`, or of other factors."""
    left, right = expected
    np.testing.assert_allclose(factors.left, left, atol=atol)
    np.testing.assert_allclose(factors.right, right, atol=atol)


@functools.cache
class Reference:
    """M (N, S, m, S, m) and x (N, S, d) of every example, and weights, from dense derivatives."""

    def __init__(self, name):
        model, w, inputs, rows, shape, _ = CASES[name]
        params = with_head(w)
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
