"""``python -m specdens``: what it finds and prints, and that it fails when something is wrong."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from specdens import __main__ as command
from specdens import selftest
from specdens.backends import get_backend
from tests.cases import home, import_library, move

HERE = {"numpy", "strict"}  # quick to import and to run


@pytest.fixture
def few(monkeypatch):
    """Let the command find two libraries only."""
    found = [library for library in selftest.found_backends() if library.name in HERE]
    monkeypatch.setattr(command, "found_backends", lambda: found)


def test_the_chain_has_the_eigenvalues_of_the_formula():
    matrix = selftest.chain(get_backend("numpy"), "cpu", 9) @ np.eye(9)
    expected = 2 * np.eye(9) - np.eye(9, k=1) - np.eye(9, k=-1)
    np.testing.assert_array_equal(matrix, expected)
    exact = np.linalg.eigvalsh(expected)
    np.testing.assert_allclose(selftest.chain_eigenvalues(9), exact, atol=1e-13)


def test_the_chain_is_the_same_on_every_library(library):
    import_library(library)
    example = move(np.arange(9.0), library)
    backend = get_backend(library.partition(":")[0])
    operator = selftest.chain(backend, "cpu" if library == "numpy" else example.device, 9)
    product = home(operator @ operator.space.from_numpy(np.arange(9.0)))
    np.testing.assert_array_equal(product, [-1, 0, 0, 0, 0, 0, 0, 0, 9])


def test_a_library_says_its_version_and_its_devices():
    found = {library.name: library for library in selftest.found_backends()}
    assert found["numpy"].version == np.__version__
    assert found["numpy"].devices == ("cpu",)
    assert "device1" in [selftest.device_name(device) for device in found["strict"].devices]
    assert "meta" not in [str(device) for device in found["torch"].devices]  # has no memory


@pytest.mark.parametrize(
    ("error", "reason"),
    [(ImportError("no such module"), "not installed"), (OSError("old driver"), "OSError: old dr")],
)
def test_a_library_that_cannot_be_used_says_why(monkeypatch, error, reason):
    def fail(name):
        raise error

    monkeypatch.setattr(selftest, "get_backend", fail)
    library = selftest.found_backends()[0]
    assert library.version is None
    assert library.reason.startswith(reason)
    assert list(selftest.run_checks([library])) == []


def test_all_is_well(few, capsys):
    assert command.main() == 0
    printed = capsys.readouterr().out
    assert np.__version__ in printed
    assert "no_float64" in printed
    assert "all 12 passed" in printed
    assert "FAILED" not in printed


def test_a_wrong_spectrum_fails(few, capsys, monkeypatch):
    exact = selftest.chain_eigenvalues()
    monkeypatch.setattr(selftest, "chain_eigenvalues", lambda: exact * (1 + 1e-3))
    assert command.main() == 1
    assert "12 of 12 failed" in capsys.readouterr().out


def test_an_exception_is_reported_and_fails(few, capsys, monkeypatch):
    def broken(*arguments, **options):
        raise RuntimeError("out of order")  # noqa: EM101

    monkeypatch.setattr(selftest, "eigsh", broken)
    assert command.main() == 1
    printed = capsys.readouterr().out
    assert "RuntimeError: out of order" in printed
    assert "6 of 12 failed" in printed


def test_the_command_runs_where_only_numpy_is_installed():
    code = """
import runpy, sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name in ("torch", "jax", "cupy", "array_api_strict"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Absent())
runpy.run_module("specdens", run_name="__main__")
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "all 2 passed" in done.stdout
    assert done.stdout.count("not installed") >= 4
