"""Class structure in PyTorch: every part against dense Jacobians of single examples."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from specdens import eigsh, hierarchy, testing
from specdens_torch import GaussNewton, Hessian, Risk, next_token_loss, token_loss
from specdens_torch.class_products import ClassPasses
from specdens_torch.class_structure import ClassStructure
from tests.adapters.torch_cases import classes, mlp, ragged
from tests.adapters.torch_class_cases import case

PARTS = ("class", "cross", "within", "equal")
WEIGHTINGS = ("probability", "uniform")
SLOW = pytest.mark.slow
# Every second one, the others when there is time.
CASES = [
    pytest.param(name, weighting, marks=() if (i + j) % 2 == 0 else SLOW)
    for i, name in enumerate(
        ("hard", "soft", "smoothed", "weighted", "ignored", "imbalanced", "empty", "sum")
    )
    for j, weighting in enumerate(WEIGHTINGS)
]


@pytest.mark.parametrize(("name", "weighting"), CASES)
def test_parts_weights_and_means_are_those_of_the_definitions(name: str, weighting: str) -> None:
    data = case(name)
    dense, structure = data.dense(weighting), data.structure(weighting)
    p = structure.space.dimension
    scale = sum(dense.parts.values()).abs().max().item()
    close = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-11 * scale)
    assert structure.num_classes == 3
    close(torch.from_numpy(structure.pair_weights), dense.pair_weights)
    close(torch.from_numpy(structure.class_weights), dense.class_weights)
    total = torch.zeros(p, p, dtype=torch.float64)
    for part in PARTS:
        operator = getattr(structure, f"G_{part}")
        product = operator @ torch.eye(p, dtype=torch.float64)
        close(product, dense.parts[part])
        close(operator @ torch.ones(p, dtype=torch.float64), dense.parts[part].sum(1))
        total += product
    close(total, GaussNewton(structure.risk) @ torch.eye(p, dtype=torch.float64))
    close(structure.class_means, dense.class_means)
    close(structure.pair_means(), dense.pair_means)
    for part in ("class", "cross", "equal"):
        check_spectrum(structure, part, dense.parts[part])
    check_spectrum(structure, "means", sum(dense.parts[part] for part in PARTS if part != "within"))


def check_spectrum(structure: ClassStructure, part: str, dense: Tensor) -> None:
    """Compare eigenvalues and basis of a part with those of its dense matrix."""
    expected = torch.linalg.eigvalsh(dense).flip(0).numpy()
    actual = structure.eigenvalues(part)
    atol = 1e-12 * expected[0]
    np.testing.assert_allclose(actual, expected[: len(actual)], rtol=1e-10, atol=atol)
    assert expected[len(actual) :].max(initial=0.0) < atol
    basis = structure.basis(part)
    rank = basis.shape[1]
    assert rank == int((expected > 1e-11 * expected[0]).sum())
    torch.testing.assert_close(basis.T @ basis, torch.eye(rank, dtype=torch.float64))
    torch.testing.assert_close(basis @ (basis.T @ dense), dense, rtol=1e-7, atol=1e-8 * expected[0])


def product_of_identity(operator: Any) -> Tensor:
    return operator @ torch.eye(operator.space.dimension, dtype=operator.space.dtype)


@pytest.mark.parametrize("weighting", ["uniform", pytest.param("probability", marks=SLOW)])
def test_a_small_budget_gives_the_same(weighting: str) -> None:
    """Graphs are made anew, class means are streamed, the Gram matrix comes in blocks."""
    data = case("weighted")
    plenty = data.structure(weighting)
    vector = 43 * 8
    sparse = data.structure(weighting, memory_budget=max(8 * 3**4, 2 * vector))
    assert not sparse.risk.passes.plan().keeps_graphs
    for part in PARTS:
        x = torch.randn(43, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        expected, actual = (getattr(s, f"G_{part}") @ x for s in (plenty, sparse))
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-14)
    np.testing.assert_allclose(sparse.pair_gram(), plenty.pair_gram(), rtol=1e-10, atol=1e-14)
    whole = data.structure(weighting, regroup=False)
    torch.testing.assert_close(whole.class_means, plenty.class_means, rtol=1e-10, atol=1e-14)


def test_identities_of_probability_weights() -> None:
    """Papyan (2020): the class mean is antiparallel to that of c' = c, hence rank C (C - 1)."""
    structure = case("imbalanced").structure("probability")
    means, weights = structure.pair_means(), torch.from_numpy(structure.pair_weights)
    own = torch.stack([weights[c, c] * means[c, c] for c in range(3)], 1)
    weighted = structure.class_means * torch.from_numpy(structure.class_weights)
    torch.testing.assert_close(weighted, -own, rtol=1e-10, atol=1e-13)
    assert structure.basis("means").shape[1] == 3 * 2
    angle = torch.linalg.svdvals(structure.basis("class").T @ structure.basis("equal"))
    torch.testing.assert_close(angle, torch.ones(3, dtype=torch.float64))


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_eigenvalues_are_ordered_as_the_parts_are(weighting: str) -> None:
    structure = case("hard").structure(weighting)
    dense = product_of_identity(GaussNewton(structure.risk))
    whole = torch.linalg.eigvalsh(dense).flip(0).numpy()
    means, between = structure.eigenvalues("means"), structure.eigenvalues("class")
    rounding = 1e-13 * whole[0]
    assert (whole[:9] >= means - rounding).all()
    assert (means[:3] >= between - rounding).all()


