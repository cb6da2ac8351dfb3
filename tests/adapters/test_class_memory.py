"""Class structure of 100 classes and a million parameters: one pass over the data, within 2 GB."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

PROGRAM = """
import json, resource
import numpy as np

rng = np.random.default_rng(0)
WIDTHS, EXAMPLES, BATCH = (600, 1500, 100), 2000, 250
inputs = rng.standard_normal((EXAMPLES, WIDTHS[0])).astype(np.float32)
labels = np.arange(EXAMPLES) % WIDTHS[2]
weights = [
    rng.standard_normal(shape).astype(np.float32) / shape[0] ** 0.5
    for shape in zip(WIDTHS, WIDTHS[1:])
]
passes = 0

class Data:
    def __init__(self, make):
        self.make = make

    def __iter__(self):
        global passes
        passes += 1
        for start in range(0, EXAMPLES, BATCH):
            rows = slice(start, start + BATCH)
            yield self.make(inputs[rows]), self.make(labels[rows])

{library}

structure = ClassStructure(risk)
shares = structure.class_weights  # the first use checks and counts
before = passes
means = np.asarray(structure.class_means)
once = passes - before
values = structure.eigenvalues("class")
basis = structure.principal_subspace(99)
gigabytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
gram = means.T @ means * np.sqrt(np.outer(shares, shares))
product = np.asarray(structure.G_class @ structure.class_means[:, 0])
result = {{
    "parameters": means.shape[0],
    "classes": means.shape[1],
    "passes": once,
    "directions": basis.shape[1],
    "gigabytes": gigabytes,
    "apart": float(np.abs(np.linalg.eigvalsh(gram)[-1] / values.max() - 1)),
    "product": float(np.linalg.norm(product)),
    "expected": float(np.linalg.norm(means @ (shares * (means.T @ means[:, 0])))),
}}
print(json.dumps(result))
"""
LIBRARIES = {
    "torch": """
import torch
from specdens_torch import ClassStructure, Risk

model = torch.nn.Sequential(
    torch.nn.Linear(WIDTHS[0], WIDTHS[1], bias=False),
    torch.nn.ReLU(),
    torch.nn.Linear(WIDTHS[1], WIDTHS[2], bias=False),
)
for layer, weight in zip((model[0], model[2]), weights):
    layer.weight.data = torch.from_numpy(weight.T.copy())
risk = Risk(model, torch.nn.CrossEntropyLoss(), Data(torch.from_numpy))
""",
    "jax": """
import jax
from specdens_jax import ClassStructure, CrossEntropy, Risk

def predict(weights, inputs):
    return jax.nn.relu(inputs @ weights[0]) @ weights[1]

asarray = jax.numpy.asarray
risk = Risk(predict, CrossEntropy(), [asarray(w) for w in weights], Data(asarray))
""",
}


@pytest.mark.slow
@pytest.mark.parametrize("library", LIBRARIES)
def test_means_of_a_hundred_classes_take_one_pass_and_two_gigabytes(library):
    pytest.importorskip(library, reason=f"{library} is not installed")
    program = PROGRAM.format(library=LIBRARIES[library])
    paths = map(str, (ROOT, ROOT / "adapters", os.environ.get("PYTHONPATH", "")))
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    command = [sys.executable, "-c", program]
    run = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert (found["parameters"], found["classes"]) == (1_050_000, 100)
    assert (found["passes"], found["directions"]) == (1, 99)
    assert found["gigabytes"] < 2
    assert found["apart"] < 1e-4
    assert found["product"] == pytest.approx(found["expected"], rel=1e-4)  # sums of 10^6 float32
