"""Operators from matrices, functions and other libraries' objects, and their sums and multiples.

Everything that specdens itself makes inherits `Arithmetic`, so that sums, differences and multiples
of operators are operators again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, cast

import array_api_compat as compat
import numpy as np
import scipy.sparse

from specdens.arguments import checked_callable, shown
from specdens.backends import Array, backend_of, dtype_name, get_backend
from specdens.foreign import foreign_product, shape_of
from specdens.spaces import LinearOperator, VectorSpace
from specdens.symmetry import check_dense, check_sparse


class Arithmetic:
    """Makes ``A + B``, ``A - B``, ``2.0 * A``, ``A / 2.0`` and ``-A`` operators again."""

    __array_ufunc__ = None  # let numpy.float64(2.0) * A reach __rmul__
    __array_priority__ = 1000

    def __add__(self, other: Any) -> LinearOperator:
        return _combine(self, 1.0, other, 1.0)

    def __radd__(self, other: Any) -> LinearOperator:
        return _combine(other, 1.0, self, 1.0)

    def __sub__(self, other: Any) -> LinearOperator:
        return _combine(self, 1.0, other, -1.0)

    def __rsub__(self, other: Any) -> LinearOperator:
        return _combine(other, 1.0, self, -1.0)

    def __mul__(self, factor: float) -> LinearOperator:
        return LinearCombination.of([(real_scalar(factor, "factor"), cast("LinearOperator", self))])

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> LinearOperator:
        return self * (1.0 / real_scalar(divisor, "divisor"))

    def __neg__(self) -> LinearOperator:
        return self * -1.0


def _combine(left: Any, left_factor: float, right: Any, right_factor: float) -> LinearOperator:
    terms = []
    for factor, part in ((left_factor, left), (right_factor, right)):
        if np.isscalar(part) and not isinstance(part, str):
            if part != 0:  # sum() starts with 0
                msg = f"operator + {part!r} is ambiguous; shift(A, {part!r}) adds {part!r} * I."
                raise TypeError(msg)
        else:
            terms.append((factor, aslinearoperator(part)))
    return LinearCombination.of(terms)


def check_same_space(first: LinearOperator, *others: LinearOperator) -> VectorSpace:
    """Return the space that operators share.

    Raises
    ------
    ValueError
        Names both values of everything that differs.
    """
    space = first.space
    for other in others:
        if other.space == space:
            continue
        pairs = {
            "dimension": (space.dimension, other.space.dimension),
            "dtype": (dtype_name(space.dtype), dtype_name(other.space.dtype)),
            "device": (str(space.device), str(other.space.device)),
            "library": (space.backend.name, other.space.backend.name),
        }
        differing = ", ".join(f"{name} {a} and {b}" for name, (a, b) in pairs.items() if a != b)
        msg = (
            f"operators act on different spaces: {differing}, in {first!r} and {other!r}. "
            "on_backend brings them to one library and device; cast arrays to one dtype first."
        )
        raise ValueError(msg)
    return space


def real_scalar(value: Any, name: str) -> float:
    """Return `value` as a float, or say that it would not leave the operator Hermitian."""
    try:
        no_number = isinstance(value, bool | str) or getattr(value, "ndim", 0) != 0
        number = complex("" if no_number else value)
    except (TypeError, ValueError):
        advice = "; A @ x multiplies a vector" if hasattr(value, "shape") else ""
        msg = f"{name}={shown(value)} must be a real number{advice}."
        raise TypeError(msg) from None
    if number.imag != 0 or not np.isfinite(number.real):
        msg = f"{name}={value!r} must be real and finite, or the operator would not stay Hermitian."
        raise ValueError(msg)
    return number.real


@dataclass(frozen=True, repr=False)
class LinearCombination(Arithmetic):
    """The operator ``shift * I + sum(c * A for c, A in terms)``, all on one space."""

    terms: tuple[tuple[float, LinearOperator], ...]
    shift: float = 0.0

    @classmethod
    def of(
        cls, terms: Iterable[tuple[float, LinearOperator]], shift: float = 0.0
    ) -> LinearCombination:
        """Build the combination: nested ones flattened, each operator once, and all on one space.

        Operators that cancel are dropped, except the first if nothing else is left.
        """
        merged: dict[int, tuple[float, LinearOperator]] = {}  # by identity, in order of appearance
        for factor, operator in terms:
            inner: Iterable[tuple[float, LinearOperator]] = [(1.0, operator)]
            if isinstance(operator, LinearCombination):
                inner, shift = operator.terms, shift + factor * operator.shift
            for inner_factor, part in inner:
                before = merged.get(id(part), (0.0, part))[0]
                merged[id(part)] = (before + factor * inner_factor, part)
        check_same_space(*(part for _, part in merged.values()))
        parts = tuple(merged.values())
        return cls(tuple(term for term in parts if term[0]) or parts[:1], shift)

    @property
    def space(self) -> VectorSpace:
        return self.terms[0][1].space

    def __matmul__(self, x: Array, /) -> Array:
        factor, operator = self.terms[0]
        total = factor * (operator @ x)
        for factor, operator in self.terms[1:]:
            total = total + factor * (operator @ x)
        return total + self.shift * x if self.shift else total

    def __repr__(self) -> str:
        parts = [f"{factor:g} * {operator!r}" for factor, operator in self.terms]
        return " + ".join(parts + ([f"{self.shift:g} * I"] if self.shift else []))


@dataclass(frozen=True, repr=False)
class MatrixOperator(Arithmetic):
    """A matrix that is there as an array, dense or sparse, of any library."""

    matrix: Any
    space: VectorSpace
    makes_new_arrays = True

    @property
    def makes_new_rows(self) -> bool:
        """Tell whether, of vectors end to end in memory, products are so, too."""
        return self._fast_form("csr_product") is not None

    def __matmul__(self, x: Array, /) -> Array:
        y = self._fast("csr_product", x)
        return self.matrix @ x if y is NotImplemented else y

    def three_term(self, q: Array, q_prev: Array, beta: Array) -> Any:
        """Return A q - beta q_prev and Re <q, that> in one sweep, or NotImplemented."""
        return self._fast("csr_three_term", q, q_prev, beta)

    def _fast(self, name: str, *arguments: Array) -> Any:
        fast = self._fast_form(name)
        return NotImplemented if fast is None else fast(self.matrix, *arguments)

    def _fast_form(self, name: str) -> Any:
        sparse = getattr(self.matrix, "format", None) == "csr"
        return self.space.backend.fast.get(name) if sparse else None

    def __repr__(self) -> str:
        kind = type(self.matrix).__name__
        return f"MatrixOperator({kind}, n={self.space.dimension}, {dtype_name(self.space.dtype)})"


@dataclass(frozen=True, repr=False)
class FunctionOperator(Arithmetic):
    """An operator from a function that multiplies.

    Parameters
    ----------
    function : callable
        ``function(x)`` returns ``A @ x``, in the shape of `x`.
    space : VectorSpace
        The vectors; ``VectorSpace.like(example_vector)`` makes it.
    blocks : bool, optional
        Whether `function` multiplies all columns of an ``(n, k)`` array at once. None finds out:
        the first block is compared with the product of its first column (one product of one column
        more), and functions that only know ``(n,)`` are then called column by column.

    Raises
    ------
    TypeError
        If `function` cannot be called or `space` is not a `VectorSpace`.

    Examples
    --------
    >>> import numpy as np
    >>> def second_difference(x):  # periodic, a convolution
    ...     return 2 * x - np.roll(x, 1, axis=0) - np.roll(x, -1, axis=0)
    >>> laplacian = FunctionOperator(second_difference, VectorSpace.like(np.zeros(4)))
    >>> laplacian @ np.array([1.0, 0.0, 0.0, 0.0])
    array([ 2., -1.,  0., -1.])
    """

    function: Callable[[Array], Array]
    space: VectorSpace
    blocks: bool | None = None
    _found: dict[str, bool] = field(default_factory=dict, init=False, compare=False)

    def __post_init__(self) -> None:
        checked_callable("function", self.function, "a function of a vector")
        if not isinstance(self.space, VectorSpace):
            msg = (
                f"space={shown(self.space)} must be a VectorSpace; VectorSpace.like(vector) makes "
                "one."
            )
            raise TypeError(msg)

    def __matmul__(self, x: Array, /) -> Array:
        if x.ndim == 1:
            return self.function(x)
        takes_blocks = self._found.get("blocks") if self.blocks is None else self.blocks
        if takes_blocks is None and x.shape[1] > 1:  # one column cannot tell blocks from vectors
            return self._find_out(x)
        return self.function(x) if takes_blocks else self._columns(x)

    def _columns(self, x: Array) -> Array:
        columns = [self.function(x[:, j]) for j in range(x.shape[1])]
        for y in columns:
            shape = getattr(y, "shape", None)
            if shape is None or tuple(shape) != (x.shape[0],):
                found = type(y).__qualname__ if shape is None else f"shape {tuple(shape)}"
                msg = f"function returns {found} for x of shape ({x.shape[0]},); expected A @ x."
                raise ValueError(msg)
        return self.space.backend.xp.stack(columns, axis=1)

    def _find_out(self, x: Array) -> Array:
        """Multiply a block, and remember whether the function can do that in one call."""
        xp = self.space.backend.xp
        first = self.function(x[:, 0])
        try:
            y = self.function(x)
            same_shape = tuple(getattr(y, "shape", ())) == tuple(x.shape)
        except (TypeError, ValueError, IndexError, RuntimeError):
            same_shape = False  # a function of (n,) only; one that is broken fails again below
        scale = self.space.precision * self.space.dimension**0.5
        agrees = same_shape and bool(
            xp.all(xp.abs(y[:, 0] - first) <= 100 * scale * xp.max(xp.abs(first)))
        )
        self._found["blocks"] = agrees
        return y if agrees else self._columns(x)

    def __repr__(self) -> str:
        named = getattr(self.function, "__name__", type(self.function).__name__)
        name = getattr(self.function, "__qualname__", named)
        return f"FunctionOperator({name}, n={self.space.dimension})"


def aslinearoperator(A: Any) -> LinearOperator:  # noqa: N803 (the field's name for an operator)
    """Return `A` as a `LinearOperator`.

    Parameters
    ----------
    A : operator, array or matrix-like of shape (n, n)
        A `LinearOperator` is returned as it is. Dense arrays of any backend, SciPy and CuPy sparse
        matrices and linear operators, torch sparse tensors, JAX ``BCOO``, operators of PyLops,
        CoLA, lineax, linear_operator (GPyTorch) and curvlinops, and any object with ``.shape`` and
        either ``@``, ``matmat`` or ``matvec`` are wrapped. Its ``dtype`` and ``device`` decide the
        library of the vectors, NumPy float64 without them. Integers and booleans are promoted to
        floating point.

    Returns
    -------
    LinearOperator

    Raises
    ------
    TypeError
        If `A` is none of these.
    ValueError
        If `A` is not square, is empty, or is a dense array or SciPy sparse matrix that is not
        Hermitian. Of a large sparse matrix a sample of the entries is looked at.

    Examples
    --------
    >>> import numpy as np
    >>> A = aslinearoperator(np.array([[2, 1], [1, 2]]))
    >>> A @ np.array([1.0, -1.0])
    array([ 1., -1.])
    >>> (3.0 * A - A).space.dimension
    2
    """
    if isinstance(A, LinearOperator) and isinstance(A.space, VectorSpace):
        return A
    if isinstance(A, type):
        msg = f"operator is the class {A.__qualname__}; pass an instance of it."
        raise TypeError(msg)
    if isinstance(A, list | tuple):
        A = _from_rows(A)  # noqa: N806
    shape = shape_of(A)
    if shape is None:
        msg = (
            f"operator has type {type(A).__qualname__}; expected an object with .space and @, a "
            "square array, a sparse matrix, or something with .shape and @ or matvec. A function "
            "becomes an operator as FunctionOperator(function, space)."
        )
        raise TypeError(msg)
    if len(shape) != 2 or shape[0] != shape[1]:
        msg = f"operator has shape {shape}; a spectrum needs a square matrix (n, n)."
        raise ValueError(msg)
    if shape[0] < 1:
        msg = "operator has shape (0, 0): there is no spectrum without vectors."
        raise ValueError(msg)
    for wrap in (_from_sparse, _from_dense):
        operator = wrap(A)
        if operator is not None:
            return operator
    product = foreign_product(A)
    if product is not None:
        return FunctionOperator(product, product.space, product.blocks)
    msg = f"operator of type {type(A).__qualname__} has .shape but neither @ nor matvec nor matmat."
    raise TypeError(msg)


def _from_rows(rows: Any) -> np.ndarray:
    try:
        return np.asarray(rows)
    except (TypeError, ValueError) as error:
        msg = "operator is a list whose rows differ in length; expected n rows of n numbers."
        raise ValueError(msg) from error


def _from_sparse(matrix: Any) -> LinearOperator | None:
    """Wrap a sparse matrix in the layout in which its library multiplies fastest."""
    module = type(matrix).__module__
    if scipy.sparse.issparse(matrix):
        matrix = matrix.tocsr()
        if matrix.dtype.kind not in "fc":
            matrix = matrix.astype(np.float64)
        example = np.zeros(matrix.shape[0], dtype=matrix.dtype)
        check_sparse(matrix, VectorSpace.like(example))
    elif module.startswith("cupyx.scipy.sparse") and not hasattr(matrix, "matvec"):
        matrix = matrix.tocsr()
        example = get_backend("cupy").xp.zeros(matrix.shape[0], dtype=matrix.dtype)
    elif module.startswith("jax.experimental.sparse"):
        xp = get_backend("jax").xp
        example = xp.zeros(matrix.shape[0], dtype=xp.result_type(matrix.dtype, xp.float32))
        if xp.isdtype(matrix.dtype, "integral"):
            matrix = type(matrix)(
                (matrix.data.astype(example.dtype), matrix.indices), shape=matrix.shape
            )
    elif compat.is_torch_array(matrix) and "sparse" in str(matrix.layout):
        dtype = matrix.dtype if matrix.is_floating_point() or matrix.is_complex() else None
        xp = get_backend("torch").xp
        example = xp.zeros(matrix.shape[0], dtype=dtype or xp.float64, device=matrix.device)
        matrix = matrix.to(example.dtype)
    else:
        return None
    return MatrixOperator(matrix, VectorSpace.like(example))


def _from_dense(matrix: Any) -> LinearOperator | None:
    try:
        backend = backend_of(matrix)
    except TypeError:
        return None
    if isinstance(matrix, np.ndarray):
        matrix = np.asarray(matrix)  # numpy.matrix would give back two-dimensional vectors
        if matrix.dtype.kind not in "biufc":
            msg = f"operator has dtype {matrix.dtype}; expected numbers, such as float64."
            raise TypeError(msg)
    space = VectorSpace.like(matrix)
    xp = backend.xp
    if matrix.dtype != space.dtype:
        matrix = xp.astype(matrix, space.dtype)
    check_dense(matrix, space)
    return MatrixOperator(matrix, space)
