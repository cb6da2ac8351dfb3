"""Arithmetic on blocks of vectors: few large operations give what many small ones give."""

from dataclasses import replace

import numpy as np
import pytest

from specdens import slq
from specdens.backends import get_backend
from specdens.methods.columns import kernels, sketcher
from tests.cases import dense_case, flat, home, import_library, move

_SHAPE = (700, 5)


def _arguments(name, library, complex_):
    """Return the arguments of a function, new ones for every call."""
    rng = np.random.default_rng(0)

    def draw(*shape):
        values = rng.standard_normal(shape)
        return values + 1j * rng.standard_normal(shape) if complex_ else values

    tall, wide = [draw(*_SHAPE) for _ in range(3)], [draw(4, 700) for _ in range(2)]
    hosts = {
        "three_term": (*tall, np.linspace(0.5, 2, 5)),
        "three_term_into": (*tall, np.linspace(0.5, 2, 5)),
        "chebyshev": (*tall, np.array([2.0, -0.3, -1.0])),
        "subtract": (*tall[:2], np.linspace(0.5, 2, 5)),
        "inner": tuple(wide),
        "transform": (wide[0], draw(4, 4)),
        "take": (wide[0], wide[1], draw(4, 4)),
        "as_rows": (tall[0],),
        "recur": (wide[0], (wide[1], draw(4, 700)), (draw(4, 4), draw(4, 4))),
    }[name]

    def moved(x):
        if isinstance(x, tuple):
            return tuple(moved(part) for part in x)
        return move(x.astype(complex) if complex_ else x.copy(), library)

    return [moved(x) for x in hosts]


@pytest.mark.parametrize("complex_", [False, True], ids=["real", "complex"])
@pytest.mark.parametrize(
    "name",
    [
        "three_term",
        "three_term_into",
        "chebyshev",
        "subtract",
        "inner",
        "transform",
        "take",
        "as_rows",
        "recur",
    ],
)
@pytest.mark.parametrize("library", ["numpy", "torch", "strict:device1"])
def test_coarse_operations_give_what_fine_ones_give(library, name, complex_):
    fine = replace(get_backend(import_library(library).partition(":")[0]), fast={})
    coarse = replace(fine, coarse=True)
    dtype = fine.dtype("complex128" if complex_ else "float64")
    results = []
    for backend in (fine, coarse):
        result = getattr(kernels(backend, dtype), name)(*_arguments(name, library, complex_))
        results.append([home(x) for x in flat(result)])
    for found, expected in zip(*results, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", [64, 33, 700, 1000])
@pytest.mark.parametrize("library", ["numpy", "strict:device1"])
def test_coarse_sketches_are_the_fine_ones(library, size):
    fine = replace(get_backend(import_library(library).partition(":")[0]), fast={})
    rng = np.random.default_rng(0)
    q, signs = rng.standard_normal(_SHAPE), rng.choice(np.array([-1, 1], np.int8), 700)
    found, expected = (
        home(sketcher(backend, size)(move(q, library), move(signs, library)))
        for backend in (replace(fine, coarse=True), fine)
    )
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kept", [True, False])
def test_runs_of_coarse_operations(monkeypatch, kept):
    matrix = dense_case("outliers")
    options = {"num_probes": 3, "num_steps": 12, "reorthogonalize": kept}
    expected = slq(matrix, **options)
    numpy = get_backend("numpy")
    monkeypatch.setattr("specdens.backends.numpy.BACKEND", replace(numpy, coarse=True, fast={}))
    found = slq(matrix, **options)
    for k in range(2 * 12):  # single nodes depend on rounding where copies appear
        scale = 20.0**k
        np.testing.assert_allclose(
            found.plain().moment(k).value, expected.plain().moment(k).value, atol=1e-12 * scale
        )
