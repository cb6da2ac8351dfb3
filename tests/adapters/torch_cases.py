"""Small models with data, and dense derivatives that PyTorch computes without specdens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

torch.set_num_threads(1)  # the matrices are tiny: threads would only wait for each other


def mlp(
    activation: type[nn.Module] = nn.Tanh, *, width: int = 5, dtype: torch.dtype = torch.float64
) -> nn.Module:
    """4-5-3 perceptron, 43 parameters (19 of width 2)."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, width), activation(), nn.Linear(width, 3)).to(dtype)


def classes(number: int = 12, *, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Inputs (number, 4) and labels (number,) below 3."""
    generator = torch.Generator().manual_seed(2)
    inputs = torch.randn(number, 4, generator=generator, dtype=torch.float64).to(dtype)
    return inputs, torch.randint(3, (number,), generator=generator)


class Attention(nn.Module):
    """One head of scaled dot-product attention over an embedded sequence, then a mean."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.qkv = nn.Linear(4, 12, bias=False)
        self.head = nn.Linear(4, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        q, k, v = self.qkv(self.embed(tokens)).chunk(3, dim=-1)
        return self.head(F.scaled_dot_product_attention(q, k, v, is_causal=True).mean(1))


class Tied(nn.Module):
    """A network that uses one weight twice, and has a parameter that is never used."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(4, 3, bias=False)
        self.middle = nn.Linear(3, 3, bias=False)
        self.decoder = nn.Linear(3, 4, bias=False)
        self.again = nn.Linear(4, 3, bias=False)
        self.again.weight = self.encoder.weight
        self.unused = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.decoder(torch.tanh(self.middle(self.encoder(x))))
        return self.again(torch.tanh(hidden))


class TwoInputs(nn.Module):
    """A bilinear model of two inputs, so that dicts and tuples have something to name."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Linear(4, 3)
        self.right = nn.Linear(2, 3)

    def forward(self, x: Tensor, z: Tensor, scale: float = 1.0) -> Tensor:
        return scale * self.left(x) * torch.tanh(self.right(z))


def architectures() -> dict[str, Callable[[], tuple[nn.Module, Any, Tensor]]]:
    """Return builders of (model, inputs, labels) in float64, by name."""

    def build(make: Callable[[], nn.Module], inputs: Callable[[], Any]) -> Callable[[], Any]:
        def case() -> tuple[nn.Module, Any, Tensor]:
            torch.manual_seed(3)
            model = make().double()
            return model, inputs(), torch.randint(3, (7,))

        return case

    def pixels() -> Tensor:
        return torch.randn(7, 1, 5, 5, dtype=torch.float64)

    def features() -> Tensor:
        return torch.randn(7, 4, dtype=torch.float64)

    def conv() -> nn.Module:
        layers = (nn.Conv2d(1, 2, 3, stride=2), nn.Softplus(), nn.Flatten(), nn.Linear(8, 3))
        return nn.Sequential(*layers)

    def normalized() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.GELU(), nn.Linear(5, 3))

    def batch_normalized() -> nn.Module:
        model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Tanh(), nn.Linear(3, 3))
        model(torch.randn(20, 4))  # give the running statistics something to say
        return model.eval()

    def encoder() -> nn.Module:
        layer = nn.TransformerEncoderLayer(2, 1, 2, dropout=0.0, batch_first=True)
        return nn.Sequential(layer, nn.Flatten(), nn.Linear(6, 3))

    return {
        "tanh": build(lambda: mlp(nn.Tanh), features),
        "relu": build(lambda: mlp(nn.ReLU), features),
        "conv": build(conv, pixels),
        "layernorm": build(normalized, features),
        "batchnorm": build(batch_normalized, features),
        "attention": build(Attention, lambda: torch.randint(5, (7, 3))),
        "encoder": build(encoder, lambda: torch.randn(7, 3, 2, dtype=torch.float64)),
        "tied": build(Tied, features),
        "linear": build(lambda: nn.Linear(4, 3), features),
    }


def dense(
    model: nn.Module,
    loss: Callable[[Any, Any], Tensor],
    inputs: Any,
    targets: Any,
    names: list[str] | None = None,
    order: int = 2,
    vectorize: bool = True,
) -> Tensor:
    """Return the (n, n) Hessian or (n,) gradient of a scalar ``loss(model(inputs), targets)``.

    It is taken with respect to the parameters called `names`, the trainable ones by default; not
    all losses can be vectorized.
    """
    state = {name: p.detach() for name, p in model.named_parameters()}
    names = [n for n, p in model.named_parameters() if p.requires_grad] if names is None else names
    sizes = [state[name].numel() for name in names]
    args = inputs if isinstance(inputs, tuple) else () if isinstance(inputs, Mapping) else (inputs,)
    kwargs = dict(inputs) if isinstance(inputs, Mapping) else {}

    def function(flat: Tensor) -> Tensor:
        parts = zip(names, flat.split(sizes), strict=True)
        varied = {name: part.view(state[name].shape) for name, part in parts}
        return loss(functional_call(model, {**state, **varied}, args, kwargs), targets)

    flat = torch.cat([state[name].flatten() for name in names])
    with sdpa_kernel(SDPBackend.MATH):
        if order == 1:
            return torch.autograd.functional.jacobian(function, flat)
        return torch.autograd.functional.hessian(function, flat, vectorize=vectorize)


def ragged(inputs: Any, targets: Any, seed: int) -> list[tuple[Any, Any]]:
    """Return the data cut at random places into batches of uneven sizes."""
    number = targets.shape[0]
    generator = torch.Generator().manual_seed(seed)
    places = torch.randperm(number - 1, generator=generator)[: 1 + seed % (number - 1)] + 1
    bounds = [0, *sorted(places.tolist()), number]
    return [(inputs[a:b], targets[a:b]) for a, b in pairwise(bounds)]
