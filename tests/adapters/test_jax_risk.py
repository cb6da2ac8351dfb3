"""Risks of JAX functions: flat parameters, forms of data, splits, options, and what is refused."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from specdens_jax import CrossEntropy, FlatParameters, Hessian, Risk, SquaredError, risk_value
from specdens_jax import gradient as gradient_of

pytestmark = pytest.mark.usefixtures("doubles")


class Pair(NamedTuple):
    weight: Any
    bias: Any


@jax.tree_util.register_dataclass
@dataclass
class Layer:
    weight: Any
    bias: Any


def numbers(*shape, seed=0, dtype=np.float64):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape).astype(dtype))


TREES = {
    "dict": ({"b": numbers(2), "a": numbers(3, 2)}, ("a", "b")),
    "list": ([numbers(2), numbers(3, 2)], ("0", "1")),
    "tuple": ((numbers(2), (numbers(3),)), ("0", "1.0")),
    "named": (Pair(numbers(2, 3), numbers(3)), ("weight", "bias")),
    "dataclass": ({"x": Layer(numbers(2, 3), numbers(3))}, ("x.weight", "x.bias")),
    "array": (numbers(2, 3), ("",)),
    "scalars": ({"a": 0.5, "b": jnp.float32(2.0), "c": numbers(2)}, ("a", "b", "c")),
    "empty leaf": ({"a": jnp.zeros((0, 3)), "b": numbers(2)}, ("a", "b")),
}


@pytest.mark.parametrize("name", TREES)
def test_flat_vectors_and_trees_are_the_same(name):
    tree, names = TREES[name]
    parameters = FlatParameters(tree)
    assert parameters.names == names
    expected = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])
    flat = parameters.ravel(tree)
    assert flat.dtype == parameters.space.dtype == jnp.float64
    np.testing.assert_array_equal(flat, expected)
    back = parameters.unravel(flat)
    assert jax.tree.structure(back) == jax.tree.structure(tree)
    jax.tree.map(np.testing.assert_array_equal, back, tree)

    block = numbers(parameters.size, 3, seed=4)
    columns = parameters.unravel(block)
    for leaf, own in zip(jax.tree.leaves(columns), jax.tree.leaves(tree), strict=True):
        assert leaf.shape == (*np.shape(own), 3)
    np.testing.assert_array_equal(parameters.ravel(columns), block)
    first = jax.tree.map(lambda leaf: leaf[..., 0], columns)
    np.testing.assert_array_equal(parameters.ravel(first), block[:, 0])
    for key in names:
        values = np.asarray(expected)[parameters.indices(key)]
        np.testing.assert_array_equal(values, flat[parameters.slices[key]].reshape(values.shape))


NESTED = {
    "body": {"0": {"weight": numbers(2, 2), "bias": numbers(2)}, "1": {"weight": numbers(2, 2)}},
    "body2": {"weight": numbers(3)},
    "head": {"weight": numbers(2), "steps": 3},
}
BODY = ("body.0.bias", "body.0.weight", "body.1.weight")


@pytest.mark.parametrize(
    ("selection", "names"),
    [
        ("body", BODY),  # a subtree, and not body2
        ("body.0", BODY[:2]),
        ("body.0.bias", BODY[:1]),
        ("*.bias", BODY[:1]),
        ("body*", (*BODY, "body2.weight")),
        (["head.weight", "body.1.*"], ("body.1.weight", "head.weight")),
        (("head.weight", "head.weight"), ("head.weight",)),
        (lambda name: name.startswith("body."), BODY),
        (None, (*BODY, "body2.weight", "head.weight")),
    ],
)
def test_selections(selection, names):
    parameters = FlatParameters(NESTED, selection)
    assert parameters.names == names
    everything = FlatParameters(NESTED)
    expected = np.concatenate(
        [np.asarray(everything.ravel(NESTED))[everything.slices[name]] for name in names]
    )
    np.testing.assert_array_equal(parameters.ravel(NESTED), expected)
    leaves = jax.tree.leaves(parameters.unravel(expected))
    assert sum(leaf.size for leaf in leaves) == parameters.size


@pytest.mark.parametrize(
    ("selection", "error", "match"),
    [
        ("haed", ValueError, r"'haed' matches no leaf; close to it: .*'head"),
        ([], ValueError, "selects nothing"),
        (lambda name: False, ValueError, "selects nothing"),
        ("head.steps", ValueError, "'head.steps' is .*real floating-point"),
        ("head", ValueError, "'head.steps' is"),
        (3, TypeError, "parameters has type int"),
        ([3], TypeError, "an item of type int"),
    ],
)
def test_selections_that_are_refused(selection, error, match):
    with pytest.raises(error, match=match):
        FlatParameters(NESTED, selection)


def test_flat_parameters_refuse():
    parameters = FlatParameters({"a": jnp.zeros((2, 2)), "b": jnp.zeros(3)})
    with pytest.raises(ValueError, match=r"x has shape \(6,\); expected \(7,\)"):
        parameters.unravel(jnp.zeros(6))
    with pytest.raises(TypeError, match="x has type list; expected an array of length 7"):
        parameters.unravel([0.0] * 7)
    with pytest.raises(ValueError, match="tree must have the structure"):
        parameters.ravel({"a": jnp.zeros((2, 2))})
    with pytest.raises(ValueError, match=r"'b' has shape \(4,\); expected \(3,\)"):
        parameters.ravel({"a": jnp.zeros((2, 2)), "b": jnp.zeros(4)})
    with pytest.raises(ValueError, match="different trailing axes"):
        parameters.ravel({"a": jnp.zeros((2, 2, 2)), "b": jnp.zeros((3, 1))})
    with pytest.raises(ValueError, match="none of the selected parameters"):
        parameters.indices("c")
    with pytest.raises(ValueError, match=r"several leaves called 'a\.b'"):
        FlatParameters({"a.b": jnp.zeros(2), "a": {"b": jnp.zeros(3)}})


def test_leaves_of_other_kinds_are_constants():
    params = {
        "w": numbers(3), "key": jax.random.key(0), "old_key": jax.random.PRNGKey(0), "none": None,
        "steps": 3, "mask": jnp.array([True, False, True]), "act": jnp.tanh, "name": "layer",
        "complex": jnp.ones(3, complex),
    }  # fmt: skip

    def predict(params, inputs):
        noise = jax.random.normal(params["key"], (3,))  # the same in every pass
        assert params["name"] == "layer"
        return params["act"](inputs @ (params["w"] * params["mask"] + noise)) * params["steps"]

    inputs, targets = numbers(5, 3, seed=1), numbers(5, seed=2)
    risk = Risk(predict, SquaredError(), params, (inputs, targets), batch_size=2)
    assert risk.parameters.names == ("w",)
    mean = lambda w: jnp.square(predict(params | {"w": w}, inputs) - targets).mean()  # noqa: E731
    expected = jax.hessian(mean)(params["w"])
    np.testing.assert_allclose(Hessian(risk) @ jnp.eye(3), expected, rtol=1e-11, atol=1e-12)
    with pytest.raises(ValueError, match="make a new Risk"):
        risk.at(params | {"act": jnp.sin})
    other = risk.at(params | {"steps": 5})
    assert risk_value(other) != risk_value(risk)


def test_mixed_dtypes():
    params = {"a": numbers(2, dtype=np.float32), "b": numbers(2).astype(jnp.bfloat16)}
    assert FlatParameters(params).space.dtype == jnp.float32
    assert FlatParameters(params, "b").space.dtype == jnp.bfloat16
    params["c"] = numbers(2)
    parameters = FlatParameters(params)
    assert parameters.space.dtype == jnp.float64
    half = params["b"].astype(jnp.float64)
    np.testing.assert_array_equal(parameters.ravel(params)[2:4], half)
    predict = lambda p, x: jnp.tanh(x * p["a"] * p["b"]).sum(1) + x @ p["c"]  # noqa: E731
    risk = Risk(predict, SquaredError(), params, (numbers(4, 2), numbers(4, seed=1)))
    assert (Hessian(risk) @ jnp.eye(6)).dtype == jnp.float64
    assert [leaf.dtype for leaf in risk.varying] == [jnp.float32, jnp.bfloat16, jnp.float64]


def test_python_numbers_count_as_arrays():
    """A number that Python holds is a leaf in double precision, or in single without x64."""
    params = {"scale": 2.0, "w": jnp.ones(2, jnp.float32)}
    assert FlatParameters(params).space.dtype == jnp.float64
    with jax.enable_x64(False):
        parameters = FlatParameters({"scale": 2.0, "w": jnp.ones(2)})
        assert parameters.space.dtype == jnp.float32
        assert parameters.names == ("scale", "w")


INPUTS, LABELS = numbers(11, 4), jnp.asarray(np.random.default_rng(3).integers(3, size=11))
PARAMS = {"w": numbers(4, 3, seed=5), "b": numbers(3, seed=6)}


def classify(params, inputs):
    return jnp.tanh(inputs @ params["w"] + params["b"])


def named(params, inputs):
    return classify(params, inputs["x"])


class Again:
    """Gives its batches anew in every pass."""

    def __init__(self, make):
        self.make = make

    def __iter__(self):
        return iter(self.make())


def split(cuts, inputs=INPUTS, labels=LABELS):
    edges = [0, *cuts, len(inputs)]
    return [(inputs[a:b], labels[a:b]) for a, b in pairwise(edges)]


def torch_data():
    return tuple(torch.tensor(np.array(array)) for array in (INPUTS, LABELS))


FORMS = {
    "pair": lambda: (INPUTS, LABELS),
    "list": lambda: split([3, 5]),
    "list of lists": lambda: [[x, y] for x, y in split([3])],
    "empty batch": lambda: split([0, 4, 4]),
    "NumPy": lambda: (np.asarray(INPUTS), np.asarray(LABELS)),
    "torch": torch_data,
    "torch with gradient": lambda: (torch_data()[0].requires_grad_(), torch_data()[1]),
    "class": lambda: Again(lambda: split([2, 9])),
    "DataLoader": lambda: DataLoader(TensorDataset(*torch_data()), batch_size=4),
    "shuffled": lambda: DataLoader(TensorDataset(*torch_data()), batch_size=4, shuffle=True),
    "mapping": lambda: {"x": INPUTS, "labels": LABELS},
    "mappings": lambda: [{"x": x, "labels": y} for x, y in split([7])],
    "dict inputs": lambda: ({"x": INPUTS}, LABELS),
}


@pytest.mark.parametrize("batch_size", [None, 3])
@pytest.mark.parametrize("form", FORMS)
def test_forms_of_data(form, batch_size):
    predict = named if "mapping" in form or "dict" in form else classify
    risk = Risk(predict, CrossEntropy(), PARAMS, FORMS[form](), batch_size=batch_size)
    log_p = jax.nn.log_softmax(classify(PARAMS, INPUTS))
    assert risk_value(risk) == pytest.approx(
        -float(log_p[jnp.arange(11), LABELS].mean()), rel=1e-13
    )
    if batch_size is not None:
        assert all(len(batch.targets) <= batch_size for batch in risk.batches())
    assert "11 examples" in repr(risk)


def test_half_precision_of_torch_is_read():
    inputs = torch.tensor(np.array(INPUTS)).to(torch.bfloat16)
    risk = Risk(classify, CrossEntropy(), PARAMS, (inputs, np.asarray(LABELS)))
    assert next(iter(risk.batches())).inputs.dtype == jnp.bfloat16
    rounded = INPUTS.astype(jnp.bfloat16)
    expected = risk_value(Risk(classify, CrossEntropy(), PARAMS, (rounded, LABELS)))
    assert risk_value(risk) == pytest.approx(expected, rel=1e-14)


def test_data_are_copied():
    """What a loader writes into its arrays afterwards changes nothing."""
    inputs = np.array(INPUTS)
    risk = Risk(classify, CrossEntropy(), PARAMS, (inputs, LABELS))
    before = risk_value(risk)
    inputs[:] = 0
    assert risk_value(risk) == before


REFUSED_DATA = {
    "generator": (lambda: iter(split([3])), TypeError, "one-shot list_iterator"),
    "array": (lambda: INPUTS, TypeError, "data has type"),
    "number": (lambda: 3, TypeError, "data has type int"),
    "text": (lambda: "text", TypeError, "data has type str"),
    "list of arrays": (lambda: [INPUTS, LABELS], TypeError, "is a tuple, not a list"),
    "triple": (lambda: (INPUTS, LABELS, LABELS), TypeError, "tuple of length 3"),
    "no labels": (lambda: {"x": INPUTS}, TypeError, "keys x and without labels"),
    "strings": (lambda: (np.array(["a"]), np.ones(1)), TypeError, "ndarray of <U1"),
    "objects": (lambda: (INPUTS, object()), TypeError, "data hold a object"),
    "empty list": (list, ValueError, "data is empty"),
    "no examples": (lambda: (INPUTS[:0], LABELS[:0]), ValueError, "data is empty"),
    "empty iterable": (lambda: Again(list), ValueError, "data is empty"),
    "uneven": (lambda: ((INPUTS, jnp.ones(1)), LABELS), ValueError, "batch_size=4 cannot cut"),
}


@pytest.mark.parametrize("name", REFUSED_DATA)
def test_data_that_are_refused(name):
    make, error, match = REFUSED_DATA[name]
    with pytest.raises(error, match=match):
        risk_value(Risk(classify, CrossEntropy(), PARAMS, make(), batch_size=4))


@pytest.mark.slow
def test_ragged_splits_agree():
    rng = np.random.default_rng(0)
    x = numbers(15, 2, seed=9)
    labels = LABELS.at[2].set(-100)
    loss = CrossEntropy(class_weights=(1.0, 3.0, 0.2), label_smoothing=0.1)
    whole = Risk(classify, loss, PARAMS, (INPUTS, labels))
    value, slope, product = risk_value(whole), gradient_of(whole), Hessian(whole) @ x
    for _ in range(10):
        cuts = sorted(rng.choice(np.arange(1, 11), size=2, replace=False))
        risk = Risk(classify, loss, PARAMS, split(cuts, labels=labels))
        assert risk_value(risk) == pytest.approx(value, rel=1e-12)
        np.testing.assert_allclose(gradient_of(risk), slope, rtol=1e-12, atol=1e-14)
        np.testing.assert_allclose(Hessian(risk) @ x, product, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_values_and_gradients_against_jax(reduction):
    weights = jnp.arange(11.0)
    decay = 0.3

    def loss(outputs, targets):
        return (jnp.square(outputs).sum(1), targets)

    def dense(flat):
        params = risk.parameters.unravel(flat)
        total = (weights * jnp.square(classify(params, INPUTS)).sum(1)).sum()
        return total / (weights.sum() if reduction == "mean" else 1) + decay / 2 * flat @ flat

    risk = Risk(
        classify, loss, PARAMS, (INPUTS, weights),
        reduction=reduction, weight_decay=decay, batch_size=3,
    )  # fmt: skip
    here = risk.parameters.ravel(PARAMS)
    assert risk_value(risk) == pytest.approx(float(dense(here)), rel=1e-13)
    np.testing.assert_allclose(gradient_of(risk), jax.grad(dense)(here), rtol=1e-12)
    matrix = Hessian(risk) @ jnp.eye(15)
    np.testing.assert_allclose(matrix, jax.hessian(dense)(here), rtol=1e-10, atol=1e-12)


def coupled(params, inputs):
    return classify(params, inputs - inputs.mean(0))


REFUSED_LOSSES = {
    "batch norm": (coupled, CrossEntropy(), ValueError, "couples the examples"),
    "weights over batch": (
        classify, lambda f, y: (f[:, 0], jnp.ones(len(f)) / len(f)), ValueError, "couples"),
    "scalar": (classify, lambda f, y: jnp.square(f).mean(), ValueError, "a single number"),
    "nan": (classify, lambda f, y: jnp.log(f[:, 0]), ValueError, "not finite"),
    "no weight": (classify, lambda f, y: (f[:, 0], 0 * f[:, 0]), ValueError, "weights of all"),
    "integers": (classify, lambda f, y: f.argmax(1), TypeError, "loss returned int64"),
    "shapes": (classify, lambda f, y: (f[:, 0], jnp.ones(2)), ValueError, "they must agree"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED_LOSSES)
@pytest.mark.parametrize("use", [risk_value, gradient_of, lambda r: Hessian(r) @ jnp.ones(15)])
def test_losses_that_are_refused(name, use):
    predict, loss, error, match = REFUSED_LOSSES[name]
    with pytest.raises(error, match=match):
        use(Risk(predict, loss, PARAMS, (INPUTS, LABELS)))
