"""Targets sampled from the model: expectations by enumeration and quadrature, not by chance."""

from __future__ import annotations

import functools
import itertools
import math

import numpy as np
import pytest
import scipy.stats
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn
from torch.autograd.functional import hessian as hessian_of
from torch.autograd.functional import jacobian as jacobian_of

from specdens_torch.language import next_token_loss, token_loss
from specdens_torch.losses import as_term_loss
from specdens_torch.sampling import sample_classes

WEIGHT = torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64)


def scores(*shape):
    torch.manual_seed(7)
    return torch.randn(*shape, dtype=torch.float64)


def indices(ignored, *shape):
    torch.manual_seed(8)
    targets = torch.randint(3, shape)
    targets.view(-1)[1] = ignored
    return targets


def soft(*shape):
    torch.manual_seed(9)
    return torch.rand(*shape, dtype=torch.float64)


def all_classes(loss, outputs, targets):
    """Yield (probability, sampled) of each class, at every term at once, with its axis last."""
    axis = 1 if outputs.ndim > 1 else 0
    for c in range(outputs.shape[axis]):
        probability = torch.softmax(outputs, axis).select(axis, c)
        yield probability, torch.full(loss.draws(outputs, targets), c)


def all_bits(probability, values=(0.0, 1.0)):
    def enumerate_bits(loss, outputs, targets):
        for value, p in zip(values, (1 - probability(outputs), probability(outputs)), strict=True):
            yield p, torch.full(loss.draws(outputs, targets), value, dtype=torch.float64)

    return enumerate_bits


def quadrature(loss, outputs, targets):
    """Nodes through the sampler itself: Gauss-Hermite's, as uniforms."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(5)
    for node, weight in zip(nodes, weights / math.sqrt(2 * math.pi), strict=True):
        u = torch.special.ndtr(torch.tensor(node, dtype=torch.float64))
        shape = loss.draws(outputs, targets)
        sampled = loss.sampler(outputs, targets, u.expand(shape))
        yield torch.full(shape, weight, dtype=u.dtype), sampled


def all_label_sets(loss, outputs, targets):
    probability = torch.sigmoid(outputs)
    for bits in itertools.product((0.0, 1.0), repeat=outputs.shape[1]):
        bits = torch.tensor(bits, dtype=torch.float64)
        p = torch.where(bits > 0, probability, 1 - probability).prod(1)
        yield p, bits.expand(outputs.shape)


def counts(loss, outputs, targets):
    for count in range(80):
        s = torch.full(outputs.shape, float(count), dtype=torch.float64)
        yield torch.exp(s * outputs - outputs.exp() - torch.lgamma(s + 1)), s


def expected_outer_products(loss, outputs, targets, outcomes):
    """Return E Σ_i w_i g_i g_iᵀ for gradients g_i of the terms' losses in all outputs."""
    weights = loss.terms(outputs, targets).weights.flatten()
    total = torch.zeros(outputs.numel(), outputs.numel(), dtype=torch.float64)
    for probability, sampled in outcomes(loss, outputs, targets):
        jacobian = jacobian_of(lambda f, s=sampled: loss.resampled(f, targets, s), outputs)
        jacobian = jacobian.reshape(weights.numel(), -1)
        total += jacobian.T @ ((weights * probability.flatten())[:, None] * jacobian)
    return total


def hessian_in_outputs(loss, outputs, targets):
    matrix = hessian_of(lambda f: loss.terms(f, targets).weighted.sum(), outputs)
    return matrix.reshape(outputs.numel(), -1)


