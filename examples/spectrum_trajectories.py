"""Top of the Hessian over epochs, over sample sizes, and on the line between two solutions.

Three studies of the ReLU network 64-32-10 on real digits, each with a figure:

- *epochs*: the eigenvalues that stand out are one fewer than classes early in training, hold most
  of the gradient, and sink once the training error has dropped (Papyan 2019, arXiv 1811.07062;
  Gur-Ari, Roberts, Dyer 2018, arXiv 1812.04754);
- *samples*: at fixed weights, how many examples the top of the spectrum needs: eigenvalues and
  eigenspace from nested parts of the data, against those of all;
- *basin*: all data as one batch first, then small batches from there. The loss on the line between
  the two solutions has no barrier above the chord; a solution from other initial weights is behind
  one (Sagun et al. 2017, arXiv 1706.04454). The sharpness along the line is shown beside:

    pip install ".[examples]" && python examples/spectrum_trajectories.py

Over epochs and samples each set of eigenpairs starts from the one before (`SpectrumTracker`, or
``start`` of `specdens.eigsh`). The samples study prints the products of a random start beside: for
twelve pairs of so small a matrix, forty products from one random vector are enough, and a start
from the last eigenvectors saves none.

Prints PASS or FAIL for each claim and writes three figures and a JSON file; exits with 1 if a claim
fails. Half a minute on one core. ``--quick`` trains less and looks at fewer places.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn

from specdens import EigenResult, eigsh, subspace_overlap
from specdens_torch import Hessian, Risk, SpectrumHistory, SpectrumTracker
from specdens_torch.paths import LinePath, along_line

NUM_CLASSES = 10
NUM_EIGENVALUES = 12  # a few more than stand out
CROSS_ENTROPY = nn.CrossEntropyLoss()


def digits(num_examples: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return images (N, 64), entries from 0 to 1, and labels (N,), in an order of no meaning."""
    pixels, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))[:num_examples]
    return torch.tensor(pixels[order] / 16), torch.tensor(labels[order])


def network(seed: int) -> nn.Sequential:
    """Return 64-32-10 in float64, He initialization."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, NUM_CLASSES)).double()
    for layer in (model[0], model[2]):
        nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        nn.init.zeros_(layer.bias)
    return model


def sgd(
    model: nn.Module, num_epochs: int, batch_size: int, rate: float, seed: int, momentum: float = 0
) -> Any:
    """Train; yield each epoch's number before it, and the last one after it."""
    images, labels = digits()
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=momentum)
    generator = torch.Generator().manual_seed(seed)
    for epoch in range(num_epochs):
        yield epoch
        for batch in torch.randperm(len(images), generator=generator).split(batch_size):
            optimizer.zero_grad()
            CROSS_ENTROPY(model(images[batch]), labels[batch]).backward()
            optimizer.step()
    yield num_epochs


def finish(training: Any) -> None:
    """Train to the end."""
    for _ in training:
        pass


def gap(eigenvalues: np.ndarray) -> tuple[int, float]:
    """Return after how many of the largest the greatest ratio of neighbors is, and that ratio."""
    ratios = eigenvalues[:-1] / eigenvalues[1:]
    return int(ratios.argmax()) + 1, float(ratios.max())


# Study 1: over epochs.


def over_epochs(epochs: list[int], seed: int) -> SpectrumHistory:
    """Return the top of the Hessian of all data at these epochs."""
    model = network(seed)
    hessian = Hessian(model, CROSS_ENTROPY, digits())
    tracker = SpectrumTracker(hessian, num_eigenvalues=NUM_EIGENVALUES, every=1, max_products=300)
    for epoch in sgd(model, epochs[-1], 64, 0.05, seed, momentum=0.9):
        if epoch in epochs:
            tracker.update(epoch)
    return tracker.history


# Study 2: over sample sizes.


@dataclass(frozen=True)
class Sampled:
    """Top of the Hessian of a part of the data."""

    num_examples: int
    pairs: EigenResult
    cold_products: int  # without the eigenvectors of the part before
    overlap: float  # of the top C - 1 eigenvectors with those of all data


def over_samples(sizes: list[int], seed: int) -> list[Sampled]:
    """Return the top of the Hessian for nested parts of the data, at the weights of epoch 2."""
    model = network(seed)
    finish(sgd(model, 2, 64, 0.05, seed, momentum=0.9))
    found: list[tuple[int, EigenResult, int]] = []
    for size in sizes:
        hessian = Hessian(model, CROSS_ENTROPY, digits(size))
        start = found[-1][1].eigenvectors if found else None
        options: dict[str, Any] = {"tol": 1e-4, "progress": False}
        warm = eigsh(hessian, NUM_EIGENVALUES, start=start, **options)
        cold = eigsh(hessian, NUM_EIGENVALUES, **options).num_products
        found.append((size, warm, cold))
    count = NUM_CLASSES - 1
    last = found[-1][1].eigenvectors[:, -count:]
    return [
        Sampled(size, pairs, cold, float(subspace_overlap(pairs.eigenvectors[:, -count:], last)))
        for size, pairs, cold in found
    ]


