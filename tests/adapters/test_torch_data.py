"""Data as Hugging Face's collators give them, and how batches are cut and joined."""

from __future__ import annotations

from collections import UserDict, defaultdict
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn
from torch.utils.data import DataLoader, Dataset

from specdens_torch import Hessian, Risk, gradient, risk_value
from specdens_torch.data import DataSource, regroup
from specdens_torch.structures import Batch, logits_of, num_examples, tensors_in
from tests.adapters.torch_cases import TwoInputs, dense

N = 7


def features(number=N):
    torch.manual_seed(0)
    x, z = torch.randn(number, 4, dtype=torch.float64), torch.randn(number, 2, dtype=torch.float64)
    return {"x": x, "z": z, "labels": torch.randint(3, (number,))}


def part(data, start, stop):
    return {key: value[start:stop] for key, value in data.items()}


class Examples(Dataset):
    """A data set of mappings, which the default collate function stacks."""

    def __init__(self):
        self.features = features()

    def __len__(self):
        return N

    def __getitem__(self, index):
        return {key: value[index] for key, value in self.features.items()}


def settings(batch):
    """The same batch with a keyword of the model that is no tensor."""
    return {**batch, "scale": 1.0}


SHAPES = {
    "single": features,
    "single-userdict": lambda: UserDict(features()),
    "list": lambda: [part(features(), 0, 2), part(features(), 2, 3), part(features(), 3, N)],
    "list-of-two": lambda: [part(features(), 0, 5), part(features(), 5, N)],
    "userdicts": lambda: [UserDict(part(features(), 0, 4)), UserDict(part(features(), 4, N))],
    "settings": lambda: [settings(part(features(), 0, 4)), settings(part(features(), 4, N))],
    "loader": lambda: DataLoader(Examples(), batch_size=3),
    "mixed": lambda: [
        part(features(), 0, 4),
        ({key: features()[key][4:] for key in ("x", "z")}, features()["labels"][4:]),
    ],
}


@pytest.mark.parametrize("regroup", [True, False])
@pytest.mark.parametrize("name", SHAPES)
def test_mappings_with_labels_are_pairs(name, regroup):
    torch.manual_seed(1)
    model, everything = TwoInputs().double(), features()
    inputs, labels = {key: everything[key] for key in ("x", "z")}, everything["labels"]
    risk = Risk(model, nn.CrossEntropyLoss(), SHAPES[name](), regroup=regroup)
    expected = F.cross_entropy(model(**inputs), labels)
    assert risk_value(risk) == pytest.approx(expected.item(), rel=1e-12)
    slope = dense(model, F.cross_entropy, inputs, labels, order=1)
    torch.testing.assert_close(gradient(risk), slope, rtol=1e-10, atol=1e-13)
    matrix = dense(model, F.cross_entropy, inputs, labels)
    identity = torch.eye(len(slope), dtype=torch.float64)
    torch.testing.assert_close(Hessian(risk) @ identity, matrix, rtol=1e-10, atol=1e-12)


def test_the_model_never_sees_labels():
    class Strict(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Linear(4, 3).double()

        def forward(self, x, z, labels=None):
            assert labels is None
            return self.body(x)

    data = features()
    model = Strict()
    expected = F.cross_entropy(model(data["x"], data["z"]), data["labels"]).item()
    assert risk_value(Risk(model, nn.CrossEntropyLoss(), data)) == pytest.approx(expected)
    assert set(data) == {"x", "z", "labels"}  # the caller's mapping keeps its labels


def test_labels_may_be_nested():
    data = {"x": torch.ones(2, 4), "labels": {"labels": torch.zeros(2, 3), "mask": torch.ones(2)}}
    (batch,) = DataSource([data])
    assert set(batch.inputs) == {"x"}
    assert set(batch.targets) == {"labels", "mask"}
    assert num_examples(batch) == 2


def test_a_mapping_in_memory_is_watched():
    """A change in place is noticed, as for pairs."""
    data, model = features(), TwoInputs().double()
    source = DataSource(data)
    assert source.in_memory
    assert {id(t) for t in source.tensors} == {id(t) for t in data.values()}
    hessian = Hessian(model, nn.CrossEntropyLoss(), data)
    vector = torch.ones(hessian.space.dimension, dtype=torch.float64)
    before = hessian @ vector
    data["x"].mul_(2)
    fresh = Hessian(model, nn.CrossEntropyLoss(), data) @ vector
    torch.testing.assert_close(hessian @ vector, fresh, rtol=1e-12, atol=1e-13)
    assert not torch.allclose(before, fresh)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"x": torch.ones(2, 4)}, r"data is a dict with the keys x and without labels"),
        ([{"x": torch.ones(2, 4), "label": torch.ones(2)}], "item 0 of data .* keys x, label"),
        ([{"x": [1, 2], "labels": 1}], "item 0 of data is a dict without tensors.*DataLoader"),
        (torch.ones(2, 4), "Tensor"),
        ([{"x": torch.ones(1, 4), "labels": torch.ones(1)}, 3], "item 1 of data is a int"),
    ],
    ids=["no-labels", "other-key", "single-example", "tensor", "number"],
)
def test_mappings_that_are_refused(data, words):
    with pytest.raises(TypeError, match=words):
        list(DataSource(data))


def test_regrouping_keeps_every_example_in_order():
    data = features(23)
    bounds = [0, 1, 2, 9, 10, 23]
    batches = [part(data, a, b) for a, b in pairwise(bounds)]
    for limit in (1, 2, 5, 23, 100):
        chunks = list(regroup(DataSource(batches), lambda batch, most=limit: most))
        assert max(num_examples(chunk) for chunk in chunks) <= limit
        assert len(chunks) == -(-23 // limit)
        assert torch.equal(torch.cat([chunk.inputs["x"] for chunk in chunks]), data["x"])
        assert torch.equal(torch.cat([chunk.targets for chunk in chunks]), data["labels"])


def test_other_lengths_are_not_joined():
    """Texts padded to different lengths stay apart, whole."""
    batches = [
        {"ids": torch.ones(3, length), "labels": torch.ones(3, length)} for length in (4, 4, 6)
    ]
    chunks = list(regroup(DataSource(batches), lambda batch: 100))
    assert [tuple(chunk.targets.shape) for chunk in chunks] == [(6, 4), (3, 6)]


@pytest.mark.parametrize(
    "outputs",
    [
        torch.ones(2),
        {"logits": torch.ones(2)},
        UserDict(logits=torch.ones(2)),
        type("Output", (), {"logits": torch.ones(2)})(),
    ],
)
def test_logits_are_found(outputs):
    assert torch.equal(logits_of(outputs), torch.ones(2))


@pytest.mark.parametrize(
    "outputs", [None, 1.0, (torch.ones(2),), {"logits": None}, defaultdict(lambda: torch.ones(2))]
)
def test_outputs_without_logits(outputs):
    assert logits_of(outputs) is None
    assert len(list(tensors_in(Batch(outputs, None)))) == isinstance(outputs, tuple)
