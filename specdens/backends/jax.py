"""The JAX backend: the arithmetic between two products is compiled.

The device of a space may be a `jax.sharding.NamedSharding`, which says how arrays (n, k) lie on the
devices of a mesh.
"""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from specdens.backends import Backend

Spec: Any = PartitionSpec  # the class has no annotations

# Arrays whose axes are all shorter hold coefficients, which every device needs.
_LEAST_DIVIDED = 1024


def layout(device: Any, shape: tuple[int, ...]) -> Any:
    """Return how an array of a space lies on `device`, which may be a sharding of (n, k) arrays.

    Arrays (k, n) are laid out as their transposes, coefficients are on every device, and so is an
    axis that its number of parts does not divide.

    Parameters
    ----------
    device : jax.Device or jax.sharding.Sharding
    shape : tuple of int

    Returns
    -------
    jax.Device or jax.sharding.Sharding

    Examples
    --------
    >>> mesh = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    >>> rows = NamedSharding(mesh, Spec("x"))
    >>> [layout(rows, shape).spec for shape in [(4096, 3), (3, 4096), (3, 3)]]
    [P('x',), P(None, 'x'), P()]
    """
    if not isinstance(device, NamedSharding):
        return device
    if not shape or max(shape) < _LEAST_DIVIDED:
        return NamedSharding(device.mesh, Spec())
    spec = tuple(device.spec) + (None,) * (len(shape) - len(device.spec))
    if len(shape) == 2 and shape[0] < _LEAST_DIVIDED:
        spec = (spec[1], spec[0])
    spec = tuple(
        axes if size % num_parts(device, axes) == 0 else None
        for axes, size in zip(spec, shape, strict=False)
    )
    if len(spec) >= len(device.spec) and spec == (*device.spec, None)[: len(spec)]:
        return device  # the same object: devices of arrays are compared
    while spec and spec[-1] is None:
        spec = spec[:-1]
    return NamedSharding(device.mesh, Spec(*spec))


def num_parts(sharding: NamedSharding, axes: Any) -> int:
    """Return into how many parts one entry of a partition spec divides an axis."""
    names = () if axes is None else axes if isinstance(axes, tuple) else (axes,)
    return math.prod(sharding.mesh.shape[name] for name in names)


def _from_numpy(array: np.ndarray, dtype: Any, device: Any) -> jax.Array:
    # Cast on the host: without x64, JAX would warn about the float64 it cannot keep.
    host = np.asarray(array, dtype=dtype)
    return jax.device_put(host, layout(device, host.shape))


def _to_numpy(array: Any) -> np.ndarray:
    """Return the value of an array, also of one that lies partly on other processes."""
    if isinstance(array, jax.Array) and not (
        array.is_fully_addressable or array.is_fully_replicated
    ):
        mesh = cast(NamedSharding, array.sharding).mesh
        whole = NamedSharding(mesh, Spec())
        array = jax.jit(lambda value: value, out_shardings=whole)(array)
    return np.asarray(array)


def _zeros(shape: Any, dtype: Any = None, *, device: Any = None) -> jax.Array:
    shape = (shape,) if isinstance(shape, int) else tuple(shape)
    return jnp.zeros(shape, dtype, device=layout(device, shape))


# jax.numpy, except that a sharding as device means the same for arrays of all shapes.
_namespace = ModuleType("jax.numpy")
_namespace.__dict__.update(vars(jnp), zeros=_zeros)

BACKEND = Backend(
    name="jax", xp=_namespace, from_numpy=_from_numpy, to_numpy=_to_numpy, jit=jax.jit
)
