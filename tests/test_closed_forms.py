"""Models with spectra in closed form, against their definitions, networks and random data."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats

from specdens import aslinearoperator, eigsh
from specdens.laws import goodness_of_fit, outlier_gap_test
from specdens.testing import (
    check_operator,
    hidden_layer_residual_eigenvalues,
    multinomial_logistic_model,
    spiked_covariance,
)

PARTS = ("class", "cross", "equal", "within")
CASES = [(5, 20, 10.0, 0.1), (4, 4, 2.0, 0.9), (3, 7, 0.0, 0.5), (2, 5, 3.0, 0.02)]


def expected_matrix(num_classes, dimension, signal, error):
    """Return the mean over classes of E[x x^T] kron Hess(log-sum-exp), by the model's words."""
    total = np.zeros((dimension * num_classes,) * 2)
    for label in range(num_classes):
        p = np.full(num_classes, error / (num_classes - 1))
        p[label] = 1 - error
        moment = np.eye(dimension)
        moment[label, label] += signal**2
        total += np.kron(moment, np.diag(p) - np.outer(p, p)) / num_classes
    return total


@pytest.mark.parametrize("case", CASES)
def test_logistic_spectrum_and_multiplicities(case):
    model = multinomial_logistic_model(*case)
    matrix = expected_matrix(*case)
    found = np.linalg.eigvalsh(matrix)[::-1]
    np.testing.assert_allclose(model.eigenvalues(), found, rtol=0, atol=1e-10 * found[0])
    values, multiplicities = model.levels
    assert multiplicities.sum() == len(matrix)
    np.testing.assert_allclose(model.matrix(), matrix, atol=1e-14)
    operator = model.operator()
    check_operator(operator)
    np.testing.assert_allclose(operator @ np.eye(len(matrix)), matrix, atol=1e-12)
    gaps = found[:-1] - found[1:] > 1e-6
    levels = values[multiplicities > 0]
    assert gaps.sum() == len(np.unique(levels.round(9))) - 1


def test_logistic_model_of_the_paper():
    values, multiplicities = multinomial_logistic_model(5, 200, 10.0, 0.1).levels
    np.testing.assert_allclose(values, [2.296875, 0.546875, 0.046875, 0], atol=1e-14)
    np.testing.assert_array_equal(multiplicities, [5, 15, 780, 200])


@pytest.mark.parametrize("case", CASES)
def test_the_parts_of_the_logistic_model(case):
    """Each has its own closed spectrum; means of sampled extended gradients confirm the class."""
    model = multinomial_logistic_model(*case)
    total = 0
    for part in PARTS:
        matrix = model.matrix(part)
        total = total + matrix
        found = np.linalg.eigvalsh(matrix)[::-1]
        np.testing.assert_allclose(model.eigenvalues(part), found, atol=1e-12 * (1 + case[2] ** 2))
    np.testing.assert_allclose(total, expected_matrix(*case), atol=1e-12)
    C, D, t, _ = case  # noqa: N806
    p, by_class = model.probabilities, 0
    for label in range(C):  # of x = t e_c, the mean over the noise
        wrong = [j for j in range(C) if j != label]
        rows = [np.kron(t * np.eye(D)[label], p[label] - np.eye(C)[j]) for j in wrong]
        weights = p[label, wrong]
        mean = np.average(rows, axis=0, weights=weights)
        by_class = by_class + weights.sum() / C * np.outer(mean, mean)
    np.testing.assert_allclose(model.matrix("class"), by_class, atol=1e-12)


def test_outliers_of_the_logistic_model_are_found():
    model = multinomial_logistic_model(5, 40, 10.0, 0.1)
    found = eigsh(model.operator(), 21, which="LA").eigenvalues[::-1]
    np.testing.assert_allclose(found, model.eigenvalues()[:21], rtol=1e-5)
    knocked = aslinearoperator(model.matrix()) - aslinearoperator(model.matrix("class"))
    top = eigsh(knocked, 1, which="LA").eigenvalues[0]
    assert top < model.levels[0][0] / 3


