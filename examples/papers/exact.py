"""Identities that hold exactly, tried on small networks in PyTorch and in JAX: rows I, T and W.

    python examples/papers/exact.py

They follow from the formulas of Papyan (2019, arXiv 1811.07062; 2019, arXiv 1901.08244; 2020, arXiv
2008.11865), Sagun et al. (2017, arXiv 1706.04454) and Wu et al. (2020, arXiv 2010.04261), and hold
for any weights and data, up to rounding. So no range is accepted but that of rounding. Networks are
of ReLUs, with the same weights in both libraries; JAX is left out where it is not installed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from importlib.util import find_spec
from itertools import pairwise
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from fixtures import Data, network
from report import Report, parser, run
from structure_papyan import designed, logits_of_designed
from torch import nn

import specdens_torch
from specdens.testing import hidden_layer_residual_eigenvalues, multinomial_logistic_model

SHALLOW, DEEP = (5, 7, 4), (5, 7, 6, 4)
NUM_CLASSES = SHALLOW[-1]
PARTS = ("class", "cross", "equal", "within")
ROUNDING = 1e-12


class Library(NamedTuple):
    """What is needed to ask both adapters the same."""

    name: str
    adapter: ModuleType
    risk: Callable[[Any, Data], Any]  # of the network, or of weights (C, D) of the solvable model
    array: Callable[[np.ndarray], Any]
    output: str  # the name of the output layer of the deep network

    def dense(self, operator: Any) -> np.ndarray:
        """Return the matrix (p, p)."""
        identity = self.array(np.eye(operator.space.dimension))
        return np.asarray(operator @ identity)

    def dense_of(self, name: str, risk: Any) -> np.ndarray:
        """Return the matrix called `name`, such as ``"Hessian"``."""
        return self.dense(getattr(self.adapter, name)(risk))

    def structure(self, risk: Any) -> Any:
        """Return the class structure."""
        return self.adapter.ClassStructure(risk)


def libraries() -> Iterator[Library]:
    """Yield PyTorch, and JAX in double precision if it is installed."""

    def risk(model: Any, data: Data) -> Any:
        if not isinstance(model, nn.Module):
            model = _Solvable(model)
        return specdens_torch.Risk(model, nn.CrossEntropyLoss(), tuple(data))

    yield Library("PyTorch", specdens_torch, risk, torch.from_numpy, "4")
    if find_spec("jax") is None or find_spec("specdens_jax") is None:
        return
    import jax

    with ExitStack() as stack:
        stack.enter_context(jax.enable_x64(True))
        yield _jax_library()


class _Solvable(nn.Module):
    """`logits_of_designed` as a module."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return logits_of_designed(self.weight, inputs)


def _jax_library() -> Library:
    import jax
    import jax.numpy as jnp

    import specdens_jax

    def predict(params: Any, inputs: Any) -> Any:
        if not isinstance(params, list):
            return logits_of_designed(params, inputs)
        for layer in params[:-1]:
            inputs = jax.nn.relu(inputs @ layer["a_weight"].T + layer["b_bias"])
        return inputs @ params[-1]["a_weight"].T + params[-1]["b_bias"]

    def array(tensor: torch.Tensor) -> Any:
        return jnp.asarray(tensor.detach().numpy())

    def risk(model: Any, data: Data) -> Any:
        if isinstance(model, nn.Module):
            linear = (layer for layer in model if isinstance(layer, nn.Linear))
            params = [{"a_weight": array(m.weight), "b_bias": array(m.bias)} for m in linear]
        else:
            params = array(model)
        pair = tuple(array(part) for part in data)
        return specdens_jax.Risk(predict, specdens_jax.CrossEntropy(), params, pair)

    return Library("JAX", specdens_jax, risk, jnp.asarray, "2.a_weight")


