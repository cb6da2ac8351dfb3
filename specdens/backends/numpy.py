"""The NumPy backend."""

from __future__ import annotations

from typing import Any

import array_api_compat.numpy as xp
import numpy as np
from scipy.linalg import get_blas_funcs

from specdens.backends import Backend


def _from_numpy(array: np.ndarray, dtype: Any, device: Any) -> np.ndarray:
    return np.asarray(array, dtype=dtype)


def _subtract_product(w: np.ndarray, c: np.ndarray, q: np.ndarray) -> np.ndarray:
    if w.dtype.char not in "fdFD":
        w -= c @ q
        return w
    # BLAS counts in columns: rows that lie end to end are the columns of the transpose.
    gemm = get_blas_funcs("gemm", (w, q))
    result: np.ndarray = gemm(-1.0, q.T, c.T, beta=1.0, c=w.T, overwrite_c=True)
    return result.T


BACKEND = Backend(
    name="numpy",
    xp=xp,
    from_numpy=_from_numpy,
    to_numpy=np.asarray,
    subtract_product=_subtract_product,
)
