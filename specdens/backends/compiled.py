"""Kernels for NumPy arrays, compiled and run on all cores by numba; used if it is installed.

Each sweeps its (n, p) arrays once, where NumPy would once per operation: large blocks of vectors
are bound by memory. Rows are cut into a fixed number of parts, whose sums are added in order, so
that the result does not depend on the number of threads.
"""

from __future__ import annotations

import numpy as np
from numba import njit, prange

#: Pieces that rows are cut into, whatever the number of threads.
PARTS = 64


@njit(parallel=True, cache=True, nogil=True)
def three_term(product, q, q_prev, beta, w, sums):  # type: ignore[no-untyped-def]
    """Set w = A q - beta q_prev, and the parts of <q, w> per column."""
    n, p = q.shape
    for part in prange(PARTS):
        total = np.zeros(p)
        for i in range(part * n // PARTS, (part + 1) * n // PARTS):
            for j in range(p):
                value = product[i, j] - beta[j] * q_prev[i, j]
                w[i, j] = value
                total[j] += np.float64(q[i, j]) * np.float64(value)
        sums[part] = total


@njit(parallel=True, cache=True, nogil=True)
def three_term_into(w, q, q_prev, beta, sums):  # type: ignore[no-untyped-def]
    """Subtract beta q_prev from w = A q, and set the parts of <q, w> per column."""
    n, p = q.shape
    for part in prange(PARTS):
        total = np.zeros(p)
        for i in range(part * n // PARTS, (part + 1) * n // PARTS):
            for j in range(p):
                value = w[i, j] - beta[j] * q_prev[i, j]
                w[i, j] = value
                total[j] += np.float64(q[i, j]) * np.float64(value)
        sums[part] = total


@njit(parallel=True, cache=True, nogil=True)
def subtract(w, q, alpha, sums):  # type: ignore[no-untyped-def]
    """Subtract alpha q from w, and set the parts of <w, w> per column."""
    n, p = q.shape
    for part in prange(PARTS):
        total = np.zeros(p)
        for i in range(part * n // PARTS, (part + 1) * n // PARTS):
            for j in range(p):
                value = w[i, j] - alpha[j] * q[i, j]
                w[i, j] = value
                total[j] += np.float64(value) * np.float64(value)
        sums[part] = total


@njit(parallel=True, cache=True, nogil=True)
def scale(w, factors):  # type: ignore[no-untyped-def]
    """Multiply column j of w by factors[j]."""
    n, p = w.shape
    for part in prange(PARTS):
        for i in range(part * n // PARTS, (part + 1) * n // PARTS):
            for j in range(p):
                w[i, j] *= factors[j]


@njit(parallel=True, cache=True, nogil=True)
def chebyshev(product, t, t_prev, coefficients, w, crosses, squares):  # type: ignore[no-untyped-def]
    """Set w = a A t + b t + c t_prev, and the parts of <w, t> and <w, w> per column."""
    n, p = t.shape
    a, b, c = coefficients
    for part in prange(PARTS):
        cross, square = np.zeros(p), np.zeros(p)
        for i in range(part * n // PARTS, (part + 1) * n // PARTS):
            for j in range(p):
                value = a * product[i, j] + b * t[i, j] + c * t_prev[i, j]
                w[i, j] = value
                cross[j] += np.float64(value) * np.float64(t[i, j])
                square[j] += np.float64(value) * np.float64(value)
        crosses[part] = cross
        squares[part] = square


@njit(parallel=True, cache=True, nogil=True)
def sketch(q, signs, size, sums):  # type: ignore[no-untyped-def]
    """Set the parts (size, p) of the sums of signed rows over their residue classes."""
    n, p = q.shape
    for part in prange(PARTS):
        total = np.zeros((size, p), q.dtype)
        first = part * n // PARTS
        row = first % size
        for i in range(first, (part + 1) * n // PARTS):
            sign = signs[i]  # a factor: nobody can foresee which branch random signs take
            for j in range(p):
                total[row, j] += sign * q[i, j]
            row += 1
            if row == size:
                row = 0
        sums[part] = total


@njit(parallel=True, cache=True, nogil=True)
def csr_three_term(indptr, indices, data, q, q_prev, beta, w, sums):  # type: ignore[no-untyped-def]
    """Set w = A q - beta q_prev for a matrix in compressed rows, and the parts of <q, w>."""
    n, p = q.shape
    for part in prange(PARTS):
        total, row = np.zeros(p), np.zeros(p, q.dtype)
        for i in range(part * n // PARTS, (part + 1) * n // PARTS):
            for j in range(p):
                row[j] = -beta[j] * q_prev[i, j]
            for k in range(indptr[i], indptr[i + 1]):
                entry, column = data[k], indices[k]
                for j in range(p):
                    row[j] += entry * q[column, j]
            for j in range(p):
                w[i, j] = row[j]
                total[j] += np.float64(q[i, j]) * np.float64(row[j])
        sums[part] = total


@njit(parallel=True, cache=True, nogil=True)
def csr_product(indptr, indices, data, x, y):  # type: ignore[no-untyped-def]
    """Set y = A x for a matrix in compressed rows."""
    n, p = y.shape
    for part in prange(PARTS):
        total = np.zeros(p, y.dtype)
        for i in range(part * n // PARTS, (part + 1) * n // PARTS):
            total[:] = 0
            for k in range(indptr[i], indptr[i + 1]):
                entry, column = data[k], indices[k]
                for j in range(p):
                    total[j] += entry * x[column, j]
            for j in range(p):
                y[i, j] = total[j]


@njit(parallel=True, cache=True, nogil=True)
def csr_product_of_rows(indptr, indices, data, x, y):  # type: ignore[no-untyped-def]
    """Set y = A x for a matrix in compressed rows and vectors end to end, (p, n), in pairs."""
    p, n = y.shape
    zero = y.dtype.type(0)
    for part in prange(PARTS):
        first, stop = part * n // PARTS, (part + 1) * n // PARTS
        for j in range(0, p - 1, 2):
            for i in range(first, stop):
                left = right = zero
                for k in range(indptr[i], indptr[i + 1]):
                    entry, column = data[k], indices[k]
                    left += entry * x[j, column]
                    right += entry * x[j + 1, column]
                y[j, i], y[j + 1, i] = left, right
        if p % 2:
            for i in range(first, stop):
                left = zero
                for k in range(indptr[i], indptr[i + 1]):
                    left += data[k] * x[p - 1, indices[k]]
                y[p - 1, i] = left
