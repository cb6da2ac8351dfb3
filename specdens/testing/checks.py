"""Checks that operators are what the estimators need, and arguments what models need."""

from __future__ import annotations

from typing import Any

import numpy as np

from specdens.arguments import checked_positive, checked_seed
from specdens.backends import Array, dtype_name
from specdens.operators import aslinearoperator
from specdens.probes import draw, sphere
from specdens.spaces import VectorSpace


def check_operator(A: Any, *, seed: int = 0, tolerance: float | None = None) -> None:  # noqa: N803
    """Check that an operator is what the estimators need, with a handful of products.

    Parameters
    ----------
    A : LinearOperator or array-like of shape (n, n)
        Arrays are wrapped first; a dense array that is not Hermitian fails there.
    seed : int
        Of the random vectors.
    tolerance : float, optional
        Largest relative violation of linearity and symmetry; by default ``100 * eps * sqrt(n)`` for
        eps the roundoff of the operator's dtype.

    Raises
    ------
    ValueError
        Says which property fails and shows the numbers: *shape* and *dtype* and *device* of
        products, *finite*, *repeatable* to the bit, *columns* of a block as single products,
        *linear*, *Hermitian*.

    Examples
    --------
    >>> check_operator(np.diag([1.0, 2.0, 3.0]))
    >>> from specdens import FunctionOperator, VectorSpace
    >>> nonlinear = FunctionOperator(lambda x: x**2, VectorSpace.like(np.zeros(3)))
    >>> check_operator(nonlinear)
    Traceback (most recent call last):
    ...
    ValueError: operator is not linear: |A(2x + 3y) - 2Ax - 3Ay| is ... of |A||x|, tolerance ...
    """
    A = aslinearoperator(A)  # noqa: N806
    space = A.space
    checked_seed(seed)
    if tolerance is None:
        tolerance = 100 * space.precision * space.dimension**0.5
    checked_positive("tolerance", tolerance, "it is relative to |A||x|")
    xp = space.backend.xp
    block = xp.astype(draw(sphere, space, seed, range(2)), space.dtype)
    x, y = block[:, 0], block[:, 1]
    products = A @ block
    _check_kind(products, block, space, "(n, 2)")
    Ax, Ay = A @ x, A @ y  # noqa: N806
    _check_kind(Ax, x, space, "(n,)")
    if not bool(xp.all(A @ x == Ax)):
        _fail(
            "repeatable", "the same product, taken twice, differs by", _size(A @ x - Ax, space), 0
        )
    norm = max(_size(Ax, space), _size(Ay, space)) or 1.0
    apart = _size(products[:, 0] - Ax, space) + _size(products[:, 1] - Ay, space)
    if apart > tolerance * norm:
        _fail("consistent over columns", "|(A[x y]) - [Ax Ay]|", apart / norm, tolerance)
    defect = _size(A @ (2 * x + 3 * y) - 2 * Ax - 3 * Ay, space)
    if defect > 10 * tolerance * norm:
        _fail("linear", "|A(2x + 3y) - 2Ax - 3Ay|", defect / norm, 10 * tolerance)
    left, right = _inner(y, Ax, space), _inner(Ay, x, space)
    if abs(left - right) > tolerance * norm:
        _fail(
            "Hermitian",
            f"<y, Ax> = {left:.6g} but <Ay, x> = {right:.6g}: difference",
            abs(left - right) / norm,
            tolerance,
        )


def _fail(what: str, measured: str, value: float, tolerance: float) -> None:
    msg = f"operator is not {what}: {measured} is {value:.3g} of |A||x|, tolerance {tolerance:.3g}."
    raise ValueError(msg)


def _check_kind(product: Array, x: Array, space: VectorSpace, shape: str) -> None:
    """Check shape, library, device, dtype and finiteness of one product."""
    if tuple(getattr(product, "shape", ())) != tuple(x.shape):
        msg = (
            f"operator has the wrong shape: A @ x for x of shape {shape} = {tuple(x.shape)} has "
            f"shape {tuple(getattr(product, 'shape', ()))}."
        )
        raise ValueError(msg)
    if product.dtype != space.dtype:
        msg = (
            f"operator has the wrong dtype: A @ x is {dtype_name(product.dtype)}, its space says "
            f"{dtype_name(space.dtype)}."
        )
        raise ValueError(msg)
    here = VectorSpace.like(product)
    if here.backend is not space.backend or here.device != space.device:
        msg = (
            f"operator has the wrong device: A @ x is on {here.device} ({here.backend.name}), its "
            f"space says {space.device} ({space.backend.name})."
        )
        raise ValueError(msg)
    xp = space.backend.xp
    bad = int(xp.sum(xp.astype(~xp.isfinite(product), xp.int32)))
    if bad:
        size = int(np.prod(product.shape))
        msg = (
            f"operator is not finite: {bad} of {size} entries of A @ x are NaN or Inf, for unit x."
        )
        raise ValueError(msg)


def _inner(x: Array, y: Array, space: VectorSpace) -> complex:
    x, y = (space.to_numpy(v).astype(np.complex128) for v in (x, y))
    return complex(np.vdot(x, y))


def _size(x: Array, space: VectorSpace) -> float:
    return float(np.linalg.norm(space.to_numpy(x).astype(np.complex128)))
