"""Time spectra on a graphics processor: CuPy against NumPy, and CuPy against torch around torch.

README.md says how to run it. Three operators: the 7-point Laplacian as a sparse matrix of SciPy and
of CuPy, a dense matrix, and the Hessian of a network whose products run in torch while the vectors
are CuPy's (`on_backend`) or torch's own.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cupy
import cupyx.scipy.sparse
import numpy as np
import scipy.sparse
from networks import perceptron
from reporting import machine, versions, write
from torch import nn

from specdens import SpectralMeasure, on_backend, slq
from specdens_torch import Hessian


def laplacian(side: int) -> scipy.sparse.csr_array:
    """Return the 7-point Laplacian of a cube with `side` points along each edge."""
    line = scipy.sparse.diags_array([-1.0, 2.0, -1.0], offsets=[-1, 0, 1], shape=(side, side))
    one = scipy.sparse.eye_array(side)
    pairs = scipy.sparse.kron(line, one) + scipy.sparse.kron(one, line)
    cube = scipy.sparse.kron(pairs, one) + scipy.sparse.kron(scipy.sparse.eye_array(side**2), line)
    return scipy.sparse.csr_array(cube)


def dense(n: int) -> np.ndarray:
    """Return a random symmetric matrix with a semicircle of eigenvalues."""
    matrix = np.random.default_rng(0).standard_normal((n, n)).astype(np.float32)
    return (matrix + matrix.T) / np.float32(np.sqrt(2 * n))


def contenders(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Return operators by problem and by where their vectors are."""
    sparse, matrix, problem = laplacian(args.side), dense(args.dense), perceptron()
    on_gpu = [(x.cuda(), y.cuda()) for x, y in problem.batches]
    hessian = Hessian(problem.model.cuda(), nn.CrossEntropyLoss(), on_gpu)
    return {
        f"Laplacian, n = {sparse.shape[0]:,}": {
            "numpy": sparse,
            "cupy": cupyx.scipy.sparse.csr_matrix(sparse),
        },
        f"dense, n = {args.dense:,}": {"numpy": matrix, "cupy": cupy.asarray(matrix)},
        f"Hessian, n = {hessian.space.dimension:,}": {
            "torch": hessian,
            "cupy": on_backend(hessian, "cupy"),
        },
    }


def timed(run: Callable[[], SpectralMeasure], repeats: int) -> tuple[list[float], SpectralMeasure]:
    """Return the seconds of `repeats` runs after a first one, and a measure."""
    measure = run()
    seconds = []
    for _ in range(repeats):
        cupy.cuda.Device().synchronize()
        start = time.perf_counter()
        measure = run()
        cupy.cuda.Device().synchronize()
        seconds.append(time.perf_counter() - start)
    return seconds, measure


def measured(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Time `slq` on every operator, with and without reorthogonalization."""
    rows = []
    for problem, places in contenders(args).items():
        for kept in (False, True):
            reference = None
            for place, operator in places.items():

                def run(operator: Any = operator, kept: bool = kept) -> SpectralMeasure:
                    options = {"num_probes": args.probes, "num_steps": args.steps}
                    return slq(operator, **options, reorthogonalize=kept, progress=False)

                repeats = 1 if place == "numpy" else args.repeats
                seconds, measure = timed(run, repeats)
                moments = np.array([measure.plain().moment(k).value for k in (1, 2, 3)])
                reference = moments if reference is None else reference
                rows.append(
                    {
                        "problem": problem,
                        "vectors": place,
                        "reorthogonalize": kept,
                        "seconds": seconds,
                        "median": statistics.median(seconds),
                        "difference": float(np.abs(moments / reference - 1).max()),
                    }
                )
                how = "basis kept" if kept else "no basis"
                last = rows[-1]
                print(
                    f"{problem:<24}{place:<7}{how:<12}{last['median']:>9.3f} s   "
                    f"moments differ by {last['difference']:.1e}",
                    flush=True,
                )
    return rows


def main() -> None:
    """Measure, print a line each, and write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--side", type=int, default=100, help="points along an edge of the cube")
    parser.add_argument("--dense", type=int, default=8192, help="size of the dense matrix")
    parser.add_argument("--probes", type=int, default=10)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--repeats", type=int, default=5)
    default = Path(__file__).parent / "results" / "gpu_spectra.json"
    parser.add_argument("--output", type=Path, default=default, help="JSON file to write")
    args = parser.parse_args()
    name = cupy.cuda.runtime.getDeviceProperties(0)["name"].decode()
    print(f"{name}; {args.probes} probes x {args.steps} steps\n")
    rows = measured(args)
    result = {
        "benchmark": "slq on a graphics processor",
        "machine": machine() | {"graphics_processor": name},
        "versions": versions(["cupy-cuda12x", "cupy-cuda13x", "torch", "numpy", "scipy"]),
        "settings": {key: value for key, value in vars(args).items() if key != "output"},
        "results": rows,
    }
    write(result, args.output)


if __name__ == "__main__":
    main()
