"""Kronecker factors of layers against Jacobians of single examples and the exact block."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import jacrev, vmap

from specdens.testing import check_operator
from specdens_torch import GaussNewton, Risk, layer_passes, next_token_loss
from specdens_torch.kronecker_factors import KroneckerFactors
from tests.adapters.torch_cases import Attention, Tied, classes, mlp, ragged

TIGHT = {"rtol": 1e-10, "atol": 1e-12}


def matrix(operator):
    return operator @ torch.eye(operator.space.dimension, dtype=operator.space.dtype)


def exact(factors):
    return matrix(GaussNewton(factors.risk))


def derivatives(model, place, inputs):
    """Return x (N, S, d), U (N, C, m, S) and p (N, C) of layer `place` of a sequence of modules."""
    layer, rest = model[place], model[place + 1 :]
    with torch.no_grad():
        z = layer(model[:place](inputs))
    U = vmap(jacrev(lambda one: rest(one[None])[0]))(z)  # noqa: N806
    if isinstance(layer, nn.Linear):
        x = model[:place](inputs)[:, None]
    else:  # a convolution is linear in its weight: this derivative is its patches
        jac = jacrev(lambda w: layer._conv_forward(model[:place](inputs), w, None))(layer.weight)
        x = jac[:, 0].flatten(1, z.ndim - 2)[:, :, 0].flatten(2)
    p = torch.softmax(rest(z), -1)
    U = U.flatten(3) if U.ndim > 3 else U[..., None]  # noqa: N806
    return x.detach(), U.detach(), p.detach()


def second_moments(x, U, p, kappa, weights, sharing):  # noqa: N803
    """Return both factors from the definitions; kappa and weights (N,) are divided already."""
    A = kappa[:, None, None] * (torch.diag_embed(p) - p[:, :, None] * p[:, None])  # noqa: N806
    if sharing == "reduce":
        U, x = U.sum(-1, keepdim=True), x.mean(1, keepdim=True)  # noqa: N806
    left = torch.einsum("nams,nab,nbks->mk", U, A, U)
    right = torch.einsum("n,nsd,nse->de", weights, x, x) / x.shape[1]
    return left, right


def average_curvature(p):
    return (torch.diag_embed(p) - p[:, :, None] * p[:, None]).mean(0)


def conv2d():
    layer = nn.Conv2d(2, 3, (3, 2), stride=(2, 1), padding=(1, 0), padding_mode="circular")
    shape, modules = (2, 4, 3), (layer, nn.Softplus(), nn.Flatten(), nn.Linear(12, 3))
    return modules, shape


def conv1d():
    layer = nn.Conv1d(2, 3, 3, padding="same", dilation=2)
    return (layer, nn.Tanh(), nn.Flatten(), nn.Linear(15, 3)), (2, 5)


def segments():  # logits (N, 3, 5)
    return (nn.Conv1d(2, 2, 3, padding=1), nn.Tanh(), nn.Conv1d(2, 3, 1)), (2, 5)


MASKED = nn.CrossEntropyLoss(torch.tensor([1.0, 3.0, 0.5], dtype=torch.float64), ignore_index=-1)


def network(build, number=6):
    torch.manual_seed(3)
    modules, shape = build()
    inputs = torch.randn(number, *shape, dtype=torch.float64)
    return nn.Sequential(*modules).double(), inputs, torch.arange(number) % 3


@pytest.mark.parametrize("place", [0, 2])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_factors_of_a_linear_layer_are_the_averages_of_their_definition(place, reduction):
    model, (inputs, labels) = mlp(), classes()
    labels[3] = -100
    weight = torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64)
    loss = nn.CrossEntropyLoss(weight, reduction=reduction)
    factors = KroneckerFactors(Risk(model, loss, ragged(inputs, labels, 3)), str(place))
    x, U, p = derivatives(model, place, inputs)  # noqa: N806
    total = (weights := torch.where(labels < 0, 0.0, weight[labels.clamp(0)])).sum()
    kappa = weights / (total if reduction == "mean" else 1)
    left, right = second_moments(x, U, p, kappa, weights / total, "expand")
    np.testing.assert_allclose(factors.left, left, **TIGHT)
    np.testing.assert_allclose(factors.right, right, **TIGHT)
    torch.testing.assert_close(matrix(factors.operator()), torch.kron(left, right), **TIGHT)


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("build", [conv1d, conv2d])
def test_factors_of_a_convolution_are_the_averages_of_their_definition(build, sharing):
    model, inputs, labels = network(build)
    risk = Risk(model, nn.CrossEntropyLoss(), ragged(inputs, labels, 2))
    factors = KroneckerFactors(risk, "0", weight_sharing=sharing)
    even = torch.full((6,), 1 / 6, dtype=torch.float64)
    left, right = second_moments(*derivatives(model, 0, inputs), even, even, sharing)
    np.testing.assert_allclose(factors.left, left, **TIGHT)
    np.testing.assert_allclose(factors.right, right, **TIGHT)


def test_little_memory_gives_the_same_numbers(monkeypatch):
    model, inputs, labels = network(conv2d)
    factors = KroneckerFactors(Risk(model, nn.CrossEntropyLoss(), (inputs, labels)), "0", bias=True)
    monkeypatch.setattr(layer_passes, "_MOST_ENTRIES", 150)  # two examples' patches
    risk = Risk(model, nn.CrossEntropyLoss(), (inputs, labels), memory_budget=3000)
    again = KroneckerFactors(risk, "0", bias=True)
    np.testing.assert_allclose(again.left, factors.left, **TIGHT)
    np.testing.assert_allclose(again.right, factors.right, **TIGHT)
    found = again.corrected().eigenvalues
    np.testing.assert_allclose(found, factors.corrected().eigenvalues, rtol=1e-9, atol=1e-14)
    assert again.risk.passes.num_chunks > 1


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("per_class", [False, True])
def test_one_example_gives_the_exact_block_in_the_order_of_the_weight(bias, per_class):
    inputs, labels = classes(1)
    risk = Risk(mlp(), nn.CrossEntropyLoss(), (inputs, labels))
    factors = KroneckerFactors(risk, "0", per_class=per_class, bias=bias)
    assert factors.parameters.names == (("0.weight", "0.bias") if bias else ("0.weight",))
    block = exact(factors)
    assert block.abs().max() > 1e-3
    torch.testing.assert_close(matrix(factors.operator()), block, **TIGHT)
    torch.testing.assert_close(matrix(factors.corrected()), block, **TIGHT)
    found = factors.eigsh(2)
    torch.testing.assert_close(
        block @ found.eigenvectors,
        found.eigenvectors * torch.from_numpy(found.eigenvalues),
        **TIGHT,
    )


def test_equal_inputs_give_the_exact_block():
    model, (inputs, labels) = mlp(), classes(6)
    risk = Risk(model, nn.CrossEntropyLoss(), (inputs[:1].expand(6, 4), labels))
    factors = KroneckerFactors(risk, "0")
    torch.testing.assert_close(matrix(factors.operator()), exact(factors), **TIGHT)


def test_the_output_layer_has_the_average_curvature_with_a_null_vector():
    model, (inputs, labels) = mlp(), classes()
    factors = KroneckerFactors(Risk(model, nn.CrossEntropyLoss(), (inputs, labels)), "2")
    p = torch.softmax(model(inputs), -1).detach()
    np.testing.assert_allclose(factors.left, average_curvature(p), **TIGHT)
    assert np.abs(factors.left.sum(1)).max() < 1e-15
    assert np.linalg.eigvalsh(factors.left)[1] > 1e-3  # of rank C - 1


def test_factors_per_class_add_up_products_of_class_averages():
    model, (inputs, labels) = mlp(), classes()
    risk = Risk(model, nn.CrossEntropyLoss(), ragged(inputs, labels, 3))
    factors = KroneckerFactors(risk, "0", per_class=True)
    x, U, p = derivatives(model, 0, inputs)  # noqa: N806
    expected = 0
    for c in range(3):
        own = labels == c
        even = torch.full((int(own.sum()),), 1 / 12, dtype=torch.float64)
        left, right = second_moments(x[own], U[own], p[own], even, even, "expand")
        expected = expected + torch.kron(left, right) / even.sum()
    torch.testing.assert_close(matrix(factors.operator()), expected, **TIGHT)
    whole = KroneckerFactors(risk, "0")
    for name in ("left", "right"):
        np.testing.assert_allclose(getattr(factors, name), getattr(whole, name), **TIGHT)
    found = factors.eigsh(3)
    assert found.pairs is None
    values = torch.linalg.eigvalsh(expected).flip(0)
    np.testing.assert_allclose(found.eigenvalues, values[:3], rtol=1e-6)


def test_factors_per_class_are_exact_for_one_example_of_each_class():
    inputs, _ = classes(3)
    labels = torch.tensor([2, 0, 1])
    soft = torch.nn.functional.one_hot(labels, 3).double()
    weight = torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64)
    for targets in (labels, soft):
        risk = Risk(mlp(), nn.CrossEntropyLoss(weight, label_smoothing=0.1), (inputs, targets))
        factors = KroneckerFactors(risk, "0", per_class=True)
        torch.testing.assert_close(matrix(factors.operator()), exact(factors), **TIGHT)


class Twice(nn.Module):
    """Calls a layer two times, followed by an activation in place."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(4, 4), nn.Linear(4, 3)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x):
        return self.head(self.act(self.layer(self.act(self.layer(x)) + x)))


