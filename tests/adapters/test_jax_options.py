"""Options of risks of JAX functions: sums, data that change, restriction, and what is refused."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import specdens_jax
from specdens_jax import (
    ClassStructure,
    CorrectedKronecker,
    CrossEntropy,
    Fisher,
    FlatParameters,
    GradientSecondMoment,
    Hessian,
    KroneckerFactors,
    Risk,
    SquaredError,
    along_line,
    layerwise,
    pac_bayes,
)

pytestmark = pytest.mark.usefixtures("doubles")


def numbers(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


FLAT, LABELS = numbers(7, 4, seed=1), jnp.asarray([0, 2, 1, 1, 0, 2, 2])
PERCEPTRON = {"w": numbers(4, 3), "b": numbers(3, seed=2), "v": numbers(3, 3, seed=4)}


def mlp(params, inputs):
    return jnp.tanh(inputs @ params["w"] + params["b"]) @ params["v"]


def risk_of(**options):
    return Risk(mlp, CrossEntropy(), PERCEPTRON, (FLAT, LABELS), batch_size=3, **options)


def whole(operator):
    return np.asarray(operator @ jnp.eye(operator.space.dimension, dtype=operator.space.dtype))


@pytest.mark.parametrize("x64", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_compensated_sums_beat_plain_ones(x64):
    """1500 batches of one example in float32, against float64 throughout."""
    count = 1500
    inputs = np.random.default_rng(0).normal(size=(count, 2)).astype(np.float32) + 1
    exact = 2 * inputs.astype(np.float64).T @ inputs.astype(np.float64) / count
    errors = {}
    with jax.enable_x64(x64):
        data = [(x[None], np.zeros(1, np.float32)) for x in inputs]
        options = (None, "compensated", "float64") if x64 else (None, "compensated")
        for accumulate in options:
            risk = Risk(lambda w, x: x @ w, SquaredError(), jnp.zeros(2, jnp.float32), data,
                        accumulate=accumulate)  # fmt: skip
            errors[accumulate] = np.abs(whole(Hessian(risk)) - exact).max() / exact.max()
        if not x64:
            with pytest.raises(ValueError, match="switch jax_enable_x64 on"):
                Risk(mlp, SquaredError(), jnp.zeros(2), data, accumulate="float64")
    assert errors["compensated"] < 1e-7
    assert errors[None] > 2 * errors["compensated"]
    if x64:
        assert errors["float64"] < 1e-7


class Shifting:
    """Data that are not the same in the second pass."""

    def __init__(self, change):
        self.change, self.passes = change, 0

    def __iter__(self):
        self.passes += 1
        return iter(self.change(self.passes))


CHANGES = {
    "noise": lambda n: [(FLAT + 0.1 * (n > 2), LABELS)],
    "fewer": lambda n: [(FLAT[: 7 - (n > 2)], LABELS[: 7 - (n > 2)])],
    "order": lambda n: [(FLAT[:: (-1) ** n], LABELS[:: (-1) ** n])],  # allowed
}


@pytest.mark.parametrize("change", CHANGES)
def test_data_that_change_between_passes(change):
    hessian = Hessian(Risk(mlp, CrossEntropy(), PERCEPTRON, Shifting(CHANGES[change])))
    first = whole(hessian)  # one pass looks at the first batch, one multiplies
    if change == "order":
        np.testing.assert_allclose(whole(hessian), first, rtol=1e-11, atol=1e-14)
        return
    with pytest.raises(ValueError, match="data differ between two passes: 7 examples"):
        whole(hessian)


def test_restricted_risks():
    risk = risk_of(weight_decay=0.1)
    matrix, part = whole(Hessian(risk)), risk.parameters.slices["v"]
    np.testing.assert_allclose(
        whole(Hessian(risk.restricted("v"))), matrix[part, part], rtol=1e-12, atol=1e-14
    )
    assert risk.restricted("v").parameters.names == ("v",)


REFUSED = [
    ({"predict": None}, TypeError, "predict has type NoneType"),
    ({"loss": "mse"}, TypeError, "loss has type str"),
    ({"reduction": "none"}, ValueError, "reduction='none' is unknown; expected 'mean' or"),
    ({"reduction": 3}, TypeError, "reduction=3 is unknown"),
    ({"weight_decay": -1.0}, ValueError, "weight_decay=-1.0 must be"),
    ({"weight_decay": float("nan")}, ValueError, "weight_decay=nan must be"),
    ({"batch_size": 0}, ValueError, "batch_size=0 must be"),
    ({"batch_size": True}, TypeError, "batch_size=True must be an integer; None leaves"),
    ({"weight_decay": "small"}, TypeError, "weight_decay='small' must be a real number"),
    ({"accumulate": "float32"}, ValueError, "accumulate='float32' must be"),
    ({"accumulate": "double double"}, ValueError, "accumulate='double double' must be"),
    ({"accumulate": "a"}, ValueError, "accumulate='a' must be 'compensated' or a dtype at least"),
    ({"accumulate": "complex128"}, ValueError, "accumulate='complex128' .* 'float64'"),
    ({"accumulate": jnp.ones(3)}, TypeError, "accumulate=ArrayImpl of shape"),
]


@pytest.mark.parametrize(("options", "error", "match"), REFUSED)
def test_arguments_that_are_refused(options, error, match):
    given = {"predict": mlp, "loss": CrossEntropy(), "params": PERCEPTRON, "data": (FLAT, LABELS)}
    with pytest.raises(error, match=match):
        Risk(**(given | options))


CALLS = {
    "risk_value": (
        lambda risk: specdens_jax.risk_value(Hessian(risk)),
        "risk has type Hessian",
    ),
    "gradient": (
        lambda risk: specdens_jax.gradient(mlp),
        "type function; expected a Risk",
    ),
    "class of a loss": (
        lambda risk: Risk(mlp, CrossEntropy, PERCEPTRON, (FLAT, LABELS)),
        r"loss is the class CrossEntropy; pass CrossEntropy\(\)",
    ),
    "no parameters": (lambda risk: FlatParameters({"a": 1}), "params={'a': 1} have no leaf that"),
    "selection": (
        lambda risk: risk.restricted(lambda name: jnp.ones(2)),
        r"parameters\('.*'\) returned ArrayImpl of shape \(2,\); expected True or False",
    ),
    "no columns": (
        lambda risk: Hessian(risk) @ jnp.ones((risk.parameters.size, 0)),
        r"x has shape \(\d+, 0\); expected",
    ),
    "blocks": (
        lambda risk: layerwise(Hessian(risk), by=lambda name: [name]),
        r"by\('.*'\) returned \['.*'\]; expected the name of a block",
    ),
    "eigenvectors": (
        lambda risk: ClassStructure(risk).attribution([1.0], [[1.0]]),
        r"eigenvectors=\[\[1.0\]\] must be an array",
    ),
    "truth value": (
        lambda risk: KroneckerFactors(risk, "w", bias="no"),
        "bias='no' must be True or False",
    ),
    "factors": (
        lambda risk: CorrectedKronecker(3, np.eye(2)),
        "factors has type int; exp",
    ),
    "quantity": (
        lambda risk: along_line(risk, *line(risk), [0, 1], quantity=lambda risk: None),
        r"quantity\(risk\)=None must be a real number",
    ),
    "end of a line": (
        lambda risk: along_line(risk, *line(risk, 1j), [0, 1]),
        "start has dtype complex128; expected real floating-point parameters",
    ),
    "prior": (lambda risk: pac_bayes(risk, None), "prior_mean=None is no array; expected the para"),
    "grid": (lambda risk: pac_bayes(risk, line(risk)[0], grid=3), "grid=3 must be a PriorGrid"),
    "seed": (lambda risk: pac_bayes(risk, line(risk)[0], seed=1.5), "seed=1.5 must be an integer"),
    "smoothing": (
        lambda risk: CrossEntropy(label_smoothing=1.5),
        "label_smoothing=1.5 must",
    ),
    "class weights": (
        lambda risk: CrossEntropy(class_weights=(1.0,))(jnp.ones((2, 3)), LABELS[:2]),
        r"class_weights=\(1.0,\) must be one number for each of 3 classes",
    ),
    "outputs": (lambda risk: CrossEntropy()(jnp.ones(()), LABELS), r"outputs have shape \(\); exp"),
}


def line(risk, scale=1.0):
    return scale * jnp.ones(risk.parameters.size), jnp.zeros(risk.parameters.size)


@pytest.mark.parametrize("name", CALLS)
def test_calls_that_are_refused(name):
    """Errors of ours, which name the argument, not those of JAX."""
    call, match = CALLS[name]
    with pytest.raises((TypeError, ValueError), match=match):
        call(risk_of())


def test_arguments_of_matrices_that_are_refused():
    risk = risk_of()
    with pytest.raises(TypeError, match="either a Risk or"):
        Hessian(risk, CrossEntropy())
    with pytest.raises(TypeError, match="without loss and data"):
        GradientSecondMoment(mlp)
    with pytest.raises(ValueError, match="num_samples=0 must be"):
        Fisher(risk, num_samples=0)
    with pytest.raises(TypeError, match=r"num_samples=1\.5 must be an integer"):
        Fisher(risk, num_samples=1.5)
    with pytest.raises(ValueError, match="seed=-1 must lie in"):
        Fisher(risk, seed=-1)
    with pytest.raises(ValueError, match="no methods draws"):
        Fisher(mlp, lambda f, y: f[:, 0], PERCEPTRON, (FLAT, LABELS))
    with pytest.raises(ValueError, match="params have the leaf 'b' of shape"):
        risk.at(PERCEPTRON | {"b": jnp.ones(4)})
