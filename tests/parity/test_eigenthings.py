"""Curvature matrices of hessian-eigenthings: equal to ours for batches of one size, else wrong.

Written against hessian-eigenthings 1.0.0a5. Where it is wrong the test says so, and fails once it
is not any more.
"""

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from specdens import eigsh
from specdens_torch import GaussNewton, GradientSecondMoment, Hessian
from tests.adapters.torch_cases import dense
from tests.adapters.torch_dense import gauss_newton
from tests.parity.parity_cases import (
    CE,
    EXACT,
    WRONG,
    batches,
    by_columns,
    columns,
    dense_second_moment,
    error,
    partly_ignored,
    problem,
)

library = pytest.importorskip(
    "hessian_eigenthings", reason="hessian-eigenthings is compared with, and is not installed"
)
pytestmark = pytest.mark.filterwarnings("ignore")  # theirs are not ours to mend

KINDS = ("hessian", "gauss_newton", "second_moment")
OURS = dict(zip(KINDS, (Hessian, GaussNewton, GradientSecondMoment), strict=True))


def operator(kind, model, data, **options):
    """Return their operator of the mean cross-entropy."""
    if kind == "hessian":
        loss = library.supervised_loss(CE)
        return library.HessianOperator(model, data, loss, **options)
    if kind == "gauss_newton":
        loss = library.supervised_loss_of_output(CE)
        return library.GGNOperator(model, data, library.supervised_forward, loss, **options)

    def one(model, example):
        return F.cross_entropy(model(example[0][None]), example[1][None])

    return library.EmpiricalFisherOperator(model, data, one, **options)


def theirs(kind, model, data, **options):
    return by_columns(operator(kind, model, data, **options).matvec)


def reference(kind, model, inputs, labels):
    """Return the dense matrix of all data in one batch."""
    if kind == "second_moment":
        return dense_second_moment(model, inputs, labels)
    return {"hessian": dense, "gauss_newton": gauss_newton}[kind](model, CE, inputs, labels)


@pytest.mark.parametrize("sizes", [(12,), (6, 6), (3, 3, 3, 3)], ids=len)
@pytest.mark.parametrize("kind", KINDS)
def test_equal_for_batches_of_one_size(kind, sizes):
    """In 1.0.0a5 the Gauss-Newton product is exact; 1.0.0a6 takes finite differences by default."""
    model, inputs, labels = problem()
    data = batches(inputs, labels, *sizes)
    expected = columns(OURS[kind](model, CE, data))
    assert error(theirs(kind, model, data), expected) < EXACT


@pytest.mark.parametrize("sizes", [(5, 5, 2), (8, 4), (11, 1)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_smaller_last_batch(kind, sizes):
    """Every batch counts the same for them, whatever its size."""
    model, inputs, labels = problem()
    data = batches(inputs, labels, *sizes)
    expected = reference(kind, model, inputs, labels)
    assert error(columns(OURS[kind](model, CE, data)), expected) < EXACT
    assert error(theirs(kind, model, data), expected) > WRONG


def test_a_smaller_last_microbatch():
    """Cutting one batch into pieces of 5, 5 and 2 changes their Hessian; ours never."""
    model, inputs, labels = problem()
    expected = dense(model, CE, inputs, labels)
    cut = Hessian(model, CE, (inputs, labels), memory_budget=1)  # single examples
    assert error(columns(cut), expected) < EXACT
    data = [(inputs, labels)]
    assert error(theirs("hessian", model, data, microbatch_size=6), expected) < EXACT
    assert error(theirs("hessian", model, data, microbatch_size=5), expected) > WRONG


@pytest.mark.parametrize("kind", KINDS)
def test_ignored_labels_in_two_batches(kind):
    """Means over the labels that are not ignored, averaged over batches, are not their mean."""
    model, inputs, labels = problem()
    labels = partly_ignored(labels)
    data = batches(inputs, labels, 6, 6)
    expected = reference(kind, model, inputs, labels)
    assert error(columns(OURS[kind](model, CE, data)), expected) < EXACT
    assert error(theirs(kind, model, data), expected) > WRONG


@pytest.mark.parametrize("which", ["LA", "SA", "LM"])
def test_eigenvalues(which):
    model, inputs, labels = problem()
    ours = eigsh(Hessian(model, CE, (inputs, labels)), 3, which=which, tol=1e-10)
    result = library.lanczos(
        operator("hessian", model, [(inputs, labels)]), k=3, max_iter=43, which=which, seed=0
    )
    there = np.sort(result.eigenvalues.numpy())
    np.testing.assert_allclose(np.sort(ours.eigenvalues), there, atol=1e-9 * np.abs(there).max())


def test_power_iteration_with_momentum():
    """Theirs subtracts the momentum before the Rayleigh quotient, and reports convergence.

    Found is the largest eigenvalue less the momentum.
    """
    matrix = torch.diag(torch.tensor([5.0, 2.0, 1.0]).double())
    wrapped = library.LambdaOperator(
        lambda v: matrix @ v, size=3, device=torch.device("cpu"), dtype=torch.float64
    )
    found, *_, converged = library.power_iteration_one(
        wrapped, momentum=0.5, max_iter=500, tol=1e-6, seed=0
    )
    assert converged
    assert found == pytest.approx(4.5, abs=1e-3)
    assert eigsh(matrix, 1).eigenvalues[0] == pytest.approx(5.0, rel=1e-12)