# Study 3: the line between two solutions.


@dataclass(frozen=True)
class Basin:
    """Loss and sharpness between large batch, small batch, and a control of other origin."""

    loss: LinePath  # from the large batch's solution to the small batch's
    sharpness: LinePath
    control: LinePath  # loss, from the large batch's solution to that of other initial weights


def basin(num_steps: int, num_epochs: int, num_points: int, seed: int) -> Basin:
    """Train with all data as one batch, go on with batches of 16, and look between."""
    images, labels = digits()
    model, other = network(seed), network(seed + 1000)
    for each in (model, other):
        finish(sgd(each, num_steps, len(images), 0.1, seed))
    risk = Risk(model, CROSS_ENTROPY, (images, labels))
    large = risk.parameters.ravel()
    finish(sgd(model, num_epochs, 16, 0.1, seed))
    small = risk.parameters.ravel()
    far = torch.cat([p.detach().flatten() for p in other.parameters()])
    places = np.linspace(0, 1, num_points)

    def sharpness(at: Risk) -> float:
        return float(eigsh(Hessian(at), 1, tol=1e-3, progress=False).eigenvalues[0])

    return Basin(
        along_line(risk, large, small, places),
        along_line(risk, large, small, places[:: num_points // 5], quantity=sharpness),
        along_line(risk, large, far, places),
    )


# What is printed, claimed and drawn.


def report(history: SpectrumHistory, samples: list[Sampled], between: Basin) -> None:
    """Print all three studies."""
    print(" epoch     lam1     lam9    lam10  gap after  ratio  energy of top 12  products")
    for r in history:
        place, ratio = gap(r.eigenvalues)
        top = r.eigenvalues
        print(
            f"  {r.step:4d} {top[0]:8.3f} {top[8]:8.4f} {top[9]:8.4f}  {place:9d}  {ratio:5.2f}"
            f"  {r.energy:16.1%}  {r.num_products:8d}"
        )
    print("\n examples     lam1     lam9  overlap with all  products, warm  cold")
    for s in samples:
        top = s.pairs.eigenvalues[::-1]
        print(
            f"  {s.num_examples:7d} {top[0]:8.3f} {top[8]:8.4f}  {s.overlap:16.3f}"
            f"  {s.pairs.num_products:14d}  {s.cold_products:4d}"
        )
    print("\n alpha     loss   to other start  sharpness")
    sharp = dict(zip(between.sharpness.alphas.round(9), between.sharpness.values, strict=True))
    for alpha, loss, other in zip(
        between.loss.alphas, between.loss.values, between.control.values, strict=True
    ):
        known = sharp.get(alpha.round(9))
        print(
            f"  {alpha:4.2f} {loss:8.5f}  {other:14.5f}  {'' if known is None else f'{known:9.3f}'}"
        )


def verdicts(history: SpectrumHistory, samples: list[Sampled], between: Basin) -> dict[str, bool]:
    """Print each claim with what was found and what was accepted; return which hold."""
    found: dict[str, bool] = {}

    def claim(name: str, value: float, sign: str, bound: float) -> None:
        holds = bool({">=": value >= bound, "<=": value <= bound, "==": value == bound}[sign])
        found[name] = holds
        print(f"  {name:52s} {value:9.4g}   {sign} {bound:<6g} {'PASS' if holds else 'FAIL'}")

    print()
    early = [r for r in history if r.step in (1, 2)]
    for r in early:
        claim(f"gap in the spectrum, epoch {r.step}", gap(r.eigenvalues)[0], "==", NUM_CLASSES - 1)
        claim(f"ratio at the gap, epoch {r.step}", gap(r.eigenvalues)[1], ">=", 2)
    late = [r.energy for r in history if 5 <= r.step <= 21]
    claim("gradient's energy in the top 12, epochs 5 to 21", min(late), ">=", 0.9)
    tops = history.arrays()["sharpness"]
    claim("sharpness, peak / last epoch", tops.max() / tops[-1], ">=", 1.5)
    for part, bound in ((50, 0.85), (900, 0.99)):
        (overlap,) = (s.overlap for s in samples if s.num_examples == part)
        claim(f"overlap of {part} examples with all", overlap, ">=", bound)
    claim("barrier between large and small batch", float(between.loss.barrier), "<=", 0.01)
    claim("barrier to other initial weights", float(between.control.barrier), ">=", 0.1)
    return found


def draw(
    history: SpectrumHistory, samples: list[Sampled], between: Basin, path: Path
) -> list[Path]:
    """Write one figure for each study."""
    plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "font.size": 10})
    paths = [path.with_name(f"{path.stem}_{name}{path.suffix}") for name in
             ("epochs", "samples", "basin")]  # fmt: skip
    figures = [plt.subplots(1, 2, figsize=(9, 4), layout="constrained") for _ in paths]
    (_, (left, right)), (_, (first, second)), (_, (height, sharp)) = figures
    arrays = history.arrays()
    colors = ["C0"] * (NUM_CLASSES - 1) + ["0.6"] * (NUM_EIGENVALUES - NUM_CLASSES + 1)
    for values, color in zip(arrays["eigenvalues"].T, colors, strict=True):
        left.plot(arrays["step"], values, color=color, linewidth=1, marker=".")
    left.set(title="Largest 12 eigenvalues (blue: 9)", yscale="log", xlabel="epoch")
    right.plot(arrays["step"], arrays["energy"], marker=".", label="gradient's energy")
    right.plot(arrays["step"], arrays["overlap"], marker=".", label="overlap with last time")
    right.set(title="Top eigenspace", xlabel="epoch", ylim=(0, 1.02))
    right.legend(frameon=False)

    sizes = [s.num_examples for s in samples]
    values = np.array([s.pairs.eigenvalues[::-1] for s in samples]).T
    for row, color in zip(values, colors, strict=True):
        first.plot(sizes, row, color=color, linewidth=1, marker=".")
    first.set(title="Largest 12 eigenvalues", xscale="log", yscale="log", xlabel="examples")
    second.plot(sizes, [s.overlap for s in samples], marker=".")
    second.set(title="Overlap of the top 9 with all data's", xscale="log", xlabel="examples")

    height.plot(between.loss.alphas, between.loss.values, label="small batches from there")
    height.plot(between.control.alphas, between.control.values, label="other initial weights")
    height.plot(between.control.alphas, between.control.chord, "k:", linewidth=0.8, label="chord")
    height.set(title="Loss on the line from large batch", xlabel="place on the line")
    height.set_ylim(0, 1.4 * max(between.control.values.max(), between.loss.values.max()))
    height.legend(frameon=False, loc="upper left")
    sharp.plot(between.sharpness.alphas, between.sharpness.values, marker=".")
    sharp.set(title="Sharpness, large to small batch", xlabel="place on the line", ylim=(0, None))
    for (figure, _), place in zip(figures, paths, strict=True):
        figure.savefig(place, dpi=200)
        plt.close(figure)
    return paths


