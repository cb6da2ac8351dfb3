"""Time products with the Hessian and the Gauss-Newton matrix: specdens against two libraries.

One number is compared: *gradients per product*, the seconds of a product with a block of columns
divided by the number of columns and by the seconds of one gradient over the same data. README.md
says how to run it.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from networks import PROBLEMS, Problem
from reporting import machine, print_targets, target, versions, write
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import specdens_torch

LOSS = nn.CrossEntropyLoss()
KINDS = ("Hessian", "GaussNewton")
MOST_GRADIENTS = {  # the targets: gradients per product, Hessian and Gauss-Newton
    "MLP": (1.4, 1.3),
    "small CNN": (2.0, 1.8),
    "ResNet-18": (2.5, 2.2),
    "MiniLM": (2.5, 2.2),
}
MIN_SPEEDUP = 2.0
Multiply = Callable[[Tensor], Tensor]


class Contender(NamedTuple):
    """A library, and how it makes ``(problem, kind) -> (n, k) product``."""

    name: str
    module: str
    requirement: str
    operator: Callable[[Problem, str], Multiply]


def ours(problem: Problem, kind: str) -> Multiply:
    operator = getattr(specdens_torch, kind)(problem.model, LOSS, problem.batches)
    return lambda x: operator @ x


def curvlinops(problem: Problem, kind: str) -> Multiply:
    from curvlinops import GGNLinearOperator, HessianLinearOperator

    make = HessianLinearOperator if kind == "Hessian" else GGNLinearOperator
    parameters = list(problem.model.parameters())
    operator = make(problem.model, LOSS, parameters, problem.batches, check_deterministic=False)

    def multiply(x: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):  # which it does not choose by itself
            return operator @ x

    return multiply


def eigenthings(problem: Problem, kind: str) -> Multiply:
    from hessian_eigenthings.operators.ggn import GGNOperator
    from hessian_eigenthings.operators.hessian import HessianOperator

    if kind == "Hessian":
        operator = HessianOperator(
            problem.model, problem.batches, lambda net, batch: LOSS(net(batch[0]), batch[1])
        )
    else:
        operator = GGNOperator(
            problem.model,
            problem.batches,
            lambda net, batch: net(batch[0]),
            lambda outputs, batch: LOSS(outputs, batch[1]),
        )

    def multiply(x: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            return torch.stack([operator.matvec(column) for column in x.T.contiguous()], 1)

    return multiply


OURS = Contender("specdens", "specdens", "specdens", ours)
RIVALS = (
    Contender("curvlinops", "curvlinops", "curvlinops-for-pytorch==3.0.1", curvlinops),
    Contender(
        "hessian-eigenthings",
        "hessian_eigenthings",
        "hessian-eigenthings==1.0.0a5",
        eigenthings,
    ),
)


@dataclass
class Timing:
    """What one contender needed for one matrix; an entry per repeat in the lists."""

    problem: str
    kind: str
    contender: str
    columns: int
    first_seconds: float = float("nan")  # of the first product, with everything it sets up
    seconds: list[float] = field(default_factory=list)
    gradient_seconds: list[float] = field(default_factory=list)
    difference: float | None = None  # from the product of specdens, relative
    failure: str | None = None

    @property
    def seconds_per_product(self) -> float:
        return statistics.median(self.seconds) / self.columns if self.seconds else float("nan")

    @property
    def gradients_per_product(self) -> float:
        """Median over repeats, each divided by the gradients timed beside it."""
        pairs = list(zip(self.seconds, self.gradient_seconds, strict=True))
        if not pairs:
            return float("nan")
        return statistics.median(s / self.columns / g for s, g in pairs)


def full_gradient(problem: Problem) -> None:
    """Compute the gradient of the mean loss over equal batches."""
    parameters = list(problem.model.parameters())
    total = [torch.zeros_like(parameter) for parameter in parameters]
    for inputs, targets in problem.batches:
        loss = LOSS(problem.model(inputs), targets)
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        for block, gradient in zip(total, gradients, strict=True):
            if gradient is not None:
                block.add_(gradient, alpha=1 / len(problem.batches))


def moved(problem: Problem, device: str) -> Problem:
    batches = [(inputs.to(device), targets.to(device)) for inputs, targets in problem.batches]
    return problem._replace(model=problem.model.to(device), batches=batches)


def wait(problem: Problem) -> None:
    """Wait for what a graphics processor has been told to do."""
    device = problem.batches[0][0].device
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(task: Callable[[], Any], problem: Problem) -> float:
    wait(problem)
    start = time.perf_counter()
    task()
    wait(problem)
    return time.perf_counter() - start


def installed_rivals() -> list[Contender]:
    """Return the rivals that can be imported; print how to install the others."""
    present = []
    for rival in RIVALS:
        if importlib.util.find_spec(rival.module) is None:
            print(f"skipped: {rival.name} is not installed (pip install {rival.requirement})")
        else:
            present.append(rival)
    return present


def measure_contender(
    timing: Timing, contender: Contender, problem: Problem, x: Tensor, repeats: int
) -> Tensor:
    """Time the products of one library with `x`, and return the first."""
    multiply = contender.operator(problem, timing.kind)
    results: list[Tensor] = []
    timing.first_seconds = seconds(lambda: results.append(multiply(x)), problem)
    for _ in range(repeats):
        gradients = [seconds(lambda: full_gradient(problem), problem) for _ in range(3)]
        timing.seconds.append(seconds(lambda: multiply(x), problem))
        gradients += [seconds(lambda: full_gradient(problem), problem) for _ in range(3)]
        timing.gradient_seconds.append(statistics.median(gradients))
    return results[0].detach()


def measure_problem(problem: Problem, args: argparse.Namespace) -> list[Timing]:
    """Time all contenders on one network, one after the other in every repeat."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(problem.num_parameters, args.columns, generator=generator).to(args.device)
    timings = []
    for kind in KINDS:
        for contender in (OURS, *installed_rivals()):
            gc.collect()
            columns = args.columns if contender is OURS else args.rival_columns
            timing = Timing(problem.name, kind, contender.name, columns)
            timings.append(timing)
            some = x[:, :columns].contiguous()
            try:
                result = measure_contender(timing, contender, problem, some, args.repeats)
            except (RuntimeError, NotImplementedError, ValueError, TypeError) as error:
                timing.failure = f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
                print(f"  {problem.name}  {kind}  {contender.name}: {timing.failure}", flush=True)
                continue
            if contender is OURS:
                reference = result
            shared = reference[:, :columns]
            timing.difference = float((result - shared).norm() / shared.norm())
            print(
                f"  {problem.name}  {kind}  {contender.name}: "
                f"{timing.gradients_per_product:.2f} gradients per product",
                flush=True,
            )
    return timings


