"""JAX operators whose vectors lie on a mesh with explicit axes, which has one device here.

With more devices: `tests/adapters/jax_sharding_cases.py`.
"""

from contextlib import nullcontext

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from specdens import FunctionOperator, VectorSpace, low_rank, project_out

_N = 1200  # shorter vectors are on every device
_VALUES = np.linspace(-1.0, 3.0, _N)
_RNG = np.random.default_rng(0)
_Q, _BLOCK = _RNG.standard_normal((_N, 3)), _RNG.standard_normal((_N, 2))


def _on(*spec):
    mesh = jax.make_mesh((1,), ("x",), axis_types=(AxisType.Explicit,))
    return NamedSharding(mesh, PartitionSpec(*spec))


@pytest.fixture(params=[False, True], ids=["arrays", "set_mesh"], autouse=True)
def context(request):
    """Take the mesh from the arrays only, or set it for all that is computed as well."""
    with jax.enable_x64(True), jax.set_mesh(_on().mesh) if request.param else nullcontext():
        yield


@pytest.fixture
def operator(context):
    values = jax.device_put(_VALUES, _on("x"))
    return FunctionOperator(
        lambda x: values * x if x.ndim == 1 else values[:, None] * x,
        VectorSpace.like(values),
        blocks=True,
    )


def _complement(x):
    basis = np.linalg.qr(_Q)[0]
    return x - basis @ (basis.T @ x)


def _close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=1e-12, atol=1e-12 * np.abs(expected).max())


def test_without_it_jax_asks_for_a_sharding():
    q = jax.device_put(_Q, _on("x"))
    with pytest.raises(Exception, match="out_sharding"):
        _ = q.T @ q


@pytest.mark.parametrize("width", [None, 2])
def test_project_out(operator, width):
    host = _BLOCK[:, 0] if width is None else _BLOCK
    x = jax.device_put(host, _on("x"))
    y = project_out(operator, jax.device_put(_Q, _on("x"))) @ x
    expected = _complement((_VALUES * _complement(host).T).T)
    _close(y, expected)
    assert y.sharding.mesh == x.sharding.mesh
    assert y.sharding.is_equivalent_to(x.sharding, y.ndim)


def test_low_rank(context):
    x = jax.device_put(_BLOCK, _on("x"))
    y = low_rank(jax.device_put(_Q, _on("x")), [2.0, -1.0, 0.5]) @ x
    _close(y, _Q @ (np.array([2.0, -1.0, 0.5])[:, None] * (_Q.T @ _BLOCK)))
    assert y.sharding.mesh == x.sharding.mesh
