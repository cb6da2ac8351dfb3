"""What fitting a posterior takes, against closed forms, dense matrices and autodifferentiation."""

from __future__ import annotations

import math

import array_api_strict
import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal, ortho_group

from specdens.certificates import (
    PriorGrid,
    binary_kl,
    certificate,
    gaussian_kl,
    kl_inverse,
    monte_carlo_upper,
    pac_bayes_bound,
)
from specdens.certificates.fitting import (
    Objective,
    Schedule,
    between,
    matrix_shape,
    smallest_scale,
    squared_overlap,
)

RNG = np.random.default_rng(0)
N, GRID = 500, PriorGrid(largest=0.2, precision=50.0, delta=0.05)
OBJECTIVE = Objective(GRID, N)
W, W0, SCALES, LAMBDA = RNG.normal(size=5), RNG.normal(size=5), RNG.uniform(0.1, 1, 5), 0.03
LOGS = np.log(SCALES), np.asarray(0.5 * math.log(LAMBDA))


@pytest.mark.parametrize(
    ("epochs", "drops", "rates"),
    [
        (7, None, [1, 1, 0.1, 0.1, 0.01, 0.01, 0.01]),  # from 7 // 3 and 14 // 3
        (1, None, [0.01]),
        (4, (), [1, 1, 1, 1]),
        (4, [np.int64(3), 1], [1, 0.1, 0.1, 0.01]),
        (3, (2, 2), [1, 1, 0.01]),
    ],
)
def test_the_rate_falls_to_a_tenth_at_every_drop(epochs, drops, rates):
    schedule = Schedule(epochs, 4.0, 10, drops)
    found = [schedule.rate(epoch) for epoch in range(epochs)]
    np.testing.assert_allclose(found, 4.0 * np.array(rates), rtol=1e-14)


def test_a_run_calls_epochs_and_refreshes_in_turn_and_keeps_their_averages():
    calls = []

    def one_epoch(rate, batch_size):
        calls.append((round(rate, 9), batch_size))
        return np.arange(4.0) + len(calls)

    schedule = Schedule(5, 1.0, 8, (3,), refresh_every=2)
    history = schedule.run(one_epoch, lambda: calls.append("basis"))
    epoch, late = (1.0, 8), (0.1, 8)
    assert calls == [epoch, epoch, "basis", epoch, late, "basis", late]
    assert list(history) == ["surrogate", "kl", "prior_variance", "objective"]
    table = np.array([1.0, 2, 4, 5, 7])[:, None] + np.arange(4)
    np.testing.assert_array_equal(np.stack(list(history.values()), axis=1), table)


def test_a_run_that_diverges_says_when():
    values = iter([np.zeros(4), np.array([0, np.nan, 0, 0])])
    with pytest.raises(ValueError, match=r"learning_rate=3\.0 makes .* diverge in epoch 1; pass a"):
        Schedule(4, 3.0, 8).run(lambda rate, size: next(values), lambda: None)


def test_the_divergence_is_that_of_dense_gaussians():
    found = OBJECTIVE.divergence(W, *LOGS, W0)
    assert found == pytest.approx(gaussian_kl(W, SCALES, W0, LAMBDA), rel=1e-12)
    # The mean of ln q - ln p under q: both are quadratic, so it is known from second moments.
    Q = ortho_group.rvs(5, random_state=1)  # noqa: N806
    root = Q @ np.diag(SCALES) * math.sqrt(5)  # W +- its columns have the moments of q
    points = np.concatenate([W + root.T, W - root.T])
    q = multivariate_normal(W, Q @ np.diag(SCALES**2) @ Q.T).logpdf(points)
    p = multivariate_normal(W0, LAMBDA * np.eye(5)).logpdf(points)
    assert found == pytest.approx((q - p).mean(), rel=1e-10)


def test_scales_that_stand_for_several_directions_count_as_often():
    counts, few = np.array([3, 2]), np.log([0.2, 0.7])
    found = OBJECTIVE.divergence(W, few, LOGS[1], W0, counts)
    repeated = OBJECTIVE.divergence(W, np.repeat(few, counts), LOGS[1], W0)
    assert found == pytest.approx(repeated, rel=1e-13)
    assert OBJECTIVE.divergence(W0, np.full(5, LOGS[1]), LOGS[1], W0) == 0  # the prior itself


