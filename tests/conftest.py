"""Fixtures of the suite: array libraries, spectra, and settings that make runs repeatable."""

import os

# Before any library is imported: matrices here are small, threads would wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("JAX_ENABLE_X64", "1")

import pytest
from hypothesis import settings

from tests.cases import LIBRARIES, SPECTRA, import_library

settings.register_profile(
    "specdens", deadline=None, derandomize=True, max_examples=40, database=None
)
settings.load_profile("specdens")


def _parameter(name):
    return pytest.param(name, marks=pytest.mark.gpu if name == "cupy" else ())


@pytest.fixture(params=[_parameter(name) for name in LIBRARIES])
def library(request):
    """Name an array library, and its device where it pretends to have two."""
    return import_library(request.param)


@pytest.fixture(params=SPECTRA)
def spectrum(request):
    """Name a prescribed spectrum of `tests.cases.SPECTRA`."""
    return request.param