def shared_cases():
    torch.manual_seed(5)
    tokens, labels = torch.randint(5, (4, 3)), torch.arange(4) % 3
    modules, inputs, targets = network(conv2d, 4)
    return {
        "tokens": (Attention().double(), tokens, labels, "qkv", nn.CrossEntropyLoss()),
        "twice": (Twice().double(), *classes(5), "layer", nn.CrossEntropyLoss()),
        "conv": (modules, inputs, targets, "0", nn.CrossEntropyLoss()),
        "mse": (mlp(), classes()[0], torch.ones(12, 3).double(), "0", nn.MSELoss()),
        "linear": (mlp(), *classes(), "2", nn.CrossEntropyLoss(label_smoothing=0.2)),
        "segments": (
            *network(segments, 3)[:2],
            torch.arange(15).reshape(3, 5) % 4 - 1,
            "0",
            MASKED,
        ),
    }


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("case", ["tokens", "twice", "conv", "mse", "linear", "segments"])
def test_corrected_eigenvalues_are_the_diagonal_of_the_exact_block(case, bias):
    model, inputs, targets, layer, loss = shared_cases()[case]
    bias = bias and case != "tokens"
    factors = KroneckerFactors(Risk(model, loss, (inputs, targets)), layer, bias=bias)
    corrected = factors.corrected()
    basis = factors.eigsh(factors.space.dimension)
    block = exact(factors)
    diagonal = (basis.eigenvectors * (block @ basis.eigenvectors)).sum(0)
    found = corrected.eigenvalues[tuple(basis.pairs.T)]
    np.testing.assert_allclose(found, diagonal.numpy(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(diagonal.sum(), block.trace())
    expected = (basis.eigenvectors * diagonal) @ basis.eigenvectors.T
    torch.testing.assert_close(matrix(corrected), expected, **TIGHT)
    errors = [(block - matrix(op)).norm() for op in (corrected, factors.operator())]
    assert errors[0] <= errors[1]
    top = corrected.eigsh(3)
    np.testing.assert_allclose(top.eigenvalues, diagonal.sort(descending=True).values[:3])
    images = corrected @ top.eigenvectors
    torch.testing.assert_close(images, top.eigenvectors * torch.from_numpy(top.eigenvalues))


def test_losses_other_than_softmax_cross_entropy():
    model, (inputs, _) = mlp(), classes()

    def loss(outputs, targets):
        return (outputs - targets).pow(4).sum(1) + outputs[:, 0] * outputs[:, 1]

    targets = torch.linspace(-1, 1, 36, dtype=torch.float64).reshape(12, 3)
    factors = KroneckerFactors(Risk(model, loss, (inputs, targets)), "0")
    _, U, _ = derivatives(model, 0, inputs)  # noqa: N806
    A = torch.diag_embed(12 * (model(inputs) - targets).detach() ** 2)  # noqa: N806
    A[:, [0, 1], [1, 0]] += 1
    left = torch.einsum("nams,nab,nbks->mk", U, A, U) / 12
    np.testing.assert_allclose(factors.left, left, **TIGHT)


def test_next_tokens_take_every_row_of_logits():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(4, 3), nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 4)).double()
    tokens = torch.tensor([[0, 1, 2], [3, 3, 1]])
    factors = KroneckerFactors(Risk(model, next_token_loss, (tokens, tokens)), "3")
    p = torch.softmax(model(tokens), -1).detach()[:, :-1].flatten(0, 1)
    np.testing.assert_allclose(factors.left, average_curvature(p), **TIGHT)
    rows = model[:3](tokens).detach().flatten(0, 1)
    np.testing.assert_allclose(factors.right, rows.T @ rows / 6, **TIGHT)


