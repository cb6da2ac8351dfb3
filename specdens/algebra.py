"""Operators made of operators: shifts, low rank, projections, blocks, other libraries and devices.

Sums, differences and multiples are `specdens.operators.Arithmetic`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import array_api_compat as compat
import numpy as np
import scipy.sparse.linalg
from numpy.typing import ArrayLike

from specdens.arguments import shown
from specdens.backends import Array, Backend, Device, backend_of, dtype_name, get_backend
from specdens.operators import Arithmetic, LinearCombination, aslinearoperator, real_scalar
from specdens.spaces import LinearOperator, VectorSpace, checked_vectors, multiply


def shift(A: Any, c: float) -> LinearOperator:  # noqa: N803
    """Return ``A + c I``.

    Raises
    ------
    ValueError
        If `c` is not real and finite.

    Examples
    --------
    >>> shift(np.diag([1.0, 2.0]), 3.0) @ np.ones(2)
    array([4., 5.])
    """
    return LinearCombination.of([(1.0, aslinearoperator(A))], real_scalar(c, "c"))


@dataclass(frozen=True, eq=False, repr=False)
class _LowRank(Arithmetic):
    """Q diag(values) Q^H."""

    Q: Array  # (n, k)
    values: Array  # (k,) of the space's dtype
    space: VectorSpace

    def __matmul__(self, x: Array, /) -> Array:
        return _compiled(self.space.backend, _spanned)(x, self.Q, self.values)

    def __repr__(self) -> str:
        return f"low_rank(n={self.space.dimension}, rank={self.Q.shape[1]})"


def low_rank(Q: Array, values: ArrayLike) -> LinearOperator:  # noqa: N803
    """Return the operator ``Q diag(values) Q^H``.

    Parameters
    ----------
    Q : array of shape (n, k)
        Any columns; with orthonormal ones `values` are the eigenvalues that are not zero.
    values : array_like of shape (k,)
        Real.

    Raises
    ------
    ValueError
        If the shapes do not fit or a value is not real.

    Examples
    --------
    >>> low_rank(np.ones((3, 1)), [2.0]) @ np.ones(3)
    array([6., 6., 6.])
    """
    backend_of(Q, "Q")
    space = VectorSpace.like(Q)
    host = (
        backend_of(values).to_numpy(values)
        if compat.is_array_api_obj(values)
        else _host_array(values)
    )
    if Q.ndim != 2 or host.shape != (Q.shape[1],):
        msg = f"Q has shape {tuple(Q.shape)} and values {host.shape}; expected (n, k) and (k,)."
        raise ValueError(msg)
    if host.dtype.kind not in "biufc":
        msg = f"values={shown(values)} must be real numbers."
        raise TypeError(msg)
    if not np.isfinite(host).all() or (np.iscomplexobj(host) and host.imag.any()):
        msg = "values must be real and finite, or the operator would not be Hermitian."
        raise ValueError(msg)
    xp = space.backend.xp
    moved = space.backend.from_numpy(host.real.astype(np.float64), space.dtype, space.device)
    return _LowRank(Q if Q.dtype == space.dtype else xp.astype(Q, space.dtype), moved, space)


@dataclass(frozen=True, eq=False, repr=False)
class _Projected(Arithmetic):
    """P A P with P = I - Q Q^H and Q orthonormal."""

    operator: LinearOperator
    Q: Array  # (n, k) orthonormal, in the working dtype

    @property
    def space(self) -> VectorSpace:
        return self.operator.space

    def __matmul__(self, x: Array, /) -> Array:
        space, xp = self.space, self.space.backend.xp
        complement = _compiled(space.backend, _complement)
        if x.dtype != space.working_dtype:
            x = xp.astype(x, space.working_dtype)
        y = complement(multiply(self.operator, complement(x, self.Q)), self.Q)
        return y if y.dtype == space.dtype else xp.astype(y, space.dtype)

    def __repr__(self) -> str:
        return f"project_out({self.operator!r}, rank={self.Q.shape[1]})"


def project_out(A: Any, Q: Array) -> LinearOperator:  # noqa: N803
    """Return ``(I - P) A (I - P)``, with P the orthogonal projector onto the columns of `Q`.

    The columns' span becomes part of the null space: eigenvalues of A that belong to them turn to
    zero.

    Parameters
    ----------
    A : LinearOperator or array-like of shape (n, n)
    Q : array of shape (n,) or (n, k)
        Linearly independent columns, of the operator's library and device; orthonormalized here.

    Raises
    ------
    ValueError
        If the length differs from n, or the columns are linearly dependent.

    Examples
    --------
    >>> project_out(np.diag([5.0, 1.0]), np.array([2.0, 0.0])) @ np.ones(2)
    array([0., 1.])
    """
    A = aslinearoperator(A)  # noqa: N806
    space = A.space
    xp = space.backend.xp
    given = checked_vectors("Q", Q, space)
    columns = given[:, None] if given.ndim == 1 else given
    basis, triangle = _compiled(space.backend, _orthonormalized)(columns)
    diagonal = np.abs(np.diagonal(space.to_numpy(triangle)))
    rounding = float(xp.finfo(space.working_dtype).eps) * space.dimension**0.5
    if columns.shape[1] > space.dimension or diagonal.min() <= 10 * rounding * diagonal.max():
        msg = f"Q has linearly dependent columns (smallest pivot {diagonal.min():.3g}); drop some."
        raise ValueError(msg)
    return _Projected(A, basis)


@dataclass(frozen=True, eq=False, repr=False)
class _Restricted(Arithmetic):
    """The principal submatrix of an operator: rows and columns `indices`."""

    operator: LinearOperator
    indices: Array  # (k,) integers on the device
    places: Array  # (n,) where each entry of the whole vector is found, k meaning a zero
    space: VectorSpace

    def __matmul__(self, x: Array, /) -> Array:
        xp = self.space.backend.xp
        if x.shape[0] != self.space.dimension:  # `take` would not notice
            n = self.space.dimension
            msg = f"x has length {x.shape[0]}, {self!r} has dimension {n}."
            raise ValueError(msg)
        zero = xp.zeros((1, *x.shape[1:]), dtype=x.dtype, device=self.space.device)
        whole = xp.take(xp.concat([x, zero], axis=0), self.places, axis=0)
        return xp.take(self.operator @ whole, self.indices, axis=0)

    def __repr__(self) -> str:
        return f"restrict({self.operator!r}, k={self.space.dimension})"


def restrict(A: Any, indices: ArrayLike | slice) -> LinearOperator:  # noqa: N803
    """Return the principal submatrix of rows and columns `indices`.

    Parameters
    ----------
    A : LinearOperator or array-like of shape (n, n)
    indices : slice, or array_like of integers or of n booleans
        Which entries, in the order wanted; negative ones count from the end.

    Raises
    ------
    ValueError
        If an index is out of range or repeated, or none is left.
    TypeError
        If `indices` are no integers.

    Examples
    --------
    >>> restrict(np.diag([1.0, 2.0, 3.0]), [2, 0]) @ np.ones(2)
    array([3., 1.])
    """
    A = aslinearoperator(A)  # noqa: N806
    space, n = A.space, A.space.dimension
    chosen = np.arange(n)[indices] if isinstance(indices, slice) else _host_array(indices)
    if chosen.dtype == bool and chosen.shape == (n,):
        chosen = np.flatnonzero(chosen)
    if chosen.ndim != 1 or chosen.size == 0 or chosen.dtype.kind not in "iu":
        expected = f"must be a slice, integers or {n} booleans, at least one chosen"
        msg = f"indices={shown(indices)} {expected}."
        raise TypeError(msg) if chosen.size and chosen.dtype.kind not in "iub" else ValueError(msg)
    if chosen.min() < -n or chosen.max() >= n:
        msg = (
            f"indices reach from {chosen.min()} to {chosen.max()}; expected -{n} to {n - 1}, since "
            f"the dimension is {n}."
        )
        raise ValueError(msg)
    chosen = chosen.astype(np.int64) % n
    different, times = np.unique(chosen, return_counts=True)
    if len(different) < len(chosen):
        msg = (
            f"indices are repeated: {different[times.argmax()]} occurs {times.max()} times; a "
            "principal submatrix takes each row and column once."
        )
        raise ValueError(msg)
    places = np.full(n, len(chosen))
    places[chosen] = np.arange(len(chosen))
    backend = space.backend
    integer = backend.dtype("int64" if backend.has_dtype("int64", space.device) else "int32")
    rows, where = (backend.from_numpy(a, integer, space.device) for a in (chosen, places))
    return _Restricted(A, rows, where, VectorSpace(len(chosen), space.dtype, space.device, backend))


@dataclass(frozen=True, eq=False, repr=False)
class _Moved(Arithmetic):
    """An operator whose vectors belong to another library or device than its products."""

    operator: LinearOperator
    space: VectorSpace

    def __matmul__(self, x: Array, /) -> Array:
        return transfer(self.operator @ transfer(x, self.operator.space), self.space)

    def __repr__(self) -> str:
        return f"on_backend({self.operator!r}, {self.space.backend.name!r}, {self.space.device})"


def on_backend(A: Any, backend: str, device: Device = None) -> LinearOperator:  # noqa: N803
    """Return an operator with vectors of another array library; products still run where they did.

    Arrays change hands without a copy through DLPack where both libraries see the same memory,
    otherwise by way of the host.

    Parameters
    ----------
    A : LinearOperator or array-like of shape (n, n)
    backend : str
        ``"numpy"``, ``"cupy"``, ``"torch"``, ``"jax"`` or ``"strict"``.
    device : device of that library, optional
        By default the operator's own if the library can address it, otherwise the library's
        default.

    Raises
    ------
    ValueError
        If the name is unknown.
    ImportError
        If the library is not installed.

    Examples
    --------
    >>> import array_api_strict
    >>> A = on_backend(np.diag([1.0, 2.0]), "strict")
    >>> (A @ array_api_strict.ones(2)).dtype
    array_api_strict.float64
    """
    A = aslinearoperator(A)  # noqa: N806
    target, space = get_backend(backend), A.space
    if device is None:
        probe = target.from_numpy(np.zeros(1), target.dtype("float32"), None)
        device = compat.device(_by_dlpack(space.from_numpy(np.zeros(1)), target.xp, probe))
    name = dtype_name(space.dtype)
    if name == "bfloat16" and not hasattr(target.xp, name):
        name = "float32"  # holds every bfloat16; the products keep their own precision
    if not target.has_dtype(name, device):  # JAX without x64, and devices without doubles
        name = {"float64": "float32", "complex128": "complex64"}.get(name, name)
    return _Moved(A, VectorSpace(space.dimension, target.dtype(name), device, target))


def transfer(x: Array, space: VectorSpace) -> Array:
    """Return `x` as an array of `space`'s library, device and dtype."""
    source, target = backend_of(x), space.backend
    if source is target and compat.device(x) == space.device:
        return x if x.dtype == space.dtype else target.xp.astype(x, space.dtype)
    if dtype_name(x.dtype) == "bfloat16" and not hasattr(target.xp, "bfloat16"):
        x = source.xp.astype(x, source.xp.float32)
    strides = getattr(x, "strides", ())
    if isinstance(strides, tuple) and any(step < 0 for step in strides):
        x = source.xp.asarray(x, copy=True)  # what torch cannot read aborts the process
    moved = _by_dlpack(x, target.xp, None)
    if moved is None or compat.device(moved) != space.device:
        return target.from_numpy(source.to_numpy(x), space.dtype, space.device)
    return moved if moved.dtype == space.dtype else target.xp.astype(moved, space.dtype)


