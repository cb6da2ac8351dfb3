"""Adding up batches, in a wider dtype or with the rounding errors beside the sum."""

from __future__ import annotations

from typing import Any

import jax


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
