"""Gauss-Newton matrices of classifiers with many classes: the same numbers in less memory."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn
from torch.profiler import ProfilerActivity, profile

from specdens_torch import GaussNewton, Risk, next_token_loss, token_loss

WORDS, TEXTS, LENGTH = 6000, 3, 50


def language_model(words=WORDS, width=3, dtype=torch.float32):
    torch.manual_seed(0)
    body = (nn.Embedding(40, width), nn.Linear(width, width), nn.Tanh())
    return nn.Sequential(*body, nn.Linear(width, words, bias=False)).to(dtype)


def texts(words=WORDS):
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randint(40, (TEXTS, LENGTH), generator=generator)
    labels = torch.randint(words, (TEXTS, LENGTH), generator=generator)
    labels[0, 30:] = -100
    return inputs, labels


def peak_bytes(task):
    """Return the most bytes that `task` held at a time beyond what there was before."""
    with profile(
        activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as profiler:
        task()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


@pytest.mark.parametrize("loss", [token_loss, next_token_loss])
def test_a_product_holds_three_tensors_of_the_logits_size(loss):
    model, data = language_model(), texts()
    # One byte of budget keeps nothing, so the model is evaluated within the product, too.
    risk = Risk(model, loss, data, memory_budget=1, regroup=False)
    matrix = GaussNewton(risk)
    x = torch.randn(matrix.space.dimension)
    product = matrix @ x
    logits = TEXTS * LENGTH * WORDS * 4
    assert peak_bytes(lambda: matrix @ x) <= 3.1 * logits
    plain = GaussNewton(Risk(model, lambda o, y: loss(o, y), data, regroup=False))
    torch.testing.assert_close(product, plain @ x, rtol=1e-4, atol=1e-6 * float(product.norm()))


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("kind", ["labels", "probabilities", "pixels"])
def test_the_closed_form_is_the_automatic_derivative(kind, weighted, smoothing):
    generator = torch.Generator().manual_seed(2)
    shape = (7, 4, 2) if kind == "pixels" else (7, 4)
    inputs = torch.randn(7, 3, generator=generator, dtype=torch.float64)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.Unflatten(1, (4, 2))).double()
    if kind != "pixels":
        model = nn.Linear(3, 4).double()
    targets = torch.randint(4, (7, *shape[2:]), generator=generator)
    targets[1] = -100
    if kind == "probabilities":
        targets = torch.rand(shape, generator=generator, dtype=torch.float64)
    weight = torch.rand(4, generator=generator, dtype=torch.float64) if weighted else None
    loss = nn.CrossEntropyLoss(weight=weight, label_smoothing=smoothing)

    def automatic(outputs, y):
        losses = F.cross_entropy(outputs, y, weight, reduction="none", label_smoothing=smoothing)
        if y.is_floating_point():
            return losses
        own = torch.ones(4, dtype=torch.float64) if weight is None else weight
        weights = own[y.clamp(min=0)] * (y >= 0)
        return losses / weights.where(y >= 0, 1.0), weights

    matrix, plain = (GaussNewton(model, form, (inputs, targets)) for form in (loss, automatic))
    identity = torch.eye(matrix.space.dimension, dtype=torch.float64)
    torch.testing.assert_close(matrix @ identity, plain @ identity, rtol=1e-12, atol=1e-15)


def test_a_head_that_passes_its_vector_on_is_not_overwritten():
    # The Jacobian of a bias alone is the identity: its product may be the vector itself.
    class Shift(nn.Module):
        def __init__(self):
            super().__init__()
            self.shift = nn.Parameter(torch.zeros(1, 5, dtype=torch.float64))

        def forward(self, x):
            return x + self.shift

    x = torch.arange(5.0, dtype=torch.float64)
    inputs = torch.randn(1, 5, dtype=torch.float64)
    matrix = GaussNewton(Shift(), nn.CrossEntropyLoss(), (inputs, torch.tensor([2])))
    p = torch.softmax(inputs[0], 0)
    kept = x.clone()
    torch.testing.assert_close(matrix @ x, p * x - p * (p @ x))
    assert torch.equal(x, kept)
