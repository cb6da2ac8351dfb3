"""Lines between two solutions, and population statistics of batch norm, against closed forms."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from specdens import eigsh
from specdens_torch import Hessian, Risk, gradient, risk_value
from specdens_torch.paths import along_line, population_statistics
from tests.adapters.torch_cases import classes, mlp

CE = nn.CrossEntropyLoss()
ALPHAS = np.linspace(0, 1, 5)


def quadratic():
    """Return the risk |X w - y|^2 / n of a linear model, with X and y."""
    generator = torch.Generator().manual_seed(3)
    X = torch.randn(7, 3, generator=generator, dtype=torch.float64)  # noqa: N806
    y = torch.randn(7, 1, generator=generator, dtype=torch.float64)
    model = nn.Linear(3, 1, bias=False).double()
    return Risk(model, nn.MSELoss(), (X, y)), X, y


def norm_net(seed=1, **options):
    """Return a 4-3-3-3 network with two batch-norm layers and unlike running statistics."""
    torch.manual_seed(seed)
    norms = [nn.BatchNorm1d(3, **options) for _ in range(2)]
    net = nn.Sequential(
        nn.Linear(4, 3), norms[0], nn.Tanh(), nn.Linear(3, 3), norms[1], nn.ReLU(), nn.Linear(3, 3)
    ).double()
    for norm in norms:
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    return net.eval()


def batches(sizes=(3, 5, 4)):
    inputs, labels = classes()
    return list(zip(inputs.split(sizes), labels.split(sizes), strict=True))


def sharpness(risk):
    return eigsh(Hessian(risk), 1).eigenvalues[0]


def state(model):
    return [t.clone() for t in (*model.parameters(), *model.buffers())]


def unchanged(model, before):
    now = [*model.parameters(), *model.buffers()]
    return all(torch.equal(a, b) for a, b in zip(now, before, strict=True))


def test_a_quadratic_is_known_everywhere_on_the_line():
    risk, X, y = quadratic()  # noqa: N806
    before = state(risk.model)
    a, b = torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    alphas = [-0.5, 0.3, 0.7, 1.5]
    path = along_line(risk, a, {"weight": b[None]}, alphas)
    points = [(1 - alpha) * a + alpha * b for alpha in alphas]
    expected = [((X @ w[:, None] - y) ** 2).mean().item() for w in points]
    np.testing.assert_allclose(path.values, expected, rtol=1e-12)
    ends = [((X @ w[:, None] - y) ** 2).mean().item() for w in (a, b)]
    np.testing.assert_allclose(path.ends, ends, rtol=1e-12)
    drop = ((X @ (b - a)) ** 2).mean().item()  # q(alpha) lies alpha (1 - alpha) drop below
    sag = np.array(alphas) * (1 - np.array(alphas)) * drop
    np.testing.assert_allclose(path.values - path.chord, -sag, rtol=1e-9)
    assert path.barrier == 0
    assert unchanged(risk.model, before)
    top = along_line(risk, a, b, alphas, quantity=lambda r: eigsh(Hessian(r), 1).eigenvalues)
    largest = torch.linalg.eigvalsh(2 * X.T @ X / 7)[-1].item()
    np.testing.assert_allclose(top.values, largest * np.ones((4, 1)), rtol=1e-9)
    np.testing.assert_allclose(top.barrier, [0], atol=1e-9)


def test_the_barrier_is_measured_from_the_chord_between_the_ends():
    """Two linear layers a, b have minima of (a b - 1)^2 at 1, 1 and -1, -1, and a hill between."""
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)).double()
    ones = torch.ones(2, 1, dtype=torch.float64)
    risk = Risk(model, nn.MSELoss(), (ones, ones))
    start = torch.ones(2, dtype=torch.float64)
    blocks = {"0.weight": -ones[:1], "1.weight": -ones[:1]}
    path = along_line(risk, start, blocks, ALPHAS)
    np.testing.assert_allclose(path.values, ((1 - 2 * ALPHAS) ** 2 - 1) ** 2, atol=1e-14)
    assert path.barrier == pytest.approx(1)
    tilted = along_line(risk, start, 2 * start, ALPHAS)  # (a^2 - 1)^2 is convex from 1 to 2
    assert tilted.values.max() == pytest.approx(9)
    assert tilted.barrier == 0
    sharpest = along_line(risk, start, blocks, ALPHAS, quantity=sharpness)
    a = 1 - 2 * ALPHAS  # eigenvalues 2 a^2 +- (4 a^2 - 2) of the Hessian
    np.testing.assert_allclose(sharpest.values, 2 * a**2 + np.abs(4 * a**2 - 2), rtol=1e-9)
    # The distance from the start, as a quantity: its square has no barrier, its root none either,
    # minus its square has one of a quarter of the square.
    length = float(torch.linalg.vector_norm(risk.parameters.ravel(blocks) - start))

    def squares(at):
        apart = torch.linalg.vector_norm(at.parameters.ravel() - start)
        return torch.stack([apart**2, apart, -(apart**2)])

    path = along_line(risk, start, blocks, ALPHAS, quantity=squares)
    assert path.values.shape == (5, 3)
    np.testing.assert_allclose(path.barrier, [0, 0, length**2 / 4], atol=1e-12)
    assert "5 points from 0 to 1" in repr(path)


@pytest.mark.parametrize("split", [(12,), (3, 5, 4), (1,) * 12])
@pytest.mark.parametrize("options", [{}, {"momentum": None}, {"affine": False}])
def test_population_statistics_are_those_of_all_data_in_one_batch(split, options):
    model, data = norm_net(**options), batches(split)
    before = state(model)
    whole = Risk(model.train(), CE, classes(), batch_statistics=True)
    expected = risk_value(whole)
    curved = Hessian(whole) @ torch.eye(whole.parameters.size, dtype=torch.float64)
    with population_statistics(model, data):
        assert not any(module.training for module in model.modules())
        frozen = Risk(model, CE, classes())
        assert risk_value(frozen) == pytest.approx(expected, rel=1e-12)
        first = model[0](classes()[0])
        torch.testing.assert_close(model[1].running_mean, first.mean(0))
        torch.testing.assert_close(model[1].running_var, first.var(0, correction=0))
        matrix = Hessian(frozen) @ torch.eye(whole.parameters.size, dtype=torch.float64)
        assert not torch.allclose(matrix, curved, rtol=0.1)
    assert model.training
    assert unchanged(model, before)


def test_population_statistics_of_images_need_no_order_and_leave_the_generators_alone():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 2), nn.BatchNorm2d(2), nn.Flatten()).double().eval()
    images, labels = torch.randn(7, 1, 3, 3, dtype=torch.float64), torch.zeros(7)
    loader = DataLoader(TensorDataset(images, labels), batch_size=3, shuffle=True)
    generator = torch.get_rng_state()
    outputs = model[0](images)
    with population_statistics(model, loader):
        torch.testing.assert_close(model[1].running_mean, outputs.mean((0, 2, 3)))
        variance = outputs.var((0, 2, 3), correction=0)
        torch.testing.assert_close(model[1].running_var, variance)
    assert torch.equal(generator, torch.get_rng_state())


def test_recomputed_statistics_at_every_point():
    model, data = norm_net(), batches()
    risk = Risk(model, CE, data)
    before = state(model)
    start = risk.parameters.ravel()
    end = Risk(norm_net(2), CE, data).parameters.ravel()
    train = Risk(norm_net().train(), CE, classes(), batch_statistics=True)
    expected = along_line(train, start, end, ALPHAS)
    found = along_line(risk, start, end, ALPHAS, statistics="recomputed")
    np.testing.assert_allclose(found.values, expected.values, rtol=1e-12)
    kept = along_line(risk, start, end, ALPHAS)
    assert np.abs(kept.values - found.values).max() > 1e-2
    assert unchanged(model, before)

    def slope(at):
        return torch.linalg.vector_norm(gradient(at))

    slopes = along_line(risk, start, end, [0.5], quantity=slope, statistics="recomputed").values
    middle = norm_net()
    half = Risk(middle, CE, classes())
    with torch.no_grad():
        for name, block in half.parameters.unravel((start + end) / 2).items():
            half.parameters.tensors[name].copy_(block)
    with population_statistics(middle, classes()):
        losses = CE(middle(classes()[0]), classes()[1])
        losses.backward()
        flat = torch.cat([p.grad.flatten() for p in middle.parameters()])
    np.testing.assert_allclose(slopes, [flat.norm().item()], rtol=1e-10)


@pytest.mark.parametrize("statistics", ["kept", "recomputed"])
def test_everything_is_put_back_after_an_error(statistics):
    model = norm_net()
    model[0].weight.grad = torch.ones_like(model[0].weight)
    model[1].train()  # a mode of its own
    model[4].train()
    risk = Risk(model, CE, batches())
    before = state(model)
    start = risk.parameters.ravel()
    calls = []

    def fails(at):
        calls.append(at.parameters.ravel())
        if len(calls) == 3:
            msg = "as planned"
            raise RuntimeError(msg)
        return 0.0

    with pytest.raises(RuntimeError, match="as planned"):
        along_line(risk, start, 2 * start, ALPHAS, quantity=fails, statistics=statistics)
    torch.testing.assert_close(calls[2], 1.5 * start)
    assert unchanged(model, before)
    assert [m.training for m in model] == [False, True, False, False, True, False, False]
    assert torch.equal(model[0].weight.grad, torch.ones_like(model[0].weight))
    wrong = torch.ones(2, 9).double(), torch.zeros(2)
    context = population_statistics(model, wrong)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), context:
        pass
    assert unchanged(model, before)
    assert not model[1]._forward_pre_hooks


def test_a_part_of_the_parameters_moves():
    model, data = mlp(), classes()
    risk = Risk(model, CE, data, "2.*")
    zero = torch.zeros(risk.parameters.size, dtype=torch.float64)
    path = along_line(risk, zero, risk.parameters.ravel(), [0, 1])
    np.testing.assert_allclose(path.values, [np.log(3), risk_value(risk)], rtol=1e-12)


class Twice(nn.Module):
    """Applies one batch-norm layer twice."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x):
        return self.norm(2 * self.norm(x))


