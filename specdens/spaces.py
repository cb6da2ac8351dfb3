"""The space of an operator's vectors, the linear-operator protocol, and the checked product."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, runtime_checkable

import array_api_compat as compat
import numpy as np

from specdens.arguments import checked_count, shown
from specdens.backends import Array, Backend, Device, DType, backend_of, dtype_name

_FLOATING = ("float16", "bfloat16", "float32", "float64", "complex64", "complex128")


@dataclass(frozen=True)
class VectorSpace:
    """The vectors an operator acts on; the only place where dtype and device are decided.

    Parameters
    ----------
    dimension : int
        Length n of a vector, at least 1.
    dtype : dtype of the backend
        Real or complex floating point. Half precision is the precision of the products; the vectors
        between two products are then kept in float32 (see `working_dtype`).
    device : device of the backend
    backend : Backend

    Raises
    ------
    ValueError
        If `dimension` is below 1.
    TypeError
        If `dimension` is no integer, `dtype` no floating-point dtype or `backend` no `Backend`.

    Examples
    --------
    >>> space = VectorSpace.like(np.zeros(5, dtype=np.float32))
    >>> space.dimension, space.backend.name, space.is_complex
    (5, 'numpy', False)
    """

    dimension: int
    dtype: DType
    device: Device
    backend: Backend

    def __post_init__(self) -> None:
        checked_count("dimension", self.dimension)
        if not isinstance(self.backend, Backend):
            msg = (
                f"backend={shown(self.backend)} must be a Backend, such as backend_of(array); "
                "VectorSpace.like(vector) makes the whole space."
            )
            raise TypeError(msg)
        if dtype_name(self.dtype) not in _FLOATING:
            msg = f"dtype={dtype_name(self.dtype)} must be one of {', '.join(_FLOATING)}."
            raise TypeError(msg)

    @classmethod
    def like(cls, vector: Array) -> VectorSpace:
        """Return the space of vectors of the length, dtype, device and library of `vector`.

        Parameters
        ----------
        vector : array of shape (n,) or (n, k)
            Integers and booleans stand for the library's default floating-point dtype.
        """
        backend = backend_of(vector, "vector")
        if vector.ndim not in (1, 2):
            msg = f"vector has shape {tuple(vector.shape)}; expected (n,) or (n, k)."
            raise ValueError(msg)
        device = compat.device(vector)
        dtype = vector.dtype
        if not backend.xp.isdtype(dtype, ("numeric", "bool")):
            msg = f"vector has dtype {dtype_name(dtype)}; expected numbers."
            raise TypeError(msg)
        if not backend.xp.isdtype(dtype, ("real floating", "complex floating")):
            dtype = backend.dtype("float64" if backend.has_dtype("float64", device) else "float32")
        return cls(int(vector.shape[0]), dtype, device, backend)

    @property
    def is_complex(self) -> bool:
        """Whether the vectors, and so a Hermitian operator, are complex."""
        return dtype_name(self.dtype).startswith("complex")

    @cached_property
    def working_dtype(self) -> DType:
        """The dtype of vectors between products: `dtype`, or float32 if that is half precision."""
        half = dtype_name(self.dtype) in ("float16", "bfloat16")
        return self.backend.dtype("float32") if half else self.dtype

    @cached_property
    def wide_dtype(self) -> DType:
        """The dtype inner products are accumulated in: double precision where the device has it."""
        name = "complex128" if self.is_complex else "float64"
        if self.backend.has_dtype(name, self.device):
            return self.backend.dtype(name)
        return self.working_dtype

    @property
    def precision(self) -> float:
        """Unit roundoff of a product, from `dtype`: how accurate eigenvalues can be, relatively."""
        return float(self.backend.xp.finfo(self.dtype).eps)

    @property
    def vector_bytes(self) -> int:
        """Bytes of one vector in `working_dtype`."""
        return (
            int(self.backend.xp.finfo(self.working_dtype).bits)
            * (1 + self.is_complex)
            // 8
            * (self.dimension)
        )

    def from_numpy(self, array: np.ndarray) -> Array:
        """Move a host array into this space's library and device, in `working_dtype`."""
        return self.backend.from_numpy(array, self.working_dtype, self.device)

    def to_numpy(self, array: Array) -> np.ndarray:
        """Bring an array of this space's library to the host."""
        return self.backend.to_numpy(array)


@runtime_checkable
class LinearOperator(Protocol):
    """A real symmetric or complex Hermitian (n, n) matrix, known only through its products.

    Anything with these two members is an operator: nothing to inherit, nothing to register.
    Products must be linear, Hermitian and repeatable; `specdens.testing.check_operator` tries all
    three.
    """

    @property
    def space(self) -> VectorSpace:
        """Length, dtype, device and array library of the vectors."""
        ...

    def __matmul__(self, x: Array, /) -> Array:
        """Return ``A @ x`` for `x` of shape ``(n,)`` or ``(n, k)``, in the shape of `x`."""
        ...


def multiply(operator: LinearOperator, x: Array) -> Array:
    """Return ``operator @ x`` for `x` in the working dtype, checked for shape and kind of number.

    Every method multiplies through here: half-precision operators see vectors in their own dtype,
    and the product comes back in the working dtype.
    """
    space = operator.space
    xp = space.backend.xp
    y = operator @ (x if x.dtype == space.dtype else xp.astype(x, space.dtype))
    if not hasattr(y, "shape") or tuple(y.shape) != tuple(x.shape):
        shape = tuple(getattr(y, "shape", ()))
        msg = f"operator @ x has shape {shape} for x of shape {tuple(x.shape)}; they must be equal."
        raise ValueError(msg)
    if not space.is_complex and xp.isdtype(y.dtype, "complex floating"):
        msg = (
            f"operator @ x is {dtype_name(y.dtype)} for a {dtype_name(space.dtype)} vector; a "
            "complex Hermitian operator needs a complex space, VectorSpace.like(complex_vector)."
        )
        raise TypeError(msg)
    return y if y.dtype == space.working_dtype else xp.astype(y, space.working_dtype)


def checked_vectors(name: str, x: Array, space: VectorSpace) -> Array:
    """Return `x`, of shape ``(n,)`` or ``(n, k)``, in the working dtype on the space's device.

    Raises
    ------
    ValueError
        If it has another shape.
    TypeError
        If it is no array, or complex and the space real.
    """
    backend, n, shape = backend_of(x, name), space.dimension, tuple(x.shape)
    if len(shape) not in (1, 2) or shape[0] != n or 0 in shape:
        msg = f"{name} has shape {shape}; expected ({n},) or ({n}, k), not empty."
        raise ValueError(msg)
    if dtype_name(x.dtype).startswith("complex") and not space.is_complex:
        msg = (
            f"{name} is complex, the operator real; pass its real and its imaginary part one after "
            "the other."
        )
        raise TypeError(msg)
    if backend is space.backend and compat.device(x) == space.device:
        return space.backend.xp.astype(x, space.working_dtype)
    return space.from_numpy(backend.to_numpy(x))
