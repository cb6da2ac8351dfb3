"""The Hessian of PyTorch models against dense second derivatives, however the data are split."""

from __future__ import annotations

import math
from collections import UserDict

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from specdens import LinearOperator, VectorSpace, slq
from specdens.testing import check_operator
from specdens_torch import Hessian, Risk, gradient, risk_value
from tests.adapters.torch_cases import TwoInputs, architectures, classes, dense, mlp, ragged
from tests.adapters.torch_dense import assert_close

CE = nn.CrossEntropyLoss()
ARCHITECTURES = architectures()


def identity(operator):
    return torch.eye(operator.space.dimension, dtype=operator.space.dtype)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_products_gradient_and_value_of_every_architecture(name):
    model, inputs, labels = ARCHITECTURES[name]()
    risk = Risk(model, CE, ragged(inputs, labels, seed=2))
    hessian = Hessian(risk)
    assert_close(hessian @ identity(hessian), dense(model, CE, inputs, labels))
    assert_close(gradient(risk), dense(model, CE, inputs, labels, order=1))
    assert risk_value(risk) == pytest.approx(CE(model(inputs), labels).item(), rel=1e-12)


@pytest.mark.parametrize(
    "names",
    [["0.weight"], ["2.bias"], ["0.bias", "2.weight"], ["0.bias", "0.weight", "2.weight"]],
    ids=len,
)
def test_subsets_of_the_parameters_are_diagonal_blocks(names):
    model, (inputs, labels) = mlp(), classes()
    hessian = Hessian(model, CE, (inputs, labels), names)
    order = list(hessian.parameters.names)
    assert sorted(order) == sorted(names)
    assert_close(hessian @ identity(hessian), dense(model, CE, inputs, labels, order))


def test_frozen_parameters_are_left_out_and_named_ones_included():
    model, (inputs, labels) = mlp(), classes()
    model[0].requires_grad_(False)
    default = Hessian(model, CE, (inputs, labels))
    names = ["2.weight", "2.bias"]
    assert_close(default @ identity(default), dense(model, CE, inputs, labels, names))
    named = Hessian(model, CE, (inputs, labels), "0.*")
    names = ["0.weight", "0.bias"]
    assert_close(named @ identity(named), dense(model, CE, inputs, labels, names))


def test_only_unused_parameters_give_the_zero_matrix():
    model, inputs, labels = ARCHITECTURES["tied"]()
    hessian = Hessian(model, CE, (inputs, labels), "unused")
    assert torch.equal(hessian @ identity(hessian), torch.zeros(2, 2, dtype=torch.float64))
    assert torch.equal(gradient(hessian.risk), torch.zeros(2, dtype=torch.float64))


def test_least_squares_has_its_closed_form():
    torch.manual_seed(0)
    inputs, targets = torch.randn(9, 4, dtype=torch.float64), torch.randn(9, 1, dtype=torch.float64)
    hessian = Hessian(nn.Linear(4, 1, bias=False).double(), nn.MSELoss(), (inputs, targets))
    assert_close(hessian @ identity(hessian), 2 / 9 * inputs.T @ inputs)


def test_logistic_regression_has_its_closed_form():
    torch.manual_seed(0)
    model = nn.Linear(4, 1, bias=False).double()
    inputs = torch.randn(9, 4, dtype=torch.float64)
    targets = torch.randint(2, (9, 1)).double()
    p = torch.sigmoid(model(inputs)).detach()
    hessian = Hessian(model, nn.BCEWithLogitsLoss(), (inputs, targets))
    assert_close(hessian @ identity(hessian), inputs.T @ (p * (1 - p) * inputs) / 9)


def test_a_loss_that_is_linear_in_the_parameters_has_no_curvature():
    model, (inputs, _) = nn.Linear(4, 3).double(), classes()
    hessian = Hessian(model, lambda o, y: o.sum(1), (inputs, inputs))
    assert torch.equal(hessian @ identity(hessian), torch.zeros(15, 15, dtype=torch.float64))