def residual_case(seed=0, number=9):
    rng = np.random.default_rng(seed)
    inputs, labels = rng.standard_normal((number, 4)), rng.integers(0, 3, number)
    V, a = rng.standard_normal((3, 5)), rng.standard_normal(3)  # noqa: N806
    W, b = rng.standard_normal((5, 4)), rng.standard_normal(5)  # noqa: N806
    before = inputs @ W.T + b
    return inputs, labels, (W, b, V, a), before


def softmax_errors(outputs, labels):
    p = np.exp(outputs - outputs.max(axis=1, keepdims=True))
    return p / p.sum(axis=1, keepdims=True) - np.eye(outputs.shape[1])[labels]


@pytest.mark.parametrize("slope", [0.0, 0.2])
def test_residual_of_a_hidden_layer_in_torch(slope):
    torch = pytest.importorskip("torch")
    from specdens_torch import Residual

    inputs, labels, weights, before = residual_case()
    activation = torch.nn.LeakyReLU(slope) if slope else torch.nn.ReLU()
    model = torch.nn.Sequential(torch.nn.Linear(4, 5), activation, torch.nn.Linear(5, 3)).double()
    with torch.no_grad():
        for parameter, value in zip(model.parameters(), weights, strict=True):
            parameter.copy_(torch.tensor(value))
    data = torch.tensor(inputs), torch.tensor(labels)
    matrix = Residual(model, torch.nn.CrossEntropyLoss(), data) @ torch.eye(43, dtype=torch.float64)
    slopes = np.where(before > 0, 1.0, slope)
    outputs = (slopes * before) @ weights[2].T + weights[3]
    closed = hidden_layer_residual_eigenvalues(inputs, slopes, softmax_errors(outputs, labels))
    np.testing.assert_allclose(closed, np.linalg.eigvalsh(matrix.numpy()), atol=1e-12)
    np.testing.assert_allclose(closed, -closed[::-1], atol=1e-14)
    assert np.sum(np.abs(closed) > 1e-12) <= 2 * (3 - 1) * 5


def test_residual_of_a_hidden_layer_in_jax():
    jax = pytest.importorskip("jax")
    from specdens_jax import Residual, SquaredError

    inputs, _, (W, _, V, _), _ = residual_case(1)  # noqa: N806
    targets = np.random.default_rng(2).standard_normal((9, 3))
    with jax.enable_x64(True):

        def predict(params, x):
            return jax.nn.relu(x @ params["W"].T) @ params["V"].T

        params = {"W": jax.numpy.asarray(W), "V": jax.numpy.asarray(V)}
        data = jax.numpy.asarray(inputs), jax.numpy.asarray(targets)
        matrix = Residual(predict, SquaredError(), params, data) @ jax.numpy.eye(35)
        outputs = np.asarray(predict(params, inputs))
        slopes = jax.grad(lambda f: SquaredError()(f, targets).mean())(jax.numpy.asarray(outputs))
    errors = np.asarray(slopes) * len(inputs)
    closed = hidden_layer_residual_eigenvalues(inputs, inputs @ W.T > 0, errors, bias=False)
    np.testing.assert_allclose(closed, np.linalg.eigvalsh(np.asarray(matrix)), atol=1e-12)
    assert np.sum(np.abs(closed) > 1e-9) == 2 * 3 * 5


SPIKED = spiked_covariance([9.0, 5.0, 3.0, 1.3], 2000, 500)


@pytest.fixture(scope="module")
def trials():
    """Sample eigenvalues (8, n) and squared first entries of the top eigenvectors (8, 4)."""
    values, cosines = [], []
    for seed in range(8):
        data = SPIKED.sample(seed)
        found, vectors = np.linalg.eigh(data.T @ data / len(data))
        values.append(found[::-1])
        cosines.append(np.diagonal(vectors[:4, ::-1][:, :4]) ** 2)
    return np.array(values), np.array(cosines)


