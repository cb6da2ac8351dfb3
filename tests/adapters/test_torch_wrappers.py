"""Models that are wrapped, hooked, compiled or parametrized: exact, or refused with a way out."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint

from specdens_torch import Hessian, Risk, gradient, risk_value
from tests.adapters.test_torch_layers import (
    CE,
    DATA,
    LABELS,
    Function,
    assert_exact,
    built,
    headed,
    normal,
    parametrized,
    per_example,
    references,
    tokens,
)
from tests.adapters.torch_cases import classes, dense, mlp
from tests.adapters.torch_dense import all_matrices, assert_matrices


class Caching(nn.Module):
    """A module that keeps its last output, and uses it for a second number."""

    def __init__(self):
        super().__init__()
        self.body, self.output = mlp(), None

    def forward(self, x):
        self.output = self.body(x)
        return self.output + 0.1 * self.output.square()


class WeightNormed(nn.Module):
    """Weight norm by its definition, parameters in the order of `order`."""

    def __init__(self, bias, g, v, last):
        super().__init__()
        self.bias, self.g, self.v, self.last = bias, g, v, last

    def forward(self, x):
        weight = self.g * self.v / self.v.square().sum(1, keepdim=True).sqrt()
        return self.last(torch.tanh(x @ weight.T + self.bias))


@pytest.mark.parametrize("budget", [2**30, 1])
def test_weight_norm(budget):
    # torch's own second derivative of it is wrong, see torch.autograd.gradgradcheck.
    model = built(lambda: parametrized(parametrizations.weight_norm))
    weight = model[0].parametrizations.weight
    assert "0.parametrizations.weight.original0" in Hessian(model, CE, DATA).parameters.names
    twin = WeightNormed(model[0].bias, weight.original0, weight.original1, model[2])
    assert_exact(model, normal(4), twin, memory_budget=budget)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")
def test_old_weight_norm():
    model = built(lambda: parametrized(nn.utils.weight_norm))
    before = dict(vars(model[0]))
    twin = WeightNormed(model[0].bias, model[0].weight_g, model[0].weight_v, model[2])
    assert_exact(model, normal(4), twin)
    assert vars(model[0]) == before


def test_weights_that_are_cached_are_refused():
    model = built(lambda: parametrized(parametrizations.spectral_norm))
    hessian = Hessian(model, CE, DATA)
    x = torch.ones(hessian.space.dimension, dtype=torch.float64)
    before = hessian @ x
    with parametrize.cached(), pytest.raises(ValueError, match=r"cached\(\) is active"):
        gradient(hessian.risk)
    assert torch.equal(hessian @ x, before)


def test_recurrent_layers_do_without_cudnn():
    # Its layers cannot be differentiated twice; convolutions may use it.
    seen = []

    def read(self, x):
        seen.append(torch.backends.cudnn.enabled)
        return self.body(x)

    before = torch.backends.cudnn.enabled
    parts = {"body": mlp(), "unused": nn.GRU(2, 2).double()}
    gradient(Risk(Function(read, **parts), CE, DATA))
    assert seen
    assert not any(seen)
    assert torch.backends.cudnn.enabled == before
    seen.clear()
    gradient(Risk(Function(read, body=mlp()), CE, DATA))
    assert all(enabled == before for enabled in seen)


def test_sparse_gradients():
    model = built(lambda: headed(nn.Embedding(5, 2, sparse=True), nn.Tanh(), features=6))
    twin = built(lambda: headed(nn.Embedding(5, 2), nn.Tanh(), features=6))
    assert_exact(model, tokens(3), twin)


def test_a_frozen_bag_of_embeddings():
    model = built(lambda: nn.Sequential(nn.EmbeddingBag(5, 2), nn.Linear(2, 3)))
    expected = references(model, tokens(3), ["1.weight", "1.bias"])
    assert_matrices(Risk(model, CE, (tokens(3), LABELS), model[1]), expected)


def test_a_module_that_keeps_its_output():
    model = Caching()
    assert_exact(model, normal(4))
    model.output = kept = torch.zeros(1)
    Hessian(model, CE, DATA) @ torch.ones(43, dtype=torch.float64)
    assert model.output is kept


REFUSED = {
    "spectral norm": (
        lambda: parametrized(parametrizations.spectral_norm).train(),
        r"'0\.parametrizations\.weight\.0' .* model\.eval\(\)",
    ),
    "scripted": (lambda: torch.jit.script(mlp()), "pass the module that it was made from"),
    "scripted part": (
        lambda: nn.Sequential(torch.jit.script(nn.Linear(4, 3))),
        r"module '0' \(RecursiveScriptModule\)",
    ),
    "data parallel": (lambda: nn.DataParallel(mlp()), r"pass model\.module"),
    "transformer": (lambda: nn.Sequential(nn.Transformer(2, 2, 1, 1, 2)), r"dropout=0\.1"),
    "gru": (lambda: nn.Sequential(nn.GRU(2, 2, 2, dropout=0.1)), r"dropout=0\.1"),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated", "ignore:enable_nested_tensor")
def test_modules_that_are_refused(name):
    make, words = REFUSED[name]
    with pytest.raises(ValueError, match=words):
        risk_value(Risk(built(make), CE, DATA))


def test_bags_of_embeddings_are_refused():
    model = built(lambda: nn.Sequential(nn.EmbeddingBag(5, 2), nn.Linear(2, 3)))
    with pytest.raises(ValueError, match=r"module '0' \(EmbeddingBag\) has no second derivative"):
        risk_value(Risk(model, CE, (tokens(3), LABELS)))


@pytest.mark.filterwarnings("ignore:.*spectral_norm.*is deprecated:FutureWarning")
def test_old_spectral_norm():
    model = built(lambda: parametrized(nn.utils.spectral_norm))
    assert_exact(model, normal(4))
    with pytest.raises(ValueError, match="spectral norm in every forward pass"):
        risk_value(Risk(model.train(), CE, DATA))


@pytest.mark.parametrize("selected", [None, ["first.*", "head.*"]])
def test_reentrant_checkpoints_say_what_to_do(selected):
    # Where torch itself does not object, it takes the gradient of what is hidden for zero.
    def read(self, x):
        hidden = checkpoint(self.first, self.before(x) + self.zero, use_reentrant=True)
        return self.head(torch.tanh(hidden))

    parts = {name: nn.Linear(4, 4) for name in ("before", "first", "head")}
    model = Function(read, **parts).double()
    model.zero = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    with pytest.raises(ValueError, match="use_reentrant=False"):
        gradient(Risk(model, CE, DATA, selected))


@pytest.mark.parametrize("whole", [True, False])
def test_compiled_models_are_differentiated_as_they_were_before(whole):
    model, calls = Function(lambda self, x: self.body(x), body=mlp()), []

    def backend(graph, example_inputs):
        return lambda *args: calls.append(1) or graph(*args)

    compiled = torch.compile(model, backend=backend) if whole else model
    if not whole:
        model.compile(backend=backend)
    compiled(DATA[0])
    assert calls
    calls.clear()
    hessian = Hessian(compiled, CE, DATA)
    actual = hessian @ torch.eye(43, dtype=torch.float64)
    torch.testing.assert_close(actual, dense(mlp(), CE, *DATA), rtol=1e-10, atol=1e-12)
    assert not calls
    compiled(DATA[0])
    assert calls
    torch._dynamo.reset()


class HalfBody(nn.Module):
    """A body in bfloat16 and a head in float32."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 3), nn.Tanh()).to(torch.bfloat16)
        self.head = nn.Linear(3, 3)

    def forward(self, x):
        return self.head(self.body(x.to(torch.bfloat16)).float())


def test_a_head_in_float32_on_a_body_in_bfloat16():
    torch.manual_seed(3)
    model, (inputs, labels) = HalfBody(), classes(dtype=torch.float32)
    twin = nn.Sequential(*model.body, model.head)
    expected = {name: p.detach().double() for name, p in twin.named_parameters()}
    twin = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3)).double()
    twin.load_state_dict(expected)
    matrices = all_matrices(twin, per_example, [(inputs.to(torch.bfloat16).double(), labels)])
    risk = Risk(model, CE, (inputs, labels))
    assert risk.parameters.space.dtype == torch.float32
    for kind, matrix in matrices.items():
        actual = kind(risk) @ torch.eye(27)
        assert (actual.double() - matrix).norm() < 16 * 2.0**-8 * matrices[Hessian].norm()
