"""Class structure from Gram matrices: against matrices that are made of the vectors themselves."""

from __future__ import annotations

import sys
from typing import NamedTuple

import numpy as np
import pytest

from specdens import hierarchy

NUM_CLASSES, DIMENSION = 4, 30


class Vectors(NamedTuple):
    """Pair means with their weights, and the dense matrix of every part."""

    means: np.ndarray  # (C * C, n)
    weights: np.ndarray  # (C, C)
    class_means: np.ndarray  # (C, n)
    parts: dict[str, np.ndarray]

    @property
    def gram(self) -> np.ndarray:
        return self.means @ self.means.T


def vectors(kind: str) -> Vectors:
    """Draw pair means; ``"empty"`` leaves one class without weight, and one pair of another."""
    rng = np.random.default_rng(7)
    means = rng.standard_normal((NUM_CLASSES**2, DIMENSION))
    weights = rng.random((NUM_CLASSES, NUM_CLASSES)) ** 4
    if kind == "empty":
        weights[1], weights[2, 3] = 0.0, 0.0
        means[weights.ravel() == 0] = 0.0
    if kind == "tiny":
        weights *= 1e-300
    parts = {part: np.zeros((DIMENSION, DIMENSION)) for part in ("class", "cross", "equal")}
    class_means = np.zeros((NUM_CLASSES, DIMENSION))
    for c in range(NUM_CLASSES):
        others = [d for d in range(NUM_CLASSES) if d != c]
        total = sum(weights[c, d] for d in others)
        for d in others:
            class_means[c] += weights[c, d] / total * means[c * NUM_CLASSES + d] if total else 0
        parts["class"] += total * np.outer(class_means[c], class_means[c])
        for d in others:
            spread = means[c * NUM_CLASSES + d] - class_means[c]
            parts["cross"] += weights[c, d] * np.outer(spread, spread)
        own = means[c * NUM_CLASSES + c]
        parts["equal"] += weights[c, c] * np.outer(own, own)
    parts["means"] = parts["class"] + parts["cross"] + parts["equal"]
    return Vectors(means, weights, class_means, parts)


@pytest.mark.parametrize("part", hierarchy.PARTS)
@pytest.mark.parametrize("kind", ["full", "empty", "tiny"])
def test_parts_have_the_spectra_and_ranges_of_the_dense_matrices(kind: str, part: str) -> None:
    data = vectors(kind)
    dense = data.parts[part]
    scale = np.linalg.norm(dense, 2)
    expected = np.linalg.eigvalsh(dense)[::-1]
    actual = hierarchy.part_eigenvalues(data.gram, data.weights, part)
    np.testing.assert_allclose(actual, expected[: len(actual)], rtol=0, atol=1e-13 * scale)
    assert expected[len(actual) :].max() < 1e-13 * scale
    small = hierarchy.part_gram(data.gram, data.weights, part)
    assert np.array_equal(small, small.T)
    eigenvalues, coefficients = hierarchy.part_basis(data.gram, data.weights, part)
    basis = data.means.T @ coefficients
    assert basis.shape[1] == (expected > 1e-12 * scale).sum()
    np.testing.assert_allclose(basis.T @ basis, np.eye(basis.shape[1]), atol=1e-7)
    np.testing.assert_allclose((basis * eigenvalues) @ basis.T, dense, rtol=0, atol=1e-7 * scale)


@pytest.mark.parametrize("part", hierarchy.PARTS)
@pytest.mark.parametrize("kind", ["full", "empty"])
def test_tables_multiply_with_the_parts(kind: str, part: str) -> None:
    data = vectors(kind)
    block = np.random.default_rng(0).standard_normal((DIMENSION, 3))
    products = (data.means @ block).reshape(NUM_CLASSES, NUM_CLASSES, 3)
    for a, v in ((products, block), (products[..., 0], block[:, 0])):
        factors = hierarchy.part_tables(a, data.weights, part)
        weighted = (data.weights.T * factors.T).T.reshape(NUM_CLASSES**2, *v.shape[1:])
        np.testing.assert_allclose(data.means.T @ weighted, data.parts[part] @ v, atol=1e-12)


@pytest.mark.parametrize("kind", ["full", "empty"])
def test_class_weights_gram_and_distances_are_those_of_the_vectors(kind: str) -> None:
    data = vectors(kind)
    off = data.weights.copy()
    np.fill_diagonal(off, 0.0)
    np.testing.assert_allclose(hierarchy.class_weights(data.weights), off.sum(1), rtol=1e-15)
    gram = hierarchy.class_gram(data.gram, data.weights)
    np.testing.assert_allclose(gram, data.class_means @ data.class_means.T, atol=1e-13)
    points = np.vstack([data.class_means, data.means])
    expected = ((points[:, None] - points) ** 2).sum(2)
    actual = hierarchy.squared_distances(data.gram, data.weights)
    np.testing.assert_allclose(actual, expected, atol=1e-12)
    assert not np.diagonal(actual).any()


