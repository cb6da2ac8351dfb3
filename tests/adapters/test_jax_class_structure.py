"""Class structure of JAX models against dense extended gradients and identities."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from specdens_jax import (
    CrossEntropy,
    GaussNewton,
    Risk,
    SquaredError,
    class_means,
    next_token_loss,
    token_loss,
)
from specdens_jax.class_structure import ClassStructure

PARTS = ("class", "cross", "equal", "within")
CLASSES, EXAMPLES = 3, 8
WEIGHTS = (1.0, 3.0, 0.5)

pytestmark = pytest.mark.usefixtures("doubles")


def numbers(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def mlp(params, inputs):
    return jnp.tanh(inputs @ params["w"] + params["b"]) @ params["v"]


def params_of(classes=CLASSES):
    return {"w": numbers(4, 5), "b": numbers(5, seed=2), "v": 2 * numbers(5, classes, seed=4)}


def labels_of(number=EXAMPLES):
    """Labels of which every class has a few."""
    return jnp.asarray(np.random.default_rng(3).permutation(np.arange(number) % CLASSES))


@dataclass(frozen=True)
class Case:
    loss: Any
    targets: Any
    reduction: str = "mean"
    batch_size: int | None = None
    shape: tuple[int, ...] = (EXAMPLES, 4)


def case_of(name):
    tokens = labels_of(2 * EXAMPLES).reshape(-1, 2)
    soft = jax.nn.softmax(2 * numbers(EXAMPLES, CLASSES, seed=7))
    return {
        "hard": lambda: Case(CrossEntropy(), labels_of()),
        "smoothed": lambda: Case(
            CrossEntropy(class_weights=WEIGHTS, label_smoothing=0.2), labels_of().at[4].set(-100)
        ),
        "soft": lambda: Case(CrossEntropy(class_weights=WEIGHTS, label_smoothing=0.1), soft),
        # Nine of the first class, three of the second, none of the last; batches of 8 and 4.
        "imbalanced": lambda: Case(
            CrossEntropy(), jnp.asarray([0, 0, 1, 0] * 3), "sum", batch_size=8, shape=(12, 4)
        ),
        "tokens": lambda: Case(token_loss, tokens.at[3, 1].set(-100), shape=(EXAMPLES, 2, 4)),
        "next tokens": lambda: Case(
            next_token_loss, tokens.at[3].set(-100), shape=(EXAMPLES, 2, 4)
        ),
    }[name]()


FAST = [("smoothed", "probability")]  # uniform weights: test_structure_agreement
ALL = FAST + [
    pytest.param(name, weighting, marks=pytest.mark.slow)
    for name in ("hard", "smoothed", "soft", "imbalanced", "tokens", "next tokens")
    for weighting in ("probability", "uniform")
    if (name, weighting) not in FAST
]


@functools.cache
def risk_of(name):
    case, params = (
        case_of(name),
        {"w": numbers(4, 5), "b": numbers(5, seed=2), "v": 2 * numbers(5, CLASSES, seed=4)},
    )
    data = numbers(*case.shape, seed=1), case.targets
    options = {"reduction": case.reduction, "batch_size": case.batch_size}
    return Risk(mlp, case.loss, params, data, **options)


@functools.cache
def structure_of(name, weighting):
    return ClassStructure(risk_of(name), weighting=weighting)


@functools.cache
def dense_of(name, weighting):
    return Dense(name, weighting)


class Dense:
    """All extended gradients, one by one, with weights from the Hessians of the terms' losses."""

    def __init__(self, name, weighting):
        case, params = case_of(name), risk_of(name).params
        theta, unravel = ravel_pytree(params)
        inputs = numbers(*case.shape, seed=1)

        def logits_of(theta):
            return mlp(unravel(theta), inputs)

        def total(flat):
            losses, weights = case.loss(flat.reshape(*case.shape[:-1], CLASSES), case.targets)
            return (losses * weights).sum(), weights.sum()

        logits = np.asarray(logits_of(theta)).reshape(-1, CLASSES)
        jacobian = np.asarray(jax.jit(jax.jacobian(logits_of))(theta))
        jacobian = jacobian.reshape(*logits.shape, -1)
        curvature, weight = jax.jit(jax.hessian(total, has_aux=True))(jnp.asarray(logits.ravel()))
        exponentials = np.exp(logits)
        probabilities = exponentials / exponentials.sum(1, keepdims=True)
        # Each term's loss has the Hessian kappa (diag p - p p^T) in its own logits.
        slopes = np.diagonal(np.asarray(curvature)).reshape(logits.shape)
        kappa = (slopes / (probabilities * (1 - probabilities))).mean(1)
        mass = float(weight) if case.reduction == "mean" else 1.0
        members = self.members(name, case)
        self.h = np.zeros((len(logits), CLASSES, jacobian.shape[-1]))
        self.omega = np.zeros((len(logits), CLASSES, CLASSES))
        for i, p in enumerate(probabilities):
            for d in range(CLASSES):
                length, share = (1.0, p[d]) if weighting == "probability" else (p[d] ** 0.5, 1.0)
                self.h[i, d] = length * jacobian[i].T @ (p - np.eye(CLASSES)[d])
                self.omega[i, :, d] = kappa[i] * members[i] * share / mass
        self.w = self.omega.sum(0)
        self.pairs = np.zeros((CLASSES, CLASSES, jacobian.shape[-1]))
        self.means = np.zeros((CLASSES, jacobian.shape[-1]))
        self.class_w = np.zeros(CLASSES)
        for c in range(CLASSES):
            others = [d for d in range(CLASSES) if d != c]
            for d in range(CLASSES):
                if self.w[c, d] > 0:
                    self.pairs[c, d] = self.omega[:, c, d] @ self.h[:, d] / self.w[c, d]
            self.class_w[c] = self.w[c, others].sum()
            if self.class_w[c] > 0:
                self.means[c] = self.w[c, others] @ self.pairs[c, others] / self.class_w[c]

    @staticmethod
    def members(name, case):
        targets = np.array(case.targets)
        if name == "soft":
            return targets
        if name == "next tokens":  # the last place of a row has no target
            targets = np.concatenate([targets[:, 1:], np.full((len(targets), 1), -100)], axis=1)
        return np.stack([np.arange(CLASSES) == label for label in targets.ravel()]).astype(float)

    def part(self, name):
        pairs = [(c, d) for c in range(CLASSES) for d in range(CLASSES)]
        if name == "class":
            return sum(w * np.outer(g, g) for w, g in zip(self.class_w, self.means, strict=True))
        if name == "equal":
            return sum(
                self.w[c, c] * np.outer(self.pairs[c, c], self.pairs[c, c]) for c in range(CLASSES)
            )
        if name == "cross":
            rows = [(self.w[c, d], self.pairs[c, d] - self.means[c]) for c, d in pairs if c != d]
            return sum(w * np.outer(g, g) for w, g in rows)
        centered = self.h[:, None] - self.pairs
        return np.einsum("icd,icdp,icdq->pq", self.omega, centered, centered)