def test_the_complexity_is_the_formula_and_joins_the_bound():
    kl = 12.5
    b, c, delta = GRID.largest, GRID.precision, GRID.delta
    cost = 2 * math.log(c * math.log(b / LAMBDA)) + math.log(math.pi**2 * N / (6 * delta))
    expected = math.sqrt((kl + cost) / (2 * (N - 1)))
    assert OBJECTIVE.complexity(kl, LOGS[1]) == pytest.approx(expected, rel=1e-12)
    # At a point of the grid its square is half the divergence of the bound (Pinsker's inequality).
    index = 40
    budget = 2 * OBJECTIVE.complexity(kl, np.asarray(0.5 * math.log(GRID.variance(index)))) ** 2
    bound = pac_bayes_bound(0.1, kl, N, index=index, grid=GRID)
    assert binary_kl(0.1, bound) == pytest.approx(budget, rel=1e-9)
    assert bound <= 0.1 + math.sqrt(budget / 2)


def test_gradients_are_those_of_the_formulas():
    w, logs, prior = (torch.tensor(x, requires_grad=True) for x in (W, *LOGS))
    kl = OBJECTIVE.divergence(w, logs, prior, torch.tensor(W0))
    found = torch.autograd.grad(kl, (w, logs, prior), retain_graph=True)
    apart = ((W - W0) ** 2).sum() / LAMBDA
    expected = (W - W0) / LAMBDA, SCALES**2 / LAMBDA - 1, 5 - (SCALES**2).sum() / LAMBDA - apart
    for mine, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(mine.numpy(), theirs, rtol=1e-12)
    (slope,) = torch.autograd.grad(OBJECTIVE.complexity(kl.detach(), prior), prior)
    index, root = GRID.index(LAMBDA), float(OBJECTIVE.complexity(float(kl.detach()), LOGS[1]))
    # d/dt of 2 ln(c (ln b - 2 t)) is -4 c / j, over 2 (n - 1) times twice the square root.
    assert slope == pytest.approx(-4 * GRID.precision / index / (4 * (N - 1) * root), rel=1e-12)


def test_the_first_prior_is_not_above_the_largest():
    assert OBJECTIVE.first_log_prior(0.01) == pytest.approx(math.log(0.01), rel=1e-15)
    largest = 0.5 * math.log(0.2 * math.exp(-1 / 50))
    assert OBJECTIVE.first_log_prior(3.0) == OBJECTIVE.largest_log_prior
    assert OBJECTIVE.largest_log_prior == pytest.approx(largest, rel=1e-14)
    assert GRID.index(math.exp(2 * OBJECTIVE.largest_log_prior)) == pytest.approx(1, rel=1e-12)


def test_any_library_of_the_array_standard_will_do():
    strict = [array_api_strict.asarray(x) for x in (W, *LOGS, W0)]
    found = OBJECTIVE.divergence(*strict)
    assert float(found) == pytest.approx(OBJECTIVE.divergence(W, *LOGS, W0), rel=1e-13)
    complexity = OBJECTIVE.complexity(found, strict[2])
    expected = OBJECTIVE.complexity(float(found), LOGS[1])
    assert float(complexity) == pytest.approx(float(expected), rel=1e-13)


def orthogonal(order, seed):
    return ortho_group.rvs(order, random_state=seed)


def kronecker(left, right):
    return np.kron(np.eye(3) if left is None else left, np.eye(4) if right is None else right)


