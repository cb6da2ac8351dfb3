"""The NumPy backend."""

from __future__ import annotations

from typing import Any

import array_api_compat.numpy as xp
import numpy as np

from specdens.backends import Backend


def _from_numpy(array: np.ndarray, dtype: Any, device: Any) -> np.ndarray:
    return np.asarray(array, dtype=dtype)


BACKEND = Backend(name="numpy", xp=xp, from_numpy=_from_numpy, to_numpy=np.asarray)
