"""Spectra followed during training: against dense Hessians, simulated optimizers and files."""

from __future__ import annotations

import copy
import io
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from specdens import aslinearoperator
from specdens_torch import Hessian, Risk, tracking
from specdens_torch.history import SpectrumHistory, SpectrumRecord
from specdens_torch.tracking import SpectrumTracker, stability_edge
from tests.adapters.torch_cases import classes, dense, mlp

NUM = 4


def training(rate: float = 0.3) -> tuple[nn.Module, SpectrumTracker, torch.optim.SGD]:
    model = mlp()
    hessian = Hessian(model, nn.CrossEntropyLoss(), classes())
    tracker = SpectrumTracker(hessian, num_eigenvalues=NUM, every=5, tol=1e-9)
    return model, tracker, torch.optim.SGD(model.parameters(), lr=rate)


def train(
    model: nn.Module, tracker: SpectrumTracker, optimizer: torch.optim.SGD, steps: range
) -> list[tuple[Tensor, Tensor]]:
    """Train and track; return the dense Hessian and gradient at every record."""
    inputs, labels = classes()
    found = []
    for step in steps:
        if tracker.update(step, optimizer) is not None:
            loss = functional.cross_entropy
            both = (dense(model, loss, inputs, labels, order=order) for order in (2, 1))
            found.append(tuple(both))
        optimizer.zero_grad()
        functional.cross_entropy(model(inputs), labels).backward()
        optimizer.step()
    return found


def test_records_are_those_of_the_dense_hessian() -> None:
    model, tracker, optimizer = training()
    truths = train(model, tracker, optimizer, range(16))
    history = tracker.history
    assert [record.step for record in history] == [0, 5, 10, 15]
    last = None
    for record, (matrix, slope) in zip(history, truths, strict=True):
        values, vectors = np.linalg.eigh(matrix.numpy())
        top, g = vectors[:, -NUM:], slope.numpy()
        np.testing.assert_allclose(record.eigenvalues, values[: -NUM - 1 : -1], rtol=1e-7)
        assert record.converged.all()
        assert (record.residuals <= 1e-9 * np.abs(values).max()).all()
        np.testing.assert_allclose(record.gradient_norm, np.linalg.norm(g), rtol=1e-10)
        share = np.sum((top.T @ g) ** 2) / np.sum(g**2)
        np.testing.assert_allclose(record.energy, share, rtol=1e-6)
        if last is None:
            assert math.isnan(record.overlap)
        else:
            overlap = np.sum((last.T @ top) ** 2) / NUM
            assert overlap < 0.9999  # the eigenspace does move
            np.testing.assert_allclose(record.overlap, overlap, rtol=1e-6)
        assert record.edge == pytest.approx(2 / 0.3)
        np.testing.assert_allclose(record.ratio, values[-1] * 0.15, rtol=1e-7)
        last = top
    assert tracker.eigenvectors is not None
    assert last is not None
    aligned = np.abs(np.sum(tracker.eigenvectors.numpy() * last[:, ::-1], axis=0))
    np.testing.assert_allclose(aligned, 1, atol=1e-6)  # largest first


def test_products_are_counted_bounded_and_saved_by_the_last_eigenvectors() -> None:
    matrix = torch.diag(torch.linspace(0, 1, 300, dtype=torch.float64) ** 4)
    matrix[0, 0] = 3.0

    class Counted:
        space = aslinearoperator(matrix).space
        columns = 0

        def __matmul__(self, x: Tensor) -> Tensor:
            self.columns += 1 if x.ndim == 1 else x.shape[1]
            return matrix @ x

    counted = Counted()
    tracker = SpectrumTracker(counted, num_eigenvalues=3, tol=1e-8, max_products=12)
    first = tracker.measure(0)
    assert first.num_products == counted.columns == 12
    assert not first.converged.all()  # what the budget did not suffice for says so
    for step in range(1, 25):  # and is taken up again
        counted.columns = 0
        record = tracker.measure(step)
        assert record.num_products == counted.columns <= 12
    exact = np.sort(torch.diagonal(matrix).numpy())[::-1][:3]
    np.testing.assert_allclose(record.eigenvalues, exact, atol=1e-3)
    assert (record.residuals < first.residuals).all()
    assert math.isnan(record.gradient_norm)  # a matrix without a risk has no gradient
    assert math.isnan(record.energy)
    assert math.isnan(record.edge)
    assert "not converged" in repr(tracker.history)


def test_training_is_not_disturbed() -> None:
    followed, tracker, optimizer = training()
    alone, _, other = training()
    torch.manual_seed(4)
    inputs, labels = classes()
    draws = []
    for model, opt, is_followed in ((followed, optimizer, True), (alone, other, False)):
        torch.manual_seed(4)
        for step in range(11):
            opt.zero_grad()
            noisy = inputs + 0.1 * torch.randn_like(inputs)
            functional.cross_entropy(model(noisy), labels).backward()
            if is_followed:
                tracker.update(step, opt)  # between backward and step: .grad must survive
            opt.step()
        draws.append(torch.rand(3))
    assert len(tracker.history) == 3
    assert torch.equal(draws[0], draws[1])
    for mine, its in zip(followed.parameters(), alone.parameters(), strict=True):
        assert torch.equal(mine, its)
        assert torch.equal(mine.grad, its.grad)


