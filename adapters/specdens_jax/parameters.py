"""Flat vectors and the pytrees they stand for: the only place where one becomes the other."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from specdens import VectorSpace, backend_of
from specdens.arguments import shown
from specdens_jax.sharding import (
    automatic,
    fitted,
    in_context,
    of_rows,
    on_automatic_axes,
    vector_sharding,
    whole,
)

PyTree: TypeAlias = Any
Selection: TypeAlias = str | Iterable[str] | Callable[[str], bool] | None


class FlatParameters:
    """Names, shapes and places of a pytree's leaves in one flat vector of length n.

    Parameters
    ----------
    params : pytree of arrays
        What the model takes. Leaves that are not real floating point are constants, and those that
        are neither arrays nor numbers, such as activation functions, are not even traced.
    parameters : str, sequence of str, or callable, optional
        The leaves that vary: their names (the path, joined by dots), glob patterns over names, the
        name of a subtree, several of these, or a function from names to bool. By default all that
        are real floating point.
    sharding : jax.sharding.Sharding, optional
        How flat vectors (n, k) lie on devices, by default on the device of the first leaf, and
        whole on every device of its mesh if it lies on several.

    Attributes
    ----------
    size : int
        Length n of the flat vector.
    names : tuple of str
        Names of the leaves that vary, in the order of the vector, which is that of the pytree.
    slices : dict of str to slice
        Place of each in the vector.
    shapes : dict of str to tuple of int

    Raises
    ------
    ValueError
        If a name matches nothing (close names are listed), nothing is selected, a selected leaf is
        not real floating point, or two leaves have the same name.
    TypeError
        If `parameters` is of another type.

    Examples
    --------
    >>> kernel = jnp.zeros((3, 2), jnp.float32)
    >>> params = {"dense": {"bias": kernel[0], "kernel": kernel}, "step": 4}
    >>> parameters = FlatParameters(params)
    >>> parameters
    FlatParameters(2 leaves, 8 parameters, float32)
    >>> parameters.slices
    {'dense.bias': slice(0, 2, None), 'dense.kernel': slice(2, 8, None)}
    >>> FlatParameters(params, "*.bias").unravel(jnp.ones(2, jnp.float32))
    {'dense': {'bias': Array([1., 1.], dtype=float32), 'kernel': None}, 'step': None}
    """

    def __init__(
        self, params: PyTree, parameters: Selection = None, *, sharding: Any = None
    ) -> None:
        paths, structure = jax.tree_util.tree_flatten_with_path(params)
        self._structure: Any = structure
        every = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in paths]
        leaves = [leaf for _, leaf in paths]
        self._static = {i: leaf for i, leaf in enumerate(leaves) if not _is_number(leaf)}
        chosen = _selected(every, leaves, parameters, params)
        self._places = [i for i, name in enumerate(every) if name in chosen]
        self.names: tuple[str, ...] = tuple(every[i] for i in self._places)
        arrays = [jnp.asarray(leaves[i]) for i in self._places]
        self.shapes: dict[str, tuple[int, ...]] = {
            name: array.shape for name, array in zip(self.names, arrays, strict=True)
        }
        self.dtypes = {name: a.dtype for name, a in zip(self.names, arrays, strict=True)}
        self.slices: dict[str, slice] = {}
        stop = 0
        for name, array in zip(self.names, arrays, strict=True):
            start, stop = stop, stop + array.size
            self.slices[name] = slice(start, stop)
        self.size: int = stop
        first = arrays[0]
        dtype = jnp.result_type(*(a.dtype for a in arrays))
        place = vector_sharding(first.device if sharding is None else sharding, stop, sharding)
        self._space = VectorSpace(stop, dtype, place, backend_of(first))

    @property
    def space(self) -> VectorSpace:
        """Vectors of length n in the promoted dtype of the leaves, on the mesh that is set."""
        device = in_context(self._space.device)
        return self._space if device is self._space.device else replace(self._space, device=device)

    def split(self, params: PyTree) -> tuple[list[jax.Array], list[Any]]:
        """Return the leaves that vary, as arrays of strong dtypes, and all leaves with holes.

        Raises
        ------
        ValueError
            If the structure, a shape, or a leaf that is neither array nor number is another.
        """
        leaves = self._leaves(params, "params")
        for i, static in self._static.items():
            if leaves[i] is not static and leaves[i] != static:
                msg = f"params hold {leaves[i]!r}, but {static!r} before; make a new Risk of them."
                raise ValueError(msg)
        varying = []
        for i, name in zip(self._places, self.names, strict=True):
            if jnp.shape(leaves[i]) != self.shapes[name]:
                msg = (
                    f"params have the leaf {name!r} of shape {jnp.shape(leaves[i])}; expected "
                    f"{self.shapes[name]}, make a new Risk for another model."
                )
                raise ValueError(msg)
            leaf = jnp.asarray(automatic(leaves[i]), dtype=self.dtypes[name])
            varying.append(self._on_mesh(leaf))
        holes = {*self._places, *self._static}
        return varying, [
            None if i in holes else self._on_mesh(leaf) for i, leaf in enumerate(leaves)
        ]

    def _leaves(self, tree: PyTree, what: str) -> list[Any]:
        try:
            return self._structure.flatten_up_to(tree)
        except (ValueError, TypeError) as error:
            msg = f"{what} must have the structure of the parameters. {error}"
            raise ValueError(msg) from error

    def merge(self, varying: Sequence[jax.Array], constants: Sequence[Any]) -> PyTree:
        """Return the pytree that `split` took apart."""
        leaves = list(constants)
        for i, leaf in self._static.items():
            leaves[i] = leaf
        for i, leaf in zip(self._places, varying, strict=True):
            leaves[i] = leaf
        return self._structure.unflatten(leaves)

    @on_automatic_axes
    def ravel(self, tree: PyTree) -> jax.Array:
        """Return one flat vector from a pytree like the parameters.

        Parameters
        ----------
        tree : pytree of arrays
            Of the parameters' structure; leaves that do not vary are ignored, and None stands for
            zeros. With one more trailing axis of length k for k vectors at once.

        Returns
        -------
        array of shape (n,) or (n, k)

        Raises
        ------
        ValueError
            If the structure or a shape does not fit.
        """
        leaves = self._leaves(tree, "tree")
        blocks = [automatic(leaves[i]) for i in self._places]
        widths = set()
        for name, block in zip(self.names, blocks, strict=True):
            shape = self.shapes[name]
            if block is None:
                continue
            extra = jnp.shape(block)[len(shape) :]
            if jnp.shape(block)[: len(shape)] != shape or len(extra) > 1:
                msg = (
                    f"the leaf {name!r} has shape {jnp.shape(block)}; expected {shape} or that "
                    "with one trailing axis."
                )
                raise ValueError(msg)
            widths.add(extra)
        if len(widths) > 1:
            msg = f"leaves have different trailing axes, {sorted(widths)}; they must be the same."
            raise ValueError(msg)
        width = widths.pop() if widths else ()
        parts = [
            jnp.zeros((part.stop - part.start, *width), self.space.dtype)
            if block is None
            else jnp.asarray(block, self.space.dtype).reshape(-1, *width)
            for block, part in zip(blocks, self.slices.values(), strict=True)
        ]
        return self.placed(jnp.concatenate(parts))

    @on_automatic_axes
    def unravel(self, x: jax.Array) -> PyTree:
        """Return the pytree of a flat vector.

        Parameters
        ----------
        x : array of shape (n,) or (n, k)

        Returns
        -------
        pytree
            Of the parameters' structure, with None for the leaves that do not vary; with a
            trailing axis of length k if `x` has one.

        Raises
        ------
        ValueError
            If the first axis of `x` does not have length n.
        TypeError
            If `x` is no array.
        """
        if not isinstance(x, jax.Array | np.ndarray):
            msg = f"x has type {type(x).__qualname__}; expected an array of length {self.size}."
            raise TypeError(msg)
        if x.ndim not in (1, 2) or x.shape[0] != self.size:
            msg = (
                f"x has shape {x.shape}; expected ({self.size},) or ({self.size}, k), one entry "
                "for each parameter."
            )
            raise ValueError(msg)
        leaves: list[Any] = [None] * self._structure.num_leaves
        for i, name in zip(self._places, self.names, strict=True):
            leaves[i] = x[self.slices[name]].reshape(*self.shapes[name], *x.shape[1:])
        return self._structure.unflatten(leaves)

    def blocks(self, rows: jax.Array) -> list[jax.Array]:
        """Return the rows (k, n) by leaf, each (k, *shape) in the leaf's own dtype."""
        return [
            rows[:, self.slices[name]]
            .reshape(rows.shape[0], *self.shapes[name])
            .astype(self.dtypes[name])
            for name in self.names
        ]

    def rows(self, blocks: Sequence[jax.Array], dtype: Any) -> jax.Array:
        """Return what `blocks` gives as rows (k, n) again, in `dtype`."""
        rows = jnp.concatenate([b.reshape(b.shape[0], -1).astype(dtype) for b in blocks], axis=1)
        layout = self.rows_layout(len(rows))
        if isinstance(layout, NamedSharding):
            return jax.lax.with_sharding_constraint(rows, layout)
        return rows

    def placed(self, x: jax.Array) -> jax.Array:
        """Return vectors (n,) or (n, k) laid out as those of the space."""
        return jax.device_put(x, fitted(self.space.device, x.shape))

    def rows_layout(self, count: int) -> Any:
        """Return how rows (count, n) lie on the devices of the space."""
        return of_rows(self.space.device, count, self.size)

    def _on_mesh(self, leaf: Any) -> Any:
        """Return a leaf on the mesh of the vectors: as it lies there, or whole on every device."""
        device = self.space.device
        if not isinstance(leaf, jax.Array):
            return leaf
        if isinstance(device, NamedSharding) and leaf.sharding.device_set != device.device_set:
            return jax.device_put(leaf, whole(device))
        return automatic(leaf)

    def indices(self, name: str) -> np.ndarray:
        """Return the places of one leaf's entries in the flat vector, of its shape.

        Parameters
        ----------
        name : str

        Returns
        -------
        ndarray of int64

        Raises
        ------
        ValueError
            If no leaf that varies has that name.

        Examples
        --------
        >>> FlatParameters({"kernel": jnp.zeros((2, 3))}).indices("kernel")[1]
        array([3, 4, 5])
        """
        if not isinstance(name, str) or name not in self.slices:
            msg = f"name={name!r} is none of the selected parameters {list(self.names)}."
            raise ValueError(msg)
        place = self.slices[name]
        return np.arange(place.start, place.stop).reshape(self.shapes[name])

    def __len__(self) -> int:
        return len(self.names)

    def __repr__(self) -> str:
        leaves = "1 leaf" if len(self) == 1 else f"{len(self)} leaves"
        return f"FlatParameters({leaves}, {self.size:,} parameters, {self.space.dtype})"


