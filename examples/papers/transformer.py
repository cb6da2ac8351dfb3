"""A sentence encoder of 22.7 million parameters: row P1.9, and its blocks, rows Z1 and Z2.

Papyan (2019, arXiv 1811.07062) proposes Lanczos without reorthogonalization, because it keeps a
few vectors however many steps it takes. Here the vectors that live between products are counted
while MiniLM's Hessian is analyzed. Zhang et al. (2024, arXiv 2402.16788) find that the spectra of
a transformer's blocks differ from block to block, and those of other networks less. Compared is
how the sum of magnitudes is spread over decades below the largest, by the Jensen-Shannon and the
Wasserstein-1 distance: between blocks of MiniLM, and between those of the network on digits. Few
steps do not resolve the lower decades, so the distances depend on their number, equal for both.

The model, its texts and the distances are those of ``examples/transformer_spectrum.py``. Layers 0,
2 and 5 stand for all six, which ``--all-layers`` takes. Some minutes on two cores.
"""

from __future__ import annotations

import gc
import re
import resource
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
from fixtures import digits_training
from report import Report, parser, run

from specdens import Progress, SpectralMeasure, slq
from specdens_torch import Hessian, layerwise

sys.path.append(str(Path(__file__).resolve().parents[1]))
from transformer_spectrum import (
    FULL,
    batches,
    hessian_of,
    jensen_shannon,
    load,
    peak_memory,
    shares,
    train,
)

EPOCHS = (0, 1, 3)  # of the network on digits: untrained, and where outliers and bulk are apart
DECADES = np.linspace(-7, 1, 401)
GIGABYTES = 6
KINDS = {
    "attention.self.query": "query",
    "attention.self.key": "key",
    "attention.self.value": "value",
    "attention.output.dense": "output",
    "attention.output.LayerNorm": "norm",
    "intermediate.dense": "up",
    "output.dense": "down",
    "output.LayerNorm": "norm",
}


def prepare(report: Report) -> tuple[Hessian, torch.nn.Module]:
    """Return the Hessian of the mean loss of a few short texts, and the trained model."""
    small = {"passages": 2, "tokens": 8, "fine_tuning": 0}
    size = replace(FULL, **(small if report.quick else {"passages": 4, "tokens": 16}))
    model, inputs, labels = load(size)
    train(model, inputs, labels, size.fine_tuning)
    return hessian_of(model, batches(inputs, labels)), model


def vectors_alive(dimension: int, itemsize: int) -> float:
    """Return the memory of all tensors of at least `dimension` entries, in vectors."""
    tensors = (x for x in gc.get_objects() if issubclass(type(x), torch.Tensor))
    storages = (x.untyped_storage() for x in tensors if x.layout == torch.strided)
    sizes = {storage.data_ptr(): storage.nbytes() for storage in storages}
    vector = dimension * itemsize
    return sum(size for size in sizes.values() if size >= vector) / vector


def symmetry(hessian: Hessian, seeds: Iterable[int]) -> tuple[list[float], list[float]]:
    """Return ``|u.Hv - v.Hu| / |u.Hv|`` of random vectors, and the seconds of each product."""
    errors, seconds = [], []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        u, v = (torch.randn(hessian.space.dimension, generator=generator) for _ in range(2))
        began = time.perf_counter()
        ends = [(x.double() @ (hessian @ y).double()).item() for x, y in ((u, v), (v, u))]
        seconds.append((time.perf_counter() - began) / 2)
        errors.append(abs(ends[0] - ends[1]) / abs(ends[0]))
    return errors, seconds


def memory_of_lanczos(report: Report, hessian: Hessian) -> None:
    """P1.9: time, symmetry and memory of Lanczos without reorthogonalization."""
    space = hessian.space
    hessian @ torch.ones(space.dimension)  # records its graphs
    errors, seconds = symmetry(hessian, range(1 if report.quick else 3))
    report.row("P1.9", "MiniLM seconds of a product", seconds)
    report.row("P1.9", "MiniLM |u.Hv - v.Hu| over |u.Hv|, float32", errors, high=1e-3)
    num_steps, counts = 3 if report.quick else 30, []
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def look(progress: Progress) -> None:
        if progress.done % 3 == 2:  # at 3 of 3 the run is over, and its vectors are gone
            counts.append(vectors_alive(space.dimension, space.dtype.itemsize))

    measure = slq(
        hessian, num_probes=1, num_steps=num_steps, reorthogonalize=False,
        progress=False, callback=look,
    )  # fmt: skip
    growth = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    unit = 1 if sys.platform == "darwin" else 1024
    vectors = growth * unit / (space.dimension * space.dtype.itemsize)
    when = f"{num_steps} steps"
    report.row("P1.9", f"MiniLM vectors alive between products, {when}", counts, low=1, high=6)
    report.row("P1.9", "MiniLM growth of the peak over that of a product, vectors", vectors)
    report.row("P1.9", "MiniLM peak memory of the process, GB", peak_memory(), high=GIGABYTES)
    report.row("P1.9", "MiniLM largest Ritz value", measure.support[1])


