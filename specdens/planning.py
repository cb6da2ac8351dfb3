"""What a run will cost, before it is started: `plan`."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from specdens.arguments import checked_count
from specdens.backends import Array
from specdens.driver import Method
from specdens.estimators import lanczos_method
from specdens.methods.block import BlockLanczos
from specdens.operators import aslinearoperator
from specdens.probes import draw, sphere
from specdens.runs import MEMORY_BUDGET, checked_steps, fitting
from specdens.spaces import LinearOperator


@dataclass(frozen=True)
class Plan:
    """Cost of a run of `slq`. Prints as a table.

    Attributes
    ----------
    num_probes, num_steps, block_size : int
    reorthogonalize : bool
        Whether all Lanczos vectors fit into the budget, or were asked for.
    num_products : int
        Columns to multiply: ``num_probes * num_steps``.
    num_passes : int
        Block products, and so passes over the data of an operator that reads data.
    num_bytes : int
        Of the Lanczos vectors at most; the operator's own are not counted.
    seconds_per_product : float
        Per column, measured in a block, vector work of one step included.
    seconds : float
        Of all products. Reorthogonalization against older blocks is not in it, and can take more
        time than the products where these are cheap.
    """

    num_probes: int
    num_steps: int
    block_size: int
    reorthogonalize: bool
    num_products: int
    num_passes: int
    num_bytes: int
    seconds_per_product: float
    seconds: float

    def __str__(self) -> str:
        basis = "kept" if self.reorthogonalize else "not kept"
        rows = [
            ("probes x steps", f"{self.num_probes} x {self.num_steps}"),
            ("in blocks of", f"{self.block_size}"),
            ("Lanczos vectors", basis),
            ("products (columns)", f"{self.num_products}"),
            ("passes over the data", f"{self.num_passes}"),
            ("memory for vectors", _human(self.num_bytes)),
            ("time per product", f"{self.seconds_per_product:.3g} s"),
            ("time of all products", f"{self.seconds:.3g} s"),
        ]
        return "\n".join(f"{name:<22}{value:>14}" for name, value in rows)


def plan(
    A: LinearOperator | Array,  # noqa: N803
    *,
    num_probes: int = 10,
    num_steps: int | None = None,
    block_size: int | None = None,
    reorthogonalize: bool | None = None,
    memory_budget: int = MEMORY_BUDGET,
    verbose: bool = True,
) -> Plan:
    """Print and return what `slq` with the same arguments will cost, from one timed step.

    Takes two products with a block: one to warm up whatever the first product compiles or caches,
    and one that is timed.

    Parameters
    ----------
    A : LinearOperator or array-like of shape (n, n)
    num_probes, num_steps, block_size, reorthogonalize, memory_budget
        As in `slq`.
    verbose : bool
        Print the table.

    Returns
    -------
    Plan

    Raises
    ------
    ValueError
        If a count is below 1, `num_steps` exceeds n, or a product is not finite.
    TypeError
        If `A` is not an operator or a count is not an integer.

    Examples
    --------
    >>> import numpy as np
    >>> cost = plan(np.diag(np.arange(50.0)), num_probes=4, num_steps=20, verbose=False)
    >>> cost.num_products, cost.num_passes, cost.num_bytes // (8 * 50)
    (80, 20, 96)
    """
    A = aslinearoperator(A)  # noqa: N806
    space = A.space
    num_probes = checked_count("num_probes", num_probes)
    num_steps = checked_steps(num_steps, space.dimension)
    method: Method[Any] = lanczos_method(A, num_steps, reorthogonalize, num_probes, memory_budget)
    if block_size is None:
        block_size = fitting(method.memory(space), num_probes, memory_budget)
    block_size = min(checked_count("block_size", block_size), num_probes)
    state = method.init(A, draw(sphere, space, 0, range(block_size)))
    seconds = 0.0
    for _ in range(2):
        if method.done(state):
            break
        began = time.perf_counter()
        state = method.step(A, state)
        seconds = time.perf_counter() - began
    num_passes = num_steps * -(-num_probes // block_size)
    cost = Plan(
        num_probes,
        num_steps,
        block_size,
        isinstance(method, BlockLanczos),
        num_probes * num_steps,
        num_passes,
        method.memory(space) * block_size,
        seconds / block_size,
        seconds * num_steps * num_probes / block_size,
    )
    if verbose:
        print(cost)
    return cost


def _human(num_bytes: int) -> str:
    power = min(max(num_bytes, 1).bit_length() - 1, 39) // 10
    return f"{num_bytes / 1024**power:.3g} {('bytes', 'KiB', 'MiB', 'GiB')[power]}"
