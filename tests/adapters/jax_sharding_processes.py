"""One of two processes of jax.distributed: a Hessian divided over both, compared with its own."""

import json
import sys

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from specdens import eigsh, slq
from specdens_jax import CrossEntropy, Hessian, Risk, gradient, risk_value
from tests.adapters.jax_sharding_cases import host, predict, vectors


def relative(found, expected):
    found, expected = np.asarray(found), np.asarray(expected)
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def main(port, rank):
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", 2, rank)
    params, data = host()
    mesh = jax.make_mesh((jax.device_count(),), ("x",))
    divided, everywhere = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("x",), ()))
    many = Risk(
        predict,
        CrossEntropy(),
        jax.device_put(params, everywhere),
        jax.device_put(data, divided),
        sharding=divided,
    )
    one = Risk(predict, CrossEntropy(), *jax.device_put((params, data), jax.local_devices()[0]))
    space, hessian = many.parameters.space, Hessian(many)
    slope, x = gradient(many), vectors(space.dimension, 3)
    options = {"num_probes": 3, "num_steps": 8, "progress": False}
    measure = slq(hessian, **options)
    product = hessian @ space.from_numpy(x)
    found = {
        "devices": jax.device_count(),
        "entries here": sum(shard.data.size for shard in slope.addressable_shards),
        "value": relative(risk_value(many), risk_value(one)),
        "gradient": relative(space.to_numpy(slope), gradient(one)),
        "product": relative(
            space.to_numpy(product), Hessian(one) @ one.parameters.space.from_numpy(x)
        ),
        "nodes": relative(measure.plain().nodes, slq(Hessian(one), **options).plain().nodes),
        "eigenvalues": relative(eigsh(hessian, 2).eigenvalues, eigsh(Hessian(one), 2).eigenvalues),
        "bits": measure.nodes.tobytes().hex(),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