CROSS_ENTROPY = {
    f"{layout}-{kind}-{'weighted' if weight is not None else 'equal'}-{smoothing}": (
        nn.CrossEntropyLoss(weight=weight, label_smoothing=smoothing),
        scores(4, 3, *positions),
        soft(4, 3, *positions) if kind == "soft" else indices(-100, 4, *positions),
        all_classes,
    )
    for (layout, positions), kind, weight, smoothing in itertools.product(
        (("rows", ()), ("grid", (2,))), ("hard", "soft"), (None, WEIGHT), (0.0, 0.3)
    )
}
SIGMOID = all_bits(torch.sigmoid)
CASES = {
    **CROSS_ENTROPY,
    "f-ce": (
        functools.partial(F.cross_entropy, weight=WEIGHT, ignore_index=2, label_smoothing=0.1),
        scores(4, 3),
        indices(2, 4),
        all_classes,
    ),
    "one-example": (nn.CrossEntropyLoss(), scores(3), torch.tensor(1), all_classes),
    "ce-sum": (
        nn.CrossEntropyLoss(reduction="sum", weight=WEIGHT),
        scores(4, 3),
        indices(-100, 4),
        all_classes,
    ),
    "bce": (nn.BCEWithLogitsLoss(), scores(4, 3), soft(4, 3), SIGMOID),
    "bce-weights": (
        nn.BCEWithLogitsLoss(pos_weight=WEIGHT, weight=WEIGHT.flip(0)),
        scores(4, 3),
        soft(4, 3),
        SIGMOID,
    ),
    "f-bce": (
        functools.partial(F.binary_cross_entropy_with_logits, pos_weight=WEIGHT),
        scores(4, 3),
        soft(4, 3).round(),
        SIGMOID,
    ),
    "soft-margin": (
        nn.SoftMarginLoss(),
        scores(4, 3),
        2 * soft(4, 3).round() - 1,
        all_bits(torch.sigmoid, (-1.0, 1.0)),
    ),
    "multilabel": (
        nn.MultiLabelSoftMarginLoss(weight=WEIGHT),
        scores(4, 3),
        soft(4, 3).round(),
        all_label_sets,
    ),
    "poisson": (nn.PoissonNLLLoss(full=True), scores(4, 3), soft(4, 3).round(), counts),
    "mse": (nn.MSELoss(), scores(4, 3), soft(4, 3), quadrature),
    "f-mse-sum": (
        functools.partial(F.mse_loss, reduction="sum"),
        scores(5),
        soft(5),
        quadrature,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_sampled_gradients_have_the_hessian_as_second_moment(name):
    loss, outputs, targets, outcomes = CASES[name]
    loss = as_term_loss(loss)
    torch.testing.assert_close(
        expected_outer_products(loss, outputs, targets, outcomes),
        hessian_in_outputs(loss, outputs, targets),
        rtol=1e-12,
        atol=1e-13,
    )


@pytest.mark.parametrize("make", [next_token_loss, token_loss], ids=lambda f: f.__name__)
def test_sampled_tokens_have_the_hessian_as_second_moment(make):
    loss, logits = as_term_loss(make), scores(2, 4, 3)
    labels = indices(-100, 2, 4), torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])

    def tokens(loss, outputs, targets):
        shape = loss.draws(outputs, targets)
        for c in range(3):
            yield torch.softmax(outputs, -1)[:, : shape[1], c], torch.full(shape, c)

    torch.testing.assert_close(
        expected_outer_products(loss, logits, labels, tokens),
        hessian_in_outputs(loss, logits, labels),
        rtol=1e-12,
        atol=1e-13,
    )


@pytest.mark.parametrize("weight", [None, WEIGHT])
def test_losses_of_log_probabilities_have_the_fisher_matrix_of_the_logits(weight):
    """Their own Hessian is zero, because they are linear in the outputs."""
    logits, targets = scores(4, 3), indices(-100, 4)
    nll, ce = (as_term_loss(kind(weight=weight)) for kind in (nn.NLLLoss, nn.CrossEntropyLoss))
    outputs = torch.log_softmax(logits, 1)
    fisher = expected_outer_products(nll, outputs, targets, all_classes)
    jacobian = jacobian_of(lambda f: torch.log_softmax(f, 1), logits).reshape(12, 12)
    expected = hessian_in_outputs(ce, logits, targets)
    torch.testing.assert_close(jacobian.T @ fisher @ jacobian, expected, rtol=1e-12, atol=1e-13)


