"""Count products and seconds for a few eigenpairs: specdens.eigsh against SciPy's (ARPACK).

At equal tolerance: SciPy's is relative to each eigenvalue, so specdens is asked for SciPy's times
the smallest one wanted, and its residuals and eigenvalues are checked. Beside it a stricter
comparison without targets: specdens has to reach the residual that SciPy happened to reach.
README.md says how to run it.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse.linalg
import torch
from networks import perceptron
from reporting import machine, print_targets, target, versions, write
from sklearn.datasets import load_digits

import specdens
from specdens.testing import spiked_spectrum
from specdens_torch import Hessian

MAX_PRODUCTS_RATIO = 1.1
_GROUPS = ("diagonal", "digits", "mnist")
NOTES = [
    "SciPy's default basis; its products are counted by wrapping, and with torch each is a call of "
    "the same operator. Products are means over random starts, seconds medians.",
    "ARPACK's tolerance is relative to each eigenvalue, that of specdens to the norm: specdens is "
    "asked for tol * (smallest wanted eigenvalue) / norm, so that its residuals are within SciPy's "
    "tolerance, too. They are computed anew from the vectors. ARPACK tests for convergence only "
    "every ten products or so, and is then often more accurate than it was asked to be.",
    "'missed' counts eigenvalues of the exact answer that a result lacks. A run that misses some "
    "needs fewer products for a wrong answer: its ratio is shown and no target is set on it.",
    "specdens goes on after convergence until hidden copies are excluded (probability 0.999).",
    "A 'streamed' Hessian keeps no graphs between products, as with data that do not fit the "
    "memory budget: every product evaluates the model on all data again, for all columns.",
]


@dataclass(frozen=True)
class Case:
    """An operator, which end is wanted, and its exact eigenvalues if they are known."""

    name: str
    operator: Any
    which: str
    exact: np.ndarray  # the wanted ones, ascending
    tolerances: Sequence[float] = (1e-6, 1e-10)
    block_sizes: Sequence[int | None] = (None,)

    @property
    def count(self) -> int:
        return len(self.exact)


@dataclass(frozen=True)
class Run:
    """What one call found and cost."""

    eigenvalues: np.ndarray
    residuals: np.ndarray  # of the vectors, computed anew, over the eigenvalues
    products: int  # columns
    seconds: float


def diagonal(values: np.ndarray) -> specdens.LinearOperator:
    """Return a diagonal operator."""
    return specdens.FunctionOperator(
        lambda x: values[:, None] * x if x.ndim == 2 else values * x,
        specdens.VectorSpace.like(values),
        blocks=True,
    )


def line(n: int) -> np.ndarray:
    """Return the eigenvalues of the 1-D Laplacian."""
    return 2 - 2 * np.cos(np.pi * np.arange(1, n + 1) / (n + 1))


def small_hessian(device: str) -> Hessian:
    """Return the Hessian of a small network trained on scikit-learn's digits, in float64."""
    pixels, digits = load_digits(return_X_y=True)
    inputs, targets = torch.tensor(pixels / 16), torch.tensor(digits)
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(64, 128), torch.nn.Tanh(), torch.nn.Linear(128, 10)
    ).double()
    loss = torch.nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    for _ in range(100):
        optimizer.zero_grad()
        loss(model(inputs), targets).backward()
        optimizer.step()
    return Hessian(model.to(device), loss, (inputs.to(device), targets.to(device)))


def diagonal_cases() -> Iterator[Case]:
    """Yield operators whose eigenvalues are known."""
    side = line(20)
    cube = np.sort((side[:, None, None] + side[:, None] + side).ravel())
    triple = np.concatenate([np.linspace(0, 1, 1500), [2.0, 2.0, 2.0]])
    cluster = np.concatenate([np.linspace(0, 1, 1500), 2 + 1e-4 * np.arange(6)])
    yield Case("cube 20^3", diagonal(cube), "LA", cube[-6:])
    yield Case("cube 20^3", diagonal(cube), "SA", cube[:6])
    tops = {"line 2000": line(2000), "spiked": spiked_spectrum()}
    tops |= {"triple top": triple, "clustered top": cluster}
    for name, values in tops.items():
        yield Case(name, diagonal(values), "LA", np.sort(values)[-6:])


def digits_cases(device: str) -> Iterator[Case]:
    """Yield a small Hessian; what is exact comes from SciPy at a far smaller tolerance."""
    hessian = small_hessian(device)
    for which in ("LA", "LM"):
        exact = scipys(hessian, 6, which, 1e-13, 0).eigenvalues
        blocks = (None, 2, 6) if which == "LA" else (None,)
        yield Case("trained Hessian", hessian, which, exact, block_sizes=blocks)


