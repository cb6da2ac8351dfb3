"""Operators with structure: block diagonal, Kronecker products, congruences and powers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeAlias

import array_api_compat as compat
import numpy as np

from specdens.arguments import checked_count, checked_integer, shown
from specdens.backends import Array, backend_of, dtype_name
from specdens.operators import Arithmetic, aslinearoperator
from specdens.spaces import LinearOperator, VectorSpace, multiply

#: ``x -> C x`` and ``y -> C^H y``, for vectors and blocks of columns.
Pair: TypeAlias = tuple[Callable[[Array], Array], Callable[[Array], Array]]


@dataclass(frozen=True, eq=False, repr=False)
class _Structured(Arithmetic, ABC):
    """An operator that multiplies in the working dtype and returns its own dtype."""

    space: VectorSpace

    def __matmul__(self, x: Array, /) -> Array:
        space, xp = self.space, self.space.backend.xp
        if x.shape[0] != space.dimension:
            msg = f"x has length {x.shape[0]}, {self!r} has dimension {space.dimension}."
            raise ValueError(msg)
        y = self._multiply(xp.astype(x, space.working_dtype, copy=False))
        return xp.astype(y, space.dtype, copy=False)

    @abstractmethod
    def _multiply(self, x: Array) -> Array:
        """Return the product with `x`, both in the working dtype."""


@dataclass(frozen=True, eq=False, repr=False)
class _BlockDiagonal(_Structured):
    """diag(A_1, ..., A_m)."""

    blocks: tuple[LinearOperator, ...]

    def _multiply(self, x: Array) -> Array:
        stops = np.cumsum([0, *(block.space.dimension for block in self.blocks)]).tolist()
        parts = [
            multiply(block, x[start:stop, ...])
            for block, (start, stop) in zip(self.blocks, pairwise(stops), strict=True)
        ]
        return self.space.backend.xp.concat(parts, axis=0)

    def __repr__(self) -> str:
        return f"block_diagonal([{', '.join(map(repr, self.blocks))}])"


def block_diagonal(blocks: Sequence[Any]) -> LinearOperator:
    """Return the operator with the given diagonal blocks and zeros elsewhere.

    Its eigenvalues are those of the blocks together.

    Parameters
    ----------
    blocks : sequence of LinearOperator or array-like of shape (n_i, n_i)
        Of one dtype, library and device.

    Returns
    -------
    LinearOperator
        Of dimension ``sum(n_i)``.

    Raises
    ------
    ValueError
        If there is no block, or two of them differ in dtype, library or device.
    TypeError
        If `blocks` is no sequence of operators.

    Examples
    --------
    >>> block_diagonal([np.diag([1.0, 2.0]), [[3.0]]]) @ np.ones(3)
    array([1., 2., 3.])
    """
    if not isinstance(blocks, Iterable) or getattr(blocks, "ndim", 3) < 3:  # one matrix, not a list
        msg = f"blocks has type {type(blocks).__qualname__}; expected a list of operators."
        raise TypeError(msg)
    parts = tuple(aslinearoperator(block) for block in blocks)
    if not parts:
        msg = "blocks is empty; pass at least one operator."
        raise ValueError(msg)
    for part in parts[1:]:
        _check_kind(("blocks[0]", parts[0].space), (f"block {part!r}", part.space))
    total = sum(part.space.dimension for part in parts)
    return _BlockDiagonal(_resized(parts[0].space, total), parts)


@dataclass(frozen=True, eq=False, repr=False)
class _Kronecker(_Structured):
    """A kron B, applied as A X B^T to the (n_A, n_B) matrix X whose rows make up x."""

    left: LinearOperator
    right: LinearOperator

    def _multiply(self, x: Array) -> Array:
        xp = self.space.backend.xp
        m, n = self.left.space.dimension, self.right.space.dimension
        columns = x.shape[1] if x.ndim == 2 else 1
        y = multiply(self.left, xp.reshape(x, (m, n * columns)))
        y = xp.permute_dims(xp.reshape(y, (m, n, columns)), (1, 0, 2))
        y = multiply(self.right, xp.reshape(y, (n, m * columns)))
        y = xp.permute_dims(xp.reshape(y, (n, m, columns)), (1, 0, 2))
        return xp.reshape(y, x.shape)

    def __repr__(self) -> str:
        return f"kronecker({self.left!r}, {self.right!r})"


def kronecker(A: Any, B: Any) -> LinearOperator:  # noqa: N803
    """Return the Kronecker product of two operators, which is never formed.

    Row-major like `numpy.kron`: entry ``i * n_B + j`` of a vector belongs to row i of `A` and row j
    of `B`. The eigenvalues are all products of an eigenvalue of `A` and one of `B`.

    Parameters
    ----------
    A, B : LinearOperator or array-like of shapes (n_A, n_A) and (n_B, n_B)
        Of one dtype, library and device.

    Returns
    -------
    LinearOperator
        Of dimension ``n_A * n_B``. Its product with k columns is one of `A` with ``n_B * k``
        columns and one of `B` with ``n_A * k``.

    Raises
    ------
    ValueError
        If they differ in dtype, library or device.

    Examples
    --------
    >>> A, B = np.diag([1.0, 10.0]), np.array([[0.0, 1.0], [1.0, 0.0]])
    >>> kronecker(A, B) @ np.array([1.0, 2.0, 3.0, 4.0])
    array([ 2.,  1., 40., 30.])
    >>> np.kron(A, B) @ np.array([1.0, 2.0, 3.0, 4.0])
    array([ 2.,  1., 40., 30.])
    """
    left, right = aslinearoperator(A), aslinearoperator(B)
    _check_kind(("A", left.space), ("B", right.space))
    dimension = left.space.dimension * right.space.dimension
    return _Kronecker(_resized(left.space, dimension), left, right)


@dataclass(frozen=True, eq=False, repr=False)
class _Congruence(_Structured):
    """C^H A C, with C and C^H as functions."""

    operator: LinearOperator
    apply: Callable[[Array], Array]
    apply_adjoint: Callable[[Array], Array]

    def _multiply(self, x: Array) -> Array:
        inner = self.operator.space
        y = self.apply(x)
        expected = (inner.dimension, *x.shape[1:])
        if tuple(y.shape) != expected:
            msg = f"C x has shape {tuple(y.shape)} for x of shape {tuple(x.shape)}; {expected}"
            raise ValueError(msg + f" is what A of dimension {inner.dimension} multiplies.")
        y = multiply(self.operator, inner.backend.xp.astype(y, inner.working_dtype, copy=False))
        return self.apply_adjoint(y)

    def __repr__(self) -> str:
        return f"congruence({self.operator!r}, n={self.space.dimension})"


def congruence(
    C: Any,  # noqa: N803
    A: Any,  # noqa: N803
    *,
    space: VectorSpace | None = None,
) -> LinearOperator:
    """Return ``C^H A C``, the product of operators that stays Hermitian.

    Parameters
    ----------
    C : LinearOperator, array of shape (n, k), or pair of callables
        A `LinearOperator` is its own adjoint: ``C A C``, such as a preconditioned matrix. An array
        may have any shape (n, k). A pair holds the functions ``x -> C x`` and ``y -> C^H y`` of
        vectors and blocks of columns, for a Jacobian, say.
    A : LinearOperator or array-like of shape (n, n)
    space : VectorSpace, optional
        The vectors that C multiplies, of length k; needed with a pair of callables, otherwise known
        from `C`.

    Returns
    -------
    LinearOperator
        Of dimension k. By Sylvester's law of inertia it has no more positive, and no more negative,
        eigenvalues than `A`.

    Raises
    ------
    ValueError
        If C and A differ in length, dtype, library or device.
    TypeError
        If a pair comes without `space`.

    Examples
    --------
    >>> C = np.array([[1.0, 0.0], [1.0, 1.0], [0.0, 2.0]])
    >>> congruence(C, np.diag([1.0, 2.0, 3.0])) @ np.ones(2)
    array([ 5., 16.])
    """
    A = aslinearoperator(A)  # noqa: N806
    if isinstance(C, tuple):
        if len(C) != 2 or not all(map(callable, C)) or not isinstance(space, VectorSpace):
            msg = (
                f"C={shown(C)} needs two callables, x -> C x and y -> C^H y, and space=VectorSpace."
            )
            raise TypeError(msg)
        _check_kind(("C", space), ("A", A.space))
        return _Congruence(space, A, *C)
    rows, inner, pair = _factor(C)
    if rows != A.space.dimension:
        msg = f"C has {rows} rows and A dimension {A.space.dimension}; they must be equal."
        raise ValueError(msg)
    _check_kind(("C", inner), ("A", A.space))
    if space is not None and space != inner:
        msg = f"space={space} differs from the space of C, {inner}; leave it out."
        raise ValueError(msg)
    return _Congruence(inner, A, *pair)


def _factor(C: Any) -> tuple[int, VectorSpace, Pair]:  # noqa: N803
    """Return rows, space of columns, and the two products of an operator or a plain matrix."""
    if not compat.is_array_api_obj(C):
        itself = aslinearoperator(C)
        return itself.space.dimension, itself.space, (lambda x: multiply(itself, x),) * 2
    if C.ndim != 2 or C.shape[1] < 1:
        msg = f"C has shape {tuple(C.shape)}; expected (n, k)."
        raise ValueError(msg)
    like, xp = VectorSpace.like(C), backend_of(C).xp
    matrix = xp.astype(C, like.working_dtype, copy=False)
    adjoint = xp.permute_dims(matrix, (1, 0))
    adjoint = xp.conj(adjoint) if like.is_complex else adjoint
    columns = _resized(like, int(C.shape[1]))
    return like.dimension, columns, (lambda x: matrix @ x, lambda y: adjoint @ y)


@dataclass(frozen=True, eq=False, repr=False)
class _Power(_Structured):
    """A^exponent by repeated products."""

    operator: LinearOperator
    exponent: int

    def _multiply(self, x: Array) -> Array:
        for _ in range(self.exponent):
            x = multiply(self.operator, x)
        return x

    def __repr__(self) -> str:
        return f"power({self.operator!r}, {self.exponent})"


def power(A: Any, exponent: int) -> LinearOperator:  # noqa: N803
    """Return ``A ** exponent``, one product of A after the other.

    ``power(shift(A, -c), 2)`` folds the spectrum at c: eigenvalues next to c come first.

    Parameters
    ----------
    A : LinearOperator or array-like of shape (n, n)
    exponent : int
        At least 1; for negative powers see `inverse`.

    Raises
    ------
    ValueError
        If `exponent` is below 1.
    TypeError
        If `exponent` is not an integer.

    Examples
    --------
    >>> power(np.diag([1.0, -2.0]), 3) @ np.ones(2)
    array([ 1., -8.])
    """
    A = aslinearoperator(A)  # noqa: N806
    checked_integer("exponent", exponent, "apply_function has other functions of A")
    count = checked_count("exponent", exponent, advice="inverse(A) is the power -1")
    return _Power(A.space, A, count)


def _resized(space: VectorSpace, dimension: int) -> VectorSpace:
    return VectorSpace(dimension, space.dtype, space.device, space.backend)


def _check_kind(first: tuple[str, VectorSpace], second: tuple[str, VectorSpace]) -> None:
    """Raise an error that names both if dtype, library or device differ; lengths may."""
    kinds = [
        f"{dtype_name(space.dtype)} of {space.backend.name} on {space.device}"
        for _, space in (first, second)
    ]
    if _resized(first[1], 1) != _resized(second[1], 1):
        msg = (
            f"{first[0]} is {kinds[0]}, {second[0]} is {kinds[1]}; bring them to one dtype, "
            "library and device (on_backend for operators)."
        )
        raise ValueError(msg)
