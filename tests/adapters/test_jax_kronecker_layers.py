"""JAX layers whose Kronecker factors are found however a model is written, and those refused."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from specdens_jax import CrossEntropy, GaussNewton, Risk, SquaredError
from specdens_jax.kronecker_factors import KroneckerFactors
from specdens_jax.tapping import tapped
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
    numbers,
    risk_of,
    rows_first,
    slow,
    smoothed,
    with_head,
)

pytestmark = pytest.mark.usefixtures("doubles")


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


@pytest.mark.parametrize(
    "name", ["nested", "rule", "rearranged", slow("jit"), slow("vmap"), slow("remat")]
)
def test_functions_in_functions_are_followed(name):
    params, x = with_head(CASES["rows"][1]), jnp.asarray(FLAT)

    def function(w, rest, inputs):
        return [WRAPPED[name]({**rest, "w": w}, inputs)]

    found = tapped(function, (params["w"], {"v": params["v"]}, x), "w")
    np.testing.assert_array_equal(found.product.places, np.arange(12).reshape(4, 3).T)
    change = numbers(8, 3, seed=8)
    own = jnp.asarray(change).reshape(found.shape)
    (outputs,), multiplied = found.run(own)
    np.testing.assert_allclose(outputs, rows_first(params, x, change), atol=1e-14)
    np.testing.assert_array_equal(found.product.input_rows(multiplied, 8)[:, 0], FLAT)
    np.testing.assert_array_equal(found.product.output_rows(own, 8)[:, 0], change)


@pytest.mark.slow
def test_outputs_may_be_a_pytree():
    def model(params, x):
        return {"logits": jax.jit(rows_first)(params, x), "steps": len(x), "name": "net"}

    loss = smoothed()
    factors = KroneckerFactors(Risk(model, loss, risk_of("rows").params, batches(FLAT)), "w")
    assert_factors(factors, Reference("rows").factors("expand", slice(None)))


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
    params = with_head(jnp.eye(3))
    risk = Risk(model, SquaredError(), params, (jnp.asarray(FLAT), jnp.zeros((8, 3))))
    with pytest.raises(ValueError, match=message):
        _ = KroneckerFactors(risk, "w").shape


def time_major(params, x):
    z = x.swapaxes(0, 1) @ params["w"]
    return jnp.tanh(z).mean(0) @ params["v"]


@pytest.mark.slow
def test_the_axis_of_examples_is_found():
    params = with_head(numbers(2, 3))
    batch_major = lambda p, x: jnp.tanh(x @ p["w"]).mean(1) @ p["v"]  # noqa: E731
    expected, found = (
        KroneckerFactors(Risk(model, CrossEntropy(), params, batches(TEXT[:6], LABELS, 3)), "w")
        for model in (batch_major, time_major)
    )
    assert_factors(found, (expected.left, expected.right), 1e-14)


def test_examples_that_depend_on_each_other_are_refused():
    params = with_head(numbers(2, 3))
    risk = Risk(time_major, CrossEntropy(), params, batches(TEXT[:5], LABELS, 5))
    with pytest.raises(ValueError, match="depend on what the layer does for others"):
        _ = KroneckerFactors(risk, "w").left


@pytest.mark.slow
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