def block_of(name: str) -> str | None:
    """Return the block of a parameter, such as ``query 3``; None for the unused pooler."""
    found = re.fullmatch(r"encoder\.encoder\.layer\.(\d+)\.(.*)\.(weight|bias)", name)
    if found:
        return f"{KINDS[found[2]]} {found[1]}"
    if "pooler" in name:
        return None
    if name.startswith("head"):
        return "head"
    return "norm of embeddings" if "LayerNorm" in name else "embeddings"


def block_spectra(
    hessian: Hessian, blocks: Sequence[str], num_steps: int
) -> dict[str, SpectralMeasure]:
    """Return the spectra of some of MiniLM's blocks, by one probe each."""
    chosen = layerwise(hessian, by=lambda name: b if (b := block_of(name)) in blocks else None)
    return chosen.spectra(num_probes=1, num_steps=num_steps, progress=False)


def pairs(spectra: dict[str, SpectralMeasure]) -> tuple[np.ndarray, np.ndarray]:
    """Return the Jensen-Shannon and the Wasserstein-1 (decades) distances of all pairs."""
    densities = [shares(measure, DECADES) for measure in spectra.values()]
    step = DECADES[1] - DECADES[0]
    found = [
        (jensen_shannon(p, q), step**2 * np.abs(np.cumsum(p - q)).sum())
        for p, q in combinations(densities, 2)
    ]
    jensen, wasserstein = np.array(found).T
    return jensen, wasserstein


def heterogeneity(report: Report, spectra: dict[str, SpectralMeasure], num_steps: int) -> None:
    """Z1, Z2: blocks of MiniLM against blocks of the network on digits."""
    found = pairs(spectra)
    others = [
        pairs(
            layerwise(Hessian(digits_training(seed).risk(epoch))).spectra(
                num_probes=1, num_steps=num_steps, progress=False
            )
        )
        for seed in report.seeds
        for epoch in EPOCHS
    ]
    for i, (id, name) in enumerate((("Z1", "Jensen-Shannon"), ("Z2", "Wasserstein-1, decades"))):
        small = [other[i].mean() for other in others]
        report.row(id, f"MiniLM {name}, mean of {len(found[i])} pairs", found[i].mean())
        report.row(id, f"D {name}, mean of 6 pairs, epochs 0 to 3", small)
        # Equal means would be a ratio of 1; every run of D counts.
        report.row(id, f"{name}, MiniLM over D", found[i].mean() / np.array(small), low=1.0)
    draw_blocks(report, spectra)


def draw_blocks(report: Report, spectra: dict[str, SpectralMeasure]) -> None:
    """Draw how each block's sum of magnitudes is spread over decades, and all distances."""
    densities = [shares(measure, DECADES) for measure in spectra.values()]
    matrix = np.array([[jensen_shannon(p, q) for q in densities] for p in densities])

    def draw(axes: np.ndarray) -> None:
        for name, p in zip(spectra, densities, strict=True):
            kind = name.split()[0]
            style = {"query": "C0", "key": "C1", "value": "C2", "head": "black"}.get(kind, "0.75")
            axes[0].plot(DECADES, p, color=style, lw=1, zorder=1 + (style != "0.75"))
        for kind, style in (("query", "C0"), ("key", "C1"), ("value", "C2"), ("others", "0.75")):
            axes[0].plot([], [], color=style, label=kind)
        axes[0].plot([], [], color="black", label="head")
        axes[0].set(xlabel=r"$\log_{10} |\lambda| / \max |\lambda|$", xlim=(-4.5, 0.8))
        axes[0].set(ylabel=r"density of $\sum |\lambda|$", title="Blocks of MiniLM's Hessian")
        axes[0].legend()
        image = axes[1].imshow(matrix, cmap="viridis", vmin=0)
        axes[1].set_xticks(range(len(spectra)), spectra, rotation=90, fontsize=6)
        axes[1].set_yticks(range(len(spectra)), spectra, fontsize=6)
        axes[1].set_title("Jensen-Shannon distances")
        axes[1].figure.colorbar(image, ax=axes[1])

    report.figure("transformer_blocks", draw, columns=2)


def claims(report: Report) -> None:
    """Add all rows."""
    hessian, model = prepare(report)
    memory_of_lanczos(report, hessian)
    names = dict.fromkeys(block_of(name) for name, _ in model.named_parameters())
    blocks = [name for name in names if name]
    if report.quick:
        blocks = ["query 5", "key 5", "value 5", "down 5", "head"]
    elif not report.options.all_layers:
        blocks = [name for name in blocks if not name[-1].isdigit() or name[-1] in "025"]
    num_steps = 8 if report.quick else 20
    heterogeneity(report, block_spectra(hessian, blocks, num_steps), num_steps)


def main(arguments: list[str] | None = None) -> int:
    """Run the rows; return the exit status."""
    options = parser(__doc__)
    options.add_argument("--all-layers", action="store_true", help="blocks of all six layers")
    return run("transformer", [claims], options.parse_args(arguments))


if __name__ == "__main__":
    sys.exit(main())