class Largest(TorchDispatchMode):
    """Notes the most numbers that any tensor made inside has."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                self.numbers = max(self.numbers, tensor.numel())
        return result


@pytest.mark.parametrize("part", PARTS)
def test_products_hold_no_vector_for_each_pair(part: str) -> None:
    number, examples = 6, 12
    torch.manual_seed(0)
    model = nn.Linear(200, number).double()
    data = torch.randn(examples, 200, dtype=torch.float64), torch.arange(examples) % number
    p = 201 * number
    limit = max(number * p, 200 * examples)  # class means, or the data
    structure = ClassStructure(Risk(model, nn.CrossEntropyLoss(), data))
    vector = torch.ones(p, dtype=torch.float64)
    with Largest() as largest:
        getattr(structure, f"G_{part}") @ vector
    assert largest.numbers <= (limit if part == "class" else 2 * p)
    with Largest() as largest:
        structure.pair_means()
    assert largest.numbers >= number**2 * p


def test_class_means_take_one_pass_over_the_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every example is evaluated once, among examples of its own class only."""
    inputs, labels = classes(12)
    risk = Risk(mlp(), nn.CrossEntropyLoss(), ragged(inputs, labels, 5))
    risk.passes.plan()  # looks at some data first
    sizes: list[int] = []
    monkeypatch.setattr(
        type(risk.model), "forward", _counting(type(risk.model).forward, sizes), raising=True
    )
    structure = ClassStructure(risk)
    _ = structure.class_means
    _ = structure.principal_subspace(2), structure.class_weights, structure.G_class
    assert sum(sizes) == 12
    assert len(sizes) == len(set(labels.tolist()))
    chunks: list[Tensor] = []
    ClassPasses.like(risk.passes).sweep(lambda e: chunks.append(e.targets))
    assert all(len(set(chunk.tolist())) == 1 for chunk in chunks)
    assert torch.equal(torch.cat(chunks), labels.sort().values)


def _counting(forward: Any, sizes: list[int]) -> Any:
    def counted(self: nn.Module, x: Tensor) -> Tensor:
        sizes.append(len(x))
        return forward(self, x)

    return counted


def test_subspace_knockout_and_attribution() -> None:
    data = case("hard")
    structure = data.structure("probability")
    parts = data.dense("probability").parts
    values, vectors = torch.linalg.eigh(parts["class"])
    leading = structure.principal_subspace(2)
    torch.testing.assert_close(leading @ leading.T, vectors[:, -2:] @ vectors[:, -2:].T)
    hessian = Hessian(structure.risk)
    dense, eye = product_of_identity(hessian), torch.eye(43, dtype=torch.float64)
    for part in ("class", "cross"):
        q = structure.basis(part)
        outside = eye - q @ q.T
        projected = structure.knockout(hessian, part)
        torch.testing.assert_close(product_of_identity(projected), outside @ dense @ outside)
        rest = structure.knockout(hessian, part, how="subtract")
        torch.testing.assert_close(product_of_identity(rest), dense - parts[part])
    share, baseline = structure.attribution(values[-3:], vectors[:, -3:])
    assert share == pytest.approx(1.0, abs=1e-12)
    assert baseline == 3 / 43
    pairs = eigsh(hessian, 4)
    inside = (structure.basis("means").T @ pairs.eigenvectors).square().sum(0).numpy()
    sizes = abs(pairs.eigenvalues)
    expected = (sizes * inside).sum() / sizes.sum()
    found = structure.attribution(pairs.eigenvalues, pairs.eigenvectors, "means")
    assert found.share == pytest.approx(expected, rel=1e-10)


