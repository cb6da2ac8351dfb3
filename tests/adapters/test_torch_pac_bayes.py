"""PAC-Bayes bounds of PyTorch classifiers: dense covariances, the digits, and what is refused."""

from __future__ import annotations

import copy
from functools import cache

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

from specdens.certificates import gaussian_kl
from specdens_torch import GaussNewton, Risk, layerwise
from specdens_torch.classifier import Classifier
from specdens_torch.curvature_bases import choose_bases
from specdens_torch.pac_bayes import pac_bayes
from specdens_torch.posterior import DenseBasis, GaussianPosterior, KroneckerBasis, transferred
from tests.adapters.torch_cases import classes, mlp

DOUBLE = torch.float64
SHORT = {"epochs": 3, "num_monte_carlo": 20, "batch_size": 4}


def orthogonal(order, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(order, order, generator=generator, dtype=DOUBLE)).Q


def case(**options):
    """Return a risk of a softmax classifier and its parameters before training."""
    model = mlp(nn.ReLU, **options)
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1
    return Risk(model, nn.CrossEntropyLoss(), classes(30)), before


def covariance(bases, scales, size):
    posterior = GaussianPosterior(None, torch.zeros(size, dtype=DOUBLE), bases, scales)
    root = torch.stack([posterior.noise(row) for row in torch.eye(size, dtype=DOUBLE)], dim=1)
    return root @ root.T


def pairs():
    """Return two bases of twelve numbers of every kind, and the dense Q of each."""
    kinds = {
        "standard": [KroneckerBasis(3, 4)] * 2,
        "kronecker": [KroneckerBasis(3, 4, orthogonal(3, i), orthogonal(4, i)) for i in (0, 1)],
        "one side": [KroneckerBasis(3, 4, orthogonal(3, i), None) for i in (0, 1)],
        "dense": [DenseBasis(orthogonal(12, i)) for i in (0, 1)],
        "leading": [DenseBasis(orthogonal(12, i)[:, :4]) for i in (0, 1)],
    }
    return [pytest.param(old, new, id=name) for name, (old, new) in kinds.items()]


def dense_q(basis):
    if isinstance(basis, DenseBasis):
        return basis.vectors
    left = torch.eye(3, dtype=DOUBLE) if basis.left is None else basis.left
    right = torch.eye(4, dtype=DOUBLE) if basis.right is None else basis.right
    return torch.kron(left.contiguous(), right.contiguous())


@pytest.mark.parametrize(("old", "new"), pairs())
def test_bases_give_the_covariance_and_take_it_along(old, new):
    k = len(old.multiplicities)
    scales = torch.linspace(0.2, 2.0, k, dtype=DOUBLE)
    sigma, q = covariance({"w": old}, scales, 12), dense_q(old)
    rest = scales[-1] ** 2 * (torch.eye(12, dtype=DOUBLE) - q @ q.T)
    columns = q.shape[1]
    expected = q @ torch.diag(scales[:columns].square()) @ q.T + rest
    torch.testing.assert_close(sigma, expected, rtol=1e-12, atol=1e-12)
    # The closed form of KL needs the scales alone, whatever Q is.
    w, w0 = np.linspace(0, 1, 12), np.zeros(12)
    dense = 0.5 * (np.trace(sigma) / 0.3 + (w @ w) / 0.3 - 12 + 12 * np.log(0.3))
    dense -= 0.5 * np.linalg.slogdet(sigma.numpy())[1]
    found = gaussian_kl(w, scales.numpy(), w0, 0.3, multiplicities=old.multiplicities.numpy())
    assert found == pytest.approx(dense, rel=1e-10)
    # Refreshed scales: the diagonal of Q'^T Sigma Q', and all of the trace.
    moved, p = transferred({"w": old}, scales, {"w": new}).square(), dense_q(new)
    torch.testing.assert_close(moved[:columns], torch.diag(p.T @ sigma @ p))
    torch.testing.assert_close((moved * new.multiplicities).sum(), torch.trace(sigma))
    counts = old.multiplicities.numpy()
    after = gaussian_kl(w, moved.sqrt().numpy(), w0, 0.3, multiplicities=counts)
    assert after <= found * (1 + 1e-12)
    x = torch.linspace(-1, 2, 12, dtype=DOUBLE)
    torch.testing.assert_close(old.lengths(x)[:columns], (q.T @ x).abs())
    torch.testing.assert_close((old.lengths(x).square() * old.multiplicities).sum(), x @ x)


