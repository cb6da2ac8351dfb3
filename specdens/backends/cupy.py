"""The CuPy backend: NVIDIA and AMD graphics processors."""

from __future__ import annotations

from typing import Any

import array_api_compat.cupy as xp
import cupy
import numpy as np

from specdens.backends import Backend


def _from_numpy(array: np.ndarray, dtype: Any, device: Any) -> cupy.ndarray:
    # CuPy allocates on the current device whatever `device=` says, so make it the current one.
    with cupy.cuda.Device(device):
        return cupy.asarray(array, dtype=dtype)


# Measured on an H100: adding up ten columns of a million takes 0.13 ms by a product with ones and
# 6.3 ms by `sum`, a step of Lanczos on them in sixteen blocks of rows 12 ms.
BACKEND = Backend(name="cupy", xp=xp, from_numpy=_from_numpy, to_numpy=cupy.asnumpy, coarse=True)