@pytest.mark.parametrize("left", [None, orthogonal(3, 0)], ids=["I", "U"])
@pytest.mark.parametrize("right", [None, orthogonal(4, 1)], ids=["I", "V"])
def test_between_is_the_kronecker_product(left, right):
    x = RNG.normal(size=(3, 4))
    expected = kronecker(left, right) @ x.ravel()
    np.testing.assert_allclose(between(left, x, right).ravel(), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("new", [None, orthogonal(4, 2)], ids=["I", "new"])
@pytest.mark.parametrize("old", [None, orthogonal(4, 3)], ids=["I", "old"])
def test_overlaps_take_variances_from_basis_to_basis(new, old):
    variances, eye = RNG.uniform(1, 2, 4), np.eye(4)
    before, after = (eye if basis is None else basis for basis in (old, new))
    covariance = before @ np.diag(variances) @ before.T
    expected = np.diag(after.T @ covariance @ after)  # along the columns of the new basis
    overlap = squared_overlap(new, old)
    found = variances if overlap is None else overlap @ variances
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    assert (overlap is None) == (new is None and old is None)


def test_tensors_are_matrices_whose_first_axis_stays():
    for shape in [(8, 3, 5, 5), (8, 2), (8,), (), (0, 3)]:
        rows, columns = matrix_shape(shape)
        assert np.zeros(shape).reshape(rows, columns).shape == (rows, columns)
        assert rows == (shape[0] if shape else 1)


def test_the_least_scale_is_relative_unless_all_is_zero():
    assert smallest_scale(3.0) == pytest.approx(3 * smallest_scale(1.0), rel=1e-15)
    assert smallest_scale(0.0) == smallest_scale(1.0) > 0


def certify(prior_variance=0.01, grid=None):
    return certificate([0.1], [0.0], [1.0], [0.0], prior_variance, 10, grid=grid)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: Schedule(0, 0.1, 10), ValueError, "epochs=0 must be a positive integer"),
        (lambda: Schedule(3, 0.1, 10.0), ValueError, r"batch_size=10\.0 must be a positive int"),
        (lambda: Schedule(3, 0.1, 10, refresh_every=0), ValueError, "refresh_every=0"),
        (lambda: Schedule(3, math.inf, 10), ValueError, "learning_rate=inf must be positive"),
        (lambda: Schedule(3, "fast", 10), TypeError, "learning_rate='fast' must be a real number"),
        (lambda: Schedule(3, 0.1, 10, [-1]), ValueError, r"drops=\[-1\] must be epochs, integers"),
        (lambda: Schedule(3, 0.1, 10, 2), ValueError, "drops=2 must be epochs"),
        (lambda: PriorGrid(largest="a"), TypeError, "largest='a' must be a real number"),
        (lambda: PriorGrid(delta=0), ValueError, "delta=0 must lie between 0 and 1; it is a proba"),
        (lambda: PriorGrid().cost("1", 10), TypeError, "index='1' must be a real number"),
        (lambda: PriorGrid().cost(2, 10.5), TypeError, r"num_examples=10\.5 must be an integer"),
        (lambda: PriorGrid().cost(2, 1), ValueError, "num_examples=1 must be at least 2"),
        (lambda: binary_kl("a", 0.5), TypeError, "q='a' must be a real number or an array"),
        (lambda: binary_kl(0.5, 2), ValueError, "p=2 must lie between 0 and 1, ends included"),
        (lambda: kl_inverse(0.5, None), TypeError, "c=None must be a real number or"),
        (lambda: kl_inverse(0.5, [1, -2]), ValueError, r"c=-2\.0 must be zero or positive"),
        (lambda: pac_bayes_bound("a", 1, 9, index=2), TypeError, "empirical_error='a' must be"),
        (lambda: pac_bayes_bound(2, 1, 9, index=2), ValueError, "empirical_error=2 must lie"),
        (lambda: pac_bayes_bound(0, "a", 9, index=2), TypeError, "kl='a' must be a real"),
        (lambda: pac_bayes_bound(0, 1, 9, index=True), ValueError, "index=True must be an integer"),
        (lambda: monte_carlo_upper(1.5, 9), ValueError, r"error=1\.5 must lie between 0 and 1"),
        (lambda: gaussian_kl("w", [1], [0], 1.0), TypeError, "mean='w' must be"),
        (
            lambda: gaussian_kl([0, 0], [1, 1], [0, 0], 1.0, multiplicities=[3, -1]),
            ValueError,
            "multiplicities=-1 must not be negative",
        ),
        (lambda: PriorGrid().variance("1"), TypeError, "index='1' must be a real number"),
        (lambda: certify(grid=3), TypeError, "grid has type int; expected a PriorGrid"),
        (lambda: certify(prior_variance="a"), TypeError, "prior_variance='a' must be a real"),
        (lambda: certify(prior_variance=0.0), ValueError, r"prior_variance=0\.0 must be positive"),
        (lambda: gaussian_kl([0], [1], [math.inf], 1.0), ValueError, "mean or prior_mean has"),
        (
            lambda: gaussian_kl([0, 0], [1, 1], [0, 0], 1.0, multiplicities=[1, 1, 0]),
            ValueError,
            r"multiplicities have shape \(3,\), scales \(2,\); pass one for each",
        ),
    ],
)
def test_errors_name_the_argument_its_value_and_what_is_expected(call, error, message):
    with pytest.raises(error, match=message):
        call()
