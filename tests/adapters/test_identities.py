"""Exact identities of Hessians and Gauss-Newton matrices, in PyTorch and JAX with shared weights.

They follow from the formulas of arXiv 1811.07062, 1901.08244, 2008.11865, 1706.04454 and
2010.04261, for any weights and data, of networks of ReLUs and softmax cross-entropy.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import nn

import specdens_jax
import specdens_torch
from specdens.testing import hidden_layer_residual_eigenvalues, multinomial_logistic_model
from tests.adapters.test_agreement import of_torch, params_of, perceptron
from tests.adapters.torch_cases import classes, mlp

C, WIDTH, EXAMPLES = 3, 5, 12  # of a 4-5-3 perceptron of 43 parameters
LAYERS = (slice(0, 25), slice(25, 43))
OUTPUT = {"torch": "2", "jax": "1.0_weight"}
SMALL_PARTS = ("class", "cross", "equal")
TOLERANCE = 1e-10


@pytest.fixture(autouse=True)
def doubles():
    with jax.enable_x64(True):
        yield


@pytest.fixture(params=["torch", "jax"])
def library(request):
    return request.param


def adapter_of(library):
    return {"torch": specdens_torch, "jax": specdens_jax}[library]


@functools.cache
def risk_of(library):
    model, data = mlp(nn.ReLU), classes(EXAMPLES)
    if library == "torch":
        return specdens_torch.Risk(model, nn.CrossEntropyLoss(), data)
    data = tuple(map(of_torch, data))
    predict = perceptron(jax.nn.relu)
    return specdens_jax.Risk(predict, specdens_jax.CrossEntropy(), params_of(model), data)


def dense(library, operator):
    identity = np.eye(operator.space.dimension)
    identity = torch.from_numpy(identity) if library == "torch" else jnp.asarray(identity)
    return np.asarray(operator @ identity)


@functools.cache
def matrix(library, name):
    return dense(library, getattr(adapter_of(library), name)(risk_of(library)))


def residual_of(library):
    return matrix(library, "Hessian") - matrix(library, "GaussNewton")


@functools.cache
def structure_of(library):
    return adapter_of(library).ClassStructure(risk_of(library))


@functools.cache
def part(library, name):
    return dense(library, getattr(structure_of(library), f"G_{name}"))


class Forward(NamedTuple):
    """What the network does on the data."""

    inputs: np.ndarray  # (n, d)
    active: np.ndarray  # (n, h) of the hidden units
    probabilities: np.ndarray  # (n, C)
    labels: np.ndarray  # (n,)


@functools.cache
def forward():
    model, (inputs, labels) = mlp(nn.ReLU), classes(EXAMPLES)
    probabilities = torch.softmax(model(inputs), 1).detach().numpy()
    return Forward(inputs.numpy(), (model[0](inputs) > 0).numpy(), probabilities, labels.numpy())


def descending(symmetric):
    return np.linalg.eigvalsh(symmetric)[::-1]


def test_i1_layers_of_piecewise_linear_networks_have_no_residual(library):
    hessian, gauss_newton = matrix(library, "Hessian"), matrix(library, "GaussNewton")
    for layer in LAYERS:
        np.testing.assert_allclose(
            hessian[layer, layer], gauss_newton[layer, layer], rtol=0, atol=TOLERANCE
        )
    assert np.trace(hessian) == pytest.approx(np.trace(gauss_newton), rel=TOLERANCE)
    assert np.abs(hessian - gauss_newton).max() > 0.01  # is not zero elsewhere


def test_i2_the_residual_has_the_singular_values_of_small_matrices(library):
    found = forward()
    errors = found.probabilities - np.eye(C)[found.labels]
    expected = hidden_layer_residual_eigenvalues(found.inputs, found.active, errors)
    values = np.linalg.eigvalsh(residual_of(library))
    np.testing.assert_allclose(values, expected, rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(values, -values[::-1], rtol=0, atol=TOLERANCE)
    assert 0 < (np.abs(values) > TOLERANCE).sum() <= 2 * (C - 1) * WIDTH


def test_i3_four_parts_add_up_to_the_gauss_newton_matrix(library):
    total = sum(part(library, name) for name in (*SMALL_PARTS, "within"))
    np.testing.assert_allclose(total, matrix(library, "GaussNewton"), rtol=0, atol=TOLERANCE)


def test_i4_and_t1_class_means_are_opposite_to_those_of_true_labels(library):
    structure = structure_of(library)
    equal = np.asarray(structure.pair_means())[range(C), range(C)].T
    opposite = -structure.class_weights * np.asarray(structure.class_means)
    np.testing.assert_allclose(
        np.diag(structure.pair_weights) * equal, opposite, rtol=0, atol=TOLERANCE
    )
    first, second = (np.linalg.svd(part(library, name))[0][:, :C] for name in ("class", "equal"))
    np.testing.assert_allclose(first @ first.T, second @ second.T, rtol=0, atol=TOLERANCE)
    means = sum(part(library, name) for name in SMALL_PARTS)
    assert np.linalg.matrix_rank(means, tol=TOLERANCE) == C * (C - 1)


def test_i5_eigenvalues_are_ordered_as_the_matrices_are(library):
    whole = descending(matrix(library, "GaussNewton"))
    means = descending(sum(part(library, name) for name in SMALL_PARTS))
    own = descending(part(library, "class"))
    assert (whole >= means - TOLERANCE).all()
    assert (means >= own - TOLERANCE).all()
    hessian, residual = descending(matrix(library, "Hessian")), descending(residual_of(library))
    assert hessian[-1] >= residual[-1] - TOLERANCE
    assert hessian[0] <= whole[0] + residual[0] + TOLERANCE


def test_i6_the_curvature_of_the_output_layer_maps_ones_to_zero(library):
    factors = adapter_of(library).KroneckerFactors(risk_of(library), OUTPUT[library])
    left, p = np.asarray(factors.left), forward().probabilities
    expected = np.diag(p.mean(0)) - p.T @ p / EXAMPLES
    np.testing.assert_allclose(left, expected, rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(left @ np.ones(C), 0, rtol=0, atol=TOLERANCE)
    assert np.linalg.matrix_rank(left, tol=TOLERANCE) == C - 1


def test_i8_the_rank_is_at_most_examples_times_classes(library):
    values = descending(matrix(library, "GaussNewton"))
    assert len(values) > EXAMPLES * C
    assert (np.abs(values) > TOLERANCE * values[0]).sum() <= EXAMPLES * (C - 1)


def solvable_logits(weight, inputs):
    """Logits that are the given ones, behind the inputs, while all weights are zero."""
    dimension = weight.shape[1]
    return inputs[:, :dimension] @ weight.T + inputs[:, dimension:]


class Solvable(nn.Module):
    def __init__(self, dimension):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(C, dimension, dtype=torch.float64))

    def forward(self, inputs):
        return solvable_logits(self.weight, inputs)


def solvable_risk(library, model):
    """Data whose means and second moments are those of the model: noise is plus and minus axes."""
    dimension = model.dimension
    noise = dimension**0.5 * np.vstack([np.eye(dimension), -np.eye(dimension)])
    labels = np.repeat(np.arange(C), len(noise))
    signal = model.signal * np.eye(C, dimension)[labels]
    inputs = np.hstack([signal + np.tile(noise, (C, 1)), np.log(model.probabilities)[labels]])
    if library == "torch":
        data = torch.from_numpy(inputs), torch.from_numpy(labels)
        return specdens_torch.Risk(Solvable(dimension), nn.CrossEntropyLoss(), data)
    data = jnp.asarray(inputs), jnp.asarray(labels)
    weight = jnp.zeros((C, dimension))
    return specdens_jax.Risk(solvable_logits, specdens_jax.CrossEntropy(), weight, data)


def test_i7_and_t2_logistic_regression_has_the_spectrum_of_the_theorem(library):
    model = multinomial_logistic_model(C, 6, signal=3.0, error=0.2)
    risk = solvable_risk(library, model)
    adapter = adapter_of(library)
    structure = adapter.ClassStructure(risk)
    whole = descending(dense(library, adapter.GaussNewton(risk)))
    np.testing.assert_allclose(whole, model.eigenvalues(), rtol=0, atol=TOLERANCE)
    values, multiplicities = model.levels
    nearest = np.abs(whole[:, None] - values).argmin(1)
    np.testing.assert_array_equal(np.bincount(nearest, minlength=4), multiplicities)
    for name in SMALL_PARTS:
        found = structure.eigenvalues(name)
        expected = model.eigenvalues(name)[: len(found)]
        np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE)
