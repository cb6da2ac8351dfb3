r"""Does specdens work here? Estimators on a matrix with a known spectrum, on all that is installed.

The matrix is that of a chain of n sites, 2 on the diagonal and -1 beside it. Its eigenvalues are

.. math:: \lambda_k = 2 - 2 \cos \frac{k \pi}{n + 1}, \quad k = 1, \dots, n.
"""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from specdens.backends import _MODULES, Array, Backend, Device, dtype_name, get_backend
from specdens.eigenpairs import eigsh
from specdens.estimators import slq
from specdens.operators import FunctionOperator
from specdens.spaces import LinearOperator, VectorSpace

_SITES = 60
_ROUNDINGS = 300  # errors allowed, in roundings of the norm


class Found(NamedTuple):
    """An array library: installed or not, and the devices it can compute on.

    Attributes
    ----------
    name : str
        Of the backend.
    version : str or None
        Of the library; None if it cannot be used.
    reason : str
        Why not, otherwise empty.
    devices : tuple
        Where arrays can be made and read back.
    """

    name: str
    version: str | None
    reason: str
    devices: tuple[Device, ...]


class Check(NamedTuple):
    """What one estimator made of the chain.

    Attributes
    ----------
    backend, device, dtype, estimator : str
    error : float
        Largest deviation from the known answer; infinite if there was none.
    tolerance : float
    seconds : float
    message : str
        The exception, if there was one.
    """

    backend: str
    device: str
    dtype: str
    estimator: str
    error: float
    tolerance: float
    seconds: float
    message: str = ""

    @property
    def passed(self) -> bool:
        """Whether the error is within the tolerance."""
        return self.error <= self.tolerance


def found_backends() -> list[Found]:
    """Return what there is of each array library that specdens knows.

    Returns
    -------
    list of Found

    Examples
    --------
    >>> [found.name for found in found_backends()][0]
    'numpy'
    """
    return [_found(name) for name in _MODULES]


def _found(name: str) -> Found:
    try:
        backend = get_backend(name)
    except ImportError:
        return Found(name, None, "not installed", ())
    except Exception as error:  # a driver that is too old raises whatever it likes
        return Found(name, None, f"{type(error).__name__}: {error}", ())
    devices = usable_devices(backend)
    reason = "" if devices else "no device"
    return Found(name, library_version(backend) if devices else None, reason, devices)


def library_version(backend: Backend) -> str:
    """Return the version of a backend's library.

    Examples
    --------
    >>> library_version(get_backend("numpy")) == np.__version__
    True
    """
    parts = backend.xp.__name__.split(".")
    name = parts[-1] if parts[0] == "array_api_compat" else parts[0]
    return str(getattr(sys.modules.get(name), "__version__", "unknown"))


def usable_devices(backend: Backend) -> tuple[Device, ...]:
    """Return the devices on which a float32 array can be made and read back.

    Examples
    --------
    >>> usable_devices(get_backend("numpy"))
    ('cpu',)
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of libraries that try devices which they lack
        try:
            named = backend.xp.__array_namespace_info__().devices()
        except Exception:  # no driver
            return ()
        return tuple(device for device in named if device is not None and _works(backend, device))


def _works(backend: Backend, device: Device) -> bool:
    try:
        here = backend.to_numpy(backend.from_numpy(np.ones(2), backend.dtype("float32"), device))
        return bool(here.sum() == 2)
    except Exception:  # some devices have no memory, others no library
        return False


def device_name(device: Device) -> str:
    """Return a device's name as short as its library tells it.

    Examples
    --------
    >>> device_name("cpu"), device_name("xp.Device('device1')")
    ('cpu', 'device1')
    """
    text = str(device)
    return text.split("'")[1] if text.count("'") == 2 else text


def chain(backend: Backend, device: Device, num_sites: int = _SITES) -> LinearOperator:
    """Return the chain as an operator, in double precision where the device has it.

    Examples
    --------
    >>> chain(get_backend("numpy"), "cpu", 3) @ np.ones(3)
    array([1., 0., 1.])
    """
    xp = backend.xp
    name = "float64" if backend.has_dtype("float64", device) else "float32"

    def product(x: Array) -> Array:
        border = xp.zeros_like(x[:1, ...])
        return 2 * x - xp.concat([x[1:, ...], border]) - xp.concat([border, x[:-1, ...]])

    return FunctionOperator(
        product, VectorSpace(num_sites, backend.dtype(name), device, backend), blocks=True
    )


def chain_eigenvalues(num_sites: int = _SITES) -> np.ndarray:
    """Return the exact eigenvalues, ascending.

    Examples
    --------
    >>> chain_eigenvalues(2).round(12).tolist()
    [1.0, 3.0]
    """
    return 2 - 2 * np.cos(np.pi * np.arange(1, num_sites + 1) / (num_sites + 1))


def check_device(backend: Backend, device: Device) -> Iterator[Check]:
    """Yield a check of `slq` and one of `eigsh` on a device.

    `slq` gets as many vectors as there are eigenvalues, so that it has to find them all.
    """
    exact = chain_eigenvalues()
    A = chain(backend, device)  # noqa: N806
    space = A.space

    def spectrum() -> float:
        return slq(A, num_probes=4, num_steps=_SITES // 4, block_size=4).distance(exact)

    def largest() -> float:
        pairs = eigsh(A, 3, tol=0.0)
        return float(np.abs(pairs.eigenvalues - exact[-3:]).max())

    for name, error_of in (("slq", spectrum), ("eigsh", largest)):
        began, error, message = time.perf_counter(), np.inf, ""
        try:
            error = error_of()
        except Exception as problem:  # whatever is broken here is what the check is for
            message = f"{type(problem).__name__}: {problem}"
        seconds = time.perf_counter() - began
        tolerance = _ROUNDINGS * space.precision * exact[-1]
        where = backend.name, device_name(device), dtype_name(space.dtype), name
        yield Check(*where, error, tolerance, seconds, message)


def run_checks(found: list[Found]) -> Iterator[Check]:
    """Yield the checks of all devices of all libraries found."""
    for library in found:
        for device in library.devices:
            yield from check_device(get_backend(library.name), device)