def test_an_interrupted_run_continues_with_the_same_numbers() -> None:
    whole_model, whole, whole_optimizer = training()
    train(whole_model, whole, whole_optimizer, range(20))

    model, tracker, optimizer = training()
    train(model, tracker, optimizer, range(12))
    file = io.BytesIO()
    torch.save([x.state_dict() for x in (model, optimizer, tracker)], file)
    file.seek(0)
    states = torch.load(file, weights_only=True)
    model, tracker, optimizer = training()
    for x, state in zip((model, optimizer, tracker), states, strict=True):
        x.load_state_dict(state)
    train(model, tracker, optimizer, range(12, 20))
    for name, values in whole.history.arrays().items():
        if name != "seconds":
            np.testing.assert_array_equal(tracker.history.arrays()[name], values)


def test_a_state_may_go_without_eigenvectors() -> None:
    model, tracker, optimizer = training()
    train(model, tracker, optimizer, range(6))
    state = tracker.state_dict(eigenvectors=False)
    assert state["eigenvectors"] is None
    _, other, _ = training()
    other.load_state_dict(state)
    assert other.update(9, 0.3) is None  # five steps after the last record, not before
    record = other.update(10, 0.3)
    assert record is not None
    assert math.isnan(record.overlap)
    with pytest.raises(ValueError, match=r"state holds eigenvectors of shape \(7, 2\)"):
        other.load_state_dict(state | {"eigenvectors": torch.ones(7, 2)})
    with pytest.raises(ValueError, match="state is not what SpectrumTracker"):
        other.load_state_dict({"records": [{"step": 1}], "eigenvectors": None})


def test_zero_gradient_and_schedules() -> None:
    inputs = torch.eye(3, dtype=torch.float64) * torch.tensor([1.0, 2.0, 3.0]).double()
    model = nn.Linear(3, 1, bias=False).double()
    nn.init.zeros_(model.weight)
    risk = Risk(model, nn.MSELoss(), (inputs, torch.zeros(3, 1, dtype=torch.float64)))
    tracker = SpectrumTracker(Hessian(risk), num_eigenvalues=2, every=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.5)
    for step in range(3):
        tracker.update(step, optimizer)
        optimizer.step()
        schedule.step()
    arrays = tracker.history.arrays()
    np.testing.assert_allclose(arrays["eigenvalues"], 3 * [[6, 8 / 3]], rtol=1e-12)
    np.testing.assert_array_equal(arrays["edge"], [4, 8, 16])
    np.testing.assert_array_equal(arrays["gradient_norm"], 0)
    assert np.isnan(arrays["energy"]).all()
    assert "energy" not in repr(tracker.history[0])


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"momentum": 0.9},
        {"momentum": 0.9, "nesterov": True},
        {"momentum": 0.6, "dampening": 0.3},
        {"dampening": 0.5},
        {"weight_decay": 0.7},
        {"momentum": 0.8, "weight_decay": 0.7, "nesterov": True},
    ],
)
def test_the_edge_is_where_the_optimizer_becomes_unstable(settings) -> None:
    def final(factor: float) -> float:
        weight = nn.Parameter(torch.ones(1, dtype=torch.float64))
        optimizer = torch.optim.SGD([weight], lr=0.1, **settings)
        curvature = factor * stability_edge(optimizer)
        for _ in range(2000):
            optimizer.zero_grad()
            (0.5 * curvature * weight**2).sum().backward()
            optimizer.step()
            if abs(weight.item()) > 1e4:  # far from its start: it will not come back
                break
        return abs(weight.item())

    assert final(0.98) < 1e-3
    assert final(1.02) > 1e4


def test_overhead_is_bounded(monkeypatch) -> None:
    """Measurements that cost 1 s between steps of 0.1 s: a tenth of the time is every 100 steps."""
    clock = [0.0]
    monkeypatch.setattr(tracking.time, "perf_counter", lambda: clock[0])
    matrix = torch.diag(torch.tensor([3.0, 1.0, 2.0]))

    class Slow:
        space = aslinearoperator(matrix).space

        def __matmul__(self, x: Tensor) -> Tensor:
            clock[0] += 1 / 3
            return matrix @ x

    steps = {}
    for bound in (None, 0.1):
        clock[0] = 0.0
        tracker = SpectrumTracker(Slow(), num_eigenvalues=1, every=10, max_overhead=bound)
        for step in range(401):
            tracker.update(step)
            clock[0] += 0.1
        steps[bound] = [record.step for record in tracker.history]
        seconds = tracker.history.arrays()["seconds"]
        np.testing.assert_allclose(seconds, tracker.history.arrays()["num_products"] / 3)
    assert steps[None] == list(range(0, 401, 10))
    assert 3 <= len(steps[0.1]) <= 5
    training, tracked = 0.1 * np.array(steps[0.1][1:]), np.cumsum(seconds)[:-1]
    assert (tracked <= 0.1 * training + 1e-9).all()


