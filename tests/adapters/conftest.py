"""Fixtures that tests of the adapters share."""

import pytest


@pytest.fixture
def doubles():
    """Have JAX compute in double precision."""
    jax = pytest.importorskip("jax")
    with jax.enable_x64(True):
        yield
