"""Say where the time of a product goes: its arithmetic beside a gradient's, and all that is not.

Beside what `torch_products.py` times, for every network, matrix and library: the floating-point
operations of matrix products and convolutions that one column takes, over those of one gradient
(counted with torch's formulas, not timed), and how the seconds divide between these
operators and everything else (torch's profiler). A product cannot take fewer gradients than its
arithmetic, unless that runs faster than a gradient's. README.md says how to run it.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from networks import PROBLEMS, Problem
from reporting import machine, versions, write
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from torch_products import (
    KINDS,
    OURS,
    Timing,
    check_targets,
    full_gradient,
    installed_rivals,
    seconds,
)

# Operators that do the arithmetic which FlopCounterMode counts, by parts of their names.
ARITHMETIC = ("::mm", "::addmm", "::bmm", "::baddbmm", "convolution", "conv2d", "dot_product")


class Operations(TorchDispatchMode):
    """Adds up the floating-point operations of matrix products and convolutions.

    As `torch.utils.flop_counter.FlopCounterMode` does, without its hooks on modules, which
    `torch.func.vmap` around a backward pass does not allow.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        count = flop_registry.get(func._overloadpacket)
        if count is not None:
            self.total += count(*args, **kwargs, out_val=result)
        return result


def operations(task: Callable[[], Any]) -> int:
    """Return the floating-point operations of matrix products and convolutions in `task`."""
    with Operations() as counter:
        task()
    return counter.total


def divided_time(task: Callable[[], Any]) -> dict[str, Any]:
    """Return the seconds of `task` by kind of operator, and the five operators that take most."""
    with profile(activities=[ProfilerActivity.CPU]) as record:
        task()
    own = {e.key: (1e-6 * e.self_cpu_time_total, e.count) for e in record.key_averages()}
    largest = sorted(own.items(), key=lambda item: -item[1][0])[:5]
    arithmetic = sum(s for name, (s, _) in own.items() if any(part in name for part in ARITHMETIC))
    total = sum(s for s, _ in own.values())
    return {
        "profiled_seconds": total,
        "arithmetic_seconds": arithmetic,
        "largest": {name: {"seconds": s, "calls": calls} for name, (s, calls) in largest},
    }


def timed(task: Callable[[], Any], problem: Problem, repeats: int) -> float:
    return statistics.median(seconds(task, problem) for _ in range(repeats))


def measured(problem: Problem, args: argparse.Namespace) -> dict[str, Any]:
    """Profile the gradient of one network and the products of every library."""

    def gradient() -> None:
        full_gradient(problem)

    gradient()
    count, once = operations(gradient), timed(gradient, problem, args.repeats)
    result = {
        "problem": problem.name,
        "gradient": {"operations": count, "seconds": once} | divided_time(gradient),
        "products": [],
    }
    print(f"{problem.name}: a gradient takes {count:.2e} operations, {1e3 * once:.1f} ms")
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(problem.num_parameters, args.columns, generator=generator)
    for kind in KINDS:
        for contender in (OURS, *installed_rivals()):
            multiply = contender.operator(problem, kind)
            multiply(x)  # with everything it sets up

            def product(multiply: Callable[[Any], Any] = multiply) -> None:
                multiply(x)

            row = {
                "kind": kind,
                "contender": contender.name,
                "operations": operations(product) / args.columns / count,  # in gradients
                "gradients": timed(product, problem, args.repeats) / args.columns / once,
            } | divided_time(product)
            result["products"].append(row)
            share = row["arithmetic_seconds"] / row["profiled_seconds"]
            print(
                f"  {kind:<12}{contender.name:<20} arithmetic of {row['operations']:.2f} gradients,"
                f" time of {row['gradients']:.2f}; {share:.0%} of it arithmetic",
                flush=True,
            )
    return result


def targets(results: list[dict[str, Any]], columns: int) -> list[dict[str, Any]]:
    """Return the targets of `torch_products.py`, checked on what was timed here."""
    timings = []
    for problem in results:
        once = problem["gradient"]["seconds"]
        for row in problem["products"]:
            timing = Timing(problem["problem"], row["kind"], row["contender"], columns)
            timing.seconds.append(row["gradients"] * once * columns)
            timing.gradient_seconds.append(once)
            timings.append(timing)
    return check_targets(timings)


def main() -> None:
    """Measure, print a line each, and write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--problems", nargs="+", choices=list(PROBLEMS), default=list(PROBLEMS))
    parser.add_argument("--columns", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=3)
    default = Path(__file__).parent / "results" / "profile_products.json"
    parser.add_argument("--output", type=Path, default=default, help="JSON file to write")
    args = parser.parse_args()
    results = [measured(PROBLEMS[name](), args) for name in args.problems]
    names = ["curvlinops-for-pytorch", "hessian-eigenthings", "torch", "transformers"]
    result = {
        "benchmark": "arithmetic of a product, in gradients, beside its time",
        "machine": machine() | {"torch_threads": torch.get_num_threads()},
        "versions": versions(names),
        "settings": {name: getattr(args, name) for name in vars(args) if name != "output"},
        "notes": [
            "Arithmetic: floating-point operations of matrix products and convolutions per column, "
            "over those of one gradient on the same batches (torch.utils.flop_counter).",
            "The shares of time are from torch's profiler, which slows small operators down.",
        ],
        "results": results,
        "targets": targets(results, args.columns),
    }
    write(result, args.output)


if __name__ == "__main__":
    main()