def _by_dlpack(x: Array, xp: Any, otherwise: Array) -> Array:
    """Return `x` in the library `xp`, sharing memory, or `otherwise` if they cannot."""
    try:
        return xp.from_dlpack(x)
    except (BufferError, TypeError, ValueError, RuntimeError, AttributeError):
        return otherwise


class _SciPyOperator(scipy.sparse.linalg.LinearOperator):
    """SciPy's view of an operator: host vectors in and out."""

    def __init__(self, operator: LinearOperator) -> None:
        space = operator.space
        self.operator = operator
        example = space.to_numpy(space.from_numpy(np.zeros(1)))
        super().__init__(example.dtype, (space.dimension, space.dimension))

    def _matmat(self, x: np.ndarray) -> np.ndarray:
        space = self.operator.space
        if np.iscomplexobj(x) and not space.is_complex:
            return self._matmat(x.real) + 1j * self._matmat(x.imag)
        return space.to_numpy(multiply(self.operator, space.from_numpy(x)))

    def _matvec(self, x: np.ndarray) -> np.ndarray:
        return self._matmat(x.reshape(-1))

    def _adjoint(self) -> _SciPyOperator:
        return self


def to_scipy(A: Any) -> scipy.sparse.linalg.LinearOperator:  # noqa: N803
    """Return a ``scipy.sparse.linalg.LinearOperator`` of the same products, with vectors on the
    host.

    Its dtype is the operator's own (half precision becomes float32), not float64.

    Examples
    --------
    >>> from scipy.sparse.linalg import eigsh
    >>> float(eigsh(to_scipy(np.diag(np.arange(1.0, 11.0))), k=1)[0][0].round(9))
    10.0
    """
    return _SciPyOperator(aslinearoperator(A))


