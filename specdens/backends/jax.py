"""The JAX backend: the arithmetic between two products is compiled."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from specdens.backends import Backend


def _from_numpy(array: np.ndarray, dtype: Any, device: Any) -> jax.Array:
    # Cast on the host: without x64, JAX would warn about the float64 it cannot keep.
    return jax.device_put(np.asarray(array, dtype=dtype), device)


BACKEND = Backend(name="jax", xp=jnp, from_numpy=_from_numpy, to_numpy=np.asarray, jit=jax.jit)
