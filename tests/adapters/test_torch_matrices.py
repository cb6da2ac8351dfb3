"""Gauss-Newton, residual and second-moment matrices of PyTorch models against their definitions."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn
from torch.utils.checkpoint import checkpoint

from specdens import slq
from specdens.testing import check_operator
from specdens_torch import (
    GaussNewton,
    GradientCovariance,
    GradientSecondMoment,
    Hessian,
    Residual,
    Risk,
    gradient,
    risk_value,
)
from tests.adapters.torch_cases import TwoInputs, architectures, classes, dense, mlp, ragged
from tests.adapters.torch_dense import (
    assert_close,
    example_gradients,
    gauss_newton,
    jacobian,
    second_moment,
)

CE = nn.CrossEntropyLoss()
ARCHITECTURES = architectures()
MATRICES = (Hessian, GaussNewton, Residual, GradientSecondMoment, GradientCovariance)


def per_example(outputs, targets):
    return F.cross_entropy(outputs, targets, reduction="none")


def matrix_of(operator):
    return operator @ torch.eye(operator.space.dimension, dtype=operator.space.dtype)


@pytest.mark.parametrize("budget", [2**30, 1], ids=["kept", "one by one"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_matrix_of_every_architecture(name, budget):
    model, inputs, labels = ARCHITECTURES[name]()
    risk = Risk(model, CE, ragged(inputs, labels, seed=2), memory_budget=budget)
    reference = gauss_newton(model, CE, inputs, labels)
    assert_close(matrix_of(GaussNewton(risk)), reference)
    residual = dense(model, CE, inputs, labels) - reference
    if name != "linear":
        assert_close(matrix_of(Residual(risk)), residual, 1e-9)
    gradients = example_gradients(model, per_example, inputs, labels)
    weights = torch.ones(len(labels), dtype=torch.float64)
    assert_close(matrix_of(GradientSecondMoment(risk)), second_moment(gradients, weights))
    covariance = second_moment(gradients, weights, centered=True)
    assert_close(matrix_of(GradientCovariance(risk)), covariance)


REGRESSION = {
    "mse": nn.MSELoss(),
    "mse sum": nn.MSELoss(reduction="sum"),
    "huber": nn.HuberLoss(delta=0.7),
    "smooth l1": nn.SmoothL1Loss(beta=0.5),
    "bce": nn.BCEWithLogitsLoss(pos_weight=torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)),
    "bce sum": nn.BCEWithLogitsLoss(reduction="sum"),
    "poisson": nn.PoissonNLLLoss(),
    "kl": nn.KLDivLoss(reduction="batchmean"),
    "soft labels": nn.CrossEntropyLoss(label_smoothing=0.1),
    "soft margin": nn.SoftMarginLoss(),
}


@pytest.mark.parametrize("name", REGRESSION)
def test_gauss_newton_of_losses_with_targets_like_outputs(name):
    loss, model, (inputs, _) = REGRESSION[name], mlp(), classes(9)
    if name == "kl":
        model = nn.Sequential(model, nn.LogSoftmax(1))
    targets = torch.rand(9, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    if name == "soft margin":
        targets = targets.sub(0.5).sign()
    if name in ("kl", "soft labels"):
        targets = targets / targets.sum(1, keepdim=True)
    risk = Risk(model, loss, ragged(inputs, targets, 3))
    reference = gauss_newton(model, loss, inputs, targets)
    assert_close(matrix_of(GaussNewton(risk)), reference)
    split = dense(model, loss, inputs, targets) - reference
    assert_close(matrix_of(Residual(risk)), split, 1e-9)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("seed", range(10))
def test_weights_ignored_terms_and_any_split(seed, reduction):
    model, (inputs, labels) = mlp(), classes(11)
    labels[[0, 3, 4]] = -100
    weight = torch.tensor([1.0, 3.0, 0.5], dtype=torch.float64)
    loss = nn.CrossEntropyLoss(weight=weight, label_smoothing=0.1, reduction=reduction)
    risk = Risk(model, loss, ragged(inputs, labels, seed), memory_budget=2**30 if seed % 2 else 1)
    reference = gauss_newton(model, loss, inputs, labels)
    assert_close(matrix_of(GaussNewton(risk)), reference, 1e-12)
    assert_close(matrix_of(Residual(risk)), dense(model, loss, inputs, labels) - reference, 1e-11)
    # The weight of an example is that of its class; its own loss is not multiplied by it.
    plain = nn.CrossEntropyLoss(weight=weight, reduction=reduction)
    risk = Risk(model, plain, ragged(inputs, labels, seed))
    known = labels >= 0
    gradients = example_gradients(model, per_example, inputs[known], labels[known])
    weights = weight[labels[known]]
    mass = weights.sum() if reduction == "sum" else 1.0
    for kind, centered in ((GradientSecondMoment, False), (GradientCovariance, True)):
        expected = mass * second_moment(gradients, weights, centered=centered)
        assert_close(matrix_of(kind(risk)), expected, 1e-12)


def test_an_example_with_several_terms_counts_with_their_mean():
    model, (inputs, _) = mlp(), classes(8)
    targets = torch.zeros(8, 3, dtype=torch.float64)
    weights = torch.rand(8, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weights[2] = 0.0  # an example that does not count at all

    def loss(outputs, pair):
        return (outputs - pair[0]).square(), pair[1]

    def mean_loss(outputs, pair):
        return ((outputs - pair[0]).square() * pair[1]).sum(1) / pair[1].sum(1)

    known = weights.sum(1) > 0
    picked = (targets[known], weights[known])
    gradients = example_gradients(model, mean_loss, inputs[known], picked)
    expected = second_moment(gradients, weights[known].sum(1))
    matrix = GradientSecondMoment(model, loss, (inputs, (targets, weights)))
    assert_close(matrix_of(matrix), expected)


@pytest.mark.parametrize("kind", MATRICES)
@pytest.mark.parametrize("budget", [2**30, 1], ids=["kept", "one by one"])
def test_operators_are_sound_and_columns_are_single_products(kind, budget):
    model, data = mlp(), classes()
    operator = kind(model, CE, data, memory_budget=budget)
    check_operator(operator)
    x = torch.randn(43, 4, dtype=torch.float64)
    block = operator @ x
    singles = torch.stack([operator @ column for column in x.T], 1)
    torch.testing.assert_close(block, singles, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("kind", MATRICES)
def test_a_part_of_the_parameters_is_a_diagonal_block(kind):
    model, data = mlp(), classes()
    whole = matrix_of(kind(model, CE, data))
    part = kind(model, CE, data, ["0.bias", "2.weight"])
    places = torch.cat([torch.arange(43)[whole_slice] for whole_slice in (
        slice(20, 25), slice(25, 40))])  # fmt: skip
    assert_close(matrix_of(part), whole[places][:, places])


@pytest.mark.parametrize("kind", MATRICES)
def test_products_follow_the_parameters_and_leave_them_alone(kind):
    model, data = mlp(), classes()
    operator = kind(model, CE, data)
    x = torch.randn(43, 2, dtype=torch.float64)
    before = operator @ x
    state = {name: p.clone() for name, p in model.state_dict().items()}
    with torch.no_grad():
        model[0].weight.mul_(1.5)
    changed = operator @ x
    assert_close(changed, kind(model, CE, data) @ x, 1e-13)
    assert not torch.allclose(before, changed)
    model.load_state_dict(state)
    assert_close(operator @ x, before, 1e-13)
    assert all(p.grad is None for p in model.parameters())


# What follows are exact properties of the matrices, whatever the data.


def test_relu_networks_have_no_curvature_within_a_layer():
    model, (inputs, labels) = mlp(nn.ReLU), classes(20)
    risk = Risk(model, CE, (inputs, labels))
    residual = matrix_of(Residual(risk))
    scale = matrix_of(GaussNewton(risk)).abs().max()
    for block in Risk(model, CE, (inputs, labels)).parameters.slices.values():
        assert residual[block, block].abs().max() <= 1e-15 * scale
    # tanh has it
    curved = matrix_of(Residual(mlp(), CE, (inputs, labels)))
    assert curved[:20, :20].abs().max() > 1e-4


def test_one_hidden_layer_has_a_symmetric_residual_spectrum():
    model, (inputs, labels) = mlp(nn.ReLU), classes(20)
    eigenvalues = torch.linalg.eigvalsh(matrix_of(Residual(model, CE, (inputs, labels))))
    assert_close(eigenvalues, -eigenvalues.flip(0), 1e-13)
    # Singular values of one matrix for each hidden unit, sum_i (p - y) 1[a > 0] [x; 1]^T.
    with torch.no_grad():
        slopes = torch.softmax(model(inputs), 1) - F.one_hot(labels, 3)
        active = (model[0](inputs) > 0).double()
        extended = torch.cat([inputs, torch.ones(20, 1, dtype=torch.float64)], 1)
        units = torch.einsum("ic,ij,id->jcd", slopes, active, extended) / 20
    singular = torch.linalg.svdvals(units).flatten()
    positive = eigenvalues[eigenvalues > 1e-12 * eigenvalues[-1]]
    assert len(positive) <= len(singular)
    assert_close(positive, singular.sort().values[-len(positive) :], 1e-10)


def test_weyl_inequalities_and_the_rank_of_gauss_newton():
    model, (inputs, labels) = mlp(width=8), classes(10)
    risk = Risk(model, CE, (inputs, labels))
    whole, part, rest = (
        torch.linalg.eigvalsh(matrix_of(kind(risk))) for kind in (Hessian, GaussNewton, Residual)
    )
    slack = 1e-14 * whole[-1]
    assert part[0] >= -slack
    assert whole[0] >= rest[0] - slack
    assert whole[-1] <= part[-1] + rest[-1] + slack
    few = GaussNewton(model, CE, (inputs[:4], labels[:4]))
    eigenvalues = torch.linalg.eigvalsh(matrix_of(few))
    assert (eigenvalues > 1e-12 * eigenvalues[-1]).sum() <= 4 * (3 - 1)


def test_gauss_newton_of_the_output_layer_ignores_a_common_shift():
    model, data = mlp(), classes()
    bias = GaussNewton(model, CE, data, "2.bias")
    assert (bias @ torch.ones(3, dtype=torch.float64)).abs().max() <= 1e-16


def test_the_three_matrices_add_up():
    model, data = mlp(), classes()
    risk = Risk(model, CE, data)
    x = torch.randn(43, dtype=torch.float64)
    assert_close((GaussNewton(risk) + Residual(risk)) @ x, Hessian(risk) @ x, 1e-12)
    mean = gradient(risk)
    outer = (mean @ x) * mean
    assert_close(GradientCovariance(risk) @ x + outer, GradientSecondMoment(risk) @ x, 1e-12)


def test_models_with_several_outputs():
    class TwoHeads(nn.Module):
        def __init__(self, kind):
            super().__init__()
            self.body, self.kind = nn.Linear(4, 5), kind
            self.left, self.right = nn.Linear(5, 3), nn.Linear(5, 2)

        def forward(self, x):
            hidden = torch.tanh(self.body(x))
            parts = {"hidden": hidden, "left": self.left(hidden), "right": self.right(hidden)}
            return self.kind(parts)

    class Holder:
        def __init__(self, parts):
            self.parts = parts

    def joint(left, right, labels):
        log_p = F.log_softmax(left, 1).gather(1, labels[:, None])[:, 0]
        return -log_p + right.square().sum(1)

    pick = {
        "dict": (dict, lambda o: (o["left"], o["right"])),
        "list": (lambda p: [p["hidden"], [p["left"], p["right"]]], lambda o: o[1]),
        "object": (Holder, lambda o: (o.parts["left"], o.parts["right"])),
    }
    inputs, labels = classes(9)
    results = []
    for kind, choose in pick.values():
        torch.manual_seed(0)
        model = TwoHeads(kind).double()
        loss = lambda o, y, choose=choose: joint(*choose(o), y)  # noqa: E731
        risk = Risk(model, loss, ragged(inputs, labels, 4))
        assert_close(matrix_of(GaussNewton(risk) + Residual(risk)), matrix_of(Hessian(risk)))
        results.append(matrix_of(GaussNewton(risk)))
    torch.manual_seed(0)
    single = TwoHeads(lambda p: torch.cat([p["left"], p["right"]], 1)).double()
    expected = gauss_newton(
        single, lambda f, y: joint(f[:, :3], f[:, 3:], y).mean(), inputs, labels
    )
    for result in results:
        assert_close(result, expected)


def test_outputs_that_cannot_be_taken_apart_are_refused():
    class Sealed:
        __slots__ = ("value",)

        def __init__(self, value):
            self.value = value

    class Model(nn.Linear):
        def forward(self, x):
            return Sealed(super().forward(x))

    model, (inputs, labels) = Model(4, 3).double(), classes()
    matrix = GaussNewton(model, lambda o, y: per_example(o.value, y), (inputs, labels))
    with pytest.raises(TypeError, match="other than through tensors in the model's outputs"):
        matrix @ torch.ones(15, dtype=torch.float64)


def test_losses_without_curvature_in_the_outputs():
    model, (inputs, _) = mlp(), classes()
    loss = lambda o, y: o.sum(1)  # noqa: E731
    risk = Risk(model, loss, (inputs, inputs))
    zeros = torch.zeros(43, 43, dtype=torch.float64)
    assert torch.equal(matrix_of(GaussNewton(risk)), zeros)
    assert_close(matrix_of(Residual(risk)), matrix_of(Hessian(risk)), 1e-13)


@pytest.mark.parametrize("kind", MATRICES)
def test_unused_parameters_and_constant_losses_give_zeros(kind):
    model, inputs, labels = ARCHITECTURES["tied"]()
    unused = kind(model, CE, (inputs, labels), "unused")
    assert torch.equal(matrix_of(unused), torch.zeros(2, 2, dtype=torch.float64))


@pytest.mark.parametrize("kind", MATRICES)
def test_checkpointed_layers(kind):
    class Checkpointed(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return checkpoint(self.inner, x, use_reentrant=False)

    model, data = mlp(), classes()
    x = torch.randn(43, 2, dtype=torch.float64)
    wrapped = kind(nn.Sequential(Checkpointed(model)), CE, data)
    assert_close(wrapped @ x, kind(model, CE, data) @ x, 1e-13)


def test_weight_decay_is_that_of_the_optimizers():
    model, data = mlp(), classes()
    risk, decayed = Risk(model, CE, data), Risk(model, CE, data, "0.*", weight_decay=0.3)
    part = Risk(model, CE, data, "0.*")
    theta = decayed.parameters.ravel()
    assert risk_value(decayed) == pytest.approx(risk_value(risk) + 0.15 * float(theta @ theta))
    assert_close(gradient(decayed), gradient(part) + 0.3 * theta)
    identity = 0.3 * torch.eye(25, dtype=torch.float64)
    for kind, share in zip(MATRICES, (1, 1, 0, 0, 0), strict=True):
        assert_close(matrix_of(kind(decayed)), matrix_of(kind(part)) + share * identity)
    with pytest.raises(ValueError, match="weight_decay=-1"):
        Risk(model, CE, data, weight_decay=-1)


def test_keyword_inputs():
    model = TwoInputs().double()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(7, 4, generator=generator, dtype=torch.float64)
    z = torch.randn(7, 2, generator=generator, dtype=torch.float64)
    labels = torch.randint(3, (7,), generator=generator)
    risk = Risk(model, CE, [({"x": x, "z": z, "scale": 2.0}, labels)])
    assert_close(matrix_of(GaussNewton(risk) + Residual(risk)), matrix_of(Hessian(risk)))


def test_a_spectrum_of_each():
    model, data = mlp(), classes(30)
    for kind in MATRICES:
        operator = kind(model, CE, data)
        measure = slq(operator, num_probes=43, num_steps=43, progress=False)
        exact = torch.linalg.eigvalsh(matrix_of(operator)).numpy()
        assert measure.distance(exact) <= 1e-6 * float(abs(exact).max())


def test_partial_losses_of_torch_are_understood_alike():
    model, (inputs, labels) = mlp(), classes(9)
    loss = functools.partial(F.cross_entropy, label_smoothing=0.2)
    expected = gauss_newton(model, loss, inputs, labels)
    assert_close(matrix_of(GaussNewton(model, loss, ragged(inputs, labels, 1))), expected)


def test_jacobian_rows_have_the_rank_that_bounds_gauss_newton():
    model, (inputs, labels) = mlp(), classes(5)
    rows = jacobian(model, inputs)
    null = torch.linalg.svd(rows).Vh[15:]  # what no output depends on
    products = GaussNewton(model, CE, (inputs, labels)) @ null.T
    assert products.abs().max() <= 1e-15