@pytest.mark.parametrize("seed", range(10))
def test_any_split_gives_the_same_numbers(seed):
    model, (inputs, labels) = mlp(), classes(11)
    labels[[0, 3, 4]] = -100
    loss = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 3.0, 0.5], dtype=torch.float64))
    whole = Hessian(model, loss, (inputs, labels))
    # A budget of one byte takes the examples one by one, so the batches are cut as well as joined.
    for budget in (2**30, 1):
        risk = Risk(model, loss, ragged(inputs, labels, seed), memory_budget=budget)
        split = Hessian(risk)
        x = torch.randn(43, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        assert_close(split @ x, whole @ x, 1e-12)
        assert_close(gradient(risk), gradient(whole.risk), 1e-12)
        assert risk_value(risk) == pytest.approx(risk_value(whole.risk), rel=1e-12)


@pytest.mark.parametrize("regroup", [True, False])
def test_batches_as_given_are_equal_too(regroup):
    model, (inputs, labels) = mlp(), classes()
    risk = Risk(model, CE, ragged(inputs, labels, 5), regroup=regroup)
    hessian = Hessian(risk)
    assert_close(hessian @ identity(hessian), dense(model, CE, inputs, labels))


def test_a_small_budget_means_many_chunks_and_nothing_kept():
    model, (inputs, labels) = mlp(), classes(40)
    small = Hessian(model, CE, (inputs, labels), memory_budget=1000)
    x = torch.randn(43, 4, dtype=torch.float64)
    assert_close(small @ x, dense(model, CE, inputs, labels) @ x)
    passes = small.risk.passes
    assert passes.num_chunks is not None
    assert 4 <= passes.num_chunks < 40
    plan = passes.known_plan
    assert plan is not None
    assert not plan.keeps_graphs
    assert "graphs not kept" in repr(small)


def test_columns_are_single_products():
    model, data = mlp(), classes()
    hessian = Hessian(model, CE, data)
    x = torch.randn(43, 5, dtype=torch.float64)
    block = hessian @ x
    assert block.shape == (43, 5)
    assert torch.equal(block, torch.stack([hessian @ column for column in x.T], 1))
    assert torch.equal(block, hessian @ x.T.contiguous().T)
    assert torch.equal(block[:, ::2], hessian @ x[:, ::2])
    assert (hessian @ x[:, :0]).shape == (43, 0)


def test_it_is_an_operator():
    hessian = Hessian(mlp(), CE, classes())
    assert isinstance(hessian, LinearOperator)
    assert hessian.space == VectorSpace.like(torch.zeros(43, dtype=torch.float64))
    x = torch.randn(43, dtype=torch.float64)
    assert_close((2.0 * hessian - hessian + hessian / 4.0) @ x, 1.25 * (hessian @ x))
    y = torch.randn(43, dtype=torch.float64)
    assert torch.dot(y, hessian @ x).item() == pytest.approx(torch.dot(x, hessian @ y).item())


def test_a_shuffled_loader_gives_the_same_numbers_and_repeats_to_the_bit():
    model, (inputs, labels) = mlp(), classes(13)
    loader = DataLoader(TensorDataset(inputs, labels), batch_size=4, shuffle=True)
    expected = dense(model, CE, inputs, labels)
    for budget in (2**30, 1500):
        hessian = Hessian(model, CE, loader, memory_budget=budget)
        product = hessian @ identity(hessian)
        assert_close(product, expected)
        torch.rand(3)  # the caller's random numbers go on between products
        assert torch.equal(hessian @ identity(hessian), product)


@pytest.mark.parametrize(
    "pack",
    [
        lambda x, z: (x, z),
        lambda x, z: [x, z],
        lambda x, z: (x, z, 1.0),
        lambda x, z: {"x": x, "z": z},
        lambda x, z: {"x": x, "z": z, "scale": 1.0},
        lambda x, z: UserDict(x=x, z=z),
    ],
    ids=["tuple", "list", "with-a-number", "dict", "with-a-setting", "mapping"],
)
def test_inputs_by_position_and_by_name(pack):
    torch.manual_seed(0)
    model = TwoInputs().double()
    x, z = torch.randn(6, 4, dtype=torch.float64), torch.randn(6, 2, dtype=torch.float64)
    labels = torch.randint(3, (6,))
    data = [(pack(x[:2], z[:2]), labels[:2]), (pack(x[2:], z[2:]), labels[2:])]
    hessian = Hessian(model, CE, data)
    assert_close(hessian @ identity(hessian), dense(model, CE, (x, z), labels))


def test_targets_may_be_structures():
    model, (inputs, labels) = mlp(), classes()
    weights = torch.linspace(1, 2, len(labels), dtype=torch.float64)

    def loss(outputs, targets):
        return F.cross_entropy(outputs, targets["y"], reduction="none"), targets["w"]

    def reference(outputs, _):
        losses = F.cross_entropy(outputs, labels, reduction="none")
        return (weights * losses).sum() / weights.sum()

    parts = [slice(0, 5), slice(5, 12)]
    data = [(inputs[p], {"y": labels[p], "w": weights[p]}) for p in parts]
    hessian = Hessian(model, loss, data)
    assert_close(hessian @ identity(hessian), dense(model, reference, inputs, None))


def test_padded_sequences_of_different_lengths():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(6, 3), nn.Linear(3, 4)).double()
    short, long = torch.randint(6, (3, 2)), torch.randint(6, (2, 5))
    target_short, target_long = torch.randint(4, (3, 2)), torch.randint(4, (2, 5))
    target_long[:, 3:] = -100

    def loss(outputs, targets):  # one term for each token
        shape = outputs.flatten(0, 1), targets.flatten()
        losses = F.cross_entropy(*shape, reduction="none")
        return losses, (targets.flatten() != -100).double()

    def reference(outputs, _):
        logits = torch.cat([outputs[:3, :2].flatten(0, 1), outputs[3:].flatten(0, 1)])
        return F.cross_entropy(logits, torch.cat([target_short.flatten(), target_long.flatten()]))

    padded = torch.cat([F.pad(short, (0, 3)), long])
    hessian = Hessian(model, loss, [(short, target_short), (long, target_long)])
    assert_close(hessian @ identity(hessian), dense(model, reference, padded, None))