def test_classes_of_tokens_are_those_of_the_next_ones():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(4, 3), nn.Linear(3, 4)).double()
    tokens = torch.tensor([[0, 1], [3, 3]])
    risk = Risk(model, next_token_loss, (tokens, tokens))
    factors = KroneckerFactors(risk, "1", per_class=True)
    assert factors.class_factors[0].tolist() == [0, 0.5, 0, 0.5]
    p = torch.softmax(model(tokens), -1).detach()[:, 0]  # of the last token nothing is predicted
    A = torch.diag_embed(p) - p[:, :, None] * p[:, None]  # noqa: N806
    x = model[0](tokens).detach()
    expected = sum(torch.kron(A[n], x[n].T @ x[n]) / 4 for n in range(2))
    torch.testing.assert_close(matrix(factors.operator()), expected, **TIGHT)
    few = Risk(model, next_token_loss, (tokens, tokens), memory_budget=400)
    with pytest.raises(ValueError, match=r"4 classes, 4\^2 \+ 3\^2 numbers each, exceed"):
        _ = KroneckerFactors(few, "1", per_class=True).left


def test_eigenpairs_and_correspondence_name_the_pairs():
    factors = KroneckerFactors(Risk(mlp(), nn.CrossEntropyLoss(), classes()), "0", bias=True)
    found = factors.eigsh(5)
    dense = np.linalg.eigvalsh(np.kron(factors.left, factors.right))[::-1]
    np.testing.assert_allclose(found.eigenvalues, dense[:5], rtol=1e-12)
    operator = factors.operator()
    check_operator(operator)
    torch.testing.assert_close(
        operator @ found.eigenvectors, found.eigenvectors * torch.from_numpy(found.eigenvalues)
    )
    left, right = factors.correspondence(found.eigenvectors)
    np.testing.assert_allclose(left, np.eye(5)[:, found.pairs[:, 0]], atol=1e-12)
    np.testing.assert_allclose(right, np.eye(5)[:, found.pairs[:, 1]], atol=1e-12)
    np.testing.assert_allclose(factors.rank_ratio(found.eigenvectors).ratio, 1.0)


