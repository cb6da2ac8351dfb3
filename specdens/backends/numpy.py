"""The NumPy backend, with faster forms of what sweeps large arrays."""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import array_api_compat.numpy as xp
import numpy as np

from specdens.backends import Backend

#: Entries from which numba's threads are worth waking, and loading it is worth the time.
_LARGE = 2**20
_LARGE_SPARSE = 2**17  # the same for sparse products, of which SciPy's run on one core
_UNTHREADED = 2**18  # multiplications of a product that OpenBLAS leaves to one core
_FEW = 2**9  # inner products at once for which that one is faster than several
_LONG = 2**10  # entries of a row that NumPy loops over at full speed
_CACHED = 2**15  # entries of an array whose temporaries stay in cache


def _from_numpy(array: np.ndarray, dtype: Any, device: Any) -> np.ndarray:
    return np.asarray(array, dtype=dtype)


@functools.cache
def _compiled() -> ModuleType | None:
    try:
        from specdens.backends import compiled
    except (ImportError, RuntimeError):  # not installed, or nowhere to keep what it compiles
        return None
    return compiled


class _Recycler:
    """Large arrays whose memory is given out again, within a session, when nobody holds them.

    Memory fresh from the system costs more than a sweep over it.
    """

    def __init__(self) -> None:
        self._owners: list[np.ndarray] = []
        self._lock = threading.Lock()
        self._sessions = 0
        self._idle = next(sys.getrefcount(owner) for owner in [np.empty(1, np.uint8)])

    def empty_like(self, x: np.ndarray) -> np.ndarray:
        """Return an array like `x`, entries undefined."""
        with self._lock:
            if not self._sessions:
                return np.empty_like(x)
            for owner in self._owners:
                if owner.nbytes == x.nbytes and sys.getrefcount(owner) <= self._idle:
                    return owner.view(x.dtype).reshape(x.shape)
            owner = np.empty(x.nbytes, np.uint8)
            self._owners = [*self._owners, owner][-4:]
            return owner.view(x.dtype).reshape(x.shape)

    @contextlib.contextmanager
    def session(self) -> Iterator[None]:
        """Keep memory between steps; let go of it at the end of the outermost session."""
        with self._lock:
            self._sessions += 1
        try:
            yield
        finally:
            with self._lock:
                self._sessions -= 1
                self._owners = self._owners if self._sessions else []


_recycler = _Recycler()


def _alike(*arrays: np.ndarray) -> bool:
    """Tell whether all are real (n, p) arrays of one shape and dtype, row after row in memory."""
    first = arrays[0]
    return first.dtype.char in "fd" and all(
        x.flags.c_contiguous and x.dtype == first.dtype and x.shape == first.shape for x in arrays
    )


def _takes(*arrays: np.ndarray) -> ModuleType | None:
    """Return the compiled kernels if these arrays are for them."""
    return _compiled() if arrays[0].size >= _LARGE and _alike(*arrays) else None