def test_distances_are_those_of_the_means() -> None:
    structure = case("hard").structure("uniform")
    points = torch.cat([structure.class_means.T, structure.pair_means().reshape(9, -1)])
    expected = torch.cdist(points, points).square().numpy()
    found = structure.squared_distances()
    np.testing.assert_allclose(found, expected, atol=1e-12 * expected.max())
    assert hierarchy.embedding(found).shape == (12, 2)


@pytest.mark.parametrize("weighting", ["probability", pytest.param("uniform", marks=SLOW)])
def test_pixels_and_tokens_are_examples(weighting: str) -> None:
    """Targets along further axes, and losses of language models, as rows of a plain classifier."""
    torch.manual_seed(2)
    head = nn.Linear(4, 3).double()
    inputs = torch.randn(2, 5, 4, dtype=torch.float64)
    labels = torch.tensor([[0, 1, 2, 0, -100], [1, 1, -100, 2, 0]])

    class Pixels(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = head

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x).movedim(-1, 1)

    def structure(model: nn.Module, loss: Any, x: Tensor, y: Tensor) -> ClassStructure:
        return ClassStructure(Risk(model, loss, (x, y)), 3, weighting)

    flat = structure(head, nn.CrossEntropyLoss(), inputs.flatten(0, 1), labels.flatten())
    following = torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]
    shifted = structure(head, nn.CrossEntropyLoss(), inputs.flatten(0, 1), following.flatten())
    for found, expected in (
        (structure(Pixels(), nn.CrossEntropyLoss(), inputs, labels), flat),
        (structure(head, token_loss, inputs, labels), flat),
        (structure(head, next_token_loss, inputs, labels), shifted),
    ):
        np.testing.assert_allclose(found.pair_weights, expected.pair_weights, rtol=1e-12)
        torch.testing.assert_close(found.class_means, expected.class_means, rtol=1e-10, atol=1e-13)
        for part in PARTS:
            pair = [product_of_identity(getattr(s, f"G_{part}")) for s in (found, expected)]
            torch.testing.assert_close(*pair, rtol=1e-10, atol=1e-13)


def test_new_parameters_are_noticed_and_the_model_is_left_alone() -> None:
    data = case("hard")
    structure = data.structure("probability")
    before = {name: value.clone() for name, value in data.model.state_dict().items()}
    first = (
        structure.class_means.clone(),
        structure.pair_gram(),
        structure.G_cross @ torch.ones(43, dtype=torch.float64),
    )
    assert all(torch.equal(value, before[name]) for name, value in data.model.state_dict().items())
    assert all(p.grad is None for p in data.model.parameters())
    with torch.no_grad():
        for parameter in data.model.parameters():
            parameter.mul_(1.5)
    dense = data.dense("probability")
    torch.testing.assert_close(structure.class_means, dense.class_means)
    product = structure.G_cross @ torch.ones(43, dtype=torch.float64)
    torch.testing.assert_close(product, dense.parts["cross"].sum(1))
    means = dense.pair_means.reshape(9, -1)
    np.testing.assert_allclose(structure.pair_gram(), means @ means.T, rtol=1e-9, atol=1e-13)
    assert not torch.allclose(first[0], structure.class_means)


def test_operators_are_symmetric_and_single_precision_is_close() -> None:
    data = case("hard")
    structure = data.structure("uniform")
    for part in PARTS:
        testing.check_operator(getattr(structure, f"G_{part}"))
    model = mlp(dtype=torch.float32)
    single = ClassStructure(
        Risk(model, nn.CrossEntropyLoss(), (data.inputs.float(), data.targets)), 3, "uniform"
    )
    assert single.class_means.dtype == torch.float32
    np.testing.assert_allclose(
        single.eigenvalues("class"), structure.eigenvalues("class"), rtol=1e-5
    )
    product = single.G_within @ torch.ones(43)
    expected = structure.G_within @ torch.ones(43, dtype=torch.float64)
    torch.testing.assert_close(product.double(), expected, rtol=1e-4, atol=1e-6)
    check_dtypes(model, data.inputs.float(), data.targets, structure.pair_gram())
    basis = single.basis("means")
    torch.testing.assert_close(basis.T @ basis, torch.eye(basis.shape[1]), rtol=0, atol=1e-5)


