"""Selecting parameters and turning them into flat vectors and back."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from specdens_torch import FlatParameters
from tests.adapters.torch_cases import Tied, mlp

NAMES = ("0.weight", "0.bias", "2.weight", "2.bias")


def test_all_trainable_parameters_by_default():
    model = mlp()
    model[0].bias.requires_grad_(False)
    parameters = FlatParameters(model)
    assert parameters.names == ("0.weight", "2.weight", "2.bias")
    assert parameters.size == 20 + 15 + 3
    assert parameters.slices == {
        "0.weight": slice(0, 20),
        "2.weight": slice(20, 35),
        "2.bias": slice(35, 38),
    }
    assert parameters.space.dimension == 38
    assert parameters.space.dtype == torch.float64
    assert parameters.space.device == torch.device("cpu")


@pytest.mark.parametrize(
    ("choose", "names"),
    [
        (lambda m: "0.weight", ("0.weight",)),
        (lambda m: "*.bias", ("0.bias", "2.bias")),
        (lambda m: ["2.*", "0.bias"], ("0.bias", "2.weight", "2.bias")),
        (lambda m: m[2], ("2.weight", "2.bias")),
        (lambda m: m[0].weight, ("0.weight",)),
        (lambda m: [m[0].weight, m[2], "0.weight"], ("0.weight", "2.weight", "2.bias")),
        (lambda m: m.parameters(), NAMES),
        (lambda m: dict(m.named_parameters()), NAMES),
        (lambda m: m, NAMES),
    ],
    ids=["name", "pattern", "patterns", "module", "tensor", "mixed", "generator", "dict", "all"],
)
def test_selection_in_model_order(choose, names):
    model = mlp()
    assert FlatParameters(model, choose(model)).names == names


def test_naming_a_frozen_parameter_includes_it():
    model = mlp().requires_grad_(False)
    assert FlatParameters(model, "0.bias").names == ("0.bias",)
    assert not model[0].bias.requires_grad


def test_tied_parameters_count_once_and_every_name_finds_them():
    model = Tied()
    assert "again.weight" not in FlatParameters(model).names
    assert FlatParameters(model, "again.weight").names == ("encoder.weight",)
    assert FlatParameters(model, ["again.weight", "encoder.*"]).size == 12


@pytest.mark.parametrize(
    ("selection", "error", "words"),
    [
        ("0.wieght", ValueError, "'0.weight'"),
        ("3.*", ValueError, "matches no parameter"),
        ("0", ValueError, "'0.weight'"),
        ([], ValueError, "selects nothing"),
        (nn.Linear(2, 2), ValueError, "not part of the model"),
        (nn.ReLU(), ValueError, "no parameters"),
        (torch.zeros(3), ValueError, "not part of the model"),
        (3, TypeError, "int"),
        ([3.0], TypeError, "float"),
    ],
)
def test_what_cannot_be_selected(selection, error, words):
    with pytest.raises(error, match=words.replace(".", r"\.").replace("*", r"\*")):
        FlatParameters(mlp(), selection)


def test_a_model_without_trainable_parameters():
    with pytest.raises(ValueError, match="requires_grad=True"):
        FlatParameters(mlp().requires_grad_(False))
    with pytest.raises(ValueError, match="selects nothing"):
        FlatParameters(nn.ReLU())
    with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
        FlatParameters(lambda x: x)  # type: ignore[arg-type]


def test_parameters_that_have_no_curvature():
    with pytest.raises(ValueError, match="complex64"):
        FlatParameters(nn.Linear(2, 2, dtype=torch.complex64))
    with pytest.raises(ValueError, match="meta"):
        FlatParameters(nn.Linear(2, 2, device="meta"))
    with pytest.raises(ValueError, match="no shape"):
        FlatParameters(nn.LazyLinear(2))


def test_ravel_and_unravel_are_inverse_and_agree_with_torch():
    model = mlp()
    parameters = FlatParameters(model)
    expected = nn.utils.parameters_to_vector(model.parameters()).detach()
    assert torch.equal(parameters.ravel(), expected)
    assert torch.equal(parameters.ravel(dict(model.named_parameters())), expected)
    assert torch.equal(parameters.ravel(list(model.parameters())), expected)
    blocks = parameters.unravel(expected)
    assert list(blocks) == list(NAMES)
    assert all(torch.equal(blocks[name], p) for name, p in model.named_parameters())
    assert torch.equal(parameters.ravel(blocks), expected)


def test_columns_ravel_and_unravel_together():
    parameters = FlatParameters(mlp())
    x = torch.randn(parameters.size, 2, dtype=torch.float64)
    blocks = parameters.unravel(x)
    assert blocks["0.weight"].shape == (5, 4, 2)
    assert torch.equal(blocks["0.weight"][..., 1], parameters.unravel(x[:, 1])["0.weight"])
    assert torch.equal(parameters.ravel(blocks), x)


def test_none_is_a_block_of_zeros():
    model = mlp()
    model[2](torch.ones(1, 5, dtype=torch.float64)).sum().backward()
    parameters = FlatParameters(model)
    flat = parameters.ravel([p.grad for p in model.parameters()])
    assert torch.equal(flat[: 20 + 5], torch.zeros(25, dtype=torch.float64))
    assert torch.equal(flat[-3:], torch.ones(3, dtype=torch.float64))


@pytest.mark.parametrize(
    ("blocks", "words"),
    [
        ({"0.weight": torch.zeros(5, 4)}, "0.bias"),
        ([torch.zeros(5, 4)], "1 tensors"),
        ([torch.zeros(4, 5), None, None, None], "expected (5, 4)"),
        ([torch.zeros(5, 4, 2), torch.zeros(5), None, None], "trailing axes"),
    ],
)
def test_blocks_that_do_not_fit(blocks, words):
    with pytest.raises(ValueError, match=words.replace("(", r"\(").replace(")", r"\)")):
        FlatParameters(mlp()).ravel(blocks)


def test_vectors_of_another_length_do_not_unravel():
    with pytest.raises(ValueError, match="43"):
        FlatParameters(mlp()).unravel(torch.zeros(44))


@pytest.mark.parametrize(
    ("use", "error", "words"),
    [
        (lambda p: p.unravel([0.0] * 43), TypeError, "x has type list; expected a torch.Tensor"),
        (lambda p: p.ravel([1.0, None, None, None]), TypeError, "'0.weight' has type float"),
        (lambda p: p.ravel(3), ValueError, "blocks has 1 tensors"),
        (lambda p: p.indices(["0.weight"]), ValueError, "is none of the selected parameters"),
    ],
)
def test_what_is_no_tensor_is_named(use, error, words):
    with pytest.raises(error, match=words):
        use(FlatParameters(mlp()))


def test_mixed_precisions_are_promoted():
    model = mlp(dtype=torch.float32)
    model[2].double()
    assert FlatParameters(model).space.dtype == torch.float64
    model[0].to(torch.bfloat16)
    model[2].to(torch.float16)
    assert FlatParameters(model).space.dtype == torch.float32


def test_half_precision_vectors_may_stay_wide():
    parameters = FlatParameters(mlp(dtype=torch.bfloat16))
    assert parameters.ravel().dtype == torch.bfloat16
    x = torch.randn(parameters.size)
    assert torch.equal(parameters.ravel(parameters.unravel(x)), x)


def test_repr_says_the_sizes():
    text = "FlatParameters(4 tensors, 43 parameters, float64, cpu)"
    assert repr(FlatParameters(mlp())) == text
    assert len(FlatParameters(mlp())) == 4