def whole(operator):
    return np.asarray(operator @ jnp.eye(operator.space.dimension))


def assert_close(actual, expected, tolerance=1e-11):
    expected = np.asarray(expected)
    scale = np.abs(expected).max() or 1.0
    np.testing.assert_allclose(np.asarray(actual), expected, rtol=0, atol=tolerance * scale)


def spectrum(matrix):
    return np.linalg.eigvalsh(np.asarray(matrix))[::-1]


@pytest.mark.parametrize(("name", "weighting"), ALL)
def test_dense_extended_gradients(name, weighting):
    structure, dense = structure_of(name, weighting), dense_of(name, weighting)
    assert structure.num_classes == CLASSES
    assert_close(structure.pair_weights, dense.w)
    assert_close(structure.class_weights, dense.class_w)
    assert_close(structure.class_means.T, dense.means)
    assert_close(structure.pair_means(), dense.pairs)
    parts = {part: whole(getattr(structure, f"G_{part}")) for part in PARTS}
    for part, matrix in parts.items():
        assert_close(matrix, dense.part(part))
    assert_close(sum(parts.values()), whole(GaussNewton(structure.risk)), 1e-10)


@pytest.mark.slow  # test_structure_agreement compares them with those of torch
@pytest.mark.parametrize(
    ("name", "weighting"),
    [("smoothed", "probability"), ("soft", "uniform"), ("imbalanced", "uniform")],
)
def test_spectra_bases_and_distances(name, weighting):
    structure, dense = structure_of(name, weighting), dense_of(name, weighting)
    matrices = {part: dense.part(part) for part in ("class", "cross", "equal")}
    matrices["means"] = sum(matrices.values())
    for part, matrix in matrices.items():
        expected, vectors = np.linalg.eigh(matrix)
        found = structure.eigenvalues(part)
        assert_close(found, expected[::-1][: len(found)])
        basis = np.asarray(structure.basis(part))
        rank = (expected > 1e-12 * expected[-1]).sum()
        assert basis.shape == (len(matrix), rank)
        assert_close(basis.T @ basis, np.eye(rank), 1e-12)
        span = vectors[:, -rank:]
        assert_close(basis @ basis.T, span @ span.T, 1e-7)
    means = np.concatenate([dense.means, dense.pairs.reshape(CLASSES**2, -1)])
    distances = ((means[:, None] - means) ** 2).sum(-1)
    assert_close(structure.squared_distances(), distances)


