r"""Functions of an operator times vectors: f(A) x from a Krylov space of A and x.

Block Lanczos on the columns of :math:`X = Q_1 R_0` gives a basis Q and the projection T of A on it
(`specdens.methods.block`); the approximation is

.. math:: f(A) X \approx Q f(T) E_1 R_0.

It is exact for polynomials up to one degree less than the number of steps, and for every f once the
Krylov space is invariant.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np

from specdens.arguments import checked_callable, checked_count, checked_positive, values_of
from specdens.backends import Array
from specdens.methods.block import BlockLanczos, BlockState
from specdens.methods.columns import kernels
from specdens.methods.lanczos import check_finite
from specdens.operators import Arithmetic, aslinearoperator
from specdens.quadrature import rounding
from specdens.runs import MEMORY_BUDGET, checked_steps, fitting
from specdens.spaces import LinearOperator, VectorSpace, checked_vectors, multiply

#: A function of eigenvalues: takes a float64 array and returns one of the same shape.
SpectralFunction: TypeAlias = Callable[[np.ndarray], Any]


#: Lanczos steps for every column of f(A) in trace estimates, unless told otherwise.
NUM_STEPS = 30


def apply_function(
    f: SpectralFunction,
    A: LinearOperator | Array,  # noqa: N803
    x: Array,
    *,
    num_steps: int | None = None,
    tol: float | None = None,
    memory_budget: int = MEMORY_BUDGET,
) -> Array:
    r"""Return f(A) x without forming f(A), from products with A alone.

    Parameters
    ----------
    f : callable
        Function of the eigenvalues, called on the host with a float64 array of Ritz values, element
        by element. They lie between the smallest and the largest eigenvalue, but not all are
        eigenvalues. One that is zero to rounding is passed as 0. Complex values need a complex
        operator.
    A : LinearOperator or array-like of shape (n, n)
        Real symmetric or complex Hermitian; wrapped by `aslinearoperator`.
    x : array of shape (n,) or (n, p)
        On the host or on the operator's device. Columns share a block Krylov space, so that each
        is approximated at least as well as by itself.
    num_steps : int, optional
        Most products with the block, at most n; by default 80, or n if that is less.
    tol : float, optional
        Stop when twice in a row an approximation differs from the one before, up to an eighth of
        the steps earlier, by less than this part of its norm, in every column. This is how much the
        result still changes, not a bound on its error. None stops at a few roundings.
    memory_budget : int
        Bytes for Lanczos vectors. Columns are taken in several blocks if that takes more.

    Returns
    -------
    array
        Shaped like `x`, in the library, on the device and in the working dtype of the operator.

    Raises
    ------
    ValueError
        If f is not finite on a Ritz value, `x` has the wrong length or is not finite, or a product
        is not finite.
    TypeError
        If `x` or f is complex and the operator is real, `x` is no array or f no function.

    Warns
    -----
    RuntimeWarning
        If `tol` was given and not reached within `num_steps`.

    Notes
    -----
    Memory: ``num_steps + 4`` vectors per column, the basis kept on the device and orthonormal to
    the square root of the precision (partial reorthogonalization).

    References
    ----------
    Higham (2008), Functions of Matrices, SIAM, ch. 13.2.
    Frommer, Lund, Szyld (2017), Block Krylov subspace methods for functions of matrices, ETNA 47.
    Simon (1984), The Lanczos algorithm with partial reorthogonalization, Math. Comp. 42, 115.

    Examples
    --------
    >>> A = np.array([[2.0, 1.0], [1.0, 2.0]])
    >>> apply_function(np.sqrt, A, np.array([1.0, 1.0])).round(12)
    array([1.73205081, 1.73205081])
    """
    checked_callable("f", f, "a function of an array of eigenvalues")
    A = aslinearoperator(A)  # noqa: N806
    space, xp = A.space, A.space.backend.xp
    given = checked_vectors("x", x, space)
    columns = given if given.ndim == 2 else given[:, None]
    method = BlockLanczos(checked_steps(num_steps, space.dimension))
    checked_count("memory_budget", memory_budget)
    if tol is not None:
        checked_positive("tol", tol, "pass tol=None to stop at rounding")
    size = fitting(method.memory(space), columns.shape[1], memory_budget)
    blocks = range(0, columns.shape[1], size)
    parts = [_apply(f, A, columns[:, i : i + size], method, tol) for i in blocks]
    y = xp.concat(parts, axis=1)
    return y if given.ndim == 2 else y[:, 0]


@dataclass(frozen=True, repr=False)
class MatrixFunction(Arithmetic):
    """The operator f(A), each product of which is a call of `apply_function`."""

    function: SpectralFunction
    operator: LinearOperator
    num_steps: int
    memory_budget: int = MEMORY_BUDGET

    @property
    def space(self) -> VectorSpace:
        space = self.operator.space
        return replace(space, dtype=space.working_dtype)

    def __matmul__(self, x: Array, /) -> Array:
        return apply_function(
            self.function,
            self.operator,
            x,
            num_steps=self.num_steps,
            memory_budget=self.memory_budget,
        )


def evaluate(f: SpectralFunction, eigenvalues: np.ndarray, precision: float) -> np.ndarray:
    """Return f of eigenvalues or Ritz values, those that are zero to rounding taken as 0.

    A Ritz value of a singular operator is zero up to rounding of either sign: taken as it is, it
    would give a logarithm that is finite and wrong, or a square root that is nan.

    Raises
    ------
    ValueError
        If a value is not finite, or f returns another shape.
    TypeError
        If f returns something else than numbers.
    """
    resolution = rounding(precision, eigenvalues)
    eigenvalues = np.where(np.abs(eigenvalues) <= resolution, 0.0, eigenvalues)
    with np.errstate(all="ignore"):  # told below, with the Ritz value
        values = values_of(f, eigenvalues)
    bad = ~np.isfinite(values)
    if bad.any():
        msg = (
            f"f({eigenvalues[bad][0]:.6g}) = {values[bad][0]}, and this is a Ritz value of the "
            f"operator (taken as 0 up to {resolution:.1g}). f must be finite from the smallest to "
            "the largest eigenvalue; pass an f that is, or shift(A, c) to move the spectrum."
        )
        raise ValueError(msg)
    return values


def krylov_space(method: BlockLanczos, operator: LinearOperator, columns: Array) -> BlockState:
    """Return the state after all steps from unit columns (n, p)."""
    state = method.init(operator, columns)
    while not method.done(state):
        state = method.step(operator, state)
    return state


def dense_matrix(A: LinearOperator) -> np.ndarray:  # noqa: N803
    """Return the matrix (n, n) of an operator on the host, from n products."""
    space = A.space
    matrix = space.to_numpy(multiply(A, space.from_numpy(np.eye(space.dimension))))
    check_finite(matrix, "an entry of the matrix")
    matrix = matrix.astype(np.complex128 if space.is_complex else np.float64)
    return (matrix + matrix.conj().T) / 2


def _apply(
    f: SpectralFunction,
    A: LinearOperator,  # noqa: N803
    x: Array,
    method: BlockLanczos,
    tol: float | None,
) -> Array:
    """Return f(A) X for one block of columns (n, p)."""
    space = A.space
    unit, norms = _normalized(x, space)
    state = method.init(A, unit)
    coefficients = np.zeros((0, len(norms)))
    change, agreements, next_check = np.inf, 0, 1
    while not method.done(state) and agreements < 2:
        state = method.step(A, state)
        step = len(state.diagonal)
        if step >= next_check or method.done(state):
            before, coefficients = coefficients, _coefficients(f, method, state, space)
            change = _change(before, coefficients)
            agreements = agreements + 1 if change <= (tol or 16 * space.precision) else 0
            next_check = step + max(1, step // 8)
    exact = not state.coupling[-1].any() or state.diagonal[..., 0].size >= space.dimension
    if tol is not None and change > tol and not exact:
        msg = (
            f"tol={tol} is not reached: f(A) x still changes by {change:.2g} of its norm after "
            f"{len(state.diagonal)} steps; pass a larger num_steps."
        )
        warnings.warn(msg, RuntimeWarning, stacklevel=3)
    return _assemble(state, coefficients * norms, space)


def _coefficients(
    f: SpectralFunction, method: BlockLanczos, state: BlockState, space: VectorSpace
) -> np.ndarray:
    """Return f(T) E_1 R_0 (k p, p), with zeros for vectors that were dropped."""
    theta, vectors, active = method.ritz(state)
    values = evaluate(f, theta, space.precision)
    if np.iscomplexobj(values) and not space.is_complex:
        msg = (
            f"f returns {values.dtype} and the operator is real; apply the real and the imaginary "
            "part of f one after the other."
        )
        raise TypeError(msg)
    first = active[0].sum()
    seen = vectors[:first].conj().T @ state.coupling[0][active[0]]
    kept = vectors @ (values[:, None] * seen)
    coefficients = np.zeros((active.size, kept.shape[1]), dtype=kept.dtype)
    coefficients[active.ravel()] = kept
    return coefficients


def _change(before: np.ndarray, after: np.ndarray) -> float:
    """Return the largest relative change of a column; the basis is orthonormal."""
    difference = after.copy()
    difference[: len(before)] -= before
    size = np.linalg.norm(after, axis=0)
    moved = np.linalg.norm(difference, axis=0)
    return float(np.max(np.divide(moved, size, out=1.0 * (moved > 0), where=size > 0)))


def _assemble(state: BlockState, coefficients: np.ndarray, space: VectorSpace) -> Array:
    """Return Q C as columns (n, p)."""
    xp, do = space.backend.xp, kernels(space.backend, space.wide_dtype)
    p = coefficients.shape[1]
    y, done = xp.zeros_like(state.basis[0]), 0
    for rows in state.basis.first(len(coefficients) // p).rows():
        part = coefficients[done : done + rows.shape[0]]
        y, done = y + do.combine(rows, space.from_numpy(part)), done + rows.shape[0]
    return xp.permute_dims(y, (1, 0))


def _normalized(x: Array, space: VectorSpace) -> tuple[Array, np.ndarray]:
    """Return the columns of `x` with unit norm or zero, and their norms (p,).

    The largest entry is divided out first, so that no square over- or underflows.
    """
    xp = space.backend.xp
    largest = space.to_numpy(xp.max(xp.abs(x), axis=0)).astype(np.float64)
    if not np.isfinite(largest).all():
        msg = f"x is not finite: column {int(np.argmin(np.isfinite(largest)))} has NaN or Inf."
        raise ValueError(msg)
    scaled = x * space.from_numpy(_reciprocal(largest))
    norms = space.to_numpy(xp.linalg.vector_norm(xp.astype(scaled, space.wide_dtype), axis=0))
    norms = norms.astype(np.float64)
    return scaled * space.from_numpy(_reciprocal(norms)), largest * norms


def _reciprocal(x: np.ndarray) -> np.ndarray:
    return np.divide(1.0, x, out=np.zeros_like(x), where=x > 0)
