"""Adding up batches, in a wider dtype or with the rounding errors beside the sum."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from specdens.arguments import shown

_WIDER = ("float32", "float64")


def checked_accumulation(accumulate: Any, own: Any) -> tuple[Any, bool]:
    """Return the dtype that sums over the data have, and whether their errors are added up too.

    Parameters
    ----------
    accumulate : str, dtype or None
        None for the dtype `own` of the vectors, ``"compensated"`` for that and the errors.

    Raises
    ------
    TypeError
        If it is neither a name nor a dtype.
    ValueError
        If it is another name, or a dtype that is not floating, narrower or not switched on.
    """
    if accumulate is None or (isinstance(accumulate, str) and accumulate == "compensated"):
        return own, accumulate is not None
    wider = [name for name in _WIDER if jnp.promote_types(name, own) == name]
    msg = (
        f"accumulate={shown(accumulate)} must be 'compensated' or a dtype at least as wide as "
        f"{jnp.dtype(own)}, {' or '.join(map(repr, wider))}."
    )
    if not isinstance(accumulate, str | type | np.dtype):
        raise TypeError(msg)
    name = accumulate if isinstance(accumulate, str) else np.dtype(accumulate).name
    if name not in wider:
        raise ValueError(msg)
    if jax.dtypes.canonicalize_dtype(name) != name:
        msg = f"{msg[:-1]} (switch jax_enable_x64 on)."
        raise ValueError(msg)
    return jnp.dtype(name), False


def accumulated(total: Any, rows: jax.Array) -> Any:
    """Add rows to a total, with their rounding error if the total has a place for it.

    The error of a sum of two numbers is a number of the same precision (Knuth 1997, 4.2.2, theorem
    B); barriers keep the compiler from simplifying it to zero.
    """
    if len(total) == 1:
        return (total[0] + rows,)
    old, error = total
    new = jax.lax.optimization_barrier(old + rows)
    part = jax.lax.optimization_barrier(new - old)
    rest = jax.lax.optimization_barrier(new - part)
    return new, error + ((old - rest) + (rows - part))


def finished(total: Any) -> jax.Array:
    """Return the sum of a total."""
    return total[0] if len(total) == 1 else total[0] + total[1]
