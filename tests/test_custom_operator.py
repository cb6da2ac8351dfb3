"""The example of operators of one's own: products against dense matrices, numbers against truth."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

from specdens.testing import check_operator

pytest.importorskip("sklearn", reason="scikit-learn, which has the digits, is not installed")


@pytest.fixture(scope="module")
def example():
    path = Path(__file__).parents[1] / "examples" / "custom_operator.py"
    spec = importlib.util.spec_from_file_location("custom_operator_example", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for annotations
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def test_graph_laplacian(example):
    rng = np.random.default_rng(1)
    neighbors = np.stack([rng.permutation(np.delete(np.arange(20), i))[:3] for i in range(20)])
    adjacency = np.zeros((20, 20))
    for i, row in enumerate(neighbors):
        for j in row:
            adjacency[i, j] += 1
            adjacency[j, i] += 1
    operator = example.GraphLaplacian(neighbors)
    check_operator(operator)
    laplacian = np.diag(adjacency.sum(axis=1)) - adjacency
    np.testing.assert_allclose(operator @ np.eye(20), laplacian, atol=1e-14)
    assert np.trace(laplacian) == 2 * neighbors.size


def test_blur(example):
    rng = np.random.default_rng(2)
    kernel = rng.standard_normal((4, 6))
    kernel = kernel + np.roll(kernel[::-1, ::-1], (1, 1), axis=(0, 1))  # even, on the torus
    shifts = [np.roll(kernel, (i, j), axis=(0, 1)).reshape(-1) for i in range(4) for j in range(6)]
    operator = example.Blur(kernel)
    check_operator(operator)
    np.testing.assert_allclose(operator @ np.eye(24), np.stack(shifts, axis=1), atol=1e-13)
    values = np.linalg.eigvalsh(np.stack(shifts, axis=1))
    np.testing.assert_allclose(np.sort(operator.transfer.reshape(-1)), values, atol=1e-13)


def test_numbers_next_to_the_truth(example, capsys):
    results = example.main(["--quick"])
    printed = capsys.readouterr().out
    assert "Laplacian of the graph of 500 digits" in printed
    assert "Periodic blur of an image of 32 x 32 pixels" in printed

    study, blur = example.blur_study(32), results["blur"]
    low, high = blur["interval"]
    assert low <= study.eigenvalues.min()
    assert high >= study.eigenvalues.max()
    largest = np.sort(study.eigenvalues)[::-1][:6]
    np.testing.assert_allclose(np.sort(blur["pairs"].eigenvalues)[::-1], largest, atol=1e-7)
    for measure in blur["measures"].values():
        mean = measure.moment(1)
        assert abs(mean.value - study.eigenvalues.mean()) <= 4 * mean.stderr
    transform = np.fft.fft2(study.vector.reshape(32, 32)) * study.function(study.operator.transfer)
    sharpened = np.fft.ifft2(transform).real.reshape(-1)
    np.testing.assert_allclose(blur["filtered"], sharpened, rtol=0, atol=1e-5)

    graph = example.graph_study(500)
    laplacian = graph.operator @ np.eye(500)
    values, vectors = np.linalg.eigh(laplacian)
    np.testing.assert_allclose(
        np.sort(results["graph"]["pairs"].eigenvalues), values[:6], rtol=0, atol=1e-5
    )
    heat = vectors @ (graph.function(values) * (vectors.T @ graph.vector))
    np.testing.assert_allclose(results["graph"]["filtered"], heat, rtol=0, atol=1e-8)
    truths = {
        "graph": {
            "trace": values.sum(),
            "trace of f": graph.function(values).sum(),
            "log-determinant of A + I": np.log1p(values).sum(),
        },
        "blur": blur["exact"],
    }
    for name, exact in truths.items():
        for quantity in ("trace", "trace of f", "log-determinant of A + I"):
            estimate = results[name]["found"][quantity]
            error = abs(float(estimate.value) - exact[quantity])
            assert error <= 4 * float(estimate.stderr) + 1e-6 * abs(exact[quantity]), quantity