def test_curvature_bases_diagonalize():
    risk, _ = case()
    exact, kronecker = (choose_bases(risk, name, 50) for name in ("exact", "kronecker"))
    for name, block in layerwise(GaussNewton(risk)).items():
        matrix = block @ torch.eye(block.space.dimension, dtype=DOUBLE)
        rotated = exact[name].vectors.T @ matrix @ exact[name].vectors
        torch.testing.assert_close(rotated, torch.diag(torch.diag(rotated)), rtol=0, atol=1e-12)
    inputs = classes(30)[0]
    second = inputs.T @ inputs
    v = kronecker["0.weight"].right
    torch.testing.assert_close(
        v.T @ second @ v, torch.diag(torch.diag(v.T @ second @ v)), rtol=0, atol=1e-10
    )
    torch.testing.assert_close(kronecker["0.bias"].left, kronecker["0.weight"].left)
    # The bias's block of the Gauss-Newton matrix is E[M].
    block = layerwise(GaussNewton(risk))["0.bias"]
    u = kronecker["0.bias"].left
    rotated = u.T @ (block @ u)
    torch.testing.assert_close(rotated, torch.diag(torch.diag(rotated)), rtol=0, atol=1e-12)


def test_large_blocks_have_leading_directions_and_a_remainder(monkeypatch):
    monkeypatch.setattr("specdens_torch.curvature_bases._LARGEST_DENSE", 4)
    risk, before = case()
    result = pac_bayes(risk, before, basis="exact", num_eigenvectors=3, refresh_every=2, **SHORT)
    assert result.posterior.multiplicities.tolist() == [1] * 3 + [17] + [1] * 3 + [2] + (
        [1] * 3 + [12] + [1] * 3
    )
    risk, _ = case()
    block = layerwise(GaussNewton(risk))["0.weight"]
    values = torch.linalg.eigvalsh(block @ torch.eye(20, dtype=DOUBLE))
    q = choose_bases(risk, "exact", 3)["0.weight"].vectors
    torch.testing.assert_close(torch.trace(q.T @ (block @ q)), values[-3:].sum())


@pytest.mark.parametrize("labels", ["0 and 1", "-1 and 1", "classes"])
def test_errors_and_surrogates_of_a_linear_classifier(labels):
    x = torch.tensor([[1.0], [2.0], [-3.0], [0.5]], dtype=DOUBLE)
    y = torch.tensor([1, 0, 0, 1])
    if labels == "classes":
        model, loss, targets = nn.Linear(1, 2, bias=False), nn.CrossEntropyLoss(), y
        vector = torch.tensor([0.0, 1.0], dtype=DOUBLE)
    else:
        model, loss = nn.Linear(1, 1, bias=False), nn.SoftMarginLoss()
        targets = (y if labels[0] == "0" else 2 * y - 1).to(DOUBLE)[:, None]
        vector = torch.ones(1, dtype=DOUBLE)
    classifier = Classifier.of(Risk(model.to(DOUBLE), loss, (x, targets)))
    logits, sign = x[:, 0], 2 * y - 1
    assert classifier.errors([vector, -vector, 0 * vector]).tolist() == [0.25, 0.75, 1.0]
    expected = torch.log2(1 + torch.exp(-sign * logits))[[0, 2]].mean()
    found = classifier.surrogate(vector, torch.tensor([0, 2]))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


@cache
def digits():
    """Return inputs and labels (1,797): whether a digit is above 4."""
    inputs, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(inputs))
    inputs = torch.tensor(inputs[order] / 16, dtype=torch.float32)
    return inputs, torch.tensor(labels[order] > 4).float()


@cache
def trained():
    """Return a trained network with its initial parameters, and the risk on 1,200 digits."""
    inputs, labels = digits()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 1), nn.Flatten(0))
    before = copy.deepcopy(model.state_dict())
    risk = Risk(model, nn.BCEWithLogitsLoss(), (inputs[:1200], labels[:1200]))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
    generator = torch.Generator().manual_seed(0)
    for _ in range(15):
        for rows in torch.randperm(1200, generator=generator).split(50):
            optimizer.zero_grad()
            nn.functional.binary_cross_entropy_with_logits(
                model(inputs[rows]), labels[rows]
            ).backward()
            optimizer.step()
    model.zero_grad()
    return risk, before


@pytest.mark.parametrize(
    ("epochs", "refreshes"), [(30, False), pytest.param(60, True, marks=pytest.mark.slow)]
)
def test_curvature_improves_the_bound_and_the_bound_holds(epochs, refreshes):
    """The ordering of the paper in miniature: refreshed <= Kronecker < standard basis."""
    risk, before = trained()
    options = {"epochs": epochs, "learning_rate": 0.03, "num_monte_carlo": 300}
    standard = pac_bayes(risk, before, **options)
    kronecker = pac_bayes(risk, before, basis="kronecker", **options)
    results = [standard, kronecker]
    assert standard.bound < (0.7 if refreshes else 0.8)
    assert kronecker.bound <= 0.9 * standard.bound
    if refreshes:
        results += [pac_bayes(risk, before, basis="kronecker", refresh_every=10, **options)]
        assert results[2].bound <= kronecker.bound + 0.01
    inputs, labels = digits()
    unseen = Classifier.of(Risk(risk.model, nn.BCEWithLogitsLoss(), (inputs[1200:], labels[1200:])))
    for result in results:
        assert unseen.errors(result.posterior.sample(50, seed=1).T).mean() < result.bound
        assert result.history["objective"][-1] < 0.5 * result.history["objective"][0]
        assert result.history["kl"][-1] == pytest.approx(result.kl, rel=0.02)
        assert result.confidence == pytest.approx(0.965)


