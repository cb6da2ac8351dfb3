"""Probe vectors: where the randomness of every stochastic estimate comes from.

Probe i is a pure function of ``(seed, i)``, drawn by a counter-based generator on the host and then
moved: the same probes on every library, device and block size, and no generator state to save.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeAlias

import numpy as np

from specdens.arguments import checked_callable, checked_count, checked_seed
from specdens.backends import Array, backend_of, dtype_name
from specdens.spaces import VectorSpace

#: ``sampler(space, seed, index) -> (n,)``, a host array or one of the space's own library.
ProbeSampler: TypeAlias = Callable[[VectorSpace, int, int], Array]


#: What a sampler is, in errors.
EXPECTED_SAMPLER = "a sampler: sphere, rademacher or from_vectors(vectors)"
_LARGE = 2**17  # entries of all probes together from which threads are worth starting
_ROWS = 2**13  # entries of every probe that a thread moves at once
_TOGETHER = 16  # probes that are drawn before they are moved, fewer if they are
_BUFFER = 2**22  # entries or more
_SUMMED = 2**13  # entries of one sum of squares, too few for BLAS to divide among cores
_PER_COUNT = 4  # numbers that Philox makes for each value of its counter
_STREAMS = 1  # word of the counter that keeps uniform streams apart from probes


def generator(seed: int, index: int) -> np.random.Generator:
    """Return the generator of probe `index`: Philox, a counter-based one, keyed by both numbers."""
    return np.random.Generator(np.random.Philox(key=np.array([seed, index], dtype=np.uint64)))


def uniforms(seed: int, stream: int, start: int, count: int) -> np.ndarray:
    """Return `count` uniform numbers in (0, 1) from the place `start` of a stream.

    A number depends on seed, stream and place alone, so that any part of a stream is had without
    the rest. Streams share nothing with the probes of the same seed.

    Parameters
    ----------
    seed, stream : int
        Zero or positive.
    start, count : int
        The first place, and how many.

    Returns
    -------
    ndarray of float64

    Raises
    ------
    TypeError
        If one of them is no integer.
    ValueError
        If one is negative.

    Examples
    --------
    >>> bool((uniforms(3, 1, 7, 5) == uniforms(3, 1, 0, 12)[7:]).all())
    True
    """
    seed, stream = checked_seed(seed), checked_seed(stream, "stream")
    first, skipped = divmod(checked_count("start", start, 0), _PER_COUNT)
    count = checked_count("count", count, 0)
    key = np.array([seed, stream], dtype=np.uint64)
    counter = np.array([first, 0, 0, _STREAMS], dtype=np.uint64)
    numbers = np.random.Generator(np.random.Philox(key=key, counter=counter))
    return np.maximum(numbers.random(count + skipped)[skipped:], 2.0**-54)


def sphere(space: VectorSpace, seed: int, index: int) -> np.ndarray:
    """Return a direction drawn uniformly from the unit sphere, real or complex as the space is.

    The bands of `SpectralMeasure.cdf_band` hold for these probes.

    Examples
    --------
    >>> v = sphere(VectorSpace.like(np.zeros(4)), seed=0, index=3)
    >>> bool(np.isclose(np.linalg.norm(v), 1.0))
    True
    """
    v: np.ndarray = np.empty(space.dimension, _host_dtype(space))
    _fill_with_normals(v, seed, index)
    v /= _norm(v)
    return v


def _norm(v: np.ndarray) -> float:
    """Return the norm, the same bits on any number of cores."""
    parts = [np.linalg.norm(v[start : start + _SUMMED]) for start in range(0, len(v), _SUMMED)]
    return float(parts[0] if len(parts) == 1 else np.linalg.norm(parts))


def _fill_with_normals(v: np.ndarray, seed: int, index: int) -> None:
    rng = generator(seed, index)
    if v.dtype.kind == "c":
        v.real = rng.standard_normal(v.size)
        v.imag = rng.standard_normal(v.size)
    else:
        rng.standard_normal(out=v)


def rademacher(space: VectorSpace, seed: int, index: int) -> np.ndarray:
    """Return a vector of random signs, each 1 or -1 with probability one half (normalized when
    used).

    Exact for the trace of a diagonal matrix; `SpectralMeasure.cdf_band` is not available with it.
    """
    return 2.0 * generator(seed, index).integers(0, 2, space.dimension) - 1.0


def from_vectors(vectors: Array) -> ProbeSampler:
    """Return a sampler that hands out given vectors, probe i being column i, whatever the seed.

    Parameters
    ----------
    vectors : array of shape (n,) or (n, p)
        On the host or in the operator's own library and device.

    Raises
    ------
    TypeError
        If `vectors` is no array.
    ValueError
        If it is not one- or two-dimensional; when drawn from, if it has another length than
        the operator or too few columns.
    """
    backend_of(vectors, "vectors")
    if vectors.ndim not in (1, 2):
        msg = f"vectors has shape {tuple(vectors.shape)}; expected (n,) or (n, p)."
        raise ValueError(msg)
    columns = vectors[:, None] if vectors.ndim == 1 else vectors

    def given(space: VectorSpace, seed: int, index: int) -> Array:
        if columns.shape[0] != space.dimension:
            msg = (
                f"vectors has length {columns.shape[0]}; expected {space.dimension}, the "
                "operator's dimension."
            )
            raise ValueError(msg)
        if index >= columns.shape[1]:
            msg = f"vectors has {columns.shape[1]} columns; pass num_probes <= {columns.shape[1]}."
            raise ValueError(msg)
        return columns[:, index]

    return given


def is_isotropic(sampler: ProbeSampler) -> bool:
    """Tell whether the squared components of the probes have mean 1/n in every basis."""
    return sampler in (sphere, rademacher)


def is_own(v: Array, space: VectorSpace) -> bool:
    """Tell whether a probe is on the operator's device already, and not a host array."""
    return backend_of(v) is space.backend and space.backend.name != "numpy"


