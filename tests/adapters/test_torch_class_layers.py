"""Features and errors of single layers by class, against dense derivatives."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from specdens_torch import GaussNewton, Risk
from specdens_torch.class_layers import LayerStructure
from specdens_torch.class_structure import ClassStructure
from tests.adapters.torch_cases import classes, mlp
from tests.adapters.torch_class_cases import Case, case


@pytest.mark.parametrize("weighting", ["probability", "uniform"])
@pytest.mark.parametrize("layer", ["0", "2"])
@pytest.mark.parametrize("name", ["soft", "weighted", "empty"])
def test_errors_are_derivatives_in_the_bias(name: str, layer: str, weighting: str) -> None:
    """A bias is added to the outputs of its layer, so its Jacobian is that of these."""
    data = case(name)
    dense = data.dense(weighting, [f"{layer}.bias"])
    found = data.structure(weighting).layer(layer)
    close = {"rtol": 1e-10, "atol": 1e-13}
    np.testing.assert_allclose(found.pair_weights, dense.pair_weights, **close)
    np.testing.assert_allclose(found.error_means, dense.pair_means.movedim(-1, 0), **close)
    total = sum(dense.parts.values())
    np.testing.assert_allclose(found.error_second_moment, total, **close)
    np.testing.assert_allclose(found.error_eigenvalues(), eigenvalues(total), **close)
    means = sum(dense.parts[part] for part in ("class", "cross", "equal"))
    for part, matrix in {**dense.parts, "means": means}.items():
        values, expected = found.error_eigenvalues(part), eigenvalues(matrix)
        number = min(len(values), len(expected))
        np.testing.assert_allclose(values[:number], expected[:number], **close)
        np.testing.assert_allclose(values[number:], 0.0, atol=1e-13)
    check_features(data, layer, found)


def eigenvalues(matrix: torch.Tensor) -> np.ndarray:
    return torch.linalg.eigvalsh(matrix).flip(0).numpy()


def check_features(data: Case, layer: str, found: LayerStructure) -> None:
    """Compare the means and second moment of the layer's inputs with their definitions."""
    x = data.inputs if layer == "0" else torch.tanh(data.model[0](data.inputs)).detach()
    weights = data.factors / data.factors.sum()
    moment = sum(w * torch.outer(v, v) for w, v in zip(weights, x, strict=True))
    np.testing.assert_allclose(found.feature_second_moment, moment, rtol=1e-10, atol=1e-13)
    np.testing.assert_allclose(found.feature_eigenvalues(), eigenvalues(moment), atol=1e-12)
    np.testing.assert_allclose(found.feature_mean, weights @ x, atol=1e-13)
    shares = weights @ data.members
    np.testing.assert_allclose(found.class_shares, shares, atol=1e-14)
    for c in range(3):
        mean = (
            (weights * data.members[:, c]) @ x / shares[c] if shares[c] else torch.zeros(x.shape[1])
        )
        np.testing.assert_allclose(found.feature_means[:, c], mean, atol=1e-13)


def test_one_example_makes_a_kronecker_product() -> None:
    inputs, labels = classes(1)
    risk = Risk(mlp(), nn.CrossEntropyLoss(), (inputs, labels), "0.weight")
    found = ClassStructure(risk).layer("0")
    product = np.kron(found.error_second_moment, found.feature_second_moment)
    dense = GaussNewton(risk) @ torch.eye(20, dtype=torch.float64)
    np.testing.assert_allclose(product, dense, rtol=1e-10, atol=1e-14)


def test_layers_before_all_that_varies_have_errors_too() -> None:
    data = case("hard")
    risk = Risk(data.model, data.loss, (data.inputs, data.targets), "2.bias")
    frozen = ClassStructure(risk).layer("0")
    whole = data.structure("probability").layer("0")
    np.testing.assert_allclose(frozen.error_means, whole.error_means, rtol=1e-10, atol=1e-14)
    assert not data.model[0]._forward_hooks
    assert repr(frozen) == "LayerStructure('0', 4 inputs, 5 outputs, 3 classes)"


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4).double()
        self.head = nn.Linear(4, 3).double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.inner(torch.tanh(self.inner(x))))


def test_errors_of_layers_say_what_is_expected() -> None:
    structure = case("hard").structure("probability")
    with pytest.raises(ValueError, match=r"name='1' is none of the linear layers \['0', '2'\]"):
        structure.layer("1")
    with pytest.raises(ValueError, match=r"name='0': the second moments .* 328 bytes"):
        case("hard").structure("probability", memory_budget=327).layer("0")
    twice = ClassStructure(Risk(Twice(), nn.CrossEntropyLoss(), classes(4)))
    with pytest.raises(ValueError, match=r"name='inner': .* expected one call"):
        twice.layer("inner")
    assert not twice.risk.model.inner._forward_hooks
