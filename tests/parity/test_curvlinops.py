"""Curvature matrices of curvlinops: equal to ours where its batches are whole, else who is right.

Written against curvlinops-for-pytorch 3.0.1. Where it is wrong the test says so, and fails once it
is not any more.
"""

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from specdens_torch import GaussNewton, GradientSecondMoment, Hessian
from tests.adapters.torch_cases import dense
from tests.adapters.torch_dense import gauss_newton
from tests.parity.parity_cases import (
    CE,
    EXACT,
    WRONG,
    batches,
    columns,
    dense_second_moment,
    error,
    partly_ignored,
    problem,
)

curvlinops = pytest.importorskip(
    "curvlinops", reason="curvlinops-for-pytorch is compared with, and is not installed"
)
pytestmark = pytest.mark.filterwarnings("ignore")  # theirs are not ours to mend

PAIRS = {
    "HessianLinearOperator": Hessian,
    "GGNLinearOperator": GaussNewton,
    "EFLinearOperator": GradientSecondMoment,
}
DENSE = {Hessian: dense, GaussNewton: gauss_newton}
SPLITS = {"one": (12,), "equal": (4, 4, 4), "ragged": (5, 5, 2)}


def theirs(kind, model, loss, data):
    return columns(getattr(curvlinops, kind)(model, loss, list(model.parameters()), data))


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("kind", PAIRS)
def test_equal_for_the_mean_cross_entropy(kind, split):
    model, inputs, labels = problem()
    data = batches(inputs, labels, *SPLITS[split])
    ours = columns(PAIRS[kind](model, CE, data))
    assert error(theirs(kind, model, CE, data), ours) < EXACT


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("kind", ["HessianLinearOperator", "GGNLinearOperator"])
def test_equal_for_the_mean_and_the_summed_squared_error(kind, split):
    model, inputs, _ = problem()
    data = batches(inputs, torch.sin(inputs[:, :3]), *SPLITS[split])
    for loss in (nn.MSELoss(), nn.MSELoss(reduction="sum")):
        ours = columns(PAIRS[kind](model, loss, data))
        assert error(theirs(kind, model, loss, data), ours) < EXACT


@pytest.mark.parametrize("split", SPLITS)
def test_second_moments_of_squared_errors_differ_by_a_convention(split):
    """An example's loss is the mean over its C elements for us, and in effect their sum for them.

    With g the gradient of the mean, theirs is 1/(N C) times the sum of (C g)(C g)^T, so C times
    ours.
    """
    model, inputs, _ = problem()
    data = batches(inputs, torch.sin(inputs[:, :3]), *SPLITS[split])
    ours = columns(GradientSecondMoment(model, nn.MSELoss(), data))
    assert error(theirs("EFLinearOperator", model, nn.MSELoss(), data), 3 * ours) < EXACT


@pytest.mark.parametrize("kind", ["HessianLinearOperator", "GGNLinearOperator"])
def test_ignored_labels_in_two_batches(kind):
    """Each batch counts by its size for them, and by the labels that are not ignored for us."""
    model, inputs, labels = problem()
    labels, matrix = partly_ignored(labels), PAIRS[kind]
    expected = DENSE[matrix](model, CE, inputs, labels)
    for sizes in ((12,), (6, 6)):
        assert error(columns(matrix(model, CE, batches(inputs, labels, *sizes))), expected) < EXACT
    assert error(theirs(kind, model, CE, [(inputs, labels)]), expected) < EXACT
    assert error(theirs(kind, model, CE, batches(inputs, labels, 6, 6)), expected) > WRONG


def test_ignored_labels_in_the_second_moment():
    """Theirs multiplies by all examples of the batch to undo a mean over those not ignored."""
    model, inputs, labels = problem()
    labels = partly_ignored(labels)
    expected = dense_second_moment(model, inputs, labels)
    for sizes in ((12,), (6, 6)):
        data = batches(inputs, labels, *sizes)
        assert error(columns(GradientSecondMoment(model, CE, data)), expected) < EXACT
        assert error(theirs("EFLinearOperator", model, CE, data), expected) > WRONG


@pytest.mark.parametrize("kind", ["HessianLinearOperator", "GGNLinearOperator"])
def test_class_weights_in_two_batches(kind):
    """Each batch counts by its size for them, and by the sum of its examples' weights for us."""
    model, inputs, labels = problem()
    loss, matrix = nn.CrossEntropyLoss(torch.tensor([1.0, 3.0, 0.5]).double()), PAIRS[kind]
    expected = DENSE[matrix](model, loss, inputs, labels)
    for sizes in ((12,), (6, 6)):
        data = batches(inputs, labels, *sizes)
        assert error(columns(matrix(model, loss, data)), expected) < EXACT
    assert error(theirs(kind, model, loss, [(inputs, labels)]), expected) < EXACT
    assert error(theirs(kind, model, loss, batches(inputs, labels, 6, 6)), expected) > WRONG


@pytest.mark.parametrize("kind", PAIRS)
def test_losses_that_are_plain_functions(kind):
    """They need a loss with an attribute ``reduction``; for us any function will do."""
    model, inputs, labels = problem()

    def loss(outputs, targets):
        return F.cross_entropy(outputs, targets, reduction="none")

    ours = columns(PAIRS[kind](model, loss, (inputs, labels)))
    assert error(ours, columns(PAIRS[kind](model, CE, (inputs, labels)))) < EXACT
    with pytest.raises((AttributeError, NotImplementedError)):
        theirs(kind, model, lambda o, y: loss(o, y).mean(), [(inputs, labels)])


@pytest.mark.parametrize("names", [["0.weight"], ["2.weight", "2.bias"]], ids=len)
@pytest.mark.parametrize("kind", PAIRS)
def test_blocks_of_some_parameters(kind, names):
    model, inputs, labels = problem()
    data = batches(inputs, labels, 5, 7)
    ours = PAIRS[kind](model, CE, data, names)
    chosen = [dict(model.named_parameters())[name] for name in names]
    blocks = getattr(curvlinops, kind)(model, CE, chosen, data)
    unit = torch.eye(ours.space.dimension, dtype=torch.float64)
    assert error(blocks @ unit, ours @ unit) < EXACT
