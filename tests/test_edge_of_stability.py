"""The example of gradient descent at the edge of stability, against SciPy's eigensolver."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy.sparse.linalg import LinearOperator, eigsh

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
pytest.importorskip("sklearn", reason="scikit-learn, which has the digits, is not installed")


@pytest.fixture(scope="module")
def example():
    path = Path(__file__).parents[1] / "examples" / "edge_of_stability.py"
    spec = importlib.util.spec_from_file_location("edge_of_stability_example", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for annotations
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def top_of_hessian(example, model):
    """Return the largest eigenvalues and eigenvectors in double precision, without specdens."""
    model = model.double()
    images, targets = (x.double() for x in example.digits())
    parameters = list(model.parameters())
    loss = ((model(images) - targets) ** 2).sum() / (2 * len(images))
    slopes = torch.autograd.grad(loss, parameters, create_graph=True)
    slope = torch.cat([g.reshape(-1) for g in slopes])

    def product(x):
        x = torch.from_numpy(np.ascontiguousarray(x)).reshape(-1)
        parts = torch.autograd.grad(slope @ x, parameters, retain_graph=True)
        return torch.cat([g.reshape(-1) for g in parts]).numpy()

    n = len(slope)
    matrix = LinearOperator((n, n), matvec=product, dtype=np.float64)
    values, vectors = eigsh(matrix, k=example.NUM_CLASSES, which="LA", tol=1e-8)
    return values[::-1], vectors, slope.detach().numpy()


@pytest.fixture(scope="module")
def results(example, tmp_path_factory):
    folder = tmp_path_factory.mktemp("edge")
    found = example.main(["--quick", "--steps", "900", "--output", str(folder / "edge.png")])
    return found | {"folder": folder}


def test_sharpness_comes_to_the_edge_and_stays(results, example):
    (run,) = results["runs"]
    assert results["verdicts"] == dict.fromkeys(results["verdicts"], True)
    assert len(results["verdicts"]) == 3
    arrays = run.history.arrays()
    np.testing.assert_allclose(arrays["edge"], 10)
    assert arrays["ratio"][0] > 1.3  # it has come from elsewhere
    assert arrays["converged"].all()
    assert run.losses[-1] < run.losses[0] / 20
    assert results["too_fast"].diverged


def test_the_last_record_agrees_with_scipy(example):
    run = example.descend(0.2, 600, 600, seed=1)
    assert [record.step for record in run.history] == [0, 600]
    values, _, _ = top_of_hessian(example, run.model)
    assert values[0] < 0.8 * run.history[0].sharpness  # training has changed them
    np.testing.assert_allclose(run.history[-1].eigenvalues, values, rtol=1e-4)


def test_energy_and_gradient_agree_with_scipy(example):
    record = example.descend(0.2, 0, 1, seed=2).history[0]
    values, vectors, slope = top_of_hessian(example, example.network(2))
    np.testing.assert_allclose(record.sharpness, values[0], rtol=1e-5)
    np.testing.assert_allclose(record.gradient_norm, np.linalg.norm(slope), rtol=1e-5)
    share = np.sum((vectors.T @ slope) ** 2) / np.sum(slope**2)
    np.testing.assert_allclose(record.energy, share, atol=1e-3)


def test_a_claim_that_fails_is_said_to(results, example, capsys):
    (run,) = results["runs"]
    stable = example.descend(0.01, 700, 350, seed=0)  # far below its edge all the time
    found = example.verdicts([stable], run)
    assert found == dict.fromkeys(found, False)
    assert capsys.readouterr().out.count("FAIL") == 3


def test_figure_and_history_are_written(results):
    folder = results["folder"]
    assert (folder / "edge.png").stat().st_size > 10_000
    (run,) = results["runs"]
    again = type(run.history).load(folder / "edge_0.2.json")
    np.testing.assert_array_equal(
        again.arrays()["eigenvalues"], run.history.arrays()["eigenvalues"]
    )
