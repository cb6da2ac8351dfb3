"""Does a Hessian divided over devices have the spectrum of that on one, and what does each hold?

Trains a small network on 1,797 handwritten digits, divides the examples and the vectors over the
devices, and compares the spectrum and the bytes on a device with those of one device:

    pip install ".[examples,jax]" && python examples/sharded_hessian.py

Started as a script, a CPU pretends to be eight devices. Some ten seconds; ``--quick`` is a smaller
run of the same.
"""

from __future__ import annotations

import argparse
import os
from typing import Any

if __name__ == "__main__":  # the number of devices is fixed when jax starts
    _FLAG = "--xla_force_host_platform_device_count=8"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_FLAG}"

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from sklearn.datasets import load_digits

from specdens import SpectralMeasure, slq
from specdens_jax import CrossEntropy, Hessian, Risk

Params = dict[str, jax.Array]
WIDTH = 64  # 64 * 64 + 64 + 64 * 16 = 5184 parameters, a multiple of eight
NUM_OUTPUTS = 16  # ten classes and six that never occur


def digits() -> tuple[np.ndarray, np.ndarray]:
    """Return the images, (1792, 64) with entries up to 1, and labels: a multiple of 8 examples."""
    images, labels = load_digits(return_X_y=True)
    return (images / 16).astype(np.float32)[:1792], labels.astype(np.int32)[:1792]


def predict(params: Params, images: jax.Array) -> jax.Array:
    """Return the logits of a perceptron."""
    hidden = jnp.tanh(images @ params["hidden"] + params["bias"])
    return hidden @ params["output"]


def mean_loss(params: Params, images: jax.Array, labels: jax.Array) -> jax.Array:
    """Return the mean cross-entropy."""
    return CrossEntropy()(predict(params, images), labels)[0].mean()


def train(images: np.ndarray, labels: np.ndarray, num_steps: int) -> Params:
    """Return the parameters after some steps of gradient descent with momentum on all data."""
    rng = np.random.default_rng(0)
    shapes = {"hidden": (64, WIDTH), "bias": (WIDTH,), "output": (WIDTH, NUM_OUTPUTS)}
    draw = {name: rng.uniform(-0.1, 0.1, shape) for name, shape in shapes.items()}
    params = jax.tree.map(lambda array: jnp.asarray(array, jnp.float32), draw)
    velocity = jax.tree.map(jnp.zeros_like, params)
    slope = jax.jit(jax.grad(mean_loss))
    for _ in range(num_steps):
        velocity = jax.tree.map(lambda v, g: 0.9 * v + g, velocity, slope(params, images, labels))
        params = jax.tree.map(lambda p, v: p - 0.05 * v, params, velocity)
    return params


def spectrum(risk: Risk, num_steps: int) -> tuple[SpectralMeasure, int]:
    """Return the spectral measure, and the most bytes of Lanczos vectors on any device."""
    most = 0

    def look(progress: Any) -> None:
        nonlocal most
        held: dict[Any, int] = {}
        for array in getattr(progress.state.current, "basis", ()):
            for shard in array.addressable_shards:
                held[shard.device] = held.get(shard.device, 0) + shard.data.nbytes
        most = max(most, *held.values()) if held else most

    measure = slq(
        Hessian(risk),
        num_probes=4,
        num_steps=num_steps,
        block_size=4,
        reorthogonalize=True,
        progress=False,
        callback=look,
    )
    return measure, most


def report(many: SpectralMeasure, one: SpectralMeasure, held: tuple[int, int]) -> float:
    """Print both side by side; return the largest difference of nodes, relative to the largest."""
    scale = float(np.abs(one.plain().nodes).max())
    difference = float(np.abs(many.plain().nodes - one.plain().nodes).max()) / scale
    tops = [np.sort(measure.outliers.eigenvalues)[::-1] for measure in (many, one)]
    shown = range(min(4, *(len(top) for top in tops)))
    rows = [(f"eigenvalue {i + 1}", float(tops[0][i]), float(tops[1][i])) for i in shown]
    rows.append(("trace", float(many.trace().value), float(one.trace().value)))
    print(f"{'':24}{jax.device_count():2} devices     one device")
    for name, there, here in rows:
        print(f"{name:22}{there:13.6f}  {here:13.6f}")
    print(f"{'vectors, bytes/device':22}{held[0]:13,}  {held[1]:13,}")
    print(f"largest difference of nodes, relative to the largest: {difference:.1e}")
    return difference


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Run the example; return the numbers it printed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer steps")
    options = parser.parse_args(arguments)
    num_epochs, num_steps = (50, 10) if options.quick else (300, 40)

    data = digits()
    params = train(*data, num_epochs)
    mesh = jax.make_mesh((jax.device_count(),), ("x",))
    divided = NamedSharding(mesh, PartitionSpec("x"))
    everywhere = NamedSharding(mesh, PartitionSpec())
    many = Risk(
        predict,
        CrossEntropy(),
        jax.device_put(params, everywhere),
        jax.device_put(data, divided),  # along the first axis: the examples
        sharding=divided,  # along the first axis: the entries of vectors
    )
    here, held_many = spectrum(many, num_steps)
    there, held_one = spectrum(Risk(predict, CrossEntropy(), params, data), num_steps)
    difference = report(here, there, (held_many, held_one))
    return {
        "difference": difference,
        "devices": jax.device_count(),
        "bytes": (held_many, held_one),
        "measure": here,
    }


if __name__ == "__main__":
    main()