def test_seeds_reproduce_and_nothing_else_changes():
    risk, before = case()
    state = {name: t.clone() for name, t in risk.model.state_dict().items()}
    global_state = torch.get_rng_state()
    options = {"basis": "exact", "refresh_every": 1, **SHORT}
    first, again, other = (pac_bayes(risk, before, seed=seed, **options) for seed in (5, 5, 6))
    assert first.bound == again.bound
    assert torch.equal(first.posterior.mean, again.posterior.mean)
    assert not torch.equal(first.posterior.mean, other.posterior.mean)
    assert torch.equal(first.posterior.sample(2, seed=1), again.posterior.sample(2, seed=1))
    assert torch.equal(torch.get_rng_state(), global_state)
    assert all(torch.equal(t, state[name]) for name, t in risk.model.state_dict().items())
    assert all(p.grad is None for p in risk.model.parameters())
    with torch.inference_mode():
        assert pac_bayes(risk, before, seed=5, **options).bound == first.bound


def test_own_bases():
    risk, before = case()
    u, v, q = orthogonal(5, 0), orthogonal(4, 1), orthogonal(15, 2)[:, :6]
    own = {"0.weight": (u, v), "2.weight": q}
    result = pac_bayes(risk, before, basis=own, **SHORT)
    assert len(result.posterior.scales) == 20 + 5 + 7 + 3
    assert result.posterior.multiplicities.sum() == risk.parameters.size
    made = pac_bayes(risk, before, basis=lambda risk: own, refresh_every=2, **SHORT)
    assert torch.equal(made.posterior.bases["2.weight"].vectors, q)
    flat = risk.parameters.ravel(before)
    assert pac_bayes(risk, flat, basis=own, **SHORT).bound == result.bound


def refused_priors():
    def trained_elsewhere():
        risk, before = case()
        return risk.restricted("0.weight"), before, {}

    def of_the_trained():
        risk, _ = case()
        return risk, risk.model.state_dict(), {}

    return {
        "prior_mean equals the present": of_the_trained,
        "prior_mean has entries that are nan": lambda: (case()[0], torch.full((43,), np.nan), {}),
        "prior_mean has shape": lambda: (case()[0], torch.zeros(5), {}),
        "prior_mean lacks": lambda: (case()[0], {}, {}),
        "differs from prior_mean but is not among": trained_elsewhere,
    }


def refused_models_and_data():
    def with_layer(layer, training=False):
        model = nn.Sequential(nn.Linear(4, 3), layer).to(DOUBLE).train(training)
        prior = torch.zeros(sum(p.numel() for p in model.parameters()))
        return Risk(model, nn.CrossEntropyLoss(), classes(30)), prior, {}

    def left_out():
        data = torch.utils.data.TensorDataset(*classes(30))
        loader = torch.utils.data.DataLoader(data, batch_size=8, drop_last=True)
        risk, before = case()
        return Risk(risk.model, nn.CrossEntropyLoss(), loader), before, {}

    def regression():
        risk, before = case()
        return Risk(risk.model, nn.MSELoss(), (classes(30)[0], torch.zeros(30, 3))), before, {}

    return {
        "running statistics": lambda: with_layer(nn.BatchNorm1d(3)),
        "their data set has 30": left_out,
        "Dropout": lambda: with_layer(nn.Dropout(0.5), training=True),
        "no classifier": regression,
    }


def refused_options():
    found = {
        "basis of '2.bias' is not orthonormal": {"basis": {"2.bias": torch.ones(3, 3)}},
        "expected \\(5, 5\\) and \\(4, 4\\)": {"basis": {"0.weight": (torch.eye(4), None)}},
        "basis names \\['wrong'\\]": {"basis": {"wrong": None}},
        "basis='hessian' is unknown": {"basis": "hessian"},
        "refresh_every=3 makes": {"refresh_every": 3},
        "epochs=0": {"epochs": 0},
        "delta=2": {"delta": 2},
        "learning_rate=-1": {"learning_rate": -1.0},
        "learning_rate=1e\\+30": {"learning_rate": 1e30},
    }
    return {message: lambda o=options: (*case(), o) for message, options in found.items()}


REFUSED = {**refused_priors(), **refused_models_and_data(), **refused_options()}


@pytest.mark.parametrize("named", REFUSED)
def test_what_would_not_hold_is_refused(named):
    risk, prior, options = REFUSED[named]()
    with pytest.raises(ValueError, match=named):
        pac_bayes(risk, prior, **{**SHORT, **options})
