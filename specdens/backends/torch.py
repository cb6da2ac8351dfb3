"""The PyTorch backend (eager arithmetic on the tensor's own device)."""

from __future__ import annotations

from typing import Any

import array_api_compat.torch as xp
import numpy as np
import torch

from specdens.backends import Backend


def _from_numpy(array: np.ndarray, dtype: Any, device: Any) -> torch.Tensor:
    # A copy: NumPy may hand out read-only memory, and the tensor must not share it.
    return torch.tensor(np.ascontiguousarray(array)).to(device=device, dtype=dtype)


def _to_numpy(tensor: torch.Tensor) -> np.ndarray:
    tensor = tensor.detach().cpu().resolve_conj().resolve_neg()
    if tensor.dtype == torch.bfloat16:  # NumPy has no bfloat16; float32 holds every value exactly
        tensor = tensor.float()
    return tensor.numpy()


def _take(w: torch.Tensor, q: torch.Tensor, coefficients: torch.Tensor) -> torch.Tensor:
    return w.addmm_(coefficients.t(), q, alpha=-1)


BACKEND = Backend(
    name="torch",
    xp=xp,
    from_numpy=_from_numpy,
    to_numpy=_to_numpy,
    fast={"take": _take},
)