def _folded(*arrays: np.ndarray) -> Iterator[list[np.ndarray]]:
    """Yield blocks of (n, p) arrays as views in which some rows lie end to end.

    NumPy takes longer to start on a row than to add up sixteen numbers.
    """
    n, p = arrays[0].shape
    fold = _fold(p)
    whole = n // fold * fold
    step = fold * max(1, _CACHED // (fold * p))
    for start in range(0, whole, step):
        rows = slice(start, min(start + step, whole))
        yield [x[rows].reshape(-1, fold * p) for x in arrays]
    if whole < n:
        yield [x[whole:] for x in arrays]


def _fold(p: int) -> int:
    """Return how many rows of p entries are laid end to end."""
    return max(1, _LONG // p)


def _dots(x: np.ndarray, y: np.ndarray, p: int) -> np.ndarray:
    """Return the inner products of the p columns of folded arrays, in double precision."""
    x, y = (v.astype(np.float64, copy=False) for v in (x, y))
    products: np.ndarray = np.einsum("ij,ij->j", x, y).reshape(-1, p)
    return products.sum(axis=0)


def _three_term(
    product: np.ndarray,
    q: np.ndarray,
    q_prev: np.ndarray,
    beta: np.ndarray,
    overwrite: bool = False,
) -> Any:
    kernels = _takes(q, q_prev, product)
    if kernels is None:
        return _folded_three_term(product, q, q_prev, beta, overwrite)
    sums, beta = np.empty((kernels.PARTS, q.shape[1])), np.ascontiguousarray(beta)
    if overwrite:
        kernels.three_term_into(product, q, q_prev, beta, sums)
        return product, sums.sum(axis=0)
    w = _recycler.empty_like(q)
    kernels.three_term(product, q, q_prev, beta, w, sums)
    return w, sums.sum(axis=0)


def _folded_three_term(
    product: np.ndarray, q: np.ndarray, q_prev: np.ndarray, beta: np.ndarray, overwrite: bool
) -> Any:
    if not _alike(q, q_prev, product):
        return NotImplemented
    w, p = (product if overwrite else np.empty_like(q)), q.shape[1]
    alpha, factors = np.zeros(p), np.tile(beta, _fold(p))
    for part, made, now, before in _folded(w, product, q, q_prev):
        np.subtract(made, factors[: part.shape[1]] * before, out=part)
        alpha += _dots(now, part, p)
    return w, alpha


def _subtract(w: np.ndarray, q: np.ndarray, alpha: np.ndarray) -> Any:
    if not _alike(w, q):
        return NotImplemented
    kernels = _takes(w, q)
    if kernels is not None:
        sums = np.empty((kernels.PARTS, q.shape[1]))
        kernels.subtract(w, q, alpha, sums)
        return w, sums.sum(axis=0) ** 0.5
    p = q.shape[1]
    squares, factors = np.zeros(p), np.tile(alpha, _fold(p))
    for part, now in _folded(w, q):
        part -= factors[: part.shape[1]] * now
        squares += _dots(part, part, p)
    return w, squares**0.5


def _scale(w: np.ndarray, factors: np.ndarray) -> Any:
    kernels = _takes(w)
    if kernels is not None:
        kernels.scale(w, factors)
        return w
    if not _alike(w):
        return NotImplemented
    factors = np.tile(factors, _fold(w.shape[1]))
    for (part,) in _folded(w):
        part *= factors[: part.shape[1]]
    return w


def _chebyshev(
    product: np.ndarray, t: np.ndarray, t_prev: np.ndarray, coefficients: np.ndarray
) -> Any:
    if not _alike(t, t_prev, product):
        return NotImplemented
    kernels = _takes(t, t_prev, product)
    if kernels is not None:
        w = _recycler.empty_like(t)
        crosses, squares = np.empty((2, kernels.PARTS, t.shape[1]))
        kernels.chebyshev(product, t, t_prev, coefficients, w, crosses, squares)
        return w, crosses.sum(axis=0), squares.sum(axis=0)
    a, b, c = coefficients
    w, p = np.empty_like(t), t.shape[1]
    cross, square = np.zeros((2, p))
    for part, at, now, before in _folded(w, product, t, t_prev):
        np.multiply(a, at, out=part)
        part += b * now
        part += c * before
        cross += _dots(part, now, p)
        square += _dots(part, part, p)
    return w, cross, square


def _sketch(q: np.ndarray, signs: np.ndarray, size: int) -> Any:
    if not _alike(q):
        return NotImplemented
    kernels = _takes(q)
    if kernels is not None:
        sums = np.empty((kernels.PARTS, size, q.shape[1]), dtype=q.dtype)
        kernels.sketch(q, signs, size, sums)
        return sums.sum(axis=0)
    n, p = q.shape
    whole, total = n // size * size, np.zeros((size, p), dtype=q.dtype)
    step = size * max(1, _CACHED // (size * p))
    for start in range(0, whole, step):
        rows = slice(start, min(start + step, whole))
        factors = signs[rows].astype(q.dtype).reshape(-1, size)
        total += np.einsum("ijk,ij->jk", q[rows].reshape(-1, size, p), factors)
    total[: n - whole] += signs[whole:, None] * q[whole:]
    return total


def _csr_product(matrix: Any, x: np.ndarray) -> Any:
    if x.ndim != 2 or x.dtype != matrix.dtype:
        return NotImplemented
    ended = x.T.flags.c_contiguous  # vectors end to end: those of the product will be, too
    kernels = _compiled() if x.size >= _LARGE_SPARSE and x.dtype.char in "fd" else None
    if kernels is None:
        return np.asfortranarray(matrix @ x) if ended else NotImplemented
    csr = matrix.indptr, matrix.indices, matrix.data
    y = _recycler.empty_like(x.T if ended else x)
    if ended:
        kernels.csr_product_of_rows(*csr, x.T, y)
        return y.T
    kernels.csr_product(*csr, np.ascontiguousarray(x), y)
    return y


def _csr_three_term(matrix: Any, q: np.ndarray, q_prev: np.ndarray, beta: np.ndarray) -> Any:
    kernels = _takes(q, q_prev)
    if kernels is None or q.dtype != matrix.dtype:
        return NotImplemented
    w, sums = _recycler.empty_like(q), np.empty((kernels.PARTS, q.shape[1]))
    beta = np.ascontiguousarray(beta)  # one kind of array, one compilation
    csr = matrix.indptr, matrix.indices, matrix.data
    kernels.csr_three_term(*csr, q, q_prev, beta, w, sums)
    return w, sums.sum(axis=0)


def _products(x: np.ndarray, y: np.ndarray) -> Any:
    few = len(x) * len(y)
    if few > _FEW or not few or {x.dtype.char, y.dtype.char} & set("FDG"):
        return NotImplemented
    total = np.zeros((len(x), len(y)), dtype=x.dtype)
    for part in _parts(x.shape[1], _UNTHREADED // few):
        total += _gram(x[:, part], y[:, part])
    return total


def _gram(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return x y^T, never by the routine for symmetric results: for few rows it is slow."""
    return x @ (y.copy() if y.base is x.base else y).T


def _parts(n: int, step: int) -> Iterator[slice]:
    """Yield the slices of `step` that cover n."""
    for start in range(0, n, step):
        yield slice(start, min(start + step, n))


def _of_columns(p: int) -> int:
    """Return how many columns of p rows to sweep at once: in cache, and on one core by BLAS."""
    return min(_UNTHREADED // (p * p), 2 * _CACHED // p)


def _transform(x: np.ndarray, coefficients: np.ndarray) -> Any:
    p, n = x.shape
    if not _alike(x) or x.dtype != coefficients.dtype or coefficients.size > _FEW:
        return NotImplemented
    mixing = np.ascontiguousarray(coefficients.T)
    for part in _parts(n, _of_columns(p)):
        x[:, part] = mixing @ x[:, part]
    return x


def _recur(
    w: np.ndarray, previous: tuple[np.ndarray, ...], coefficients: tuple[np.ndarray, ...]
) -> Any:
    p, n = w.shape
    if not _alike(w, *previous) or w.dtype.char != "d" or p * p > _FEW:
        return NotImplemented
    buffers, gram = np.empty((2, p, _of_columns(p))), np.zeros((p, p))
    left = [np.zeros((p, p)) for _ in previous]
    mixing = [np.ascontiguousarray(c.T) for c in coefficients]
    for part in _parts(n, _of_columns(p)):
        old = w[:, part]
        new, change = buffers[:, :, : old.shape[1]]
        for q, c in zip(previous, mixing, strict=True):
            np.subtract(old, np.matmul(c, q[:, part], out=change), out=new)
            old = new
        for total, q in zip(left, previous, strict=True):
            total += q[:, part] @ new.T
        w[:, part] = new
        gram += _gram(new, w[:, part])
    return w, left, gram


BACKEND = Backend(
    name="numpy",
    xp=xp,
    from_numpy=_from_numpy,
    to_numpy=np.asarray,
    session=_recycler.session,
    fast={
        "three_term": _three_term,
        "subtract": _subtract,
        "scale": _scale,
        "chebyshev": _chebyshev,
        "sketch": _sketch,
        "products": _products,
        "transform": _transform,
        "recur": _recur,
        "csr_product": _csr_product,
        "csr_three_term": _csr_three_term,
    },
)