def test_losses_of_probabilities_have_the_fisher_matrix_of_the_logits():
    logits, targets = scores(4, 3), soft(4, 3)
    bce = as_term_loss(nn.BCELoss(weight=WEIGHT))
    fisher = expected_outer_products(
        bce, torch.sigmoid(logits), targets, all_bits(lambda probability: probability)
    )
    jacobian = jacobian_of(torch.sigmoid, logits).reshape(12, 12)
    expected = hessian_in_outputs(
        as_term_loss(nn.BCEWithLogitsLoss(weight=WEIGHT)), logits, targets
    )
    torch.testing.assert_close(jacobian.T @ fisher @ jacobian, expected, rtol=1e-12, atol=1e-13)


def test_classes_come_from_the_inverse_distribution_function():
    """On the midpoints of a fine grid each class is drawn as often as its probability says."""
    logits, number = torch.tensor([0.1, -1.0, 2.0, -math.inf, 0.5]), 10_000
    uniforms = (torch.arange(number, dtype=torch.float64) + 0.5) / number
    drawn = sample_classes(logits.expand(number, 5), uniforms)
    frequencies = torch.bincount(drawn, minlength=5) / number
    assert (frequencies - torch.softmax(logits, 0)).abs().max() <= 1 / number
    assert (drawn.diff() >= 0).all()
    edges = torch.tensor([1e-300, 1 - 2**-53], dtype=torch.float64)
    ends = torch.tensor([[-math.inf, 0.0, 1.0, -math.inf]]).expand(2, 4)
    assert sample_classes(ends, edges).tolist() == [1, 2]  # never a class without probability


@pytest.mark.parametrize("rows", [1, 3, 1000])
def test_the_size_of_the_pieces_is_invisible(monkeypatch, rows):
    logits = scores(40, 3)
    uniforms = (torch.arange(40, dtype=torch.float64) + 0.5) / 40
    expected = sample_classes(logits, uniforms)
    monkeypatch.setattr("specdens_torch.sampling._MOST_ENTRIES", 3 * rows)
    assert torch.equal(sample_classes(logits, uniforms), expected)


def test_classes_follow_the_layout_of_torch():
    """Each position is drawn from its own scores."""
    loss, outputs = as_term_loss(nn.CrossEntropyLoss()), torch.full((2, 3, 4, 5), -50.0)
    targets = torch.randint(3, (2, 4, 5), generator=torch.Generator().manual_seed(0))
    outputs.scatter_(1, targets[:, None], 50.0)  # a model that is sure
    assert loss.draws(outputs, targets) == (2, 4, 5)
    uniforms = torch.full((2, 4, 5), 0.5, dtype=torch.float64)
    assert torch.equal(loss.sampler(outputs, targets, uniforms), targets)


def test_tokens_are_drawn_at_their_places():
    tokens = torch.tensor([[0, 2, 1, 1], [2, 0, 0, 1]])
    logits = 50 * F.one_hot(tokens, 3).double()  # a model that is sure
    for function, expected in ((next_token_loss, tokens[:, :-1]), (token_loss, tokens)):
        loss = as_term_loss(function)
        shape = loss.draws(logits, tokens)
        assert shape == expected.shape
        uniforms = torch.full(shape, 0.5, dtype=torch.float64)
        assert torch.equal(loss.sampler({"logits": logits}, tokens, uniforms), expected)
        assert loss.resampled(logits, tokens, expected).max() < 1e-20


