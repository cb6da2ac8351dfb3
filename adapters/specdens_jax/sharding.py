"""How vectors lie on the devices of a mesh: shardings of arrays (n, k) and of their transposes."""

from __future__ import annotations

import math
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

# A name without a type, since the class is not annotated.
Spec: Any = PartitionSpec


def fitted(device: Any, shape: tuple[int, ...]) -> Any:
    """Return a sharding of vectors (n, k), less the axes of `shape` that it does not divide."""
    if not isinstance(device, NamedSharding):
        return device
    spec = tuple(device.spec)[: len(shape)]
    kept = tuple(
        axes if size % num_parts(device, axes) == 0 else None
        for axes, size in zip(spec, shape, strict=False)
    )
    # The same object where nothing changes: devices of arrays are compared.
    return device if Spec(*kept) == device.spec else NamedSharding(device.mesh, Spec(*kept))


def num_parts(sharding: NamedSharding, axes: Any) -> int:
    """Return into how many parts one entry of a partition spec divides an axis."""
    names = () if axes is None else axes if isinstance(axes, tuple) else (axes,)
    return math.prod(sharding.mesh.shape[name] for name in names)


def automatic(array: Any) -> Any:
    """Return the same array, its mesh such that the compiler lays out what is computed from it.

    Meshes with explicit axes (what `jax.make_mesh` makes) want a sharding named at every reshape.
    """
    old = array.sharding if isinstance(array, jax.Array) else None
    if not isinstance(old, NamedSharding) or old == _automatic(old):
        return array
    shards = [shard.data for shard in array.addressable_shards]
    return jax.make_array_from_single_device_arrays(array.shape, _automatic(old), shards)


def _automatic(sharding: NamedSharding) -> NamedSharding:
    mesh: Any = sharding.mesh
    types = (jax.sharding.AxisType.Auto,) * len(mesh.axis_names)
    if mesh.axis_types == types:
        return sharding
    return NamedSharding(
        jax.sharding.Mesh(mesh.devices, mesh.axis_names, axis_types=types), sharding.spec
    )


def vector_sharding(place: Any, size: int, asked: Any) -> Any:
    """Return where flat vectors of length `size` lie: as `asked`, or where parameters do."""
    if not isinstance(place, jax.Device | jax.sharding.Sharding):
        msg = (
            f"sharding has type {type(place).__qualname__}; expected a jax.sharding.Sharding, such "
            'as NamedSharding(mesh, PartitionSpec("x")).'
        )
        raise TypeError(msg)
    if not isinstance(place, NamedSharding):
        return place
    if asked is None:  # the first leaf's own layout says nothing about vectors
        return _automatic(whole(place))
    spec = tuple(place.spec)
    if len(spec) > 2:
        msg = (
            f"sharding has the spec {place.spec}; expected one entry, for the first axis of "
            "vectors (n, k), or two."
        )
        raise ValueError(msg)
    parts = num_parts(place, spec[0]) if spec else 1
    if size % parts:
        msg = (
            f"sharding={place.spec} divides vectors of length n={size} into {parts} parts, but n "
            f"is no multiple of {parts}; use a mesh or axis of a size that divides n, divide the "
            "columns with PartitionSpec(None, axis), or keep vectors whole with PartitionSpec()."
        )
        raise ValueError(msg)
    return _automatic(place)


def of_rows(device: Any, count: int, size: int) -> Any:
    """Return how rows (count, size) lie where vectors (size, count) have the sharding `device`."""
    layout = fitted(device, (size, count))
    if not isinstance(layout, NamedSharding):
        return layout
    spec = (*layout.spec, None, None)
    return NamedSharding(layout.mesh, Spec(spec[1], spec[0]))


def whole(sharding: Any) -> NamedSharding:
    """Return the layout of arrays that every device of a mesh has."""
    return NamedSharding(sharding.mesh, Spec())
