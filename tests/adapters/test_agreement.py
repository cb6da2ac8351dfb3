"""PyTorch and JAX: the same matrices, samples and spectra from the same weights and data."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import nn

import specdens_jax
import specdens_torch
from specdens import kpm, slq
from tests.adapters.torch_cases import mlp, ragged
from tests.adapters.torch_dense import gauss_newton

MATRICES = (
    "Hessian",
    "GaussNewton",
    "Residual",
    "GradientSecondMoment",
    "GradientCovariance",
    "Fisher",
)
WEIGHTS = (1.0, 3.0, 0.5)


@pytest.fixture(autouse=True)
def doubles():
    with jax.enable_x64(True):
        yield


def of_torch(tensor):
    return jnp.asarray(tensor.detach().numpy())


def params_of(model):
    """The weights of a torch perceptron as a pytree whose order is that of the flat vector."""
    return [{"0_weight": of_torch(layer.weight), "1_bias": of_torch(layer.bias)}
            for layer in model if isinstance(layer, nn.Linear)]  # fmt: skip


def perceptron(activation):
    def predict(params, inputs):
        hidden = inputs @ params[0]["0_weight"].T + params[0]["1_bias"]
        return activation(hidden) @ params[1]["0_weight"].T + params[1]["1_bias"]

    return predict


ACTIVATIONS = {"tanh": (nn.Tanh, jnp.tanh), "relu": (nn.ReLU, jax.nn.relu)}


def data_of(kind, number=11):
    generator = torch.Generator().manual_seed(2)
    inputs = torch.randn(number, 4, generator=generator, dtype=torch.float64)
    if kind == "labels":
        labels = torch.randint(3, (number,), generator=generator)
        labels[4] = -100
        return inputs, labels
    return inputs, torch.rand(number, 3, generator=generator, dtype=torch.float64)


# name -> loss of torch, loss of JAX, reduction, kind of targets
LOSSES = {
    "cross entropy": (nn.CrossEntropyLoss(), specdens_jax.CrossEntropy(), "mean", "labels"),
    "weighted": (
        nn.CrossEntropyLoss(weight=torch.tensor(WEIGHTS, dtype=torch.float64), label_smoothing=0.2),
        specdens_jax.CrossEntropy(class_weights=WEIGHTS, label_smoothing=0.2),
        "mean",
        "labels",
    ),
    "soft labels": (
        nn.CrossEntropyLoss(weight=torch.tensor(WEIGHTS, dtype=torch.float64), label_smoothing=0.1),
        specdens_jax.CrossEntropy(class_weights=WEIGHTS, label_smoothing=0.1),
        "mean",
        "numbers",
    ),
    "sum": (nn.CrossEntropyLoss(reduction="sum"), specdens_jax.CrossEntropy(), "sum", "labels"),
    "squared error": (nn.MSELoss(), specdens_jax.SquaredError(), "mean", "numbers"),
    "logistic": (nn.BCEWithLogitsLoss(), specdens_jax.BinaryCrossEntropy(), "mean", "numbers"),
}


@functools.cache
def risks(loss, activation="tanh", weight_decay=0.1):
    """The same risk in both, the data split differently."""
    options = {"weight_decay": weight_decay}
    torch_loss, jax_loss, reduction, kind = LOSSES[loss]
    torch_activation, jax_activation = ACTIVATIONS[activation]
    model, (inputs, targets) = mlp(torch_activation), data_of(kind)
    in_torch = specdens_torch.Risk(model, torch_loss, ragged(inputs, targets, 3), **options)
    # Two shapes, since each is compiled: 5, 5 and 1 examples.
    parts = zip(inputs.split(5), targets.split(5), strict=True)
    batches = [(of_torch(x), of_torch(y)) for x, y in parts]
    in_jax = specdens_jax.Risk(
        perceptron(jax_activation), jax_loss, params_of(model), batches,
        reduction=reduction, **options,
    )  # fmt: skip
    return in_torch, in_jax


def assert_same(here, there, rtol=1e-10):
    here, there = np.asarray(here), np.asarray(there)
    np.testing.assert_allclose(here, there, rtol=rtol, atol=rtol * np.abs(there).max())


@pytest.mark.parametrize(
    ("loss", "activation"),
    [
        ("weighted", "tanh"),
        pytest.param("squared error", "relu", marks=pytest.mark.slow),
        *(
            pytest.param(loss, "tanh", marks=pytest.mark.slow)
            for loss in LOSSES
            if loss != "weighted"
        ),
    ],
)
@pytest.mark.parametrize("name", MATRICES)
def test_matrices_are_the_same(name, loss, activation):
    in_torch, in_jax = risks(loss, activation)
    options = {"num_samples": 3, "seed": 5} if name == "Fisher" else {}
    here = getattr(specdens_torch, name)(in_torch, **options)
    there = getattr(specdens_jax, name)(in_jax, **options)
    assert here.space.dimension == there.space.dimension == 43
    assert_same(there @ jnp.eye(43), here @ torch.eye(43, dtype=torch.float64))


@pytest.mark.parametrize("loss", LOSSES)
def test_values_gradients_and_kernels_are_the_same(loss):
    in_torch, in_jax = risks(loss)
    assert specdens_jax.risk_value(in_jax) == pytest.approx(
        specdens_torch.risk_value(in_torch), rel=1e-12
    )
    assert_same(specdens_jax.gradient(in_jax), specdens_torch.gradient(in_torch), 1e-12)
    here, there = specdens_torch.TangentKernel(in_torch), specdens_jax.TangentKernel(in_jax)
    assert here.space.dimension == there.space.dimension == 33
    assert_same(there @ jnp.eye(33), here @ torch.eye(33, dtype=torch.float64))


def test_layers_are_the_same():
    in_torch, in_jax = risks("weighted")
    here = specdens_torch.layerwise(specdens_torch.Hessian(in_torch), by="module")
    there = specdens_jax.layerwise(specdens_jax.Hessian(in_jax), by="module")
    for mine, its in zip(here.values(), there.values(), strict=True):
        n = mine.space.dimension
        assert_same(its @ jnp.eye(n), mine @ torch.eye(n, dtype=torch.float64))


@pytest.mark.parametrize("estimator", [slq, kpm])
@pytest.mark.parametrize("name", ["Hessian", "GaussNewton"])
def test_spectra_are_the_same(name, estimator):
    in_torch, in_jax = risks("cross entropy")
    options = {"num_probes": 3, "seed": 1, "progress": False}
    options |= {"num_steps": 15} if estimator is slq else {"num_moments": 24, "interval": (-1, 4)}
    here = estimator(getattr(specdens_torch, name)(in_torch), **options)
    there = estimator(getattr(specdens_jax, name)(in_jax), **options)
    for order in range(6):
        mine, its = here.moment(order), there.moment(order)
        assert its.value == pytest.approx(mine.value, rel=1e-8, abs=1e-12)
        assert its.stderr == pytest.approx(mine.stderr, rel=1e-6, abs=1e-12)


def test_torch_is_right():
    _, in_jax = risks("cross entropy", weight_decay=0.0)
    inputs, labels = data_of("labels")
    expected = gauss_newton(mlp(), nn.CrossEntropyLoss(), inputs, labels)
    assert_same(specdens_jax.GaussNewton(in_jax) @ jnp.eye(43), expected)


def test_token_losses_are_the_same():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 5, 7, generator=generator, dtype=torch.float64)
    labels = torch.randint(7, (2, 5), generator=generator)
    labels[1, 3:] = -100
    for name in ("token_loss", "next_token_loss"):
        here = getattr(specdens_torch, name)(logits, labels)
        there = getattr(specdens_jax, name)(of_torch(logits), of_torch(labels))
        for mine, its in zip(here, there, strict=True):
            assert_same(its, mine, 1e-14)
