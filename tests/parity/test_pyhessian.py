"""Hessians of PyHessian: equal to ours for whole batches, biased for tiny losses.

Written against PyHessian 0.1. Where it is wrong the test says so, and fails once it is not any
more.
"""

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from specdens import eigsh, slq
from specdens_torch import Hessian
from tests.adapters.torch_cases import dense, mlp
from tests.parity.parity_cases import (
    CE,
    EXACT,
    WRONG,
    batches,
    by_columns,
    columns,
    error,
    partly_ignored,
    problem,
)

pyhessian = pytest.importorskip("pyhessian", reason="PyHessian is compared with, not installed")
pytestmark = pytest.mark.filterwarnings("ignore")  # theirs are not ours to mend


def one_batch(loss, inputs, targets):
    """Return their Hessian of one batch; it leaves gradients in the model, which is a new one."""
    return pyhessian.hessian(mlp(), loss, data=(inputs, targets), cuda=False)


def theirs(hessian):
    """Return all columns of their Hessian, (n, n)."""
    shapes = [parameter.shape for parameter in hessian.params]

    def product(v):
        pieces = v.split([shape.numel() for shape in shapes])
        blocks = [piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True)]
        if hessian.full_dataset:
            _, result = hessian.dataloader_hv_product(blocks)
        else:
            result = pyhessian.utils.hessian_vector_product(hessian.gradsH, hessian.params, blocks)
        return torch.cat([block.reshape(-1) for block in result])

    return by_columns(product)


@pytest.mark.parametrize("loss", [CE, nn.MSELoss()], ids=["cross-entropy", "squares"])
def test_equal_for_a_single_batch(loss):
    model, inputs, labels = problem()
    targets = labels if loss is CE else torch.sin(inputs[:, :3])
    ours = columns(Hessian(model, loss, (inputs, targets)))
    assert error(theirs(one_batch(loss, inputs, targets)), ours) < EXACT


@pytest.mark.parametrize("sizes", [(6, 6), (5, 5, 2)], ids=str)
def test_equal_for_batches_of_any_size(sizes):
    model, inputs, labels = problem()
    data = batches(inputs, labels, *sizes)
    ours = columns(Hessian(model, CE, data))
    assert error(theirs(pyhessian.hessian(mlp(), CE, dataloader=data, cuda=False)), ours) < EXACT


@pytest.mark.parametrize("case", ["ignored labels", "class weights"])
def test_weights_in_two_batches(case):
    """Each batch counts by its size for them, and by the sum of its weights for us."""
    model, inputs, labels = problem()
    loss = CE
    if case == "ignored labels":
        labels = partly_ignored(labels)
    else:
        loss = nn.CrossEntropyLoss(torch.tensor([1.0, 3.0, 0.5]).double())
    data = batches(inputs, labels, 6, 6)
    expected = dense(model, loss, inputs, labels)
    assert error(columns(Hessian(model, loss, data)), expected) < EXACT
    found = theirs(pyhessian.hessian(mlp(), loss, dataloader=data, cuda=False))
    assert error(found, expected) > WRONG


def test_the_largest_eigenvalue():
    """Theirs divides each vector by its norm plus 1e-6, so it is a few 1e-6 too small."""
    model, inputs, labels = problem()
    torch.manual_seed(0)
    (found,), _ = one_batch(CE, inputs, labels).eigenvalues(maxIter=1000, tol=1e-9)
    ours = eigsh(Hessian(model, CE, (inputs, labels)), 1, tol=1e-10).eigenvalues[0]
    assert found == pytest.approx(ours, rel=1e-5)


def test_the_model_is_left_as_it_was():
    """Theirs leaves it in evaluation mode, with gradients."""
    model, inputs, labels = problem()
    _ = Hessian(model, CE, (inputs, labels)) @ torch.ones(43, dtype=torch.float64)
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    pyhessian.hessian(model, CE, data=(inputs, labels), cuda=False)
    assert not model.training
    assert all(parameter.grad is not None for parameter in model.parameters())


def removed_eig(matrix, eigenvectors):
    """Stand in for ``torch.eig``, which PyHessian 0.1 calls and torch has removed."""
    values, vectors = torch.linalg.eigh(matrix)
    return torch.stack([values, torch.zeros_like(values)], dim=1), vectors


@pytest.mark.parametrize(("scale", "low"), [(1.0, 0.0), (1e-5, 0.1), (1e-6, 0.3)])
def test_densities_of_tiny_losses(monkeypatch, scale, low):
    """``v / (norm + 1e-6)`` shortens the Lanczos vectors once norms come near 1e-6.

    Ours scales with the loss. `low` is the least part of the largest eigenvalue that is lost there.
    """
    model, inputs, labels = problem()

    def loss(outputs, targets, reduction="mean"):
        return scale * F.cross_entropy(outputs, targets, reduction=reduction)

    top = scale * torch.linalg.eigvalsh(dense(model, CE, inputs, labels))[-1].item()
    hessian = one_batch(loss, inputs, labels)
    if hasattr(torch, "eig"):
        with pytest.raises(RuntimeError, match="removed"):
            hessian.density(iter=5)
    monkeypatch.setattr(torch, "eig", removed_eig, raising=False)
    torch.manual_seed(0)
    nodes, _ = hessian.density(iter=20)
    if low:
        assert max(nodes[0]) < (1 - low) * top
    else:
        assert max(nodes[0]) == pytest.approx(top, rel=1e-4)

    ours = Hessian(model, lambda o, y: loss(o, y, "none"), (inputs, labels))
    measure = slq(ours, num_probes=1, num_steps=20)
    assert measure.nodes.max() == pytest.approx(top, rel=1e-9)
