"""The examples that study batch norm and trajectories of spectra, against SciPy and PyTorch."""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.sparse.linalg import LinearOperator, eigsh

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
pytest.importorskip("sklearn", reason="scikit-learn, which has the digits, is not installed")

pytestmark = pytest.mark.slow  # CI runs both scripts, which check their own claims


def load(name):
    path = Path(__file__).parents[1] / "examples" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"{name}_example", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for annotations
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def norms(tmp_path_factory):
    module, folder = load("batch_norm_study"), tmp_path_factory.mktemp("norms")
    yield module, module.main(["--quick", "--output", str(folder / "norms.png")]), folder
    del sys.modules[module.__name__]


@pytest.fixture(scope="module")
def trajectories(tmp_path_factory):
    module, folder = load("spectrum_trajectories"), tmp_path_factory.mktemp("paths")
    yield module, module.main(["--quick", "--output", str(folder / "paths.png")]), folder
    del sys.modules[module.__name__]


def largest(model, images, labels, number):
    """Return the top eigenvalues and the gradient's energy there, with autograd and SciPy alone."""
    parameters = list(model.parameters())
    loss = torch.nn.functional.cross_entropy(model(images), labels)
    slopes = torch.autograd.grad(loss, parameters, create_graph=True)
    slope = torch.cat([g.reshape(-1) for g in slopes])

    def product(x):
        x = torch.from_numpy(np.ascontiguousarray(x)).reshape(-1)
        parts = torch.autograd.grad(slope @ x, parameters, retain_graph=True)
        return torch.cat([g.reshape(-1) for g in parts]).numpy()

    n = len(slope)
    matrix = LinearOperator((n, n), matvec=product, dtype=np.float64)
    values, vectors = eigsh(matrix, k=number, which="LA", tol=1e-8)
    g = slope.detach().numpy()
    return values[::-1], np.sum((vectors.T @ g) ** 2) / np.sum(g**2), loss.item()


def test_batch_norm_claims_hold_and_are_written(norms):
    _, found, folder = norms
    assert found["verdicts"] == dict.fromkeys(found["verdicts"], True)
    assert len(found["verdicts"]) == 9
    assert (folder / "norms.png").stat().st_size > 10_000
    rows = json.loads((folder / "norms.json").read_text(encoding="utf-8"))["records"]
    assert [row["energy"] for row in rows] == [r.energy for r in found["records"]]
    assert {(row["kind"], row["epoch"]) for row in rows} == {
        (kind, epoch) for kind in ("plain", "batch", "population") for epoch in (0, 3)
    }


@pytest.mark.parametrize("kind", ["plain", "batch", "population"])
def test_records_of_batch_norm_agree_with_scipy(norms, kind):
    module, found, _ = norms
    (record,) = (r for r in found["records"] if (r.kind, r.epoch) == (kind, 0))
    model = module.network(kind != "plain", seed=0)  # a new one, in train mode
    images, labels = module.digits()
    if kind == "population":  # one batch is all data: its statistics are the population's
        for layer in model:
            if isinstance(layer, torch.nn.BatchNorm1d):
                layer.momentum = 1.0
        with torch.no_grad():
            model(images)
        for layer in model:
            if isinstance(layer, torch.nn.BatchNorm1d):
                layer.running_var *= 599 / 600  # torch divides by N - 1
        model.eval()
    values, energy, risk = largest(model, images, labels, 10)
    np.testing.assert_allclose(record.eigenvalues, values, rtol=1e-6)
    np.testing.assert_allclose(record.energy, energy, atol=1e-4)
    np.testing.assert_allclose(record.risk, risk, rtol=1e-12)


def test_a_claim_about_batch_norm_that_fails_is_said_to(norms, capsys):
    module, found, _ = norms
    swap = {"batch": "population", "population": "batch", "plain": "plain"}
    records = [replace(r, kind=swap[r.kind]) for r in found["records"]]
    verdicts = module.verdicts(records)
    assert not verdicts["G5 lam1, population / batch, least over epochs"]
    assert capsys.readouterr().out.count("FAIL") == sum(not holds for holds in verdicts.values())


def test_claims_about_trajectories_hold_and_are_written(trajectories):
    _, found, folder = trajectories
    assert found["verdicts"] == dict.fromkeys(found["verdicts"], True)
    assert len(found["verdicts"]) == 10
    for name in ("epochs", "samples", "basin"):
        assert (folder / f"paths_{name}.png").stat().st_size > 10_000
    content = json.loads((folder / "paths.json").read_text(encoding="utf-8"))
    assert content["basin"]["loss"]["values"] == found["basin"].loss.values.tolist()
    assert [row["step"] for row in content["epochs"]] == [0, 1, 2, 5, 12]
    assert [row["num_examples"] for row in content["samples"]] == [50, 900, 1797]


def test_records_of_epochs_and_samples_agree_with_scipy(trajectories):
    module, found, _ = trajectories
    model = module.network(0)
    module.finish(module.sgd(model, 2, 64, 0.05, 0, momentum=0.9))
    values, energy, _ = largest(model, *module.digits(), 12)
    record = found["history"][2]
    assert np.all(np.abs(record.eigenvalues - values) <= record.residuals + 1e-8)
    np.testing.assert_allclose(record.eigenvalues, values, rtol=2e-3)
    np.testing.assert_allclose(record.energy, energy, atol=1e-2)
    values = largest(model, *module.digits(50), 12)[0]
    np.testing.assert_allclose(found["samples"][0].pairs.eigenvalues[::-1], values, rtol=1e-4)


def test_a_claim_about_trajectories_that_fails_is_said_to(trajectories, capsys):
    module, found, _ = trajectories
    between = found["basin"]
    swapped = replace(between, loss=between.control, control=between.loss)
    verdicts = module.verdicts(found["history"], found["samples"], swapped)
    assert [name for name, holds in verdicts.items() if not holds] == [
        "barrier between large and small batch",
        "barrier to other initial weights",
    ]
    assert capsys.readouterr().out.count("FAIL") == 2


def test_the_gap_of_eigenvalues(trajectories):
    module = trajectories[0]
    place, ratio = module.gap(np.array([9.0, 8.0, 2.0, 1.5]))
    assert (place, ratio) == (2, 4.0)
