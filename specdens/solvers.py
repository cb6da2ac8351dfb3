"""Inverse operators: linear systems by conjugate gradients or MINRES, many columns at once.

Every step is one product with the whole block; each column has its own coefficients, which live on
the host in float64, and stops by its own residual.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from specdens.arguments import checked_choice, checked_count, checked_fraction
from specdens.backends import Array
from specdens.methods.columns import Kernels, kernels
from specdens.methods.lanczos import check_finite
from specdens.operators import Arithmetic, aslinearoperator, real_scalar
from specdens.spaces import LinearOperator, VectorSpace, checked_vectors, multiply

#: Products that a solve may use unless told otherwise: this many times n, and the limit for any n.
PRODUCTS_PER_DIMENSION, MOST_PRODUCTS = 10, 10_000

#: ``(A, b, tol, damping, max_products) -> (x, products used)`` for columns b (n, p) of norm <= 1.
Iteration: TypeAlias = Callable[[LinearOperator, Array, float, float, int], tuple[Array, int]]


class Solution(NamedTuple):
    """Solution of a linear system.

    Attributes
    ----------
    x : array
        In the shape of the right-hand side, in the working dtype.
    residuals : ndarray of shape (p,)
        ``|b - (A + damping I) x| / |b|`` of every column, from a product with `x`; 0 where b is 0.
    num_products : int
        Products with the block, the ones that measured the residuals included.
    """

    x: Array
    residuals: np.ndarray
    num_products: int


def conjugate_gradients(
    A: LinearOperator,  # noqa: N803
    b: Array,
    tol: float,
    damping: float,
    max_products: int,
) -> tuple[Array, int]:
    """Solve (A + damping I) x = b for a positive definite A + damping I (Hestenes, Stiefel 1952).

    Raises
    ------
    ValueError
        If a product shows that A + damping I is not positive definite, or is not finite.
    """
    space = A.space
    do = kernels(space.backend, space.wide_dtype)
    x, r, p = space.backend.xp.zeros_like(b), b + 0, b + 0  # copies: r is updated in place
    norm = norms(do, space, b)
    p_squared, largest = norm**2, np.zeros_like(norm)
    undamped = space.from_numpy(np.full(b.shape[1], -damping))
    for count in range(max_products):
        active = norm > tol
        if not active.any():
            return x, count
        Ap, curvature = do.three_term(multiply(A, p), p, p, undamped)  # noqa: N806
        curvature = on_host(space, curvature, "<p, A p>", count)
        quotient = _ratio(curvature, p_squared, active)
        largest = np.maximum(largest, quotient)
        if (quotient <= space.precision * largest)[active].any():
            _refuse_indefinite(float(quotient[active].min()), damping)
        alpha = _ratio(norm**2, curvature, active)
        x = x + space.from_numpy(alpha) * p
        r, after = do.subtract(r, Ap, space.from_numpy(alpha))
        after = np.where(active, on_host(space, after, "the residual", count), norm)
        beta = _ratio(after**2, norm**2, active)
        p = r + space.from_numpy(beta) * p
        p_squared = after**2 + beta**2 * p_squared  # r is orthogonal to the old p
        norm = after
    return x, max_products


def minres(
    A: LinearOperator,  # noqa: N803
    b: Array,
    tol: float,
    damping: float,
    max_products: int,
) -> tuple[Array, int]:
    """Minimize |b - (A + damping I) x| over growing Krylov spaces (Paige, Saunders 1975, sec. 6).

    The Lanczos matrix T + damping I of every column is brought to upper triangular form by plane
    rotations; x follows from the last three columns of its QR factorization.
    """
    space = A.space
    do = kernels(space.backend, space.wide_dtype)
    beta = norms(do, space, b)
    zero, one = np.zeros_like(beta), np.ones_like(beta)
    v = b * space.from_numpy(_ratio(one, beta, beta > 0))
    x = v_old = d = d_old = space.backend.xp.zeros_like(b)
    c_old, s_old, c, s = one, zero, one, zero
    phi, beta, size, exhausted = beta, zero, zero, zero > 0
    for count in range(max_products):
        active = (np.abs(phi) > tol) & ~exhausted
        if not active.any():
            return x, count
        w, alpha = do.three_term(multiply(A, v), v, v_old, space.from_numpy(beta))
        alpha = on_host(space, alpha, "<x, A x>", count)
        w, beta_next = do.subtract(w, v, space.from_numpy(alpha))
        beta_next = on_host(space, beta_next, "the norm of A x", count)
        alpha = alpha + damping

        epsilon, delta_bar = s_old * beta, c_old * beta
        delta, gamma_bar = c * delta_bar + s * alpha, c * alpha - s * delta_bar
        size = np.maximum(size, np.abs(alpha) + beta_next)
        exhausted = beta_next <= 16 * space.precision * size  # the Krylov space is invariant
        beta_next = np.where(exhausted, 0.0, beta_next)
        gamma = np.hypot(gamma_bar, beta_next)
        solvable = active & (gamma > 2 * space.precision * size)  # else singular on that space
        c_old, s_old = c, s
        c, s = _ratio(gamma_bar, gamma, solvable), _ratio(beta_next, gamma, solvable)

        new = v - space.from_numpy(delta) * d - space.from_numpy(epsilon) * d_old
        d_old, d = d, space.from_numpy(_ratio(one, gamma, solvable)) * new
        x = x + space.from_numpy(c * phi) * d
        phi = np.where(solvable, -s * phi, phi)
        v_old, v = v, do.scale(w, space.from_numpy(_ratio(one, beta_next, active & ~exhausted)))
        beta = beta_next
    return x, max_products


METHODS: dict[str, Iteration] = {"cg": conjugate_gradients, "minres": minres}


def solve(
    A: Any,  # noqa: N803
    b: Array,
    *,
    tol: float = 1e-6,
    method: str | None = None,
    max_products: int | None = None,
    damping: float = 0.0,
) -> Solution:
    """Solve ``(A + damping I) x = b``; parameters as in `inverse`.

    The residual is measured with a product when the iteration says that it is done, and where
    rounding has spoiled it the iteration goes on from there.

    Raises
    ------
    numpy.linalg.LinAlgError
        If the residual does not reach `tol`.
    ValueError
        If `b` has another length, or conjugate gradients meet a matrix that is not positive
        definite.

    Examples
    --------
    >>> solution = solve(np.diag([1.0, 2.0, 4.0]), np.ones(3), tol=1e-12)
    >>> solution.x
    array([1.  , 0.5 , 0.25])
    """
    A = aslinearoperator(A)  # noqa: N806
    settings = _settings(A.space, tol, method, max_products, damping)
    return _solve(A, b, *settings)


def _solve(
    A: LinearOperator,  # noqa: N803
    b: Array,
    tol: float,
    method: str,
    max_products: int,
    damping: float,
) -> Solution:
    space = A.space
    do = kernels(space.backend, space.wide_dtype)
    given = checked_vectors("b", b, space)
    columns = given[:, None] if given.ndim == 1 else given
    columns, scale = _unit_columns(do, space, columns)
    x, left, used = space.backend.xp.zeros_like(columns), columns, 0
    residuals = (scale > 0).astype(np.float64)
    while (residuals > tol).any():
        before = residuals
        if used + 1 >= max_products:
            _not_converged(residuals, tol, method, used, damping, "max_products is used up")
        # A column that is done is a zero column for the iteration, which aims at half the tolerance
        # because the residual it computes is not quite the one that is measured below.
        todo = space.from_numpy((residuals > tol).astype(np.float64))
        update, count = METHODS[method](A, left * todo, tol / 2, damping, max_products - used - 1)
        x = x + update
        left = columns - multiply(A, x)
        left, norm = do.subtract(left, x, space.from_numpy(np.full(len(scale), damping)))
        residuals = on_host(space, norm, "the residual", used + count)
        used += count + 1
        if ((residuals > tol) & (residuals > 0.5 * before)).any():
            reason = "it stopped falling, at the precision of the products or a singular matrix"
            reason = "max_products is used up" if used >= max_products else reason
            _not_converged(residuals, tol, method, used, damping, reason)
    x = x * space.from_numpy(scale)
    return Solution(x[:, 0] if b.ndim == 1 else x, residuals, used)


@dataclass(frozen=True, eq=False, repr=False)
class _Inverse(Arithmetic):
    """(A + damping I)^-1, applied by solving."""

    operator: LinearOperator
    tol: float
    method: str
    max_products: int
    damping: float

    @property
    def space(self) -> VectorSpace:
        return self.operator.space

    def __matmul__(self, x: Array, /) -> Array:
        settings = (self.tol, self.method, self.max_products, self.damping)
        y = _solve(self.operator, x, *settings).x
        return self.space.backend.xp.astype(y, self.space.dtype, copy=False)

    def __repr__(self) -> str:
        damped = f", damping={self.damping:g}" if self.damping else ""
        return f"inverse({self.operator!r}, tol={self.tol:g}, method={self.method!r}{damped})"


def inverse(
    A: Any,  # noqa: N803
    *,
    tol: float = 1e-6,
    method: str | None = None,
    max_products: int | None = None,
    damping: float = 0.0,
) -> LinearOperator:
    """Return the operator ``(A + damping I)^-1``, whose product solves a linear system.

    Parameters
    ----------
    A : LinearOperator or array-like of shape (n, n)
    tol : float
        Relative residual ``|b - (A + damping I) x| / |b|`` that every column of a product reaches;
        it is measured, not taken from the recurrence.
    method : {"minres", "cg"}, optional
        ``"minres"`` for any Hermitian matrix that is not singular, ``"cg"`` for positive definite
        ones. None is MINRES, which never needs more products than conjugate gradients to bring the
        residual to `tol`; these keep three vectors fewer per column and make a smaller error in
        x where A is badly conditioned.
    max_products : int, optional
        Products with A that one product of the inverse may use, a block counting as one. None
        allows 10 n, but not more than 10,000.
    damping : float
        Added to the diagonal. A negative one gives the shifted inverse, by MINRES.

    Returns
    -------
    LinearOperator
        Its products raise ``numpy.linalg.LinAlgError``, with the residual reached, if they do not
        converge, and ``ValueError`` if conjugate gradients meet negative curvature.

    Raises
    ------
    ValueError
        If `tol` is not in (0, 1), `method` is unknown, `max_products` is below 2 or `damping` is
        not real and finite.
    TypeError
        If `max_products` is not an integer.

    Notes
    -----
    The products are linear and Hermitian to about `tol` times their norm, not to rounding, and
    `slq` sees that: eigenvalues of the inverse are meaningful to about `tol` times the largest of
    them, the small ones least, and Lanczos vectors cannot be more orthogonal than that. Choose a
    `tol` well below the accuracy wanted, and give `specdens.testing.check_operator` a tolerance of
    ten times `tol`.

    References
    ----------
    Hestenes, Stiefel (1952), J. Res. Nat. Bur. Standards 49, 409, sec. 3.
    Paige, Saunders (1975), SIAM J. Numer. Anal. 12, 617, sec. 6. doi:10.1137/0712047
    Fong, Saunders (2012), CG versus MINRES, SQU J. Sci. 17, 44.

    Examples
    --------
    >>> damped = inverse(np.diag([1.0, 3.0]), damping=1.0, tol=1e-12)
    >>> damped @ np.ones(2)
    array([0.5 , 0.25])
    """
    A = aslinearoperator(A)  # noqa: N806
    return _Inverse(A, *_settings(A.space, tol, method, max_products, damping))


def _settings(
    space: VectorSpace, tol: float, method: str | None, max_products: int | None, damping: float
) -> tuple[float, str, int, float]:
    """Return the settings of a solve, checked and with the defaults filled in."""
    tol = checked_fraction("tol", tol, "it is a residual relative to the right-hand side")
    method = "minres" if method is None else checked_choice("method", method, METHODS)
    if max_products is None:
        max_products = min(PRODUCTS_PER_DIMENSION * space.dimension, MOST_PRODUCTS)
    max_products = checked_count("max_products", max_products, 2, "one to solve, one to check")
    return tol, method, max_products, real_scalar(damping, "damping")


def _unit_columns(do: Kernels, space: VectorSpace, x: Array) -> tuple[Array, np.ndarray]:
    """Return the columns divided by their norms, and the norms; zero columns stay.

    Divided by the largest entry first: no square may overflow, or vanish.
    """
    xp = space.backend.xp
    scale = np.ones(x.shape[1])
    for measure in (lambda y: xp.max(xp.abs(y), axis=0), lambda y: norms(do, space, y)):
        size = measure(x)
        size = (size if isinstance(size, np.ndarray) else space.to_numpy(size)).astype(np.float64)
        if not np.isfinite(size).all():
            msg = f"b is not finite: column {int(np.argmin(np.isfinite(size)))} has NaN or Inf."
            raise ValueError(msg)
        x = x * space.from_numpy(_ratio(np.ones_like(size), size, size > 0))
        scale = scale * size
    return x, scale


def norms(do: Kernels, space: VectorSpace, x: Array) -> np.ndarray:
    """Return the norm of every column, accumulated in the wide dtype, on the host."""
    _, norm = do.subtract(x + 0, x, space.from_numpy(np.zeros(x.shape[1])))
    return space.to_numpy(norm).astype(np.float64)


def on_host(space: VectorSpace, values: Array, name: str, step: int) -> np.ndarray:
    """Return one coefficient per column as host float64, checked to be finite."""
    host = values if isinstance(values, np.ndarray) else space.to_numpy(values)
    host = host.astype(np.float64)
    check_finite(host, name, step)
    return host


def _ratio(numerator: np.ndarray, denominator: np.ndarray, where: np.ndarray) -> np.ndarray:
    """Return the quotient of every column, 0 where the column does not take part."""
    return np.divide(numerator, denominator, out=np.zeros_like(denominator), where=where)


def _refuse_indefinite(quotient: float, damping: float) -> None:
    damped = f" + {damping:g} I" if damping else ""
    msg = (
        "method='cg' met zero or negative curvature: "
        f"<p, (A{damped}) p> / <p, p> = {quotient:.3g}, so the matrix is not positive definite. "
        f"Pass method='minres', or a damping above {damping - min(quotient, 0.0):.3g}."
    )
    raise ValueError(msg)


def _not_converged(
    residuals: np.ndarray, tol: float, method: str, used: int, damping: float, reason: str
) -> None:
    msg = (
        f"the solve by {method} did not converge: relative residual {residuals.max():.3g} after "
        f"{used} products, tol={tol:g} ({reason}; damping={damping:g}). Raise max_products or tol, "
        "or add damping if the matrix is nearly singular."
    )
    raise np.linalg.LinAlgError(msg)
