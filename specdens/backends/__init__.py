"""What specdens needs from an array library, and which library an array belongs to.

The arithmetic everywhere else is the array API standard. This package and the adapters are the only
places that may name a framework; a framework is imported when the first of its arrays arrives.
To add one, write a module here that defines ``BACKEND`` and list it in ``_MODULES``.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, TypeAlias, TypeVar

import array_api_compat as compat
import numpy as np

from specdens.arguments import checked_choice

Array: TypeAlias = Any  # an array of any backend
DType: TypeAlias = Any  # a dtype object of that backend
Device: TypeAlias = Any  # a device object of that backend
F = TypeVar("F", bound=Callable[..., Any])

_MODULES: dict[str, Callable[[Any], bool]] = {
    "numpy": compat.is_numpy_array,
    "torch": compat.is_torch_array,
    "jax": compat.is_jax_array,
    "cupy": compat.is_cupy_array,
    "strict": lambda x: type(x).__module__.startswith("array_api_strict"),
}


def no_jit(function: F) -> F:
    """Return `function` as it is: the ``jit`` of libraries that run operation by operation."""
    return function


@dataclass(frozen=True)
class Backend:
    """What specdens needs from an array library beyond the array API standard.

    Attributes
    ----------
    name : str
        One of ``numpy``, ``torch``, ``jax``, ``cupy``, ``strict``.
    xp : module
        The array API namespace, array-api-compat's where one exists.
    from_numpy : callable
        ``(host_array, dtype, device) -> Array``, with the requested dtype and device.
    to_numpy : callable
        ``array -> numpy.ndarray``; waits until the value is computed. Half precision that NumPy
        lacks (bfloat16) arrives as float32.
    jit : callable
        Compiles a pure function of arrays. Applied to arithmetic only, never to a product ``A @
        x``.
    session : callable
        Returns a context in which memory may be kept from one step of a run to the next.
    coarse : bool
        Whether starting an operation takes longer than sweeping a few million numbers, and adding
        up long columns leaves most of the processor idle: then operations are few and large, and
        columns are added up by products with ones.
    fast : mapping
        Faster forms of functions of `specdens.methods.columns`, by name and with the same
        positional arguments, and of products with sparse matrices in compressed rows. They return
        NotImplemented for arguments that they are not made for.
    """

    name: str
    xp: ModuleType
    from_numpy: Callable[[np.ndarray, DType, Device], Array]
    to_numpy: Callable[[Array], np.ndarray]
    jit: Callable[[Any], Any] = no_jit
    session: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
    coarse: bool = False
    fast: Mapping[str, Callable[..., Any]] = field(default_factory=dict, hash=False)

    def __repr__(self) -> str:
        return f"Backend({self.name})"

    def dtype(self, name: str) -> DType:
        """Return this library's dtype object called `name`, such as ``"float32"``."""
        return getattr(self.xp, name)

    def has_dtype(self, name: str, device: Device) -> bool:
        """Tell whether arrays of dtype `name` can live on `device` (no float64 on some devices)."""
        return name in self.xp.__array_namespace_info__().dtypes(device=device)


def get_backend(name: str) -> Backend:
    """Return the backend called `name`, importing its library.

    Raises
    ------
    ValueError
        If there is no backend of this name.
    ImportError
        If its library is not installed.

    Examples
    --------
    >>> get_backend("numpy")
    Backend(numpy)
    """
    checked_choice("backend", name, _MODULES)
    backend: Backend = importlib.import_module(f"specdens.backends.{name}").BACKEND
    return backend


def backend_of(array: Array, name: str = "array") -> Backend:
    """Return the backend that `array` belongs to; errors call it `name`.

    Raises
    ------
    TypeError
        If `array` is not an array of a known library.

    Examples
    --------
    >>> backend_of(np.zeros(3)).name
    'numpy'
    """
    for library, is_mine in _MODULES.items():
        if is_mine(array):
            return get_backend(library)
    kind = f"{type(array).__module__}.{type(array).__qualname__}".removeprefix("builtins.")
    msg = (
        f"{name} has type {kind}, which is not an "
        f"array of a known library ({', '.join(_MODULES)}); convert it with numpy.asarray first."
    )
    raise TypeError(msg)


def dtype_name(dtype: DType) -> str:
    """Return the plain name of a dtype of any library: ``"float32"``, ``"complex128"``.

    Examples
    --------
    >>> dtype_name(np.float32)
    'float32'
    """
    try:
        return np.dtype(dtype).name  # NumPy, CuPy and JAX, as dtype objects or scalar classes
    except TypeError:
        return str(dtype).rsplit(".", maxsplit=1)[-1]  # torch and array-api-strict print theirs
