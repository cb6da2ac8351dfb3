"""The JAX backend: the arithmetic between two products is compiled.

The device of a space may be a `jax.sharding.NamedSharding`, which says how arrays (n, k) lie on the
devices of a mesh. Meshes with explicit axes (what `jax.make_mesh` makes) want a sharding named at
every contraction; compiled functions run on the same mesh with automatic axes instead.
"""

from __future__ import annotations

import functools
import math
from types import ModuleType
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

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


def _jit(function: Any) -> Any:
    """Compile a pure function of arrays, on meshes of any kind of axes."""
    compiled = jax.jit(function)

    @functools.wraps(function)
    def call(*arguments: Any) -> Any:
        meshes = {mesh for mesh in map(_mesh_of, jax.tree.leaves(arguments)) if mesh is not None}
        explicit = [mesh for mesh in meshes if mesh != _automatic(mesh)]
        if not explicit and not (meshes and _context_is_explicit()):
            return compiled(*arguments)
        with jax.set_mesh(_automatic(next(iter(meshes)))):
            results = compiled(*jax.tree.map(lambda x: _moved(x, _automatic), arguments))
        if len(explicit) < len(meshes):
            return results
        return jax.tree.map(lambda x: _moved(x, lambda _: explicit[0]), results)

    return call


def _mesh_of(x: Any) -> Any:
    """Return the mesh an array lies on, None if it is on one device or being traced."""
    if not isinstance(x, jax.Array) or isinstance(x, jax.core.Tracer):
        return None
    return x.sharding.mesh if isinstance(x.sharding, NamedSharding) else None


def _automatic(mesh: Any) -> Any:
    """Return the same mesh, with axes for which the compiler decides how results lie."""
    types = (jax.sharding.AxisType.Auto,) * len(mesh.axis_names)
    if mesh.axis_types == types:
        return mesh
    return Mesh(mesh.devices, mesh.axis_names, axis_types=types)


def _context_is_explicit() -> bool:
    """Tell whether the caller has set a mesh with explicit axes for all that is computed."""
    mesh = jax.sharding.get_abstract_mesh()
    return any(kind != jax.sharding.AxisType.Auto for kind in mesh.axis_types)


def _moved(x: Any, to: Any) -> Any:
    """Return an array on the mesh ``to(mesh)`` of the same devices, without a copy."""
    mesh = _mesh_of(x)
    if mesh is None or to(mesh) == mesh:
        return x
    shards = [shard.data for shard in x.addressable_shards]
    sharding = NamedSharding(to(mesh), x.sharding.spec)
    return jax.make_array_from_single_device_arrays(x.shape, sharding, shards)


# jax.numpy, except that a sharding as device means the same for arrays of all shapes.
_namespace = ModuleType("jax.numpy")
_namespace.__dict__.update(vars(jnp), zeros=_zeros)

BACKEND = Backend(name="jax", xp=_namespace, from_numpy=_from_numpy, to_numpy=_to_numpy, jit=_jit)
