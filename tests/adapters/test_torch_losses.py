"""What losses mean: torch's own as in torch, on one batch or many, and those of users."""

from __future__ import annotations

import functools
import warnings

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from specdens_torch import Hessian, Risk, gradient, risk_value
from tests.adapters.torch_cases import classes, dense, mlp, ragged

WEIGHT = torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64)
N = 12


def labels():
    return classes(N)[1]


def some_ignored(index=-100):
    targets = labels()
    targets[[1, 4, 5]] = index
    return targets


def probabilities():
    torch.manual_seed(5)
    return torch.softmax(torch.randn(N, 3, dtype=torch.float64), 1)


def values():
    torch.manual_seed(6)
    return torch.randn(N, 3, dtype=torch.float64)


def counts():
    return torch.arange(3 * N).reshape(N, 3).double() % 4


def signs():
    return torch.where(values() > 0, 1.0, -1.0).double()


CASES = {
    "ce": (nn.CrossEntropyLoss(), labels),
    "ce-sum": (nn.CrossEntropyLoss(reduction="sum"), labels),
    "ce-weight": (nn.CrossEntropyLoss(weight=WEIGHT), labels),
    "ce-ignore": (nn.CrossEntropyLoss(), some_ignored),
    "ce-ignore-255": (
        nn.CrossEntropyLoss(weight=WEIGHT, ignore_index=255),
        functools.partial(some_ignored, 255),
    ),
    "ce-smooth": (nn.CrossEntropyLoss(label_smoothing=0.2), labels),
    "ce-everything": (
        nn.CrossEntropyLoss(weight=WEIGHT, label_smoothing=0.3, ignore_index=1),
        labels,
    ),
    "ce-probabilities": (nn.CrossEntropyLoss(), probabilities),
    "ce-probabilities-weight": (
        nn.CrossEntropyLoss(weight=WEIGHT, label_smoothing=0.1),
        probabilities,
    ),
    "f-ce": (F.cross_entropy, labels),
    "f-ce-partial": (
        functools.partial(F.cross_entropy, weight=WEIGHT, ignore_index=2, label_smoothing=0.1),
        labels,
    ),
    "f-ce-sum": (functools.partial(F.cross_entropy, reduction="sum"), labels),
    "nll": (nn.NLLLoss(weight=WEIGHT), some_ignored),
    "f-nll": (functools.partial(F.nll_loss, weight=WEIGHT), some_ignored),
    "mse": (nn.MSELoss(), values),
    "mse-sum": (nn.MSELoss(reduction="sum"), values),
    "f-mse": (F.mse_loss, values),
    "smooth-l1": (nn.SmoothL1Loss(beta=0.7), values),
    "huber": (nn.HuberLoss(delta=0.7), values),
    "f-huber": (functools.partial(F.huber_loss, delta=0.5), values),
    "l1": (nn.L1Loss(), values),
    "bce-logits": (nn.BCEWithLogitsLoss(pos_weight=WEIGHT, weight=WEIGHT.flip(0)), probabilities),
    "f-bce-logits": (F.binary_cross_entropy_with_logits, probabilities),
    "kl": (nn.KLDivLoss(reduction="batchmean"), probabilities),
    "kl-sum": (nn.KLDivLoss(reduction="sum", log_target=True), values),
    "f-kl": (functools.partial(F.kl_div, reduction="batchmean"), probabilities),
    "poisson": (nn.PoissonNLLLoss(full=True), counts),
    "soft-margin": (nn.SoftMarginLoss(), signs),
    "multilabel": (nn.MultiLabelSoftMarginLoss(weight=WEIGHT), probabilities),
    "bce-logits-sum": (nn.BCEWithLogitsLoss(pos_weight=WEIGHT, reduction="sum"), probabilities),
    "f-bce-logits-weights": (
        functools.partial(
            F.binary_cross_entropy_with_logits, pos_weight=WEIGHT, weight=WEIGHT.flip(0)
        ),
        probabilities,
    ),
    "nll-sum": (nn.NLLLoss(weight=WEIGHT, reduction="sum"), some_ignored),
    "nll-ignore": (nn.NLLLoss(weight=WEIGHT, ignore_index=2), labels),
    "f-kl-sum": (functools.partial(F.kl_div, reduction="sum", log_target=True), values),
    "l1-sum": (nn.L1Loss(reduction="sum"), values),
    "multilabel-sum": (nn.MultiLabelSoftMarginLoss(reduction="sum"), probabilities),
    "hinge": (nn.HingeEmbeddingLoss(margin=0.5), signs),
}