def numbers(history: SpectrumHistory, samples: list[Sampled], between: Basin) -> dict[str, Any]:
    """Return all numbers for JSON."""
    lines = {"loss": between.loss, "sharpness": between.sharpness, "control": between.control}
    return {
        "epochs": history.rows(),
        "samples": [
            {
                "num_examples": s.num_examples,
                "eigenvalues": s.pairs.eigenvalues[::-1].tolist(),
                "overlap": s.overlap,
                "products": {"warm": s.pairs.num_products, "cold": s.cold_products},
            }
            for s in samples
        ],
        "basin": {
            name: {"alphas": line.alphas.tolist(), "values": line.values.tolist()}
            for name, line in lines.items()
        },
    }


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Run the example; return what was found and which claims hold."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="shorter training, fewer places")
    parser.add_argument("--seed", type=int, default=0, help="of weights and order of the batches")
    parser.add_argument("--output", type=Path, default=Path("spectrum_trajectories.png"))
    options = parser.parse_args(arguments)
    quick, seed = options.quick, options.seed

    began = time.perf_counter()
    epochs = [0, 1, 2, 5, 12] if quick else [0, 1, 2, 3, 5, 8, 13, 21, 34, 60]
    history = over_epochs(epochs, seed)
    sizes = [50, 900, 1797] if quick else [25, 50, 100, 200, 400, 900, 1797]
    samples = over_samples(sizes, seed)
    between = basin(*((300, 3, 11) if quick else (2000, 30, 21)), seed)
    report(history, samples, between)
    found = verdicts(history, samples, between)
    paths = draw(history, samples, between, options.output)
    table = options.output.with_suffix(".json")
    content = numbers(history, samples, between) | {"verdicts": found}
    table.write_text(json.dumps(content, indent=1), encoding="utf-8")
    print("\nfigures:", *paths, f"\nnumbers: {table}\n{time.perf_counter() - began:.1f} s")
    return {"history": history, "samples": samples, "basin": between, "verdicts": found}


if __name__ == "__main__":
    sys.exit(0 if all(main()["verdicts"].values()) else 1)