@pytest.mark.parametrize(
    ("loss", "values", "probability"),
    [
        (nn.BCEWithLogitsLoss(), [0.0, 1.0], torch.sigmoid),
        (nn.SoftMarginLoss(), [-1.0, 1.0], torch.sigmoid),
        (nn.BCELoss(), [0.0, 1.0], lambda p: p),
    ],
)
def test_two_values_come_with_their_probabilities(loss, values, probability):
    loss, number = as_term_loss(loss), 1000
    outputs = torch.tensor([0.2, 0.9, 0.5], dtype=torch.float64)
    uniforms = ((torch.arange(number, dtype=torch.float64) + 0.5) / number)[:, None]
    drawn = loss.sampler(outputs.expand(number, 3), None, uniforms.expand(number, 3))
    assert drawn.unique().tolist() == values
    frequency = (drawn == values[1]).double().mean(0)
    assert (frequency - probability(outputs)).abs().max() <= 1 / number


@pytest.mark.parametrize("rate", [1e-300, 0.03, 1.0, 12.5, 4e5])
def test_counts_are_the_quantiles_of_scipy(rate):
    loss = as_term_loss(nn.PoissonNLLLoss())
    u = torch.cat([torch.linspace(1e-9, 1 - 1e-9, 1001, dtype=torch.float64), torch.tensor([0.5])])
    outputs = torch.full_like(u, math.log(rate))
    drawn = loss.sampler(outputs, torch.zeros_like(u), u)
    exact = outputs.exp().numpy()  # the rate after rounding
    assert np.array_equal(drawn.numpy(), scipy.stats.poisson.ppf(u.numpy(), exact))


@pytest.mark.parametrize("name", ["grid-hard-equal-0.0", "bce", "multilabel", "mse", "poisson"])
def test_a_term_keeps_its_numbers_when_the_data_are_cut(name):
    loss, outputs, targets, _ = CASES[name]
    loss = as_term_loss(loss)
    shape = loss.draws(outputs, targets)
    uniforms = soft(shape.numel()).clamp(1e-3, 1 - 1e-3)
    whole = loss.sampler(outputs, targets, uniforms.view(shape))
    pieces, used = [], 0
    for part in (slice(0, 1), slice(1, 4)):
        shape = loss.draws(outputs[part], targets[part])
        numbers = uniforms[used : used + shape.numel()].view(shape)
        pieces.append(loss.sampler(outputs[part], targets[part], numbers))
        used += shape.numel()
    assert torch.equal(torch.cat(pieces), whole)


@pytest.mark.parametrize(
    "loss",
    [nn.CrossEntropyLoss(), nn.MSELoss(), nn.BCEWithLogitsLoss()],
    ids=lambda loss: type(loss).__name__,
)
def test_sampling_is_pure_and_without_gradient(loss):
    loss, outputs = as_term_loss(loss), scores(4, 3).float().requires_grad_()
    targets = soft(4, 3).float()
    uniforms = soft(*loss.draws(outputs, targets)).clamp(1e-3, 1 - 1e-3)
    state = torch.random.get_rng_state()
    first, second = (loss.sampler(outputs, targets, uniforms) for _ in range(2))
    assert torch.equal(first, second)
    assert not first.requires_grad
    assert torch.equal(torch.random.get_rng_state(), state)
    losses = loss.resampled(outputs, targets, first)
    assert losses.dtype == torch.float32
    assert losses.shape == loss.terms(outputs, targets).weights.shape
    assert losses.requires_grad


def test_ignored_terms_stay_ignored():
    loss, outputs, targets = as_term_loss(nn.CrossEntropyLoss()), scores(4, 3), indices(-100, 4)
    losses = loss.resampled(outputs, targets, torch.tensor([0, 1, 2, 0]))
    assert (losses == 0).tolist() == [False, True, False, False]


@pytest.mark.parametrize(
    "loss",
    [
        nn.L1Loss(),
        nn.HuberLoss(),
        nn.KLDivLoss(reduction="batchmean"),
        nn.GaussianNLLLoss(),
        nn.PoissonNLLLoss(log_input=False),
        lambda outputs, targets: outputs[:, 0],
        nn.CrossEntropyLoss(weight=torch.tensor([0.0, 1.0]), label_smoothing=0.1),
    ],
)
def test_losses_without_a_distribution(loss):
    loss = as_term_loss(loss)
    assert (loss.draws, loss.sampler, loss.resampled) == (None, None, None)
