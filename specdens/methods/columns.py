"""Arithmetic on blocks of p vectors: pure functions, compiled where the backend compiles.

Everything runs in blocks of rows, so that temporaries stay in cache and far below the size of one
vector, and accumulates in the space's wide dtype.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import array_api_compat as compat
import array_api_extra as xpx

from specdens.backends import Array, Backend, DType


def row_blocks(x: Array, num_elements: int = 2**15, *, coarse: bool = False) -> Iterator[slice]:
    """Yield slices of at most 16 blocks of rows, each of `num_elements` at least.

    Few and large ones if `coarse`. Arrays that only a compiler can update (JAX) come whole.
    """
    n, p = x.shape
    least = max(num_elements, 2**22) if coarse else num_elements
    rows = max(n // 16 + 1, least // p) if compat.is_writeable_array(x) else n
    for start in range(0, n, rows):
        yield slice(start, min(start + rows, n))


def three_term(
    product: Array,
    q: Array,
    q_prev: Array,
    beta: Array,
    *,
    wide: DType,
    overwrite: bool = False,
    coarse: bool = False,
) -> Any:
    """Return w = A q - beta q_prev and alpha = Re <q, w>, per column.

    With `overwrite` in the memory of the product, where that is possible.
    """
    w, alpha = (product if overwrite else q_prev * (-beta)), 0
    for rows in row_blocks(q, coarse=coarse):
        change = q_prev[rows, :] * (-beta) if overwrite else product[rows, :]
        w = xpx.at(w)[rows, :].add(change)
        alpha += _dot(q[rows, :], w[rows, :], wide, coarse=coarse)
    return w, alpha


def subtract(w: Array, q: Array, alpha: Array, *, wide: DType, coarse: bool = False) -> Any:
    """Return w - alpha q, in place where that is possible, and its norm, per column."""
    squared: Any = 0
    for rows in row_blocks(q, coarse=coarse):
        w = xpx.at(w)[rows, :].subtract(alpha * q[rows, :])
        squared += _dot(w[rows, :], w[rows, :], wide, coarse=coarse)
    return w, squared**0.5


def chebyshev(
    product: Array,
    t: Array,
    t_prev: Array,
    coefficients: Array,
    *,
    wide: DType,
    coarse: bool = False,
) -> Any:
    """Return w = a A t + b t + c t_prev with (a, b, c) given, <w, t> and <w, w>, per column."""
    w, cross, square = t_prev * coefficients[2], 0, 0
    for rows in row_blocks(t, coarse=coarse):
        part = coefficients[0] * product[rows, :] + coefficients[1] * t[rows, :]
        w = xpx.at(w)[rows, :].add(part)
        cross += _dot(w[rows, :], t[rows, :], wide, coarse=coarse)
        square += _dot(w[rows, :], w[rows, :], wide, coarse=coarse)
    return w, cross, square


def scale(w: Array, factors: Array) -> Array:
    """Return w with column j multiplied by factors[j], in place where that is possible."""
    w *= factors
    return w


def sketch(q: Array, signs: Array, *, size: int, coarse: bool = False) -> Array:
    """Return (size, p): sums of every column's signed entries over the residue classes of rows."""
    xp = compat.array_namespace(q)
    n, p = q.shape
    whole = n // size * size
    total = xp.zeros((size, p), dtype=q.dtype, device=compat.device(q))
    least = max(n // 16 + 1, 2**22 // p if coarse else size)
    step = max(size, least // size * size) if compat.is_writeable_array(q) else whole
    for start in range(0, whole, step):
        stop = min(start + step, whole)
        signed = xp.astype(signs[start:stop, None], q.dtype) * q[start:stop, :]
        groups = xp.reshape(signed, ((stop - start) // size, size * p))
        total += xp.reshape(_column_sums(groups, coarse=coarse), (size, p))
    if whole < n:
        tail = xp.astype(signs[whole:, None], q.dtype) * q[whole:, :]
        total = xpx.at(total)[: n - whole, :].add(tail)
    return total


# The block method keeps a block of p vectors as rows: the products below read (p, n) arrays end to
# end, several times faster than (n, p) ones.


def as_rows(x: Array, *, coarse: bool = False) -> Array:
    """Return the columns of x (n, p) as rows (p, n), end to end in memory of their own."""
    xp = compat.array_namespace(x)
    if not compat.is_writeable_array(x):
        return xp.permute_dims(x, (1, 0))
    rows = xp.empty(x.shape[::-1], dtype=x.dtype, device=compat.device(x))
    for part in row_blocks(x, num_elements=2**16, coarse=coarse):
        rows[:, part] = xp.permute_dims(x[part, :], (1, 0))
    return rows


def products(x: Array, y: Array) -> Array:
    """Return the inner products <x_i, y_j> of vectors in rows, in their own arithmetic."""
    xp = compat.array_namespace(x, y)
    # Conjugates of the few, not of the many.
    return _conj(xp.matmul(x, xp.permute_dims(_conj(y, xp), (1, 0))), xp)


def inner(
    x: Array, y: Array, *, wide: DType, products: Any = products, coarse: bool = False
) -> Array:
    """Return the inner products <x_i, y_j> of vectors in rows, accumulated in `wide`."""
    xp = compat.array_namespace(x, y)
    if x.dtype == wide and y.dtype == wide:  # nothing to convert
        return products(x, y)
    total: Any = 0
    for part in row_blocks(xp.permute_dims(x, (1, 0)), coarse=coarse):
        left = xp.astype(x[:, part], wide, copy=False)
        right = left if y is x else xp.astype(y[:, part], wide, copy=False)
        total += products(left, right)
    return total


def combine(x: Array, coefficients: Array) -> Array:
    """Return the rows of C^T X: row j is the sum of x_i C_ij."""
    xp = compat.array_namespace(x)
    return xp.matmul(xp.permute_dims(coefficients, (1, 0)), x)


def transform(x: Array, coefficients: Array, *, coarse: bool = False) -> Array:
    """Return the rows of C^T X, in place where that is possible."""
    xp = compat.array_namespace(x)
    mixing = xp.permute_dims(coefficients, (1, 0))
    for part in row_blocks(xp.permute_dims(x, (1, 0)), num_elements=2**16, coarse=coarse):
        x = xpx.at(x)[:, part].set(xp.matmul(mixing, x[:, part]))
    return x


def take(w: Array, q: Array, coefficients: Array, *, coarse: bool = False) -> Array:
    """Return the rows of W - C^T Q, in place where that is possible."""
    xp = compat.array_namespace(w)
    mixing = xp.permute_dims(coefficients, (1, 0))
    # In pieces: a temporary array of full size would cost as much as the product.
    for part in row_blocks(xp.permute_dims(w, (1, 0)), num_elements=2**16, coarse=coarse):
        w = xpx.at(w)[:, part].subtract(xp.matmul(mixing, q[:, part]))
    return w


def remove(
    w: Array, q: Array, *, products: Any = products, take: Any = take
) -> tuple[Array, Array]:
    """Return W without its components C_ij = <q_i, w_j> along orthonormal q_i, and C.

    In place where that is possible.
    """
    components = products(q, w)
    return take(w, q, components), components


def recur(
    w: Array,
    previous: tuple[Array, ...],
    coefficients: tuple[Array, ...],
    *,
    wide: DType,
    coarse: bool = False,
) -> tuple[Array, list[Any], Any]:
    """Return V = W less the C_i^T Q_i, all <Q_i, V>, and <V, V> accumulated in `wide`.

    One sweep: in place where that is possible, and every part is used while it is in cache.
    """
    xp = compat.array_namespace(w)
    mixing = [xp.permute_dims(c, (1, 0)) for c in coefficients]
    left, gram = [0 for _ in previous], 0
    for part in row_blocks(xp.permute_dims(w, (1, 0)), num_elements=2**16, coarse=coarse):
        old, new = [q[:, part] for q in previous], w[:, part]
        for q, c in zip(old, mixing, strict=True):
            new = new - xp.matmul(c, q)
        left = [total + products(q, new) for total, q in zip(left, old, strict=True)]
        exact = xp.astype(new, wide, copy=False)
        gram = gram + products(exact, exact)
        w = xpx.at(w)[:, part].set(new)
    return w, left, gram


def _conj(x: Array, xp: Any) -> Array:
    return xp.conj(x) if xp.isdtype(x.dtype, "complex floating") else x


def _dot(x: Array, y: Array, wide: DType, *, coarse: bool) -> Array:
    """Return Re <x_j, y_j> of every column j, multiplied and added in `wide`."""
    xp = compat.array_namespace(x, y)
    x, y = (xp.astype(v, wide, copy=False) for v in (x, y))
    if xp.isdtype(wide, "complex floating"):
        return _column_sums(xp.real(xp.conj(x) * y), coarse=coarse)
    return _column_sums(x * y, coarse=coarse)


def _column_sums(x: Array, *, coarse: bool) -> Array:
    """Return the sums (p,) of the columns, by a product with ones if `coarse`."""
    xp = compat.array_namespace(x)
    if not coarse:
        return xp.sum(x, axis=0)
    ones = xp.ones((1, x.shape[0]), dtype=x.dtype, device=compat.device(x))
    return xp.matmul(ones, x)[0, :]


@dataclass(frozen=True)
class Kernels:
    """The functions above for one library and accumulation dtype."""

    three_term: Any
    three_term_into: Any  # the same, overwriting the product
    chebyshev: Any
    subtract: Any
    inner: Any
    scale: Any
    combine: Any
    transform: Any
    take: Any
    remove: Any
    recur: Any
    as_rows: Any


@lru_cache
def kernels(backend: Backend, wide: DType) -> Kernels:
    """Return the column arithmetic of a library, compiled once."""
    coarse = {"coarse": backend.coarse}
    fastest = {"products": _best(backend, products), "take": _best(backend, take, **coarse)}
    return Kernels(
        three_term=_best(backend, three_term, wide=wide, **coarse),
        three_term_into=_best(backend, three_term, wide=wide, overwrite=True, **coarse),
        chebyshev=_best(backend, chebyshev, wide=wide, **coarse),
        subtract=_best(backend, subtract, wide=wide, **coarse),
        inner=_best(backend, inner, wide=wide, products=fastest["products"], **coarse),
        scale=_best(backend, scale),
        combine=_best(backend, combine),
        transform=_best(backend, transform, **coarse),
        take=fastest["take"],
        remove=_best(backend, remove, **fastest),
        recur=_best(backend, recur, wide=wide, **coarse),
        as_rows=_best(backend, as_rows, **coarse),
    )


@lru_cache
def sketcher(backend: Backend, size: int) -> Any:
    """Return `sketch` for one size, compiled once."""
    generic = backend.jit(partial(sketch, size=size, coarse=backend.coarse))
    fast = backend.fast.get("sketch")
    return generic if fast is None else _either(partial(fast, size=size), generic)


def _best(backend: Backend, function: Any, **options: Any) -> Any:
    """Return a function above as the library runs it fastest."""
    generic = backend.jit(partial(function, **options))
    fast = backend.fast.get(function.__name__)
    if fast is None:
        return generic
    return _either(partial(fast, overwrite=True) if "overwrite" in options else fast, generic)


def _either(fast: Any, generic: Any) -> Any:
    """Return a function that leaves to `generic` what `fast` is not made for."""

    def choose(*arguments: Array) -> Any:
        result = fast(*arguments)
        return generic(*arguments) if result is NotImplemented else result

    return choose