def mnist_cases(device: str) -> Iterator[Case]:
    """Yield the Hessian of the perceptron on 5,000 MNIST digits, in float32."""
    problem, loss = perceptron(), torch.nn.CrossEntropyLoss()
    batches = [(inputs.to(device), targets.to(device)) for inputs, targets in problem.batches]
    model = problem.model.to(device)
    hessian = Hessian(model, loss, batches)
    exact = scipys(hessian, 10, "LA", 1e-5, 0).eigenvalues
    blocks = (None, 2, 4, 10)
    yield Case("MNIST Hessian", hessian, "LA", exact, (1e-4,), blocks)
    hessian.release()
    streamed = Hessian(model, loss, batches, memory_budget=2**22)
    yield Case("MNIST Hessian, streamed", streamed, "LA", exact, (1e-4,), blocks)


def scipys(operator: Any, count: int, which: str, tol: float, seed: int) -> Run:
    """Return what SciPy finds."""
    num_products = 0
    wrapped = specdens.to_scipy(operator)

    def product(x: np.ndarray) -> np.ndarray:
        nonlocal num_products
        num_products += 1
        return wrapped.matvec(x)

    n = wrapped.shape[0]
    counted = scipy.sparse.linalg.LinearOperator(wrapped.shape, product, dtype=wrapped.dtype)
    start = np.random.default_rng(seed).standard_normal(n).astype(wrapped.dtype)
    began = time.perf_counter()
    values, vectors = scipy.sparse.linalg.eigsh(
        counted, count, which=which, tol=tol, v0=start, maxiter=100 * n
    )
    seconds = time.perf_counter() - began
    order = np.argsort(values)
    values, vectors = values[order].astype(float), vectors[:, order]
    return Run(values, residuals(operator, values, vectors), num_products, seconds)


def ours(case: Case, tol: float, block_size: int | None, seed: int) -> Run:
    """Return what specdens finds, `tol` being relative to the norm."""
    operator = case.operator
    began = time.perf_counter()
    result = specdens.eigsh(
        operator, case.count, which=case.which, tol=tol, block_size=block_size, seed=seed
    )
    vectors = operator.space.to_numpy(result.eigenvectors)  # waits for the device
    seconds = time.perf_counter() - began
    relative = residuals(operator, result.eigenvalues, vectors)
    return Run(result.eigenvalues, relative, result.num_products, seconds)