def examples(number: int, seed: int) -> Data:
    """Return normal inputs and labels, every class as often as any other, or almost."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(number, SHALLOW[0], generator=generator, dtype=torch.float64)
    return Data(inputs, torch.arange(number) % NUM_CLASSES)


class Found(NamedTuple):
    """One row: id, quantity, value, and what is accepted."""

    id: str
    quantity: str
    value: float
    low: float | None = None
    high: float | None = None


def relative(difference: np.ndarray, whole: np.ndarray) -> float:
    """Return the ratio of Frobenius norms."""
    return float(np.linalg.norm(difference) / np.linalg.norm(whole))


def of_layers(library: Library, seed: int) -> Iterator[Found]:
    """I1, I6, W1: of piecewise linear networks the Hessian of a layer is Gauss-Newton."""
    data = examples(30, seed)
    model = network(DEEP, seed)
    risk = library.risk(model, data)
    hessian, gauss_newton = (library.dense_of(m, risk) for m in ("Hessian", "GaussNewton"))
    difference = np.trace(hessian) - np.trace(gauss_newton)
    yield Found(
        "I1", "|tr Hessian - tr G| / tr G", abs(difference) / np.trace(gauss_newton), high=ROUNDING
    )
    sizes = [d * m + m for d, m in pairwise(DEEP)]
    edges = np.cumsum([0, *sizes])
    blocks = [(hessian - gauss_newton)[a:b, a:b] for a, b in pairwise(edges)]
    largest = max(np.abs(block).max() for block in blocks)
    scale = np.abs(gauss_newton).max()
    yield Found("I1", "largest entry of H within a layer / of G", largest / scale, high=ROUNDING)
    adapter = library.adapter
    layer_blocks = adapter.layerwise(adapter.Hessian(risk), by="module").values()
    errors = [
        relative(library.dense(block) - gauss_newton[a:b, a:b], gauss_newton[a:b, a:b])
        for block, (a, b) in zip(layer_blocks, pairwise(edges), strict=True)
    ]
    yield Found("W1", "|Hessian of a layer - its G| / |G|", max(errors), high=ROUNDING)
    yield from _of_outputs(library, risk, torch.softmax(model(data.inputs), dim=1).detach().numpy())


def _of_outputs(library: Library, risk: Any, probabilities: np.ndarray) -> Iterator[Found]:
    """E[M] of the output layer is the mean of diag(p) - p p^T, which maps 1 to 0."""
    factor = np.asarray(library.adapter.KroneckerFactors(risk, library.output).left)
    curvature = np.diag(probabilities.mean(axis=0))
    curvature -= probabilities.T @ probabilities / len(probabilities)
    yield Found("I6", "|E[M] - E[A]|, output layer", relative(factor - curvature, curvature),
                high=ROUNDING)  # fmt: skip
    yield Found("W1", "|E[M] 1| / |E[M]|", relative(factor.sum(axis=1), factor), high=ROUNDING)
    rank = np.linalg.matrix_rank(factor, tol=1e-10 * np.abs(factor).max())
    yield Found("I6", "rank of E[M], at most C - 1", rank, high=NUM_CLASSES - 1)


def of_one_hidden_layer(library: Library, seed: int) -> Iterator[Found]:
    """I2, and I5 for the Hessian: H in closed form, and Weyl's inequalities."""
    data = examples(30, seed)
    model = network(SHALLOW, seed)
    risk = library.risk(model, data)
    matrices = [library.dense_of(m, risk) for m in ("Hessian", "GaussNewton", "Residual")]
    hessian, gauss_newton, residual = map(np.linalg.eigvalsh, matrices)
    with torch.no_grad():
        active = model[0](data.inputs) > 0
        errors = torch.softmax(model(data.inputs), dim=1) - torch.eye(NUM_CLASSES)[data.labels]
    closed = hidden_layer_residual_eigenvalues(data.inputs, active, errors)
    size = np.abs(closed).max()
    error = np.abs(residual - closed).max() / size
    yield Found("I2", "spectrum of H against singular values", error, high=ROUNDING)
    asymmetry = np.abs(residual + residual[::-1]).max() / size
    yield Found("I2", "asymmetry of spec(H)", asymmetry, high=ROUNDING)
    bound = 2 * (NUM_CLASSES - 1) * SHALLOW[1]
    rank = (np.abs(residual) > 1e-10 * size).sum()
    yield Found("I2", f"rank of H, at most 2 (C - 1) h = {bound}", rank, high=bound)
    margins = (hessian[0] - residual[0], gauss_newton[-1] + residual[-1] - hessian[-1])
    yield Found("I5", "margin of the Hessian's ends, relative", min(margins) / size, low=-ROUNDING)