def test_errors_name_the_argument():
    risk, _, _ = quadratic()
    point = risk.parameters.ravel()
    cases = [
        ((point[:2], point, ALPHAS), {}, "start has shape"),
        ((point, point[None], ALPHAS), {}, "end has shape"),
        ((point, {"bias": point}, ALPHAS), {}, "bias"),
        ((point, point, []), {}, "alphas="),
        ((point, point, [0, np.nan]), {}, "alphas="),
        ((point, point, 0.5), {}, "alphas="),
        ((point, point, ALPHAS), {"statistics": "population"}, "statistics='population'"),
    ]
    for arguments, options, message in cases:
        with pytest.raises(ValueError, match=message):
            along_line(risk, *arguments, **options)
    for alphas, shown in (("a", "'a'"), ([0, "a"], r"\[0, 'a'\]"), (None, "None")):
        with pytest.raises(TypeError, match=f"alphas={shown} must be a real number or an array"):
            along_line(risk, point, point, alphas)
    with pytest.raises(TypeError, match="quantity=3 cannot be called; pass a function of a Risk"):
        along_line(risk, point, point, ALPHAS, quantity=3)
    train = Risk(norm_net().train(), CE, batches(), batch_statistics=True)
    flat = train.parameters.ravel()
    with pytest.raises(ValueError, match="batch_statistics=True"):
        along_line(train, flat, flat, ALPHAS, statistics="recomputed")


@pytest.mark.parametrize(
    ("model", "data", "message"),
    [
        (Twice(), (torch.ones(3, 4), torch.zeros(3)), "'norm' is applied more than once"),
        (nn.BatchNorm1d(4, track_running_stats=False), [], "no running statistics"),
        (nn.BatchNorm1d(4), [], "data is empty"),
        (nn.BatchNorm1d(4), [(torch.ones(0, 4), torch.ones(0))], "data is empty"),
    ],
)
def test_statistics_that_do_not_exist(model, data, message):
    with pytest.raises(ValueError, match=message), population_statistics(model, data):
        pass
    assert model.training