def _selected(
    names: list[str], leaves: list[Any], parameters: Selection, params: PyTree
) -> set[str]:
    """Return the names of the leaves that vary."""
    repeated = [name for name, number in Counter(names).items() if number > 1]
    if repeated:
        msg = (
            f"params have several leaves called {repeated[0]!r}; rename keys that hold dots or "
            "differ only in type."
        )
        raise ValueError(msg)
    if not (parameters is None or callable(parameters) or isinstance(parameters, Iterable)):
        msg = (
            f"parameters has type {type(parameters).__qualname__}; expected names, glob patterns "
            "or one function of names."
        )
        raise TypeError(msg)
    dtypes = {
        name: jnp.asarray(leaf).dtype
        for name, leaf in zip(names, leaves, strict=True)
        if hasattr(leaf, "dtype") or isinstance(leaf, float)
    }
    floating = {name for name, dtype in dtypes.items() if jnp.issubdtype(dtype, jnp.floating)}
    if parameters is None:
        chosen = floating
    elif callable(parameters):
        chosen = {name for name in floating if _is_true(parameters(name), name)}
    else:
        patterns = [parameters] if isinstance(parameters, str) else list(parameters)
        chosen = set()
        for pattern in patterns:
            chosen |= _matches(names, pattern)
    if not chosen and parameters is None:
        msg = (
            f"params={shown(params)} have no leaf that is a real floating-point array; expected a "
            "pytree of arrays, such as a dictionary."
        )
        raise ValueError(msg)
    if not chosen:
        msg = f"parameters={parameters!r} selects nothing of the leaves {names[:10]}."
        raise ValueError(msg)
    wrong = sorted(chosen - floating)
    if wrong:
        msg = (
            f"parameter {wrong[0]!r} is {dtypes.get(wrong[0], 'not an array')}; curvature is "
            "defined for real floating-point parameters, select others with parameters=."
        )
        raise ValueError(msg)
    return chosen


def _is_true(answer: Any, name: str) -> bool:
    try:
        return bool(answer)
    except (TypeError, ValueError) as error:
        msg = f"parameters({name!r}) returned {shown(answer)}; expected True or False."
        raise TypeError(msg) from error


def _is_number(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") or isinstance(leaf, bool | int | float | complex)


def _matches(names: list[str], pattern: Any) -> set[str]:
    if not isinstance(pattern, str):
        msg = (
            f"parameters holds an item of type {type(pattern).__qualname__}; expected names, glob "
            "patterns or one function of names."
        )
        raise TypeError(msg)
    exact = {name for name in names if name == pattern or name.startswith(f"{pattern}.")}
    found = exact or {name for name in names if fnmatchcase(name, pattern)}
    if not found:
        close = difflib.get_close_matches(pattern, names, n=3, cutoff=0.4) or names[:5]
        msg = f"parameters={pattern!r} matches no leaf; close to it: {', '.join(map(repr, close))}."
        raise ValueError(msg)
    return found