def draw(sampler: ProbeSampler, space: VectorSpace, seed: int, indices: range) -> Array:
    """Return the probes `indices` as unit columns of an (n, len(indices)) array of `space`.

    Raises
    ------
    ValueError
        If a probe has the wrong shape, is zero or not finite.
    TypeError
        If `sampler` cannot be called, or a probe is no array, or complex for a real operator.
    """
    checked_callable("probes", sampler, EXPECTED_SAMPLER)
    if is_isotropic(sampler):
        return space.from_numpy(_draw_own(sampler, space, seed, indices))
    host: np.ndarray | None = None
    moved = []
    for j, index in enumerate(indices):
        v = sampler(space, seed, index)
        backend_of(v, f"probe {index}")
        if tuple(v.shape) != (space.dimension,):
            msg = f"probe {index} has shape {tuple(v.shape)}; expected ({space.dimension},)."
            raise ValueError(msg)
        if not space.is_complex and dtype_name(v.dtype).startswith("complex"):
            msg = f"probe {index} is complex, the operator real; pass a real probe."
            raise TypeError(msg)
        if is_own(v, space):
            moved.append(_unit(v, space, index))
            continue
        if host is None:
            host = np.empty((space.dimension, len(indices)), _host_dtype(space))
        norm = np.linalg.norm(v)
        _check_norm(float(norm), index)
        np.divide(v, norm, out=host[:, j])
    if host is None:
        return space.backend.xp.stack(moved, axis=1)
    return space.from_numpy(host)


def _draw_own(sampler: ProbeSampler, space: VectorSpace, seed: int, indices: range) -> np.ndarray:
    """Return unit probes of a sampler of this module (n, p), on all cores if they are large.

    Threads only draw and move numbers. Norms are for the caller alone: BLAS may use all cores for
    each, and would wait for itself if several threads asked.
    """
    n, p = space.dimension, len(indices)
    workers = min(p, os.cpu_count() or 1) if n * p >= _LARGE else 1
    host: np.ndarray = np.empty((n, p), _host_dtype(space))
    together = max(workers, min(_TOGETHER, _BUFFER // n))
    vectors: np.ndarray = np.empty((min(p, together), n), host.dtype)
    with ThreadPoolExecutor(workers) as pool:
        each: Any = pool.map if workers > 1 else map
        for start in range(0, p, len(vectors)):
            part = vectors[: p - start]
            columns = host[:, start : start + len(part)]
            deque(each(partial(_fill, sampler, space, seed), indices[start:], part), maxlen=0)
            if sampler is sphere:  # as the sampler does itself: the bits are the same
                for v in part:
                    v /= _norm(v)
            norms = np.array([_norm(v) for v in part])
            deque(each(partial(_move, part, norms, columns), range(0, n, _ROWS)), maxlen=0)
    return host


def _fill(sampler: ProbeSampler, space: VectorSpace, seed: int, index: int, v: np.ndarray) -> None:
    if sampler is sphere:
        _fill_with_normals(v, seed, index)
    else:
        v[:] = sampler(space, seed, index)


def _move(vectors: np.ndarray, norms: np.ndarray, columns: np.ndarray, start: int) -> None:
    """Set some rows of the columns (n, p) to normalized vectors (p, n)."""
    rows = slice(start, start + _ROWS)
    columns[rows] = (vectors[:, rows] / norms[:, None]).T


def _host_dtype(space: VectorSpace) -> type:
    return np.complex128 if space.is_complex else np.float64


def _unit(v: Array, space: VectorSpace, index: int) -> Array:
    xp = space.backend.xp
    wide = xp.astype(v, space.wide_dtype)
    norm = float(xp.linalg.vector_norm(wide))
    _check_norm(norm, index)
    return xp.astype(wide / norm, space.working_dtype)


def _check_norm(norm: float, index: int) -> None:
    if not norm > 0 or not np.isfinite(norm):
        msg = f"probe {index} has norm {norm}; a probe must be finite and not zero."
        raise ValueError(msg)
