"""Operators with their dense answers: libraries, spectra, helpers that avoid what they test."""

import importlib
from dataclasses import dataclass, field

import numpy as np
import pytest

from specdens import FunctionOperator, SpectralMeasure, VectorSpace, sphere

#: Array libraries; after the colon one of array-api-strict's pretended devices.
LIBRARIES = ("numpy", "torch", "jax", "strict", "strict:device1", "cupy")
_MODULES = {"jax": "jax.numpy", "strict": "array_api_strict"}


def import_library(name):
    """Return `name` if the library can be used here, otherwise skip the test."""
    module = name.partition(":")[0]
    if module == "cupy":
        cupy = pytest.importorskip("cupy", reason="CuPy is not installed")
        if not cupy.cuda.is_available():
            pytest.skip("CuPy finds no graphics processor")
    importlib.import_module(_MODULES.get(module, module))
    return name


def move(host, library):
    """Return a host array as one of `library`, on its device, without specdens."""
    name, _, device = library.partition(":")
    if name == "numpy":
        return host
    if name == "torch":
        return importlib.import_module("torch").tensor(np.ascontiguousarray(host))
    xp = importlib.import_module(_MODULES.get(name, name))
    options = {"device": xp.Device(device or "CPU_DEVICE")} if name == "strict" else {}
    return xp.asarray(host, **options)


def home(array):
    """Return an array of any library as a NumPy array, without specdens."""
    module = type(array).__module__
    if module.startswith("array_api_strict"):
        array = array.to_device(importlib.import_module("array_api_strict").Device("CPU_DEVICE"))
    elif module.startswith("cupy"):
        array = array.get()
    elif module == "torch":
        array = array.cpu()
    return np.asarray(array)


def device_of(array):
    """Return the device of an array of any library, as text."""
    return str(getattr(array, "device", "cpu"))


def _uniform():
    return np.linspace(0.1, 3.0, 40)


def _outliers():
    bulk = 0.05 * np.random.default_rng(3).standard_normal(36)
    return np.sort(np.concatenate([bulk, [1.0, 3.0, 8.0, 20.0]]))


def _degenerate():
    return np.repeat([-1.0, 0.5, 1.0, 2.0, 4.0], 8)


def _indefinite():
    return np.concatenate([-np.linspace(2.0, 0.1, 20), np.linspace(0.1, 3.0, 20)])


def _rank_deficient():
    return np.concatenate([np.zeros(25), np.linspace(1.0, 3.0, 15)])


#: Name -> eigenvalues (40,), ascending; "hermitian" stands for a complex matrix.
SPECTRA = {
    "uniform": _uniform(),
    "outliers": _outliers(),
    "degenerate": _degenerate(),
    "indefinite": _indefinite(),
    "rank_deficient": _rank_deficient(),
    "hermitian": _uniform() - 1.0,
}


def dense(eigenvalues, *, seed=7, complex_=False):
    """Return a Hermitian matrix with these eigenvalues and random eigenvectors."""
    rng = np.random.default_rng(seed)
    n = len(eigenvalues)
    gaussian = rng.standard_normal((n, n))
    if complex_:
        gaussian = gaussian + 1j * rng.standard_normal((n, n))
    vectors = np.linalg.qr(gaussian)[0]
    matrix = (vectors * eigenvalues) @ vectors.conj().T
    return (matrix + matrix.conj().T) / 2


def dense_case(spectrum):
    """Return the dense matrix of a named spectrum."""
    return dense(SPECTRA[spectrum], complex_=spectrum == "hermitian")


def diagonal(eigenvalues, **options):
    """Return a diagonal operator, for spectra that are too large for a dense matrix."""
    values = np.asarray(eigenvalues, dtype=np.float64)
    return FunctionOperator(
        lambda x: values * x if x.ndim == 1 else values[:, None] * x,
        VectorSpace.like(values),
        blocks=True,
        **options,
    )


def probe_matrix(matrix, num_probes, seed):
    """Return the unit probes (n, p) that an estimator draws for a dense matrix."""
    space = VectorSpace.like(matrix)
    return np.stack([sphere(space, seed, i) for i in range(num_probes)], axis=1)


def probe_moments(matrix, order, probes):
    """Return ``v^* A^order v`` of each column v, from dense products."""
    powers = np.linalg.matrix_power(matrix, order) @ probes
    return np.sum(probes.conj() * powers, axis=0).real


def distribution(eigenvalues, x):
    """Return the exact fraction of eigenvalues up to each x."""
    values = np.sort(eigenvalues)
    return np.searchsorted(values, x, side="right") / len(values)


def hand_made(nodes, weights, dimension=10, **options):
    """Return a measure of given nodes and weights."""
    return SpectralMeasure(np.array(nodes, float), np.array(weights, float), dimension, **options)


@dataclass
class CountingOperator:
    """Counts products, and remembers the shapes it was given. Nothing is inherited on purpose."""

    operator: object
    shapes: list = field(default_factory=list)

    @property
    def space(self):
        return self.operator.space

    def __matmul__(self, x):
        self.shapes.append(tuple(x.shape))
        return self.operator @ x


def same_bits(first, second):
    """Tell whether two measures hold the same nodes and weights to the last bit."""
    return (
        first.nodes.shape == second.nodes.shape
        and first.nodes.tobytes() == second.nodes.tobytes()
        and first.weights.tobytes() == second.weights.tobytes()
    )


def flat(result):
    """Return all arrays of a result of nested tuples and lists."""
    if isinstance(result, tuple | list):
        return [array for part in result for array in flat(part)]
    return [result]