@pytest.mark.parametrize(
    "name", ["smoothed", *(pytest.param(n, marks=pytest.mark.slow) for n in ("soft", "imbalanced"))]
)
def test_class_means_oppose_the_means_of_equal_pairs(name):
    structure = structure_of(name, "probability")
    pairs, weights = np.asarray(structure.pair_means()), structure.pair_weights
    of_classes = structure.class_weights[:, None] * np.asarray(structure.class_means).T
    equal = np.stack([weights[c, c] * pairs[c, c] for c in range(CLASSES)])
    assert_close(of_classes, -equal)
    with_examples = (structure.class_weights > 0).sum()
    assert structure.basis("means").shape[1] == with_examples * (CLASSES - 1)
    assert structure.basis("class").shape[1] == with_examples


def test_order_of_the_eigenvalues():
    structure = structure_of("smoothed", "probability")
    of_matrix = spectrum(whole(GaussNewton(structure.risk)))[:CLASSES]
    of_means = structure.eigenvalues("means")[:CLASSES]
    of_classes = structure.eigenvalues("class")
    assert (of_matrix > of_means).all()
    assert (of_means > of_classes).all()


def test_principal_subspace():
    structure, dense = structure_of("smoothed", "probability"), dense_of("smoothed", "probability")
    _, vectors = np.linalg.eigh(dense.part("class"))
    basis = np.asarray(structure.principal_subspace(2))
    assert_close(basis @ basis.T, vectors[:, -2:] @ vectors[:, -2:].T, 1e-9)
    with pytest.raises(ValueError, match=r"k=4 must be an integer from 1 to the number 3"):
        structure.principal_subspace(4)


@pytest.mark.slow
def test_principal_subspace_has_at_most_the_rank():
    with pytest.raises(ValueError, match="k=3 exceeds the rank 2"):
        structure_of("imbalanced", "uniform").principal_subspace(3)


def test_knockouts_and_attribution():
    structure, dense = structure_of("smoothed", "probability"), dense_of("smoothed", "probability")
    operator = GaussNewton(structure.risk)
    matrix, part = whole(operator), dense.part("class")
    span, _ = np.linalg.qr(dense.means.T)
    outside = np.eye(len(part)) - span @ span.T
    assert_close(whole(structure.knockout(operator)), outside @ matrix @ outside)
    assert_close(whole(structure.knockout(operator, how="subtract")), matrix - part)
    assert_close(
        whole(structure.knockout(operator, "means", "subtract")),
        matrix - part - dense.part("cross") - dense.part("equal"),
    )
    values, vectors = np.linalg.eigh(matrix)
    share, baseline = structure.attribution(values[-5:], jnp.asarray(vectors[:, -5:]))
    energies = ((span.T @ vectors[:, -5:]) ** 2).sum(0)
    assert share == pytest.approx(abs(values[-5:]) @ energies / abs(values[-5:]).sum(), rel=1e-10)
    assert baseline == CLASSES / len(part)
    every, chance = structure.attribution(np.ones(len(part)), jnp.eye(len(part)))
    assert every == pytest.approx(chance, rel=1e-12)