def test_single_precision_has_factors_in_double():
    left = KroneckerFactors(Risk(mlp(), nn.CrossEntropyLoss(), classes()), "0").left
    narrow = {"dtype": torch.float32}
    risk = Risk(mlp(**narrow), nn.CrossEntropyLoss(), classes(**narrow))
    factors = KroneckerFactors(risk, "0")
    assert factors.left.dtype == factors.right.dtype == np.float64
    np.testing.assert_allclose(factors.left, left, rtol=1e-5, atol=1e-7)
    assert factors.operator().space == GaussNewton(factors.risk).space
    assert factors.eigsh(2).eigenvectors.dtype == torch.float32
    assert (factors.corrected() @ torch.ones(20)).dtype == torch.float32


def test_factors_follow_the_parameters_and_leave_the_model_alone():
    model, data = mlp(), classes()
    factors = KroneckerFactors(Risk(model, nn.CrossEntropyLoss(), data), "0")
    before = factors.left
    assert factors.left is before
    with torch.no_grad():
        model[2].weight.mul_(2)
    assert np.abs(factors.left - before).max() > 1e-3
    fresh = KroneckerFactors(Risk(model, nn.CrossEntropyLoss(), data), "0")
    np.testing.assert_allclose(factors.left, fresh.left, rtol=0, atol=0)
    hooks = [*model._forward_pre_hooks, *(h for m in model.modules() for h in m._forward_hooks)]
    assert not hooks
    assert all(p.grad is None for p in model.parameters())


