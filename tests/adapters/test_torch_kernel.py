"""Tangent kernels of PyTorch models against their dense Jacobians."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from specdens import eigsh, slq
from specdens.testing import check_operator
from specdens_torch import GaussNewton, Risk, TangentKernel
from tests.adapters.torch_cases import architectures, classes, mlp, ragged
from tests.adapters.torch_dense import assert_close, jacobian

CE = nn.CrossEntropyLoss()
ARCHITECTURES = architectures()


def matrix_of(operator):
    return operator @ torch.eye(operator.space.dimension, dtype=operator.space.dtype)


@pytest.mark.parametrize("budget", [2**30, 1], ids=["kept", "one by one"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_kernel_of_every_architecture(name, budget):
    model, inputs, labels = ARCHITECTURES[name]()
    rows = jacobian(model, inputs)
    kernel = TangentKernel(model, CE, ragged(inputs, labels, 2), memory_budget=budget)
    assert kernel.space.dimension == 7 * 3
    assert_close(matrix_of(kernel), rows @ rows.T)
    check_operator(kernel)
    assert "TangentKernel(n=21, Risk(" in repr(kernel)


def test_weights_and_ignored_examples_do_not_change_it():
    model, (inputs, labels) = mlp(), classes(6)
    rows = jacobian(model, inputs, ["2.bias", "0.weight"])
    weight = torch.tensor([1.0, 3.0, 0.5], dtype=torch.float64)
    labels[2] = -100
    loss = nn.CrossEntropyLoss(weight=weight, reduction="sum")
    kernel = TangentKernel(model, loss, (inputs, labels), ["0.weight", "2.bias"])
    assert_close(matrix_of(kernel), rows @ rows.T)


def test_it_shares_the_spectrum_of_gauss_newton_under_squared_error():
    model, (inputs, _) = mlp(), classes(6)
    risk = Risk(model, nn.MSELoss(reduction="sum"), (inputs, torch.zeros(6, 3).double()))
    kernel = 2.0 * TangentKernel(risk)
    top = eigsh(kernel, num_eigenvalues=5).eigenvalues
    same = eigsh(GaussNewton(risk), num_eigenvalues=5).eigenvalues
    assert top == pytest.approx(same, rel=1e-6)
    measure = slq(kernel, num_probes=18, num_steps=18, progress=False)
    exact = torch.linalg.eigvalsh(matrix_of(kernel)).numpy()
    assert measure.distance(exact) <= 1e-8 * exact[-1]


def test_several_outputs_lie_side_by_side_by_example():
    class TwoHeads(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right = nn.Linear(4, 2), nn.Conv1d(1, 3, 2)

        def forward(self, x):
            return {"left": torch.tanh(self.left(x)), "right": self.right(x[:, None]).exp()}

    def loss(outputs, targets):
        return outputs["left"].sum(1) * outputs["right"].flatten(1).sum(1) + targets

    torch.manual_seed(0)
    model, (inputs, labels) = TwoHeads().double(), classes(5)
    joined = nn.Sequential(model)
    joined.forward = lambda x: torch.cat([v.flatten(1) for v in model(x).values()], 1)
    rows = jacobian(joined, inputs)
    kernel = TangentKernel(model, loss, ragged(inputs, labels, 2))
    assert_close(matrix_of(kernel), rows @ rows.T)


def test_what_has_no_kernel_is_refused():
    model, (inputs, labels) = mlp(), classes(5)
    model.unused = nn.Parameter(torch.ones(2, dtype=torch.float64))
    kernel = TangentKernel(model, CE, (inputs, labels), "unused")
    with pytest.raises(ValueError, match="depends on no output"):
        kernel.space  # noqa: B018
    kernel = TangentKernel(model, CE, (inputs, labels))
    with pytest.raises(ValueError, match=r"x has shape \(3,\); expected \(15,\)"):
        kernel @ torch.ones(3, dtype=torch.float64)

    class Shapeless(nn.Linear):
        def forward(self, x):
            return {"outputs": super().forward(x), "scale": self.weight.sum()}

    loss = lambda o, y: o["outputs"].sum(1) * o["scale"]  # noqa: E731
    kernel = TangentKernel(Shapeless(4, 3).double(), loss, (inputs, labels))
    with pytest.raises(ValueError, match="one first axis"):
        kernel.space  # noqa: B018