def test_one_class_alone_has_no_other() -> None:
    gram, weights = np.array([[4.0]]), np.array([[0.5]])
    assert hierarchy.class_weights(weights) == 0.0
    np.testing.assert_allclose(hierarchy.part_eigenvalues(gram, weights, "equal"), [2.0])
    assert hierarchy.part_eigenvalues(gram, weights, "cross").shape == (0,)
    for part in ("class", "cross"):
        assert hierarchy.part_basis(gram, weights, part)[1].shape == (1, 0)


def test_scaling_returns_points_of_the_same_distances() -> None:
    points = np.random.default_rng(1).standard_normal((8, 3)) * [3.0, 2.0, 1.0]
    points -= points.mean(0)
    squares = ((points[:, None] - points) ** 2).sum(2)
    found = hierarchy.embedding(squares, dimension=3)
    np.testing.assert_allclose(((found[:, None] - found) ** 2).sum(2), squares, atol=1e-12)
    assert (np.diff((found**2).sum(0)) < 0).all()  # principal axes
    left = np.linalg.svd(points)[1]
    plane = hierarchy.embedding(squares)
    np.testing.assert_allclose((plane**2).sum(0), left[:2] ** 2, rtol=1e-12)


def test_neighbors_keeps_four_groups_apart() -> None:
    pytest.importorskip("sklearn")
    group = np.repeat(np.arange(4), 5)  # 20 = 4 + 4 * 4 points
    points = 50.0 * np.eye(4)[group] + np.random.default_rng(2).standard_normal((20, 4))
    squares = ((points[:, None] - points) ** 2).sum(2)
    found = hierarchy.embedding(squares, method="tsne", seed=3)
    assert found.shape == (20, 2)
    assert np.array_equal(found, hierarchy.embedding(squares, method="tsne", seed=3))
    distances = ((found[:, None] - found) ** 2).sum(2)
    np.fill_diagonal(distances, np.inf)
    assert np.array_equal(group[distances.argmin(1)], group)


def test_without_scikit_learn_the_error_says_what_to_install(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.manifold", None)
    with pytest.raises(ImportError, match="pip install scikit-learn"):
        hierarchy.embedding(np.ones((6, 6)) - np.eye(6), method="tsne")


def test_attribution_weighs_energies_by_the_size_of_eigenvalues() -> None:
    found = hierarchy.attributed(np.array([3.0, -1.0]), np.array([0.5, 1.0]), 2, 8)
    assert found == (0.625, 0.25)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: hierarchy.class_weights(np.ones(3)), r"pair_weights has shape \(3,\)"),
        (lambda: hierarchy.class_weights(-np.eye(2)), "not negative"),
        (lambda: hierarchy.class_weights(np.full((2, 2), np.nan)), "finite"),
        (lambda: hierarchy.class_gram(np.eye(3), np.eye(2)), r"gram has shape \(3, 3\)"),
        (lambda: hierarchy.part_gram(np.eye(4), np.eye(2), "within"), "part='within'"),
        (lambda: hierarchy.part_tables(np.eye(3), np.eye(2), "class"), "products has shape"),
        (lambda: hierarchy.weighted_gram(np.eye(3), np.ones(2)), r"gram has shape \(3, 3\)"),
        (lambda: hierarchy.weighted_gram(np.eye(2), -np.ones(2)), "weights has entries"),
        (lambda: hierarchy.embedding(np.eye(2)), "zeros on the diagonal"),
        (lambda: hierarchy.embedding(np.ones((2, 3))), "expected a square matrix"),
        (lambda: hierarchy.embedding(np.zeros((2, 2)), 3), "dimension=3"),
        (lambda: hierarchy.embedding(np.zeros((2, 2)), method="umap"), "method='umap'"),
        (lambda: hierarchy.embedding(np.zeros((5, 5)), method="tsne"), "perplexity=None"),
        (lambda: hierarchy.embedding(np.zeros((6, 6)), 2, "tsne", 6.0), "perplexity=6.0"),
        (lambda: hierarchy.attributed(np.ones(2), np.ones(3), 1, 4), "one eigenvalue for each"),
        (lambda: hierarchy.attributed(np.zeros(2), np.ones(2), 1, 4), "positive number"),
    ],
)
def test_errors_name_the_argument(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: hierarchy.class_weights([["a", "b"], ["c", "d"]]), "pair_weights="),
        (lambda: hierarchy.class_gram(1j * np.eye(4), np.eye(2)), "gram is complex"),
        (lambda: hierarchy.weighted_gram(1j * np.eye(2), np.ones(2)), "gram is complex"),
        (lambda: hierarchy.attributed(["x"], np.ones(1), 1, 4), "eigenvalues="),
        (lambda: hierarchy.embedding(np.array([["0"]])), "squared_distances="),
    ],
)
def test_what_is_no_number_is_refused(call, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        call()