class Scaled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Across(nn.Module):
    """Applies a layer to tokens in one way or another."""

    def __init__(self, how):
        super().__init__()
        self.how, self.layer, self.head = how, nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        if self.how == "moved":  # tokens first, as many as examples
            return self.head(self.layer(x.transpose(0, 1)).transpose(0, 1).mean(1))
        if self.how == "merged":
            return self.head(self.layer(x.flatten(0, 1)).unflatten(0, x.shape[:2]).mean(1))
        if self.how == "unused":
            return self.head((x @ self.layer.weight.T).mean(1))
        return self.head(self.layer(x).mean(1))


@pytest.mark.parametrize(
    ("model", "layer", "match"),
    [
        (mlp(), "3", r"no module of the model; the layers are \['0', '2'\]"),
        (mlp(), "1", "is not nn.Linear"),
        (nn.Sequential(nn.Conv1d(2, 2, 1, groups=2)), "0", "groups=2"),
        (nn.Sequential(Scaled(2, 2)), "0", "has a forward of its own"),
        (nn.MultiheadAttention(4, 2), "", "in_proj_weight"),
        (Tied(), "encoder", "shares a parameter with the module 'again'"),
        (nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)), "", "parametrization"),
    ],
)
def test_layers_whose_block_is_no_kronecker_product_are_refused(model, layer, match):
    with pytest.raises(ValueError, match=match):
        KroneckerFactors(Risk(model, nn.CrossEntropyLoss(), classes()), layer)


@pytest.mark.parametrize(
    ("how", "match"),
    [("moved", "for others; its inputs need"), ("unused", "does not call this module")],
)
def test_layers_that_do_not_see_one_example_after_the_other_are_refused(how, match):
    torch.manual_seed(0)
    data = torch.randn(4, 4, 4), torch.arange(4) % 3
    factors = KroneckerFactors(Risk(Across(how), nn.CrossEntropyLoss(), data), "layer")
    with pytest.raises(ValueError, match=match):
        _ = factors.right


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_tokens_merged_with_the_examples_are_taken_apart(sharing):
    data = torch.randn(4, 5, 4), torch.arange(4) % 3
    found = []
    for how in ("merged", "plain"):
        torch.manual_seed(0)
        risk = Risk(Across(how), nn.CrossEntropyLoss(), data)
        factors = KroneckerFactors(risk, "layer", per_class=True, weight_sharing=sharing)
        found.append(matrix(factors.operator()))
    torch.testing.assert_close(*found)


def test_arguments_that_make_no_sense_are_refused():
    risk = Risk(mlp(), nn.CrossEntropyLoss(), classes())
    with pytest.raises(ValueError, match=r"weight_sharing='both' must be one of expand, reduce\."):
        KroneckerFactors(risk, "0", weight_sharing="both")
    with pytest.raises(ValueError, match="has no bias"):
        KroneckerFactors(Risk(Attention(), nn.CrossEntropyLoss(), classes()), "qkv", bias=True)
    for per_class in (False, True):
        with pytest.raises(ValueError, match="k=21 must lie between 1 and 20"):
            KroneckerFactors(risk, "0", per_class=per_class).eigsh(21)