class Graph:
    """A batch that only its model understands, of two graphs."""

    def __init__(self, nodes, owner):
        self.nodes, self.owner = nodes, owner


class GraphModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = mlp()

    def forward(self, graph):
        pooled = torch.zeros(2, 4, dtype=torch.float64)
        return self.body(pooled.index_add(0, graph.owner, graph.nodes))


def test_batches_whose_examples_cannot_be_told_apart_are_used_whole():
    nodes, owner, labels = classes(7)[0], torch.tensor([0, 0, 1, 1, 1, 0, 1]), torch.tensor([0, 2])
    model = GraphModel()
    hessian = Hessian(model, CE, [(Graph(nodes, owner), labels), (Graph(nodes + 1, owner), labels)])
    pooled = torch.zeros(2, 4, dtype=torch.float64).index_add(0, owner, nodes)
    shifted = torch.zeros(2, 4, dtype=torch.float64).index_add(0, owner, nodes + 1)
    expected = dense(mlp(), CE, torch.cat([pooled, shifted]), labels.repeat(2))
    assert_close(hessian @ identity(hessian), expected)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_the_callers_mode_does_not_matter(mode):
    model, (inputs, labels) = mlp(), classes()
    hessian = Hessian(model, CE, (inputs, labels))
    with mode():
        x = torch.ones(43, dtype=torch.float64)
        products = [hessian @ x, hessian @ x, hessian @ x[:, None], gradient(hessian.risk)]
    expected = dense(model, CE, inputs, labels).sum(1)
    assert_close(products[0], expected)
    assert_close(products[1], expected)
    assert_close(products[2][:, 0], expected)
    assert not any(product.requires_grad for product in products)