def test_outliers_of_spiked_data(trials):
    """The mean over 8 samples is within 4 standard errors and O(1/T) of the limits."""
    values = trials[0]
    assert SPIKED.num_outliers == 3
    assert SPIKED.threshold == pytest.approx(1.5)
    errors = values[:, :3].mean(axis=0) - SPIKED.eigenvalues[:3]
    bias = 10 * SPIKED.spikes[:3] / SPIKED.num_samples
    assert np.all(np.abs(errors) < 4 * SPIKED.fluctuations[:3] / np.sqrt(8) + bias)
    deviations = values[:, :3].std(axis=0, ddof=1) / SPIKED.fluctuations[:3]
    low, high = np.sqrt(scipy.stats.chi2(7).ppf([1e-4, 1 - 1e-4]) / 7)
    assert np.all((deviations > low) & (deviations < high))
    edge = SPIKED.eigenvalues[3]
    assert edge == pytest.approx(2.25)
    assert np.all(np.abs(values[:, 3] - edge) < 8 * SPIKED.num_samples ** (-2 / 3))
    assert np.isnan(SPIKED.fluctuations[3])


def test_eigenvectors_of_spiked_data(trials):
    """The mean over 8 samples is within 0.02 of the limits; what cannot be seen is below 0.1."""
    means = trials[1].mean(axis=0)
    np.testing.assert_allclose(means[:3], SPIKED.overlaps[:3], atol=0.02)
    assert SPIKED.overlaps[3] == 0
    assert means[3] < 0.1


def test_the_bulk_of_spiked_data(trials):
    bulk = trials[0][0, 4:]
    assert goodness_of_fit(bulk, SPIKED.bulk).kolmogorov_smirnov < 0.01
    assert outlier_gap_test(trials[0][0]).num_outliers == SPIKED.num_outliers


def test_spiked_operator_and_scale():
    model = spiked_covariance([30.0, 20.0], 60, 90, variance=4.0)
    data = model.sample(5)
    operator = model.operator(5)
    check_operator(operator)
    np.testing.assert_allclose(operator @ np.eye(90), data.T @ data / 60, atol=1e-12)
    unit = spiked_covariance([5.0, 7.5], 60, 90)
    for name in ("eigenvalues", "fluctuations"):
        np.testing.assert_allclose(getattr(model, name), 4 * getattr(unit, name))
    np.testing.assert_allclose(model.overlaps, unit.overlaps)
    np.testing.assert_allclose(data, 2 * unit.sample(5))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: multinomial_logistic_model(1, 4, 1.0, 0.1), "num_classes=1"),
        (lambda: multinomial_logistic_model(3, 2, 1.0, 0.1), "dimension=2"),
        (lambda: multinomial_logistic_model(3, 4, -1.0, 0.1), "signal=-1"),
        (lambda: multinomial_logistic_model(3, 4, 1.0, 1.0), "error=1"),
        (lambda: multinomial_logistic_model(3, 4, 1.0, 0.1).matrix("bulk"), "part='bulk'"),
        (lambda: spiked_covariance([0.5], 10, 10), "above variance=1.0"),
        (lambda: spiked_covariance([2.0, 3.0], 10, 2), "dimension=2"),
        (lambda: spiked_covariance([2.0], 0, 10), "num_samples=0"),
        (lambda: spiked_covariance([2.0], 10, 10, variance=0.0), "variance=0"),
        (
            lambda: hidden_layer_residual_eigenvalues(np.ones((3, 2)), np.ones((2, 4)), [[1.0]]),
            "of one n",
        ),
    ],
)
def test_errors_name_the_argument(make, message):
    with pytest.raises(ValueError, match=message):
        make()
