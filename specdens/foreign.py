"""Linear operators of other libraries, recognized by what they offer and not by who made them.

One product can be spelled ``matvec`` and ``matmat`` (SciPy, PyLops), ``mv`` and ``mm`` (xitorch),
``@`` (CoLA, linear_operator, curvlinops) or ``mv`` of a declared structure (lineax).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import array_api_compat as compat
import numpy as np

from specdens.backends import Array, Backend, backend_of, dtype_name, get_backend
from specdens.spaces import VectorSpace

#: How a product with one vector and a product with a block are called, where there are two.
_SPELLINGS = (("matvec", "matmat"), ("mv", "mm"))


@dataclass(frozen=True)
class ForeignProduct:
    """The product of another library's operator, as a function of vectors and blocks.

    Attributes
    ----------
    matrix : object
        The operator itself.
    space : VectorSpace
        Its vectors.
    blocks : bool or None
        Whether `multiply` takes ``(n, k)`` arrays; None if that has to be tried.
    multiply : callable
    """

    matrix: Any
    space: VectorSpace
    blocks: bool | None
    multiply: Callable[[Array], Array]

    def __call__(self, x: Array) -> Array:
        y = self.multiply(x)
        # Operators with trainable parameters record products for differentiation.
        detach = getattr(y, "detach", None)
        return detach() if callable(detach) else y

    @property
    def __name__(self) -> str:  # what FunctionOperator prints
        return type(self.matrix).__qualname__


def shape_of(matrix: Any) -> tuple[int, ...] | None:
    """Return the shape that an object declares, or None: ``.shape``, or sizes of in- and output."""
    shape = getattr(matrix, "shape", None)
    if shape is not None:
        return tuple(shape)
    sizes = [getattr(matrix, name, None) for name in ("out_size", "in_size")]
    return tuple(int(size()) for size in sizes) if all(map(callable, sizes)) else None  # type: ignore[misc]


def foreign_product(matrix: Any) -> ForeignProduct | None:
    """Return the product of a square object of any of the spellings above, None if it has none.

    Raises
    ------
    TypeError
        If its vectors are not single arrays.
    """
    if callable(getattr(matrix, "in_structure", None)):
        return _of_structure(matrix)
    product = _spelled(matrix)
    return None if product is None else ForeignProduct(matrix, _space(matrix), *product)


def _spelled(matrix: Any) -> tuple[bool | None, Callable[[Array], Array]] | None:
    """Return whether the product takes blocks, and the product."""
    named = [[getattr(matrix, name, None) for name in pair] for pair in _SPELLINGS]
    for one, many in named:
        if callable(one) and callable(many):
            return True, lambda x, one=one, many=many: (one if x.ndim == 1 else many)(x)
    if hasattr(type(matrix), "__matmul__"):
        # Libraries with these two give blocks to ``@`` as they are; of others that is not known.
        known = any(callable(getattr(matrix, name, None)) for name in ("_matmat", "matmul"))
        return (True if known and not callable(named[0][0]) else None), lambda x: matrix @ x
    for one, many in named:
        if callable(one):
            return False, one
        if callable(many):
            return True, lambda x, many=many: many(x[:, None])[:, 0] if x.ndim == 1 else many(x)
    return None


def _of_structure(matrix: Any) -> ForeignProduct:
    """Wrap an operator between declared structures, here one array each (of any shape)."""
    given, returned = matrix.in_structure(), matrix.out_structure()
    backend = _library(given)
    if backend is None or not hasattr(given, "shape") or given != returned:
        msg = (
            f"operator of type {type(matrix).__qualname__} maps {given} to {returned}; expected "
            "one array and the same back. Flatten its vectors, and wrap the product of flat "
            "vectors as FunctionOperator(function, space)."
        )
        raise TypeError(msg)
    xp = backend.xp
    space = VectorSpace.like(xp.zeros(int(np.prod(given.shape)), dtype=given.dtype))

    def multiply(x: Array) -> Array:
        return xp.reshape(matrix.mv(xp.reshape(x, given.shape)), x.shape)

    columns = xp.vectorize(multiply, signature="(n)->(n)")  # all columns in one traced product
    return ForeignProduct(
        matrix,
        space,
        True,
        lambda x: multiply(x) if x.ndim == 1 else xp.permute_dims(columns(x.T), (1, 0)),
    )


def _space(matrix: Any) -> VectorSpace:
    """Make a space from what an object says of its vectors; without that NumPy float64."""
    dtype, n = getattr(matrix, "dtype", None), int(matrix.shape[0])
    device = getattr(matrix, "device", None)
    if hasattr(matrix, "xnp"):  # one dtype may stand for several libraries: its arrays decide
        held = _first_array(matrix)
        if held is None:
            return VectorSpace.like(matrix.xnp.zeros((n,), dtype=dtype, device=device))
        own, kind = backend_of(held), dtype_name(dtype)
        zeros = own.xp.zeros(n, dtype=own.dtype(kind), device=compat.device(held))
        return VectorSpace.like(zeros)
    backend = _library(dtype)
    if backend is not None and backend.name != "numpy":
        return VectorSpace.like(backend.xp.zeros(n, dtype=dtype, device=device))
    if type(matrix).__module__.startswith("cupyx."):
        return VectorSpace.like(get_backend("cupy").xp.zeros(n, dtype=dtype))
    return VectorSpace.like(np.zeros(n, dtype=np.float64 if dtype is None else np.dtype(dtype)))


def _first_array(thing: Any) -> Array | None:
    """Return an array that an operator, or one of the operators it is made of, holds."""
    if compat.is_array_api_obj(thing) and not isinstance(thing, type):
        return thing if thing.ndim else None
    if not isinstance(thing, list | tuple | dict):
        thing = vars(thing) if hasattr(thing, "xnp") and hasattr(thing, "__dict__") else ()
    parts = thing.values() if isinstance(thing, dict) else thing
    return next((a for a in map(_first_array, parts) if a is not None), None)


def _library(thing: Any) -> Backend | None:
    """Return the backend whose library defines the type of `thing`, a dtype or a structure."""
    try:
        return get_backend(type(thing).__module__.partition(".")[0])
    except ValueError:
        return None
