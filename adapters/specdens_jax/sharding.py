"""How vectors lie on the devices of a mesh: shardings of arrays (n, k) and of their transposes.

Meshes with explicit axes (what `jax.make_mesh` makes) want a sharding named at every contraction
and reshape. What is computed here has automatic axes instead, on the same devices, and what comes
out is handed back as it came in.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar, cast

import jax
from jax.sharding import NamedSharding, PartitionSpec

# A name without a type, since the class is not annotated.
Spec: Any = PartitionSpec

F = TypeVar("F", bound=Callable[..., Any])


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


def on_automatic_axes(function: F) -> F:
    """Make a function compute with automatic axes, whatever mesh the caller has set.

    Arrays among its arguments come in with automatic axes. Arrays that it returns lie on the mesh
    that the caller has set, or else on that of an argument, if its axes are explicit.
    """

    @functools.wraps(function)
    def call(*arguments: Any, **options: Any) -> Any:
        mesh = _set_mesh() or next(filter(None, map(_explicit_mesh, arguments)), None)
        if mesh is None or any(map(_is_traced, jax.tree.leaves((arguments, options)))):
            with _explained():
                return function(*arguments, **options)
        with _explained(), _automatic_context():
            results = function(*map(automatic, arguments), **options)
        return jax.tree.map(lambda x: _moved(x, mesh), results)

    return cast(F, call)


def on_callers_axes(tree: Any) -> Any:
    """Return a pytree with its arrays on the mesh that the caller has set."""
    mesh = _set_mesh() or _callers_mesh.get()
    return tree if mesh is None else jax.tree.map(lambda x: _moved(x, mesh), tree)


@contextmanager
def _automatic_context() -> Iterator[None]:
    """Set the same mesh with automatic axes, and remember that of the caller."""
    if _set_mesh() is None:
        yield
        return
    mesh = jax.sharding.get_mesh()
    before = _callers_mesh.set(mesh)
    try:
        with jax.set_mesh(_automatic_mesh(mesh)):
            yield
    finally:
        _callers_mesh.reset(before)


_callers_mesh: ContextVar[Any] = ContextVar("_callers_mesh", default=None)


def from_caller(items: Iterable[Any]) -> Iterator[Any]:
    """Iterate over what the caller made, with the mesh set that the caller has set."""
    mesh = _callers_mesh.get()
    if mesh is None:
        yield from items
        return
    with jax.set_mesh(mesh):
        iterator = iter(items)
    end = object()
    while True:
        with jax.set_mesh(mesh):
            item = next(iterator, end)
        if item is end:
            return
        yield item


@contextmanager
def _explained() -> Iterator[None]:
    """Say in errors of JAX about axes what a model may not do."""
    try:
        yield
    except Exception as error:
        about_axes = any(words in str(error) for words in _ABOUT_AXES)
        if about_axes and _AUTOMATIC_ONLY not in getattr(error, "__notes__", ()):
            error.add_note(_AUTOMATIC_ONLY)
        raise


_ABOUT_AXES = ("ontext mesh", "AxisType.Auto", "Mesh for all inputs")
_AUTOMATIC_ONLY = (
    "Models are compiled on the same mesh with automatic axes: pass arrays with explicit axes "
    "among params or data, not in the closures of predict and loss, and leave out_sharding= and "
    "reshard out; jax.lax.with_sharding_constraint works."
)


def in_context(sharding: Any) -> Any:
    """Return a sharding on the kind of axes that the caller has set for all that is computed."""
    mesh = _set_mesh()
    if mesh is None or not isinstance(sharding, NamedSharding):
        return sharding
    own: Any = sharding.mesh
    if own.axis_types == mesh.axis_types or own.shape_tuple != mesh.shape_tuple:
        return sharding
    return NamedSharding(_with_axes(own, mesh.axis_types), sharding.spec)


def automatic(array: Any) -> Any:
    """Return the same array, its mesh such that the compiler lays out what is computed from it."""
    mesh = _explicit_mesh(array)
    return array if mesh is None else _on_mesh(array, _automatic_mesh(mesh))


def _moved(x: Any, mesh: Any) -> Any:
    """Return an array on the axes of `mesh` if it lies on the same devices."""
    own = _mesh_of(x)
    if own is None or own.shape_tuple != mesh.shape_tuple or own.axis_types == mesh.axis_types:
        return x
    return _on_mesh(x, _with_axes(own, mesh.axis_types))


def _on_mesh(array: Any, mesh: Any) -> Any:
    """Return an array on another mesh of the same devices, without a copy."""
    shards = [shard.data for shard in array.addressable_shards]
    sharding = NamedSharding(mesh, array.sharding.spec)
    return jax.make_array_from_single_device_arrays(array.shape, sharding, shards)


def _set_mesh() -> Any:
    """Return the mesh that is set for all that is computed, if some of its axes are explicit."""
    if not hasattr(jax, "set_mesh"):  # older than explicit axes
        return None
    mesh = jax.sharding.get_abstract_mesh()
    return mesh if jax.sharding.AxisType.Explicit in mesh.axis_types else None


def _explicit_mesh(x: Any) -> Any:
    """Return the mesh that an array lies on if some of its axes are explicit."""
    mesh = _mesh_of(x)
    return None if mesh is None or mesh == _automatic_mesh(mesh) else mesh


def _mesh_of(x: Any) -> Any:
    if not isinstance(x, jax.Array) or _is_traced(x):
        return None
    return x.sharding.mesh if isinstance(x.sharding, NamedSharding) else None


def _is_traced(x: Any) -> bool:
    return isinstance(x, jax.core.Tracer)


def _automatic(sharding: NamedSharding) -> NamedSharding:
    mesh: Any = sharding.mesh
    other = _automatic_mesh(mesh)
    return sharding if other == mesh else NamedSharding(other, sharding.spec)


def _automatic_mesh(mesh: Any) -> Any:
    return _with_axes(mesh, (jax.sharding.AxisType.Auto,) * len(mesh.axis_names))


def _with_axes(mesh: Any, types: Any) -> Any:
    """Return the same mesh with axes of the given types."""
    if mesh.axis_types == types:
        return mesh
    return jax.sharding.Mesh(mesh.devices, mesh.axis_names, axis_types=types)


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