def check_targets(timings: list[Timing]) -> list[dict[str, Any]]:
    """Compare ours with one gradient and with every rival."""
    targets = []
    for mine in (t for t in timings if t.contender == OURS.name):
        most = MOST_GRADIENTS[mine.problem][KINDS.index(mine.kind)]
        cost, where = mine.gradients_per_product, f"{mine.problem}, {mine.kind}"
        what = f"{where}: gradients per product"
        targets.append(target(what, round(cost, 3), f"<= {most}", met=cost <= most))
        for other in timings:
            same = (other.problem, other.kind) == (mine.problem, mine.kind)
            if same and other is not mine and other.seconds:
                speedup = other.seconds_per_product / mine.seconds_per_product
                what = f"{where}: times faster than {other.contender}"
                met = speedup >= MIN_SPEEDUP
                targets.append(target(what, round(speedup, 3), f">= {MIN_SPEEDUP}", met=met))
    return targets


def notes(args: argparse.Namespace) -> list[str]:
    return [
        f"specdens multiplies {args.columns} columns at once, rivals {args.rival_columns}; seconds "
        "per column are compared. The first product, with graphs and checks, is not in the median.",
        "A gradient is one forward and backward over the same batches, timed beside each product.",
        "Rivals run inside sdpa_kernel(MATH), which specdens chooses by itself.",
        "curvlinops: check_deterministic=False. The difference is that of the first product from "
        "the one of specdens.",
    ]


def graphics(device: str) -> dict[str, str]:
    """Return what a graphics processor is called, nothing for the CPU."""
    if not device.startswith("cuda"):
        return {}
    return {"graphics_processor": torch.cuda.get_device_name(device)}


def report(timings: list[Timing], args: argparse.Namespace) -> dict[str, Any]:
    rows = [
        vars(t)
        | {
            "seconds_per_product": t.seconds_per_product,
            "gradients_per_product": t.gradients_per_product,
        }
        for t in timings
    ]
    settings = {name: getattr(args, name) for name in vars(args) if name != "output"}
    names = ["curvlinops-for-pytorch", "hessian-eigenthings", "torch", "transformers"]
    return {
        "benchmark": "products with Hessian and Gauss-Newton matrices, cross-entropy, float32",
        "machine": machine() | {"torch_threads": torch.get_num_threads()} | graphics(args.device),
        "versions": versions(names),
        "settings": settings,
        "notes": notes(args),
        "results": rows,
        "targets": check_targets(timings),
    }


def print_report(result: dict[str, Any]) -> None:
    print(f"\n{result['benchmark']}")
    where = result["machine"]
    print(f"{where['processor']}, {where['torch_threads']} threads")
    print(f"{where.get('graphics_processor', 'no graphics processor')}\n")
    print(f"{'network':<11}{'matrix':<13}{'library':<21}{'ms/product':>11}{'ms/gradient':>13}"
          f"{'gradients/product':>19}{'first, s':>10}{'difference':>12}")  # fmt: skip
    for row in result["results"]:
        line = f"{row['problem']:<11}{row['kind']:<13}{row['contender']:<21}"
        if row["failure"]:
            print(f"{line}  {row['failure']}")
            continue
        gradient = statistics.median(row["gradient_seconds"])
        print(
            f"{line}{1e3 * row['seconds_per_product']:>11.1f}{1e3 * gradient:>13.1f}"
            f"{row['gradients_per_product']:>19.2f}{row['first_seconds']:>10.2f}"
            f"{row['difference']:>12.1e}"
        )
    print_targets(result["targets"], result["notes"])


def main() -> None:
    """Measure, write the JSON file and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--problems", nargs="+", choices=list(PROBLEMS), default=list(PROBLEMS))
    parser.add_argument("--columns", type=int, default=10, help="columns of a product of specdens")
    parser.add_argument("--rival-columns", type=int, default=10, help="columns of the rivals")
    parser.add_argument("--device", default="cpu", help="where models, data and vectors are")
    parser.add_argument("--repeats", type=int, default=5, help="medians are reported")
    default = Path(__file__).parent / "results" / "torch_products.json"
    parser.add_argument("--output", type=Path, default=default, help="JSON file to write")
    args = parser.parse_args()
    timings = []
    for name in args.problems:
        timings += measure_problem(moved(PROBLEMS[name](), args.device), args)
    result = report(timings, args)
    write(result, args.output)
    print_report(result)


if __name__ == "__main__":
    main()
