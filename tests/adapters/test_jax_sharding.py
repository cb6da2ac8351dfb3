"""Sharded vectors, parameters and data: in processes of their own, whose CPU is many devices."""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("jax")

ROOT = Path(__file__).parents[2]
SECONDS = 600  # four minutes where two cores are shared with other work


def environment(num_devices):
    paths = [str(ROOT), str(ROOT / "adapters"), os.environ.get("PYTHONPATH", "")]
    return os.environ | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={num_devices}",
        "JAX_PLATFORMS": "cpu",
        "JAX_ENABLE_X64": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "num_devices"), [("jax_sharding_cases.py", 8), ("test_jax_explicit_axes.py", 4)]
)
def test_on_many_devices(file, num_devices):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", ""]
    command.append(f"tests/adapters/{file}")
    env = environment(num_devices)
    run = subprocess.run(
        command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=SECONDS
    )
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
    assert re.search(r"\b\d+ passed", run.stdout)
    assert "skipped" not in run.stdout


@pytest.mark.slow
def test_on_two_processes_of_four_devices():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    script = [sys.executable, str(ROOT / "tests/adapters/jax_sharding_processes.py"), str(port)]
    processes = [
        subprocess.Popen(
            [*script, str(rank)], env=environment(4), stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True,
        )
        for rank in (0, 1)
    ]  # fmt: skip
    try:
        outputs = [process.communicate(timeout=SECONDS / 4) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (_, errors) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, errors[-4000:]
    first, second = (json.loads(out.strip().splitlines()[-1]) for out, _ in outputs)
    assert first["devices"] == 8
    assert first["entries here"] == 800  # half of the vector, on four devices
    for what in ("value", "gradient", "product", "nodes", "eigenvalues"):
        assert 0 <= first[what] < 1e-10, what
    assert first["bits"] == second["bits"]


@pytest.mark.slow
def test_the_example(tmp_path):
    env = environment(1)
    del env["XLA_FLAGS"], env["JAX_ENABLE_X64"]
    command = [sys.executable, str(ROOT / "examples/sharded_hessian.py"), "--quick"]
    run = subprocess.run(
        command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=SECONDS / 2
    )
    assert run.returncode == 0, run.stderr[-4000:]
    many, one = re.search(r"bytes/device +([\d,]+) +([\d,]+)", run.stdout).groups()
    assert int(many.replace(",", "")) * 8 == int(one.replace(",", ""))
    assert float(re.search(r"the largest: (\S+)", run.stdout)[1]) < 1e-4  # float32