def test_vectors_that_require_gradients_are_taken_as_numbers():
    hessian = Hessian(mlp(), CE, classes())
    x = torch.ones(43, dtype=torch.float64, requires_grad=True)
    assert not (hessian @ x).requires_grad


@pytest.mark.parametrize(
    ("x", "error", "words"),
    [
        (torch.zeros(42, dtype=torch.float64), ValueError, "43"),
        (torch.zeros(3, 43, dtype=torch.float64), ValueError, "(43, k)"),
        (torch.zeros(43, 1, 1, dtype=torch.float64), ValueError, "(43,)"),
        (torch.zeros(43), TypeError, "x.to(torch.float64)"),
        (torch.zeros(43, dtype=torch.int64), TypeError, "int64"),
        (torch.zeros(43, dtype=torch.float64, device="meta"), ValueError, "meta"),
        ([0.0] * 43, TypeError, "list"),
    ],
)
def test_vectors_that_do_not_fit(x, error, words):
    hessian = Hessian(mlp(), CE, classes())
    with pytest.raises(error) as raised:
        _ = hessian @ x
    assert words in str(raised.value)


def test_the_spectrum_has_the_right_trace():
    model, (inputs, labels) = mlp(), classes()
    hessian = Hessian(model, CE, (inputs, labels))
    eigenvalues = torch.linalg.eigvalsh(hessian @ identity(hessian))
    expected = torch.trace(dense(model, CE, inputs, labels)).item()
    assert math.fsum(eigenvalues.tolist()) == pytest.approx(expected, rel=1e-10)


def test_arguments_of_the_shorthand():
    model, data = mlp(), classes()
    risk = Risk(model, CE, data)
    assert Hessian(risk).risk is risk
    assert Hessian(model, CE, data, memory_budget=10).risk.memory_budget == 10
    with pytest.raises(TypeError, match="already"):
        Hessian(risk, CE, data)
    with pytest.raises(TypeError, match="without loss and data"):
        Hessian(model)
    assert repr(Hessian(risk)).startswith("Hessian(n=43, Risk(Sequential, CrossEntropyLoss, 43")


class Square(torch.autograd.Function):
    """A function of the user's with a backward pass in Python."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return 2 * x * grad


class Unusual(nn.Module):
    """Custom functions and layers that are evaluated again in the backward pass."""

    def __init__(self, checkpointed):
        super().__init__()
        self.body, self.checkpointed = mlp(), checkpointed

    def attend(self, x):
        q = Square.apply(self.body[0](x))[:, :, None].repeat(1, 1, 4)
        return F.scaled_dot_product_attention(q, q, q)[..., 0]

    def forward(self, x):
        if self.checkpointed:
            return self.body[2](checkpoint(self.attend, x, use_reentrant=False))
        return self.body[2](self.attend(x))


@pytest.mark.parametrize("budget", [2**30, 1])
@pytest.mark.parametrize("checkpointed", [True, False])
def test_custom_functions_and_checkpointed_layers(checkpointed, budget):
    model, (inputs, labels) = Unusual(checkpointed), classes()
    hessian = Hessian(model, CE, (inputs, labels), memory_budget=budget)
    x = torch.randn(43, 2, dtype=torch.float64)
    expected = dense(Unusual(checkpointed=False), CE, inputs, labels) @ x
    for _ in range(2):
        assert_close(hessian @ x, expected)


def test_it_passes_the_checks_for_operators_and_has_a_density():
    model, (inputs, labels) = mlp(), classes()
    hessian = Hessian(model, CE, (inputs, labels))
    check_operator(hessian)
    measure = slq(hessian, num_probes=2, num_steps=43, seed=0)
    eigenvalues = torch.linalg.eigvalsh(dense(model, CE, inputs, labels))
    assert measure.nodes.max() == pytest.approx(eigenvalues.max().item(), rel=1e-8)
