"""Time the log-determinant of a sparse matrix: specdens against imate (C++ and OpenMP).

The 7-point Laplacian on a cube, stochastic Lanczos quadrature with the same number of probes and
steps. Reported is *milliseconds per product*: the seconds of the whole estimate over the number of
vectors multiplied. README.md says how to run it.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse
from reporting import machine, print_targets, target, versions, write

import specdens

MIN_SPEEDUP, MIN_SPEEDUP_KEPT, MAX_GROWTH = 1.5, 1.0, 1.25
NOTES = [
    "The same number of samples and steps on both sides, 64-bit numbers unless a row says float32.",
    "Every timing is a whole estimate: probes drawn, Lanczos, quadrature, and in specdens the "
    "sketches that tell repeated eigenvalues from copies. imate is given num_threads. What is done "
    "once for a run makes products of short runs dearer.",
    "One run of each before the timings, so that nothing is compiled or loaded inside them.",
    "With reorthogonalization specdens runs block Lanczos: its probes share one Krylov space, "
    "which costs 16 x 16 inner products per pair of blocks where imate has 16.",
]
FOURS = "specdens, blocks of 4"


def laplacian(side: int) -> scipy.sparse.csr_array:
    """Return the 7-point Laplacian of a cube, n = side**3, zero outside."""
    line = scipy.sparse.diags_array(
        [-1.0, 2.0, -1.0], offsets=[-1, 0, 1], shape=(side, side), dtype=np.float64
    )
    one = scipy.sparse.eye_array(side, dtype=np.float64)
    plane = scipy.sparse.kron(line, one) + scipy.sparse.kron(one, line)
    return (
        scipy.sparse.kron(plane, one) + scipy.sparse.kron(scipy.sparse.kron(one, one), line)
    ).tocsr()


def exact_logdet(side: int) -> float:
    """Return the log-determinant from the eigenvalues, sums of 2 - 2 cos(pi k / (side + 1))."""
    line = 2 - 2 * np.cos(np.pi * np.arange(1, side + 1) / (side + 1))
    return float(np.log(line[:, None, None] + line[:, None] + line).sum())


def ours(
    matrix: Any, probes: int, steps: int, *, kept: bool, block_size: int | None = None
) -> float:
    """Return the log-determinant by specdens; `kept`: with reorthogonalization."""
    measure = specdens.slq(
        matrix, num_probes=probes, num_steps=steps, reorthogonalize=kept, block_size=block_size
    )
    return float(measure.trace(np.log).value)


def imates(matrix: Any, probes: int, steps: int, *, kept: bool, threads: int) -> float:
    """Return the log-determinant by imate."""
    import imate

    value = imate.logdet(
        scipy.sparse.csr_matrix(matrix),
        method="slq",
        min_num_samples=probes,
        max_num_samples=probes,
        lanczos_degree=steps,
        orthogonalize=-1 if kept else 0,
        num_threads=threads,
    )
    return float(value)


def timed(estimates: dict[str, Callable[[], float]], products: int, repeats: int) -> dict[str, Any]:
    """Return milliseconds per product and the last value of every contender, in turns."""
    seconds: dict[str, list[float]] = {name: [] for name in estimates}
    values = {name: estimate() for name, estimate in estimates.items()}  # warms up
    for _ in range(repeats):
        for name, estimate in estimates.items():
            began = time.perf_counter()
            values[name] = estimate()
            seconds[name].append(time.perf_counter() - began)
    return {
        name: {
            "seconds": seconds[name],
            "ms_per_product": 1e3 * statistics.median(seconds[name]) / products,
            "logdet": values[name],
        }
        for name in estimates
    }


def duel(side: int, args: argparse.Namespace, *, kept: bool) -> dict[str, Any]:
    """Time both libraries on one matrix."""
    matrix, p, m = laplacian(side), args.probes, args.steps
    contenders = {"specdens": lambda: ours(matrix, p, m, kept=kept)}
    if kept:  # a block is orthogonal to all its probes' vectors: large ones say more and cost more
        contenders[FOURS] = lambda: ours(matrix, p, m, kept=kept, block_size=4)
    else:
        single = matrix.astype(np.float32)
        contenders["specdens, float32"] = lambda: ours(single, p, m, kept=kept)
    if importlib.util.find_spec("imate") is not None:
        contenders["imate"] = lambda: imates(matrix, p, m, kept=kept, threads=args.threads)
    else:
        print("imate is not installed: its rows are left out")
    rows = timed(contenders, p * m, args.repeats)
    return {"n": side**3, "reorthogonalize": kept, "exact": exact_logdet(side), "rows": rows}


def scaling(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Time specdens alone over sizes and over steps, without reorthogonalization."""
    cases = [(side, args.steps) for side in (22, 46, 100)] + [(46, m) for m in (25, 100)]
    table = []
    for side, steps in cases:
        matrix = laplacian(side)
        run = {"specdens": lambda a=matrix, m=steps: ours(a, args.probes, m, kept=False)}
        row = timed(run, args.probes * steps, args.repeats)["specdens"]
        table.append({"n": side**3, "steps": steps, "ms_per_product": row["ms_per_product"]})
    return table


