"""Backends: which library an array belongs to, and the way to the host and back."""

import array_api_strict
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from specdens import Backend, backend_of
from specdens.backends import dtype_name, get_backend
from specdens.methods.columns import kernels
from tests.cases import device_of, home, move


def test_every_library_is_recognized(library):
    backend = backend_of(move(np.zeros(3), library))
    assert isinstance(backend, Backend)
    assert backend.name == library.partition(":")[0]


def test_arrays_survive_the_way_to_the_device_and_back(library):
    example = move(np.zeros(1), library)
    backend = backend_of(example)
    host = np.random.default_rng(0).standard_normal((4, 3))
    there = backend.from_numpy(host, example.dtype, example.device if library != "numpy" else None)
    assert type(there) is type(example)
    assert device_of(there) == device_of(example)
    np.testing.assert_array_equal(home(there), host)
    back = backend.to_numpy(there)
    assert type(back) is np.ndarray
    np.testing.assert_array_equal(back, host)


@pytest.mark.parametrize("name", ["float32", "float64", "complex64", "complex128", "int64"])
def test_from_numpy_casts_to_the_requested_dtype(library, name):
    example = move(np.zeros(1), library)
    backend = backend_of(example)
    device = None if library == "numpy" else example.device
    there = backend.from_numpy(np.arange(3.0), backend.dtype(name), device)
    assert dtype_name(there.dtype) == name
    np.testing.assert_array_equal(home(there), np.arange(3).astype(name))


def test_moved_tensors_do_not_share_memory_with_the_host():
    host = np.zeros(3)
    host.flags.writeable = False
    there = backend_of(torch.zeros(1)).from_numpy(host, torch.float64, "cpu")
    there += 1.0
    assert host.sum() == 0


def test_bfloat16_arrives_as_float32_with_the_same_values():
    there = torch.tensor([1.5, -3.0], dtype=torch.bfloat16)
    back = backend_of(there).to_numpy(there)
    assert back.dtype == np.float32
    np.testing.assert_array_equal(back, [1.5, -3.0])


def test_conjugate_and_gradient_views_of_torch_come_home():
    there = torch.tensor([1 + 2j], requires_grad=True).conj()
    np.testing.assert_array_equal(backend_of(there).to_numpy(there), [1 - 2j])


@pytest.mark.parametrize(
    "dtype",
    [np.float32, np.dtype("float32"), torch.float32, jnp.float32, array_api_strict.float32],
    ids=lambda dtype: f"{type(dtype).__module__}:{dtype}",
)
def test_dtype_names_are_the_same_in_all_libraries(dtype):
    assert dtype_name(dtype) == "float32"


def test_second_device_of_the_strict_library_refuses_the_host():
    there = move(np.zeros(2), "strict:device1")
    with pytest.raises(RuntimeError, match="device"):
        np.asarray(there)


def test_other_objects_are_no_arrays():
    with pytest.raises(TypeError, match="array has type list"):
        backend_of([1.0, 2.0])


def test_unknown_backends_are_named_with_the_known_ones():
    with pytest.raises(
        ValueError, match="backend='tensorflow' is unknown; expected one of 'numpy'"
    ):
        get_backend("tensorflow")


def test_backends_print_their_name():
    assert repr(get_backend("numpy")) == "Backend(numpy)"


@pytest.mark.parametrize("name", ["float32", "float64", "complex64", "complex128"])
def test_products_are_subtracted_in_place(name):
    rng = np.random.default_rng(0)
    w, c, q = (rng.standard_normal(shape).astype(name) for shape in [(3, 50), (3, 4), (4, 50)])
    if name.startswith("complex"):
        w, c, q = (x * np.exp(1j * rng.standard_normal(x.shape)).astype(name) for x in (w, c, q))
    expected = w - c @ q
    for library in ("numpy", "torch"):
        there = move(w.copy(), library)
        take = kernels(backend_of(there), there.dtype).take
        result = take(there, move(q, library), move(np.ascontiguousarray(c.T), library))
        np.testing.assert_allclose(home(result), expected, rtol=1e-5 if "32" in name else 1e-6)
        np.testing.assert_array_equal(home(there), home(result))  # no new memory
