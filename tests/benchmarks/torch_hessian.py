"""Time the spectral density of a network's Hessian: specdens against three other libraries.

One number is compared: *gradients per product all told*, the seconds of a whole density estimate
(set-up, Hessian products, Lanczos, quadrature) divided by its number of Hessian-vector products
and by the seconds of one gradient over the same batches. README.md says how to run it.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from networks import Batches, batches_of, load_digits, perceptron
from reporting import machine, print_targets, versions, write
from torch import Tensor, nn

import specdens
import specdens_torch

Estimate = Callable[[nn.Module, Batches, int, int], float | None]

LOSS = nn.CrossEntropyLoss()
LAYOUTS = {"1 x 5000": 5000, "5 x 1000": 1000, "50 x 100": 100}  # name -> examples in a batch
GRID_BOUNDARIES = (-1.0, 10.0)  # curvlinops' plot range; giving it saves its ARPACK products
WARM_UP_STEPS = 5
MIN_SPEEDUP, MAX_GRADIENTS, MAX_SPREAD = 2.0, 1.5, 1.5  # the targets, printed and never asserted


class Contender(NamedTuple):
    """A library and its own density routine, ``estimate(model, batches, probes, steps)``."""

    name: str
    module: str
    distribution: str
    requirement: str
    estimate: Estimate


@dataclass
class Timing:
    """What one contender needed on one layout; one entry per repeat in the lists."""

    layout: str
    contender: str
    products: int
    seconds: list[float] = field(default_factory=list)
    gradient_seconds: list[float] = field(default_factory=list)
    largest_ritz_value: float | None = None

    @property
    def seconds_per_product(self) -> float:
        return statistics.median(self.seconds) / self.products

    @property
    def gradients_per_product(self) -> float:
        """Median over repeats, each divided by the gradients timed in that same repeat."""
        pairs = zip(self.seconds, self.gradient_seconds, strict=True)
        return statistics.median(s / self.products / g for s, g in pairs)


# Contenders: each returns the largest Ritz value where its library shows it, so that agreement
# on the operator can be seen in the results.


def run_specdens(model: nn.Module, batches: Batches, probes: int, steps: int) -> float:
    operator = specdens_torch.Hessian(model, LOSS, batches)
    measure = specdens.slq(operator, num_probes=probes, num_steps=steps, progress=False)
    return float(np.max(measure.nodes))


def run_eigenthings(model: nn.Module, batches: Batches, probes: int, steps: int) -> float:
    from hessian_eigenthings.algorithms.spectral_density import spectral_density
    from hessian_eigenthings.operators.hessian import HessianOperator

    operator = HessianOperator(model, batches, lambda net, batch: LOSS(net(batch[0]), batch[1]))
    result = spectral_density(operator, num_runs=probes, lanczos_steps=steps)
    return float(result.raw_eigenvalues.max())


def run_curvlinops(model: nn.Module, batches: Batches, probes: int, steps: int) -> None:
    from curvlinops import HessianLinearOperator
    from curvlinops.papyan2020traces.spectrum import lanczos_approximate_spectrum

    parameters = list(model.parameters())
    # The determinism check would cost two gradients and two products that nobody asked for here.
    operator = HessianLinearOperator(model, LOSS, parameters, batches, check_deterministic=False)
    lanczos_approximate_spectrum(operator, steps, num_repeats=probes, boundaries=GRID_BOUNDARIES)


def run_pyhessian(model: nn.Module, batches: Batches, probes: int, steps: int) -> float:
    from pyhessian import hessian

    torch.eig = _symmetric_eig  # PyPI's 0.1 calls it; torch has removed it
    single = len(batches) == 1  # its fast path: the gradient's graph is kept for the whole run
    source = {"data": batches[0]} if single else {"dataloader": batches}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # backward(create_graph=True) leaks
        eigenvalues, _ = hessian(model, LOSS, cuda=False, **source).density(steps, n_v=probes)
    model.zero_grad(set_to_none=True)
    return float(np.max(eigenvalues))


def _symmetric_eig(matrix: Tensor, eigenvectors: bool) -> tuple[Tensor, Tensor]:
    values, vectors = torch.linalg.eigh(matrix)
    return torch.stack([values, torch.zeros_like(values)], dim=1), vectors


OURS = Contender("specdens", "specdens", "specdens", "specdens", run_specdens)
RIVALS = [
    Contender(
        "hessian-eigenthings",
        "hessian_eigenthings",
        "hessian-eigenthings",
        "hessian-eigenthings==1.0.0a5",
        run_eigenthings,
    ),
    Contender(
        "curvlinops",
        "curvlinops",
        "curvlinops-for-pytorch",
        "curvlinops-for-pytorch==3.0.1",
        run_curvlinops,
    ),
    Contender("PyHessian", "pyhessian", "pyhessian", "--no-deps pyhessian==0.1", run_pyhessian),
]


def installed_rivals() -> list[Contender]:
    """Return the rivals that can be imported; print how to install the others."""
    present = []
    for rival in RIVALS:
        if importlib.util.find_spec(rival.module) is None:
            print(f"skipped: {rival.name} is not installed (pip install {rival.requirement})")
        else:
            present.append(rival)
    return present


# The problem and the yardstick.


def full_gradient(model: nn.Module, batches: Batches) -> list[Tensor]:
    """Return the gradient of the mean loss over equal batches: one forward and backward each."""
    parameters = list(model.parameters())
    total = [torch.zeros_like(parameter) for parameter in parameters]
    for inputs, targets in batches:
        gradients = torch.autograd.grad(LOSS(model(inputs), targets), parameters)
        torch._foreach_add_(total, gradients, alpha=1 / len(batches))
    return total


def seconds(task: Callable[[], Any]) -> float:
    start = time.perf_counter()
    task()
    return time.perf_counter() - start


# The measurement.


def measure_round(
    model: nn.Module,
    batches: Batches,
    entries: Sequence[tuple[Contender, int, Timing]],
    args: argparse.Namespace,
) -> None:
    """Run every contender once, with gradients timed before, between and after them."""

    def time_gradients() -> list[float]:
        return [seconds(lambda: full_gradient(model, batches)) for _ in range(args.gradients)]

    gradients = time_gradients()
    for contender, probes, timing in entries:
        gc.collect()
        start = time.perf_counter()
        largest = contender.estimate(model, batches, probes, args.steps)
        timing.seconds.append(time.perf_counter() - start)
        timing.largest_ritz_value = largest
        gradients += time_gradients()
        print(f"  {timing.layout}  {contender.name}: {timing.seconds[-1]:.1f} s", flush=True)
    for _, _, timing in entries:
        timing.gradient_seconds.append(statistics.median(gradients))


def measure(args: argparse.Namespace) -> list[Timing]:
    """Time all contenders on all layouts, interleaved so that drifting load hits all alike."""
    data, model = load_digits(), perceptron().model
    probes = {OURS: args.probes} | dict.fromkeys(installed_rivals(), args.rival_probes)
    layouts = {name: batches_of(data, size) for name, size in LAYOUTS.items()}
    entries = {
        layout: [(c, p, Timing(layout, c.name, p * args.steps)) for c, p in probes.items()]
        for layout in layouts
    }
    for batches in layouts.values():
        full_gradient(model, batches)
        for contender in probes:
            contender.estimate(model, batches, 1, WARM_UP_STEPS)
    for repeat in range(args.repeats):
        print(f"repeat {repeat + 1} of {args.repeats}", flush=True)
        for layout, batches in layouts.items():
            measure_round(model, batches, entries[layout], args)
    return [timing for rows in entries.values() for _, _, timing in rows]


# The report.


def check_targets(timings: Sequence[Timing]) -> list[dict[str, Any]]:
    """Compare ours with the fastest rival, with one gradient and with itself across layouts."""
    ours = {t.layout: t for t in timings if t.contender == OURS.name}
    targets = []
    for layout, mine in ours.items():
        rivals = [t for t in timings if t.layout == layout and t is not mine]
        if rivals:
            best = min(rivals, key=lambda t: t.seconds_per_product)
            speedup = best.seconds_per_product / mine.seconds_per_product
            what = f"{layout}: times faster than the fastest rival ({best.contender})"
            targets.append(_target(what, speedup, f">= {MIN_SPEEDUP}", speedup >= MIN_SPEEDUP))
        cost = mine.gradients_per_product
        what = f"{layout}: gradients per product"
        targets.append(_target(what, cost, f"<= {MAX_GRADIENTS}", cost <= MAX_GRADIENTS))
    per_product = [t.seconds_per_product for t in ours.values()]
    spread = max(per_product) / min(per_product)
    what = "slowest layout over fastest layout, seconds per product"
    targets.append(_target(what, spread, f"<= {MAX_SPREAD}", spread <= MAX_SPREAD))
    return targets


def _target(what: str, value: float, wanted: str, met: bool) -> dict[str, Any]:
    return {"what": what, "value": round(value, 3), "wanted": wanted, "met": met}


def notes(args: argparse.Namespace) -> list[str]:
    return [
        f"specdens runs {args.probes} probes x {args.steps} steps, every rival "
        f"{args.rival_probes} x {args.steps}: seconds per product are compared.",
        "Set-up is inside every timing: operator, graphs, Lanczos, quadrature, density.",
        f"curvlinops is given grid boundaries {GRID_BOUNDARIES}, which spares it the ARPACK "
        "products it would spend by default, and check_deterministic=False.",
        "PyHessian 0.1 calls the removed torch.eig: one function is put in its place. With a "
        "single batch it keeps the graph of the gradient for the whole run.",
        "A gradient is one forward and backward over the same batches as the row it stands in.",
    ]


def report(timings: Sequence[Timing], args: argparse.Namespace) -> dict[str, Any]:
    rows = [
        vars(t)
        | {
            "seconds_per_product": t.seconds_per_product,
            "gradients_per_product": t.gradients_per_product,
        }
        for t in timings
    ]
    settings = {name: getattr(args, name) for name in vars(args) if name != "output"}
    return {
        "benchmark": "stochastic Lanczos density of the Hessian, MLP 784-128-64-10 (109,386 "
        "parameters, float32), cross-entropy, 5,000 MNIST digits",
        "machine": machine()
        | {
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "torch_threads": torch.get_num_threads(),
        },
        "versions": versions([r.distribution for r in RIVALS] + ["torch", "numpy", "scipy"]),
        "settings": settings,
        "notes": notes(args),
        "results": rows,
        "targets": check_targets(timings),
    }


def print_report(result: dict[str, Any]) -> None:
    print(f"\n{result['benchmark']}")
    where, torch_version = result["machine"], result["versions"]["torch"]
    print(f"{where['processor']}, {where['torch_threads']} threads, torch {torch_version}\n")
    print(f"{'layout':<10}{'library':<22}{'products':>9}{'ms/product':>12}{'ms/gradient':>13}"
          f"{'gradients/product':>19}{'largest':>10}")  # fmt: skip
    for row in result["results"]:
        gradient = statistics.median(row["gradient_seconds"])
        largest = row["largest_ritz_value"]
        print(
            f"{row['layout']:<10}{row['contender']:<22}{row['products']:>9}"
            f"{1e3 * row['seconds_per_product']:>12.1f}{1e3 * gradient:>13.1f}"
            f"{row['gradients_per_product']:>19.2f}"
            f"{'-' if largest is None else format(largest, '.4f'):>10}"
        )
    print_targets(result["targets"], result["notes"])


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--probes", type=int, default=10, help="probes of specdens")
    parser.add_argument("--rival-probes", type=int, default=2, help="probes of every rival")
    parser.add_argument("--steps", type=int, default=50, help="Lanczos steps of every probe")
    parser.add_argument("--repeats", type=int, default=3, help="rounds; medians are reported")
    parser.add_argument("--gradients", type=int, default=5, help="gradients between contenders")
    default = Path(__file__).parent / "results" / "torch_hessian.json"
    parser.add_argument("--output", type=Path, default=default, help="JSON file to write")
    return parser.parse_args()


def main() -> None:
    """Measure, write the JSON file and print the table."""
    args = parse_arguments()
    result = report(measure(args), args)
    write(result, args.output)
    print_report(result)


if __name__ == "__main__":
    main()