@pytest.mark.parametrize("name", CASES)
def test_torch_losses_mean_what_they_mean_in_torch(name):
    loss, make_targets = CASES[name]
    model, inputs, targets = mlp(width=2), classes(N)[0], make_targets()
    whole = Risk(model, loss, (inputs, targets))
    expected = loss(model(inputs), targets).item()
    assert risk_value(whole) == pytest.approx(expected, rel=1e-12)
    matrix = dense(model, loss, inputs, targets, vectorize=False)
    slope = dense(model, loss, inputs, targets, order=1)
    for data in ((inputs, targets), ragged(inputs, targets, seed=4)):
        risk = Risk(model, loss, data)
        identity = torch.eye(matrix.shape[0], dtype=torch.float64)
        torch.testing.assert_close(Hessian(risk) @ identity, matrix, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(gradient(risk), slope, rtol=1e-10, atol=1e-12)
        assert risk_value(risk) == pytest.approx(expected, rel=1e-12)


def test_bce_on_probabilities():
    model = nn.Sequential(mlp(width=2), nn.Sigmoid())
    inputs, targets = classes(N)[0], probabilities()
    loss = nn.BCELoss(weight=WEIGHT)
    assert risk_value(Risk(model, loss, ragged(inputs, targets, 3))) == pytest.approx(
        loss(model(inputs), targets).item(), rel=1e-12
    )


def test_kl_mean_divides_by_the_elements():
    model, inputs, targets = mlp(width=2), classes(N)[0], probabilities()
    loss = nn.KLDivLoss(reduction="mean")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch announces another default
        expected = loss(model(inputs), targets).item()
    assert risk_value(Risk(model, loss, ragged(inputs, targets, 3))) == pytest.approx(expected)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("kind", ["indices", "ignored", "class-ignored", "probabilities"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weight", [None, WEIGHT], ids=["equal", "weighted"])
@pytest.mark.parametrize("positions", [(), (2,), (2, 2)], ids=str)
def test_cross_entropy_with_everything(positions, weight, smoothing, kind, reduction):
    """On random ragged splits: class weights, ignored classes, smoothing, soft labels, K axes."""
    torch.manual_seed(len(positions))
    model = [nn.Linear(2, 3), nn.Conv1d(2, 3, 1), nn.Conv2d(2, 3, 1)][len(positions)].double()
    inputs = torch.randn(7, 2, *positions, dtype=torch.float64)
    targets = torch.randint(3, (7, *positions))
    if kind == "ignored":
        targets[[0, 5]] = -100  # whole examples
        targets.view(7, -1)[2, 0] = -100
    if kind == "probabilities":
        targets = torch.rand(7, 3, *positions, dtype=torch.float64)  # need not add up to one
    loss = nn.CrossEntropyLoss(
        weight=weight,
        label_smoothing=smoothing,
        ignore_index=1 if kind == "class-ignored" else -100,
        reduction=reduction,
    )
    expected = loss(model(inputs), targets).item()
    matrix = dense(model, loss, inputs, targets)
    slope = dense(model, loss, inputs, targets, order=1)
    identity = torch.eye(9, dtype=torch.float64)
    for seed in (2, 4):
        risk = Risk(model, loss, ragged(inputs, targets, seed), regroup=seed == 2)
        assert risk_value(risk) == pytest.approx(expected, rel=1e-12)
        torch.testing.assert_close(gradient(risk), slope, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(Hessian(risk) @ identity, matrix, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("rows", [(), (5,)], ids=["mean-over-elements", "batchmean"])
def test_kl_over_positions(rows):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(4, 3, 1), nn.LogSoftmax(1)).double()
    inputs = torch.randn(6, 4, 5, dtype=torch.float64)
    targets = torch.softmax(torch.randn(6, 3, 5, dtype=torch.float64), 1)
    loss = nn.KLDivLoss(reduction="batchmean" if rows else "mean")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch announces another default
        expected = loss(model(inputs), targets).item()
        matrix = dense(model, loss, inputs, targets)
    risk = Risk(model, loss, ragged(inputs, targets, 3))
    assert risk_value(risk) == pytest.approx(expected, rel=1e-12)
    identity = torch.eye(15, dtype=torch.float64)
    torch.testing.assert_close(Hessian(risk) @ identity, matrix, rtol=1e-10, atol=1e-12)


def test_class_indices_may_be_bytes():
    """As in torch; to index with bytes would be to choose with a mask."""
    model, (inputs, targets) = mlp(width=2), classes(N)
    loss = nn.CrossEntropyLoss(weight=WEIGHT)
    risk = Risk(model, loss, ragged(inputs, targets.to(torch.uint8), 3))
    assert risk_value(risk) == pytest.approx(loss(model(inputs), targets).item(), rel=1e-12)


def test_a_loss_module_is_taken_as_it_is():
    """Replacing its class weights later must not mix old and new ones."""
    model, (inputs, targets) = mlp(width=2), classes(N)
    loss = nn.CrossEntropyLoss(weight=WEIGHT)
    expected = loss(model(inputs), targets).item()
    risk = Risk(model, loss, (inputs, targets))
    loss.weight = torch.tensor([5.0, 1.0, 1.0], dtype=torch.float64)
    assert risk_value(risk) == pytest.approx(expected, rel=1e-12)


class Logits:
    """What a model may return instead of a tensor."""

    def __init__(self, logits):
        self.logits = logits


@pytest.mark.parametrize("wrap", [Logits, lambda logits: {"logits": logits, "other": 0}])
@pytest.mark.parametrize("name", ["ce-everything", "f-bce-logits", "mse"])
def test_outputs_that_carry_logits(name, wrap):
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = mlp(width=2)

        def forward(self, x):
            return wrap(self.body(x))

    loss, make_targets = CASES[name]
    inputs, targets = classes(N)[0], make_targets()
    hessian = Hessian(Wrapped(), loss, ragged(inputs, targets, 3))
    matrix = dense(mlp(width=2), loss, inputs, targets)
    identity = torch.eye(19, dtype=torch.float64)
    torch.testing.assert_close(hessian @ identity, matrix, rtol=1e-10, atol=1e-12)


def test_one_label_at_each_token_is_a_loss_of_its_own():
    model, inputs = nn.Linear(4, 3).double(), torch.randn(2, 5, 4, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"\(2, 5, 3\).*next_token_loss"):
        risk_value(Risk(model, nn.CrossEntropyLoss(), (inputs, torch.zeros(2, 5).long())))


def test_gaussian_likelihood_of_mean_and_variance():
    class MeanVariance(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = mlp(width=2)

        def forward(self, x):
            y = self.body(x)
            return y, F.softplus(y) + 0.1

    model, inputs, targets = MeanVariance(), classes(N)[0], values()
    mean, variance = model(inputs)
    expected = F.gaussian_nll_loss(mean, targets, variance).item()
    risk = Risk(model, nn.GaussianNLLLoss(), ragged(inputs, targets, 3))
    assert risk_value(risk) == pytest.approx(expected, rel=1e-12)


def test_the_users_loss_module_is_not_changed():
    loss = nn.CrossEntropyLoss(weight=WEIGHT.clone())
    before = dict(vars(loss))
    _ = Hessian(mlp(width=2), loss, classes()) @ torch.zeros(19, dtype=torch.float64)
    assert vars(loss) == before
    assert loss.reduction == "mean"


def test_functions_of_examples_and_weighted_terms():
    model, (inputs, targets) = mlp(width=2), classes(N)
    weights = torch.linspace(0.0, 2.0, N, dtype=torch.float64)

    def weighted(outputs, packed):
        labels, w = packed
        return F.cross_entropy(outputs, labels, reduction="none"), w

    def reference(outputs, _):
        return (weights * F.cross_entropy(outputs, targets, reduction="none")).sum() / weights.sum()

    packed = [(inputs[:5], (targets[:5], weights[:5])), (inputs[5:], (targets[5:], weights[5:]))]
    risk = Risk(model, weighted, packed)
    assert risk_value(risk) == pytest.approx(reference(model(inputs), None).item(), rel=1e-12)
    identity = torch.eye(19, dtype=torch.float64)
    matrix = dense(model, reference, inputs, None)
    torch.testing.assert_close(Hessian(risk) @ identity, matrix, rtol=1e-10, atol=1e-12)
    plain = Risk(model, lambda o, y: F.cross_entropy(o, y, reduction="none"), (inputs, targets))
    expected = F.cross_entropy(model(inputs), targets).item()
    assert risk_value(plain) == pytest.approx(expected, rel=1e-12)


class Focal(nn.Module):
    """A user's loss module, with a buffer."""

    def __init__(self):
        super().__init__()
        self.register_buffer("gamma", torch.tensor(2.0, dtype=torch.float64))

    def forward(self, outputs, targets):
        losses = F.cross_entropy(outputs, targets, reduction="none")
        return (1 - torch.exp(-losses)) ** self.gamma * losses


def test_loss_modules_of_the_user_and_their_buffers():
    model, (inputs, targets) = mlp(width=2), classes(N)
    loss = Focal()
    hessian = Hessian(model, loss, (inputs, targets))
    identity = torch.eye(19, dtype=torch.float64)
    for gamma in (2.0, 3.0):  # a change of the loss is noticed
        loss.gamma.fill_(gamma)
        matrix = dense(model, lambda o, y: loss(o, y).mean(), inputs, targets)
        torch.testing.assert_close(hessian @ identity, matrix, rtol=1e-10, atol=1e-12)


class Halved(nn.CrossEntropyLoss):
    """A subclass of torch's loss that means something else."""

    def forward(self, outputs, targets):
        return 0.5 * F.cross_entropy(outputs, targets, reduction="none")


def test_subclasses_with_their_own_forward_are_user_functions():
    model, (inputs, targets) = mlp(width=2), classes(N)
    expected = 0.5 * F.cross_entropy(model(inputs), targets).item()
    assert risk_value(Risk(model, Halved(), (inputs, targets))) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("loss", "error", "words"),
    [
        (lambda o, y: F.cross_entropy(o, y), ValueError, "one loss per example"),
        (lambda o, y: 1.0, TypeError, "float"),
        (lambda o, y: y, TypeError, "int64"),
        (lambda o, y: (o[:, 0], torch.ones(3)), ValueError, "shapes must agree"),
        (lambda o, y: (o[:, 0], o[:, 1]), ValueError, "depend on the parameters"),
        (lambda o, y: (o[:, 0], torch.zeros(len(o))), ValueError, "sum to 0"),
        (lambda o, y: o[:, 0] * float("nan"), ValueError, "not finite"),
    ],
    ids=["scalar", "float", "integer", "shapes", "live-weights", "zero-weights", "nan"],
)
def test_functions_that_return_something_else(loss, error, words):
    with pytest.raises(error, match=words):
        risk_value(Risk(mlp(width=2), loss, classes()))


@pytest.mark.parametrize(
    ("loss", "error", "words"),
    [
        ("mse", TypeError, "str"),
        (nn.CTCLoss(), ValueError, "CTCLoss"),
        (nn.CosineEmbeddingLoss(), ValueError, "reduction='none'"),
        (F.ctc_loss, ValueError, "ctc_loss"),
        (functools.partial(F.mse_loss, reduction="median"), ValueError, "median"),
        (functools.partial(F.mse_loss, size_average=False), ValueError, "size_average"),
        (functools.partial(F.mse_loss, torch.ones(2)), ValueError, "positional"),
        (functools.partial(F.mse_loss, weight=torch.ones(2)), ValueError, "one batch"),
    ],
)
def test_losses_without_a_meaning_term_by_term(loss, error, words):
    with pytest.raises(error, match=words):
        Risk(mlp(width=2), loss, classes())


def test_outputs_that_torch_losses_cannot_take():
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = mlp(width=2)

        def forward(self, x):
            return {"scores": self.body(x)}

    with pytest.raises(TypeError, match="picks the tensor"):
        risk_value(Risk(Wrapped(), nn.CrossEntropyLoss(), classes()))
    picked = Risk(
        Wrapped(), lambda o, y: F.cross_entropy(o["scores"], y, reduction="none"), classes()
    )
    inputs, targets = classes()
    assert risk_value(picked) == pytest.approx(
        F.cross_entropy(mlp(width=2)(inputs), targets).item()
    )


def test_all_targets_ignored():
    inputs, targets = classes()
    with pytest.raises(ValueError, match="ignore_index"):
        risk_value(
            Risk(mlp(width=2), nn.CrossEntropyLoss(), (inputs, torch.full_like(targets, -100)))
        )
    ignored = Risk(
        mlp(width=2), nn.CrossEntropyLoss(reduction="sum"), (inputs, torch.full_like(targets, -100))
    )
    assert risk_value(ignored) == 0.0