def check_dtypes(model: nn.Module, inputs: Tensor, labels: Tensor, gram: np.ndarray) -> None:
    """Sums in double precision, inference mode, and vectors that the operators take."""
    risk = Risk(model, nn.CrossEntropyLoss(), (inputs, labels), accumulate=torch.float64)
    with torch.inference_mode():
        structure = ClassStructure(risk, weighting="uniform")
        np.testing.assert_allclose(structure.pair_gram(), gram, rtol=1e-4, atol=1e-6)
        for vectors in (structure.class_means, structure.basis("class"), structure.basis("cross")):
            assert vectors.dtype == torch.float32
            for operator in (structure.G_class, structure.G_within):
                assert (operator @ vectors).dtype == torch.float32
        inside = structure.knockout(structure.G_class) @ structure.basis("class")
        assert inside.abs().max() < 1e-6


def test_logits_that_no_parameter_changes_have_no_structure() -> None:
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unused = nn.Parameter(torch.ones(2, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            return x

    data = torch.eye(3, dtype=torch.float64), torch.arange(3)
    structure = ClassStructure(Risk(Unused(), nn.CrossEntropyLoss(), data))
    vector = torch.ones(2, dtype=torch.float64)
    assert not structure.class_means.any()
    assert not (structure.G_within @ vector).any()
    assert not structure.eigenvalues("means").any()
    assert structure.basis("class").shape == structure.basis("cross").shape == (2, 0)
    assert torch.equal(structure.knockout(structure.G_within) @ vector, 0 * vector)
    assert structure.attribution([1.0], vector[:, None]) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda s: ClassStructure(s.risk.model), TypeError, "pass Risk"),
        (lambda s: ClassStructure(s.risk, weighting="mean"), ValueError, "weighting='mean'"),
        (lambda s: ClassStructure(s.risk, 1), ValueError, "num_classes=1"),
        (lambda s: ClassStructure(s.risk, 4).class_means, ValueError, "num_classes=4, but"),
        (lambda s: s.principal_subspace(4), ValueError, "k=4 must be an integer from 1 to .* 3"),
        (lambda s: s.eigenvalues("within"), ValueError, "part='within'"),
        (lambda s: s.basis("all"), ValueError, "part='all' is unknown; expected one of 'class', "),
        (lambda s: s.basis("all"), ValueError, "'means'; G_within has no small matrix"),
        (lambda s: s.basis(3), TypeError, "part=3 is unknown"),
        (lambda s: s.knockout(s.G_class, how=None), TypeError, "how=None is unknown; expected 'pr"),
        (lambda s: ClassStructure(s.risk, weighting=1), TypeError, "weighting=1 is unknown"),
        (lambda s: s.knockout(s.G_class, how="drop"), ValueError, "how='drop'"),
        (lambda s: s.G_cross @ torch.ones(3), ValueError, "x has shape"),
        (lambda s: s.G_class @ torch.ones(43), TypeError, "x has dtype"),
        (lambda s: s.attribution([1.0], torch.ones(43, 2).double()), ValueError, "eigenvectors"),
    ],
)
def test_errors_name_the_argument(call: Any, error: type[Exception], message: str) -> None:
    structure = case("hard").structure("probability")
    with pytest.raises(error, match=message):
        call(structure)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_parts_of_one_mean_for_each_class_need_no_inner_products_of_pairs(weighting: str) -> None:
    data = case("weighted")
    small = data.structure(weighting, memory_budget=8 * 3**4 - 1)
    for part in ("class", "equal"):
        dense = data.dense(weighting).parts[part]
        check_spectrum(small, part, dense)
        values, vectors = torch.linalg.eigh(dense)
        assert small.attribution(values, vectors, part).share == pytest.approx(1, rel=1e-10)
        rest = product_of_identity(small.knockout(small.G_equal, part))
        basis = small.basis(part)
        assert (rest @ basis).abs().max() < 1e-12
    for part in ("cross", "means"):
        with pytest.raises(ValueError, match=r"num_classes=3: .*'class' and 'equal' as parts"):
            small.eigenvalues(part)


def test_errors_of_data_and_losses() -> None:
    data = case("hard")
    squares = Risk(data.model, nn.MSELoss(), (data.inputs, data.members))
    with pytest.raises(ValueError, match="loss=MSELoss is no softmax cross-entropy"):
        ClassStructure(squares)
    negative = data.members - 0.1
    odd = ClassStructure(Risk(data.model, data.loss, (data.inputs, negative)))
    with pytest.raises(ValueError, match="negative or add up to zero"):
        _ = odd.pair_weights
    small = data.structure("probability", memory_budget=8 * 3**4 - 1)
    with pytest.raises(ValueError, match=r"num_classes=3: .*class_means"):
        small.pair_gram()
    empty = case("empty").structure("probability")
    with pytest.raises(ValueError, match="k=3 exceeds the rank 2"):
        empty.principal_subspace(3)
