"""PyTorch and JAX: equal class structure, Kronecker factors, lines and certificates."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import nn

import specdens_jax
import specdens_torch
from specdens.certificates import certificate
from specdens_jax.classifier import Classifier as JaxClassifier
from specdens_torch.classifier import Classifier as TorchClassifier

WEIGHTS = (1.0, 3.0, 0.5)
LAYERS = {"0": "0_weight", "2": "2_weight"}  # of torch and of JAX


@pytest.fixture(autouse=True)
def doubles():
    with jax.enable_x64(True):
        yield


def predict(params, inputs):
    hidden = jnp.tanh(inputs @ params["0_weight"].T + params["1_bias"])
    return hidden @ params["2_weight"].T + params["3_bias"]


def params_of(model):
    """The weights of a torch perceptron as a pytree whose order is that of the flat vector."""
    leaves = [jnp.asarray(tensor.detach().numpy()) for tensor in model.parameters()]
    return dict(zip(("0_weight", "1_bias", "2_weight", "3_bias"), leaves, strict=True))


@functools.cache
def risks(targets="labels"):
    """The same risk in both: 8 examples of 3 imbalanced classes, in the same order."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    x = np.random.default_rng(1).normal(size=(8, 4))
    y = np.array([0, 1, 2, 0, 0, 1, 0, 1])
    if targets == "negative":
        y = np.eye(3)[y] - 0.1
    losses = {"label_smoothing": 0.1}
    own = torch.tensor(WEIGHTS, dtype=torch.float64)
    here = specdens_torch.Risk(
        model, nn.CrossEntropyLoss(weight=own, **losses), (torch.tensor(x), torch.tensor(y))
    )
    loss = specdens_jax.CrossEntropy(class_weights=WEIGHTS, **losses)
    return here, specdens_jax.Risk(predict, loss, params_of(model), (x, y))


def same(here, there, tolerance=1e-10):
    """Compare numbers, and that both are of the host or both of the framework, and as wide."""
    assert isinstance(here, np.ndarray) == isinstance(there, np.ndarray)
    assert str(here.dtype).removeprefix("torch.") == str(there.dtype)
    here, there = np.asarray(here), np.asarray(there)
    assert here.shape == there.shape
    np.testing.assert_allclose(there, here, rtol=0, atol=tolerance * np.abs(here).max())


def test_class_structures_are_the_same():
    here, there = (
        package.ClassStructure(risk, weighting="uniform")
        for package, risk in zip((specdens_torch, specdens_jax), risks(), strict=True)
    )
    for name in ("pair_weights", "class_weights", "class_means"):
        same(getattr(here, name), getattr(there, name))
    same(here.pair_means(), there.pair_means())
    x = np.random.default_rng(2).normal(size=(43, 2))
    for part in ("class", "cross", "within", "equal"):
        mine, its = (getattr(structure, f"G_{part}") for structure in (here, there))
        same(mine @ torch.tensor(x), its @ jnp.asarray(x))
        assert repr(mine).startswith(f"G_{part}(n=43, Risk(")
        assert repr(its).startswith(f"G_{part}(n=43, Risk(")
    for part in ("class", "cross", "equal", "means"):
        same(here.eigenvalues(part), there.eigenvalues(part))
    same(here.squared_distances(), there.squared_distances())
    mine, its = (np.asarray(structure.basis("class")) for structure in (here, there))
    same(mine @ mine.T, its @ its.T)
    vectors = np.linalg.qr(x)[0]
    shares = [
        structure.attribution([2.0, -1.0], convert(vectors))
        for structure, convert in ((here, torch.tensor), (there, jnp.asarray))
    ]
    np.testing.assert_allclose(*shares, rtol=1e-10)


@pytest.mark.parametrize("weighting", ["probability", "uniform"])
def test_layers_are_the_same(weighting):
    """Also with a kernel of shape (inputs, outputs), as Flax has them."""
    kernel = "0_weight"
    in_torch, in_jax = risks()
    here = specdens_torch.ClassStructure(in_torch, weighting=weighting).layer(kernel[0])
    turned = {**in_jax.params, kernel: in_jax.params[kernel].T}

    def predict_turned(params, inputs):
        return predict({**params, kernel: params[kernel].T}, inputs)

    data = next(in_jax.batches())
    flax_like = specdens_jax.Risk(predict_turned, in_jax.loss, turned, tuple(data), "1_bias")
    for risk in (in_jax, flax_like):
        there = specdens_jax.ClassStructure(risk, weighting=weighting).layer(kernel)
        for field in dataclasses.fields(here)[1:]:
            same(getattr(here, field.name), getattr(there, field.name))
        for part in (None, "class", "cross", "equal", "means", "within"):
            same(here.error_eigenvalues(part), there.error_eigenvalues(part))
        same(here.feature_eigenvalues(), there.feature_eigenvalues())
        assert repr(here).replace(repr(kernel[0]), repr(kernel)) == repr(there)


@pytest.mark.parametrize(
    ("layer", "per_class", "bias"),
    [("0", True, True), pytest.param("2", False, False, marks=pytest.mark.slow)],
)
def test_kronecker_factors_are_the_same(layer, per_class, bias):
    options = {"per_class": per_class, "bias": bias}
    in_torch, in_jax = risks()
    here = specdens_torch.KroneckerFactors(in_torch, layer, **options)
    there = specdens_jax.KroneckerFactors(in_jax, LAYERS[layer], **options)
    assert here.shape == there.shape
    assert repr(here).replace(repr(layer), repr(LAYERS[layer])) == repr(there)
    same(here.left, there.left)
    same(here.right, there.right)
    for mine, its in zip(here.class_factors, there.class_factors, strict=True):
        same(mine, its)
    found, expected = here.eigsh(4), there.eigsh(4)
    # The eigenvalues of sums of products come from Lanczos, of another accuracy each.
    same(found.eigenvalues, expected.eigenvalues, 1e-6 if per_class else 1e-10)
    assert (found.pairs is None) == (expected.pairs is None) == per_class
    same(here.corrected().eigenvalues, there.corrected().eigenvalues)
    x = np.random.default_rng(3).normal(size=(here.space.dimension, 2))
    same(here.operator() @ torch.tensor(x), there.operator() @ jnp.asarray(x))
    same(here.corrected() @ torch.tensor(x), there.corrected() @ jnp.asarray(x))
    matched = here.correspondence(torch.tensor(x)), there.correspondence(jnp.asarray(x))
    for mine, its in zip(*matched, strict=True):
        same(mine, its)