def residuals(operator: Any, values: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    """Return |A u - lambda u| / |lambda| of every pair."""
    products = specdens.to_scipy(operator).matmat(vectors).astype(float)
    return np.linalg.norm(products - vectors * values, axis=0) / np.abs(values)


def missed(run: Run, case: Case, tol: float) -> int:
    """Return how many of the exact eigenvalues a result lacks."""
    return int((errors(run, case) > 1e2 * tol * np.abs(case.exact).max()).sum())


def errors(run: Run, case: Case) -> np.ndarray:
    """Return how far eigenvalues are from the exact ones."""
    return np.abs(np.sort(run.eigenvalues) - case.exact)


def compare(
    case: Case, tol: float, block_size: int | None, theirs: list[Run], mine: list[Run]
) -> dict[str, Any]:
    """Return a row of results, from runs of both."""
    products = statistics.mean(run.products for run in mine)
    scipy_products = statistics.mean(run.products for run in theirs)
    scale = tol * np.abs(case.exact)
    return {
        "case": case.name,
        "which": case.which,
        "block_size": block_size,
        "tol": tol,
        "num_eigenvalues": case.count,
        "scipy_products": scipy_products,
        "products": products,
        "ratio": products / scipy_products,
        "scipy_missed": max(missed(run, case, tol) for run in theirs),
        "missed": max(missed(run, case, tol) for run in mine),
        "scipy_residual": float(max(run.residuals.max() for run in theirs)),
        "residual": float(max(run.residuals.max() for run in mine)),
        "error_over_tolerance": float(max((errors(run, case) / scale).max() for run in mine)),
        "scipy_seconds": statistics.median(run.seconds for run in theirs),
        "seconds": statistics.median(run.seconds for run in mine),
    }


def measure(cases: Iterator[Case], num_starts: int) -> tuple[list[Any], list[Any]]:
    """Run both on every case: the rows at equal tolerance, and those at SciPy's residual."""
    equal, strict = [], []
    for case in cases:
        norm = max(abs(end) for end in specdens.spectral_interval(case.operator))
        smallest = float(np.abs(case.exact).min())
        for tol in case.tolerances:
            theirs = [
                scipys(case.operator, case.count, case.which, tol, seed)
                for seed in range(num_starts)
            ]
            for block_size in case.block_sizes:
                asked = tol * smallest / norm
                mine = [ours(case, asked, block_size, seed) for seed in range(num_starts)]
                equal.append(compare(case, tol, block_size, theirs, mine))
                print(".", end="", flush=True)
            reached = statistics.median(run.residuals.max() for run in theirs)
            asked = max(reached * smallest / norm, 1e-13)
            mine = [ours(case, asked, None, seed) for seed in range(num_starts)]
            strict.append(compare(case, tol, None, theirs, mine))
    return equal, strict


def check_targets(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the targets, met or missed, and the checks of accuracy."""
    lines = []
    speeds: dict[str, list[tuple[float, int]]] = {}
    for row in rows:
        name = f"{row['case']} {row['which']} tol {row['tol']:.0e}"
        if row["block_size"]:
            speed = row["scipy_seconds"] / row["seconds"]
            speeds.setdefault(name, []).append((speed, row["block_size"]))
        elif not row["scipy_missed"]:
            what = f"{name}: products over SciPy's"
            met = row["ratio"] <= MAX_PRODUCTS_RATIO
            lines.append(target(what, row["ratio"], f"<= {MAX_PRODUCTS_RATIO}", met=met))
    for name, each in speeds.items():
        speed, block_size = max(each)
        what = f"{name}: times faster than SciPy, blocks of {block_size} (the fastest)"
        lines.append(target(what, speed, ">= 1", met=speed >= 1))
    worst = max(row["residual"] / row["tol"] for row in rows)
    lines.append(target("all: largest residual over the tolerance", worst, "<= 1", met=worst <= 1))
    worst = max(row["error_over_tolerance"] for row in rows)
    what = "all: largest error of an eigenvalue over the tolerance"
    lines.append(target(what, worst, "<= 1", met=worst <= 1))
    lost = sum(row["missed"] for row in rows)
    lines.append(target("all: eigenvalues missed", lost, "0", met=lost == 0))
    return lines


def print_rows(title: str, rows: list[dict[str, Any]]) -> None:
    """Print one table."""
    print(
        f"\n{title}\n{'case':<25}{'which':<6}{'block':>6}{'tol':>8}{'SciPy':>8}{'ours':>8}"
        f"{'ratio':>7}{'SciPy missed':>14}{'missed':>8}{'SciPy res.':>12}{'residual':>10}"
        f"{'SciPy s':>9}{'ours s':>8}"
    )
    for row in rows:
        print(
            f"{row['case']:<25}{row['which']:<6}{row['block_size'] or '-':>6}{row['tol']:>8.0e}"
            f"{row['scipy_products']:>8.1f}{row['products']:>8.1f}{row['ratio']:>7.2f}"
            f"{row['scipy_missed']:>14}{row['missed']:>8}{row['scipy_residual']:>12.1e}"
            f"{row['residual']:>10.1e}{row['scipy_seconds']:>9.3f}{row['seconds']:>8.3f}"
        )


def main() -> None:
    """Measure, write the JSON file and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--starts", type=int, default=3, help="random starts of each")
    parser.add_argument("--device", default="cpu", help="where the Hessians are")
    parser.add_argument("--only", nargs="+", choices=_GROUPS, default=_GROUPS)
    default = Path(__file__).parent / "results" / "eigenpairs.json"
    parser.add_argument("--output", type=Path, default=default, help="JSON file to write")
    args = parser.parse_args()

    def cases() -> Iterator[Case]:
        if "diagonal" in args.only:
            yield from diagonal_cases()
        if "digits" in args.only:
            yield from digits_cases(args.device)
        if "mnist" in args.only:
            yield from mnist_cases(args.device)

    graphics = {}
    if args.device.startswith("cuda"):
        graphics["graphics_processor"] = torch.cuda.get_device_name(args.device)
    equal, strict = measure(cases(), args.starts)
    result = {
        "benchmark": "a few eigenpairs at equal tolerance",
        "machine": machine() | {"torch_threads": torch.get_num_threads()} | graphics,
        "versions": versions(["scipy", "numpy", "torch"]),
        "settings": {"starts": args.starts, "device": args.device, "only": args.only},
        "notes": NOTES,
        "results": equal,
        "at_scipys_residual": strict,
        "targets": check_targets(equal),
    }
    write(result, args.output)
    print(f"\n{result['benchmark']}\n{result['machine']['processor']}")
    print_rows("equal tolerance; residuals over eigenvalues", equal)
    print_rows("as accurate as SciPy happened to be; no targets", strict)
    print_targets(result["targets"], result["notes"])


if __name__ == "__main__":
    main()