def test_learning_rates_without_one_edge_are_refused() -> None:
    first, second = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    assert stability_edge(0.0) == math.inf
    for rate in (-0.1, math.nan, math.inf):
        with pytest.raises(ValueError, match="must be a finite number from 0 up"):
            stability_edge(rate)
    groups = [{"params": [first], "lr": 0.1}, {"params": [second], "lr": 0.2}]
    with pytest.raises(ValueError, match=r"different edges \[10.0, 20.0\]"):
        stability_edge(torch.optim.SGD(groups, lr=0.1))
    with pytest.raises(TypeError, match=r"learning_rate has type Adam"):
        stability_edge(torch.optim.Adam([first]))


def test_arguments_and_steps_are_checked() -> None:
    _, tracker, _ = training()
    with pytest.raises(ValueError, match="every=0 must be at least 1"):
        SpectrumTracker(tracker.operator, every=0)
    with pytest.raises(TypeError, match=r"num_eigenvalues=2.0 must be an integer"):
        SpectrumTracker(tracker.operator, num_eigenvalues=2.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"max_overhead=0 must be positive"):
        SpectrumTracker(tracker.operator, max_overhead=0)
    with pytest.raises(TypeError, match="operator has vectors of numpy"):
        SpectrumTracker(aslinearoperator(np.eye(3)))
    with pytest.raises(TypeError, match="operator has type Linear"):
        SpectrumTracker(nn.Linear(2, 2))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="step='last' must be an integer"):
        tracker.measure("last")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="learning_rate='fast' must be a real number"):
        stability_edge("fast")  # type: ignore[arg-type]
    tracker.measure(3)
    with pytest.raises(ValueError, match="step=3 must lie beyond the last record, step 3"):
        tracker.measure(3)


def test_divergence_is_an_error_and_the_history_stays() -> None:
    model, tracker, _ = training()
    tracker.measure(0)
    before = tracker.eigenvectors
    with torch.no_grad():
        model[0].weight.fill_(math.nan)
    with pytest.raises(ValueError, match="not finite"):
        tracker.measure(1)
    assert len(tracker.history) == 1
    assert tracker.eigenvectors is before


def record_of(step: int, values: list[float]) -> SpectrumRecord:
    eigenvalues = np.array(values)
    done = eigenvalues > 0.2
    return SpectrumRecord(
        step, eigenvalues, eigenvalues / 7, done, math.inf, 0.1, math.nan, 1 / 3, 9, 0.01
    )


def test_histories_as_arrays_and_files(tmp_path: Path) -> None:
    history = SpectrumHistory([record_of(2, [0.5]), record_of(4, [0.3, 0.1])])
    arrays = history.arrays()
    np.testing.assert_array_equal(arrays["eigenvalues"], [[0.5, np.nan], [0.3, 0.1]])
    np.testing.assert_array_equal(arrays["converged"], [[True, False], [True, False]])
    np.testing.assert_array_equal(arrays["sharpness"], [0.5, 0.3])
    assert arrays["step"].dtype.kind == arrays["num_products"].dtype.kind == "i"
    path = tmp_path / "history.json"
    history.save(path)
    again = SpectrumHistory.load(path)
    for name, values in arrays.items():
        np.testing.assert_array_equal(again.arrays()[name], values)
    assert again.arrays()["converged"].dtype == bool
    assert [p.name for p in tmp_path.iterdir()] == ["history.json"]
    np.savez(tmp_path / "history.npz", **arrays)
    with np.load(tmp_path / "history.npz") as file:
        np.testing.assert_array_equal(file["ratio"], arrays["ratio"])
    assert (
        repr(history[1:]) == "SpectrumHistory(1 record, step 4, 9 products, 1 pair not converged)"
    )
    assert repr(SpectrumHistory()) == "SpectrumHistory(no records)"
    assert SpectrumHistory().arrays()["eigenvalues"].shape == (0, 0)
    text = path.read_text()
    for damaged in (text[:-9], "[1, 2]", text.replace('"step"', '"stop"')):
        path.write_text(damaged)
        with pytest.raises(ValueError, match="damaged or not a spectrum history"):
            SpectrumHistory.load(path)
    path.write_text(text.replace('version": 1', 'version": 2'))
    with pytest.raises(FileNotFoundError, match=r"gone\.json.: there is no such file"):
        SpectrumHistory.load(path.with_name("gone.json"))
    with pytest.raises(TypeError, match="path=3 must be the path of a file"):
        SpectrumHistory.load(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="of format 2; expected"):
        SpectrumHistory.load(path)
    with pytest.raises(ValueError, match="step 2 comes after step 2"):
        SpectrumHistory([history[0], copy.copy(history[0])])