def test_lines_are_the_same():
    ends = np.random.default_rng(4).normal(size=(2, 43))
    alphas = [-0.5, 0.25, 1.0]
    in_torch, in_jax = risks()
    here = specdens_torch.along_line(in_torch, *torch.tensor(ends), alphas)
    there = specdens_jax.along_line(in_jax, *jnp.asarray(ends), alphas)
    for name in ("alphas", "values", "ends", "chord"):
        same(getattr(here, name), getattr(there, name))
    assert here.barrier == pytest.approx(there.barrier, rel=1e-10)
    assert repr(here) == repr(there)


def test_certificates_of_the_same_draws_are_the_same():
    in_torch, in_jax = risks()
    mean = in_torch.parameters.ravel().numpy()
    scales = np.linspace(0.1, 1.0, 43)
    draws = mean + scales * np.random.default_rng(5).normal(size=(20, 43))
    found = []
    for classifier, convert in (
        (TorchClassifier.of(in_torch), torch.tensor),
        (JaxClassifier.of(in_jax), jnp.asarray),
    ):
        errors = classifier.errors(convert(draw) for draw in draws)
        found.append(certificate(errors, mean, scales, 0 * mean, 0.1, classifier.num_examples))
    assert found[0] == found[1]
    assert 0 < found[0].empirical_error < 1
    assert found[0].num_samples == 20


def knockout(package, risk):
    matrix = package.GaussNewton(risk)
    return package.ClassStructure(risk).knockout(matrix, how="remove")


def with_basis(value):
    def call(package, risk):
        basis = {risk.parameters.names[0]: value} if value == "Q" else value
        package.pac_bayes(risk, np.zeros(43), basis=basis, epochs=1, num_monte_carlo=2)

    return call


def with_options(**options):
    return lambda package, risk: package.pac_bayes(risk, np.zeros(43), **options)


ENDS = np.zeros((2, 43))
MISTAKES = {  # what is called, the error, a part of its message
    "weighting": (lambda m, r: m.ClassStructure(r, weighting="x"), ValueError, "weighting='x'"),
    "classes": (lambda m, r: m.ClassStructure(r, "3"), ValueError, "num_classes='3' must be an"),
    "no risk": (lambda m, r: m.ClassStructure(3), TypeError, "risk has type int"),
    "part": (lambda m, r: m.ClassStructure(r).basis("within"), ValueError, "no small matrix"),
    "how": (knockout, ValueError, "how='remove'"),
    "k": (lambda m, r: m.ClassStructure(r).principal_subspace(4), ValueError, "k=4 must be an"),
    "factors of no risk": (lambda m, r: m.KroneckerFactors(3, "0"), TypeError, "risk has type int"),
    "no layer": (lambda m, r: m.KroneckerFactors(r, "none"), ValueError, "'none'"),
    "alphas": (lambda m, r: m.along_line(r, *ENDS, []), ValueError, r"alphas=\[\] must be"),
    "line of no risk": (lambda m, r: m.along_line(3, 0, 1, [0.0]), TypeError, "risk has type int"),
    "start": (lambda m, r: m.along_line(r, "x", "y", [0.0]), ValueError, "start "),
    "kind of basis": (with_basis(3), TypeError, "basis"),
    "type of basis": (with_basis("Q"), TypeError, "basis of .* has type str"),
    "name of basis": (with_basis("hessian"), ValueError, "basis='hessian' is unknown"),
    "drops": (with_options(drops=[0.5]), ValueError, r"drops=\[0.5\] must be epochs"),
    "epochs": (with_options(epochs=0), ValueError, "epochs=0 must be a positive integer"),
    "prior": (lambda m, r: m.pac_bayes(r, np.zeros(3)), ValueError, "prior_mean has shape"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_the_same_errors(name):
    call, error, message = MISTAKES[name]
    for package, risk in zip((specdens_torch, specdens_jax), risks(), strict=True):
        with pytest.raises(error, match=message):
            call(package, risk)


def test_losses_and_targets_without_classes_are_refused_by_both():
    squares = torch.nn.MSELoss(), specdens_jax.SquaredError()
    for package, risk, loss, layer in zip(
        (specdens_torch, specdens_jax), risks(), squares, ("0", "0_weight"), strict=True
    ):
        data = np.ones((2, 4)), np.ones((2, 3))
        if package is specdens_torch:
            other = package.Risk(risk.model, loss, tuple(map(torch.tensor, data)))
        else:
            other = package.Risk(predict, loss, risk.params, data)
        for call in (
            lambda m=package, r=other: m.ClassStructure(r),
            lambda m=package, r=other, name=layer: m.KroneckerFactors(r, name, per_class=True),
        ):
            with pytest.raises(ValueError, match=r"loss=.* softmax cross-entropy"):
                call()
    for package, risk in zip((specdens_torch, specdens_jax), risks("negative"), strict=True):
        with pytest.raises(ValueError, match="targets has rows of class probabilities that are"):
            _ = package.ClassStructure(risk).pair_weights
