"""The array-api-strict backend: the standard and nothing else, with a second device for tests."""

from __future__ import annotations

from typing import Any

import array_api_strict as xp
import numpy as np

from specdens.backends import Backend


def _from_numpy(array: np.ndarray, dtype: Any, device: Any) -> Any:
    return xp.asarray(np.asarray(array), dtype=dtype, device=device)


def _to_numpy(array: Any) -> np.ndarray:
    return np.asarray(xp.asarray(array).to_device(xp.Device("CPU_DEVICE")))


BACKEND = Backend(name="strict", xp=xp, from_numpy=_from_numpy, to_numpy=_to_numpy)