def _host_array(values: Any) -> np.ndarray:
    """Return values as an array, of objects if they are no numbers in rows of one length."""
    try:
        return np.asarray(values)
    except (TypeError, ValueError):
        return np.array([None])


@lru_cache
def _compiled(backend: Backend, function: Any) -> Any:
    """Return one of the functions below as the library runs it, compiled once."""
    return backend.jit(function)


def _complement(x: Array, Q: Array) -> Array:  # noqa: N803
    """Return (I - Q Q^H) x."""
    return x - Q @ (_adjoint(Q) @ x)


def _spanned(x: Array, Q: Array, values: Array) -> Array:  # noqa: N803
    """Return Q diag(values) Q^H x."""
    coefficients = _adjoint(Q) @ x
    return Q @ ((values if x.ndim == 1 else values[:, None]) * coefficients)


def _orthonormalized(Q: Array) -> tuple[Array, Array]:  # noqa: N803
    """Return orthonormal columns with the span of Q, and the triangle that mixes them into Q."""
    basis, triangle = compat.array_namespace(Q).linalg.qr(Q, mode="reduced")
    return basis, triangle


def _adjoint(Q: Array) -> Array:  # noqa: N803
    xp = compat.array_namespace(Q)
    transposed = xp.permute_dims(Q, (1, 0))
    return xp.conj(transposed) if xp.isdtype(Q.dtype, "complex floating") else transposed