@pytest.mark.slow
def test_little_memory_changes_nothing(monkeypatch):
    risk = risk_of("smoothed")
    lavish = structure_of("smoothed", "probability")
    budget = 8 * CLASSES**4  # two means at a time: less than a class
    assert budget < CLASSES * lavish.space.vector_bytes
    monkeypatch.setattr(class_means, "MEMORY_BUDGET", budget)
    frugal = ClassStructure(risk)
    assert_close(frugal.squared_distances(), lavish.squared_distances())
    assert_close(whole(frugal.G_class), whole(lavish.G_class))
    monkeypatch.setattr(class_means, "MEMORY_BUDGET", budget - 1)
    with pytest.raises(ValueError, match="num_classes=3 has 9 pairs"):
        ClassStructure(risk).eigenvalues("means")
    assert_close(ClassStructure(risk).eigenvalues("class"), lavish.eigenvalues("class"))


def test_repeated_products_compile_nothing():
    structure = structure_of("smoothed", "probability")
    x = jnp.eye(structure.space.dimension)
    operators = [getattr(structure, f"G_{part}") for part in PARTS]
    first = [operator @ x for operator in operators]
    elsewhere = structure.risk.at(jax.tree.map(lambda leaf: 0.5 * leaf, structure.risk.params))
    events = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, _, **__: events.append(event)
    )
    try:
        again = [operator @ x for operator in operators]
        other = ClassStructure(elsewhere)
        moved = [other.G_cross @ x, other.G_within @ x]
        assert not any("backend_compile" in event for event in events)
    finally:
        jax.monitoring.clear_event_listeners()
    for mine, its in zip(first, again, strict=True):
        np.testing.assert_array_equal(mine, its)
    assert not np.allclose(moved[0], first[1])


@pytest.mark.slow
def test_single_precision():
    with jax.enable_x64(False):
        risk, dense = risk_of("smoothed"), dense_of("smoothed", "probability")
        params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), risk.params)
        case, inputs = case_of("smoothed"), np.asarray(numbers(EXAMPLES, 4, seed=1), np.float32)
        structure = ClassStructure(Risk(mlp, case.loss, params, (inputs, np.asarray(case.targets))))
        assert structure.class_means.dtype == jnp.float32
        assert structure.pair_weights.dtype == np.float64
        assert_close(structure.G_within @ jnp.eye(40), dense.part("within"), 1e-5)
        expected = spectrum(dense.part("class"))[:CLASSES]
        assert_close(structure.eigenvalues("class"), expected, 1e-5)
        assert structure.basis("class").shape == (40, CLASSES)


def test_what_is_refused():
    risk = risk_of("smoothed")
    with pytest.raises(ValueError, match=r"loss=SquaredError .* pass a Risk with CrossEntropy"):
        ClassStructure(Risk(mlp, SquaredError(), risk.params, (numbers(4, 4), numbers(4, 3))))
    with pytest.raises(TypeError, match="risk has type function"):
        ClassStructure(mlp)
    with pytest.raises(ValueError, match="weighting='icml'"):
        ClassStructure(risk, weighting="icml")
    for number in (1, "3", True):
        with pytest.raises(ValueError, match=r"num_classes=.* must be an integer of at least 2"):
            ClassStructure(risk, num_classes=number)
    with pytest.raises(ValueError, match="num_classes=4 differs from the 3 logits"):
        _ = ClassStructure(risk, num_classes=4).pair_weights
    structure = structure_of("smoothed", "probability")
    with pytest.raises(ValueError, match="part='within' is unknown"):
        structure.eigenvalues("within")
    with pytest.raises(ValueError, match="how='remove'"):
        structure.knockout(GaussNewton(risk), how="remove")
    with pytest.raises(ValueError, match="eigenvalues"):
        structure.attribution([1.0, 2.0], jnp.eye(40)[:, :3])