def check_targets(duels: Sequence[dict[str, Any]], table: Sequence[dict[str, Any]]) -> list[Any]:
    """Return the targets, met or missed."""
    lines = []
    for result in duels:
        rows = result["rows"]
        if "imate" in rows:
            mine = min(rows[name]["ms_per_product"] for name in ("specdens", FOURS) if name in rows)
            ratio = rows["imate"]["ms_per_product"] / mine
            wanted = MIN_SPEEDUP_KEPT if result["reorthogonalize"] else MIN_SPEEDUP
            how = "with" if result["reorthogonalize"] else "without"
            what = f"n = {result['n']}, {how} reorthogonalization: times faster than imate"
            lines.append(target(what, ratio, f">= {wanted}", met=ratio >= wanted))
    same = sorted((row["steps"], row["ms_per_product"]) for row in table if row["n"] == 46**3)
    steps = [cost for _, cost in same]
    growth = max(more / fewer for fewer, more in itertools.combinations(steps, 2))
    what = "cost of a product, 25, 50 and 100 steps: with more over with fewer, largest"
    lines.append(target(what, growth, f"<= {MAX_GROWTH}", met=growth <= MAX_GROWTH))
    return lines


def print_report(result: dict[str, Any]) -> None:
    """Print the tables."""
    print(f"\n{result['benchmark']}\n{result['machine']['processor']}\n")
    print(
        f"{'n':>9}  {'reorthogonalized':<18}{'library':<23}"
        f"{'ms/product':>11}{'logdet':>14}{'exact':>14}"
    )
    for part in result["duels"]:
        for name, row in part["rows"].items():
            print(
                f"{part['n']:>9}  {part['reorthogonalize']!s:<18}{name:<23}"
                f"{row['ms_per_product']:>11.2f}{row['logdet']:>14.1f}{part['exact']:>14.1f}"
            )
    print("\nspecdens alone, without reorthogonalization")
    print(f"{'n':>9}{'steps':>7}{'ms/product':>12}{'ns/product/n':>14}")
    for row in result["scaling"]:
        each = 1e6 * row["ms_per_product"] / row["n"]
        print(f"{row['n']:>9}{row['steps']:>7}{row['ms_per_product']:>12.3f}{each:>14.2f}")
    print_targets(result["targets"], result["notes"])


def main() -> None:
    """Measure, write the JSON file and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--probes", type=int, default=16)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--threads", type=int, default=2, help="of imate")
    parser.add_argument("--repeats", type=int, default=5, help="medians are reported")
    default = Path(__file__).parent / "results" / "sparse.json"
    parser.add_argument("--output", type=Path, default=default, help="JSON file to write")
    args = parser.parse_args()
    duels = [duel(100, args, kept=False), duel(46, args, kept=True)]
    table = scaling(args)
    result = {
        "benchmark": f"log-determinant of the 7-point Laplacian, {args.probes} x {args.steps}",
        "machine": machine(),
        "versions": versions(["imate", "numba", "numpy", "scipy"]),
        "settings": {k: v for k, v in vars(args).items() if k != "output"},
        "notes": NOTES,
        "duels": duels,
        "scaling": table,
        "targets": check_targets(duels, table),
    }
    write(result, args.output)
    print_report(result)


if __name__ == "__main__":
    main()