def of_classes(library: Library, seed: int) -> Iterator[Found]:
    """I3, I4, I5, T1: the four parts of G."""
    risk = library.risk(network(SHALLOW, seed), examples(30, seed))
    structure = library.structure(risk)
    whole = library.dense_of("GaussNewton", risk)
    parts = {part: library.dense(getattr(structure, f"G_{part}")) for part in PARTS}
    error = relative(sum(parts.values()) - whole, whole)
    yield Found("I3", "|sum of four parts - G| / |G|", error, high=ROUNDING)
    every = range(NUM_CLASSES)
    equal = np.asarray(structure.pair_means())[every, every].T * np.diag(structure.pair_weights)
    other = np.asarray(structure.class_means) * structure.class_weights
    yield Found("I4", "|w_c g_c + w_cc g_cc| / |w_c g_c|", relative(equal + other, other),
                high=ROUNDING)  # fmt: skip
    bases = [np.asarray(structure.basis(part)) for part in ("class", "equal")]
    distance = 1 - np.linalg.svd(bases[0].T @ bases[1], compute_uv=False).min()
    yield Found("I4", "1 - least cosine of class and c = c'", distance, high=ROUNDING)
    rank = structure.basis("means").shape[1]
    bound = NUM_CLASSES * (NUM_CLASSES - 1)
    yield Found("T1", f"rank of the parts of means, C (C - 1) = {bound}", rank, bound, bound)
    means = np.linalg.eigvalsh(whole - parts["within"])[::-1]
    levels = [np.linalg.eigvalsh(whole)[::-1], means, np.linalg.eigvalsh(parts["class"])[::-1]]
    margin = min((high - low).min() for high, low in pairwise(levels)) / levels[0][0]
    yield Found("I5", "margin G > means > class means, relative", margin, low=-ROUNDING)
    for part in PARTS[:3]:
        values = structure.eigenvalues(part)
        exact = np.linalg.eigvalsh(parts[part])[::-1][: len(values)]
        error = np.abs(values - exact).max() / levels[0][0]
        yield Found("T1", f"spectrum of {part} from its Gram matrix", error, high=ROUNDING)


def of_few_examples(library: Library, seed: int) -> Iterator[Found]:
    """I8: G has at most n C eigenvalues other than zero."""
    number = 5
    risk = library.risk(network(SHALLOW, seed), examples(number, seed))
    values = np.linalg.eigvalsh(library.dense_of("GaussNewton", risk))
    rank = (np.abs(values) > 1e-10 * values[-1]).sum()
    bound = number * NUM_CLASSES
    yield Found("I8", f"rank of G, at most n C = {bound} of {len(values)}", rank, high=bound)


def of_solvable_model(library: Library, seed: int) -> Iterator[Found]:
    """I7 and T2: the spectrum of logistic regression on Gaussian classes."""
    model = multinomial_logistic_model(5, 50, signal=10.0, error=0.1)
    error = np.abs(np.linalg.eigvalsh(model.matrix())[::-1] - model.eigenvalues()).max()
    yield Found("I7", "theorem 8.1 against the matrix it is about", error, high=1e-8)
    model, *data = designed(3, 8)
    risk = library.risk(torch.zeros(3, 8, dtype=torch.float64), Data(*data))
    structure = library.structure(risk)
    found = np.linalg.eigvalsh(library.dense_of("GaussNewton", risk))[::-1]
    errors = [np.abs(found - model.eigenvalues()).max()]
    for part in PARTS:
        values = np.linalg.eigvalsh(library.dense(getattr(structure, f"G_{part}")))[::-1]
        errors.append(np.abs(values - model.eigenvalues(part)).max())
    yield Found("T2", "theorem 8.1 against G and its parts on data", max(errors), high=1e-8)


FAMILIES = (of_layers, of_few_examples, of_solvable_model, of_one_hidden_layer, of_classes)


def claims(report: Report) -> None:
    """Add a row for each identity, with the values of all libraries and seeds."""
    found: dict[tuple[str, str], list[Found]] = {}
    for library in libraries():
        # JAX compiles every matrix for every network: one of each is enough.
        is_compiled = library.name == "JAX"
        for seed in report.seeds[:1] if is_compiled else report.seeds:
            for family in FAMILIES[-2:] if is_compiled else FAMILIES:
                for one in family(library, seed):
                    found.setdefault((one.id, one.quantity), []).append(one)
    for (id, quantity), ones in sorted(found.items(), key=lambda item: item[0][0]):
        values = [one.value for one in ones]
        report.row(id, quantity, values, low=ones[0].low, high=ones[0].high)


def main(arguments: list[str] | None = None) -> int:
    """Run all rows; return the exit status."""
    return run("exact", [claims], parser(__doc__).parse_args(arguments))


if __name__ == "__main__":
    sys.exit(main())
