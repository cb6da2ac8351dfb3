"""Operators of PyTorch models in other array libraries: no copies, and nothing big leaves a GPU.

The tests marked ``gpu`` need torch with CUDA and CuPy. What they measure with is tried on a CPU.
"""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from specdens import eigsh, kpm, on_backend, slq
from specdens.testing import check_operator
from specdens_torch import GaussNewton, GradientSecondMoment, Hessian, TangentKernel
from tests.adapters.torch_cases import classes, dense, mlp

ROOT = Path(__file__).parents[2]
CE = nn.CrossEntropyLoss()
EPS = {torch.float64: 2.0**-52, torch.float32: 2.0**-23, torch.bfloat16: 2.0**-7}
WIDTH = 700  # a network of 5,603 parameters: a vector is larger than any array of coefficients
SKETCH = 64  # numbers that go home for each probe in a step without reorthogonalization


def hessian(dtype=torch.float64, *, width=5, device="cpu"):
    model, (inputs, labels) = mlp(width=width, dtype=dtype), classes(dtype=dtype)
    return Hessian(model.to(device), CE, (inputs.to(device), labels.to(device)))


class Seen:
    """Keeps the last vectors that an operator was given and returned."""

    def __init__(self, operator):
        self.operator, self.given, self.returned = operator, None, None

    @property
    def space(self):
        return self.operator.space

    def __matmul__(self, x):
        self.given, self.returned = x, self.operator @ x
        return self.returned


class Traffic:
    """An operator in whose space the sizes of all arrays that go home are noted."""

    def __init__(self, operator):
        self.operator, self.sizes = operator, []
        backend = operator.space.backend

        def to_numpy(array):
            self.sizes.append(array.reshape(-1).shape[0])
            return backend.to_numpy(array)

        self.space = replace(operator.space, backend=replace(backend, to_numpy=to_numpy))

    def __matmul__(self, x):
        return self.operator @ x


class Departures(TorchDispatchMode):
    """Notes how many numbers PyTorch sends from a kind of device to another in each operation."""

    def __init__(self, source="cuda", target="cpu"):
        super().__init__()
        self.source, self.target, self.sizes = source, target, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tensors = [a for a in args if isinstance(a, torch.Tensor)]
        if any(t.device.type == self.source for t in tensors):
            if function is torch.ops.aten._local_scalar_dense.default:  # item, float, bool, int
                self.sizes.append(1)
            elif isinstance(result, torch.Tensor) and result.device.type == self.target:
                self.sizes.append(result.numel())
        return result


def note_gets(monkeypatch, kind, sizes):
    """Note the size of every array of a class in CuPy's manner that is brought to the host."""
    get = kind.get

    def noted(self, *args, **kwargs):
        sizes.append(self.size)
        return get(self, *args, **kwargs)

    monkeypatch.setattr(kind, "get", noted)


def estimates(operator):
    """Return numbers of three estimators, and the largest array each may bring home."""
    p, m = 3, 8
    options = {"num_probes": p, "seed": 1, "block_size": p, "progress": False}
    without = slq(operator, num_steps=m, reorthogonalize=False, **options).plain()
    kept = slq(operator, num_steps=m, reorthogonalize=True, **options).plain()
    chebyshev = kpm(operator, num_moments=2 * m, **options).plain()
    largest = eigsh(operator, 2).eigenvalues
    moments = [[float(m_.moment(k).value) for k in range(5)] for m_ in (without, kept, chebyshev)]
    return np.array(moments), np.asarray(largest)


def layouts(dtype):
    """Return NumPy vectors and blocks over 43 parameters, contiguous and not, by name."""
    block = np.random.default_rng(0).standard_normal((86, 6)).astype(dtype)
    return {
        "vector": block[:43, 0].copy(),
        "block": block[:43].copy(),
        "columns": np.asfortranarray(block[:43]),
        "every other row": block[::2, 0],
        "a part of a block": block[::2, 1:4],
        "one column": block[:43, :1],
    }


@pytest.mark.parametrize("layout", layouts(np.float64))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_products_in_numpy_share_their_memory_with_torch(dtype, layout):
    seen = Seen(hessian(dtype))
    moved = on_backend(seen, "numpy")
    x = layouts(moved.space.dtype)[layout]
    before = x.copy()
    y = moved @ x
    assert seen.given.data_ptr() == x.ctypes.data
    assert seen.returned.data_ptr() == y.ctypes.data
    assert (y.shape, y.dtype) == (x.shape, x.dtype)
    assert np.array_equal(x, before)
    expected = dense(mlp(), CE, *classes()).numpy() @ x
    np.testing.assert_allclose(y, expected, atol=50 * EPS[dtype] * np.abs(expected).max())


@pytest.mark.parametrize("operator", [Hessian, GaussNewton, GradientSecondMoment, TangentKernel])
def test_results_belong_to_the_caller(operator):
    moved = on_backend(operator(mlp(), CE, classes()), "numpy")
    x = np.ones(moved.space.dimension)
    first = moved @ x
    kept = first.copy()
    second = moved @ x
    assert not np.shares_memory(first, second)
    first[:] = np.nan  # a caller may write into what it was given
    assert np.array_equal(moved @ x, kept)


@pytest.mark.parametrize("name", ["numpy", "jax"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_moved_operators_are_operators(dtype, name):
    pytest.importorskip(name, reason=f"{name} is not installed")
    check_operator(on_backend(hessian(dtype), name))


def test_read_only_vectors():
    seen = Seen(hessian())
    x = np.ones(43)
    x.flags.writeable = False
    y = on_backend(seen, "numpy") @ x
    assert seen.given.data_ptr() == x.ctypes.data
    np.testing.assert_allclose(y, dense(mlp(), CE, *classes()).numpy() @ x, atol=1e-14)


REVERSED = """
import numpy as np, torch
from specdens import on_backend
matrix = torch.diag(torch.arange(5.0, dtype=torch.float64))
x = np.arange(5.0)
print((on_backend(matrix, "numpy") @ x[::-1]).tolist())
"""


def test_vectors_that_are_read_backwards():
    command = [sys.executable, "-c", REVERSED]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[0.0, 3.0, 4.0, 3.0, 0.0]", done.stderr


def test_bfloat16_is_float32_in_numpy():
    here = hessian(torch.bfloat16)
    moved = on_backend(here, "numpy")
    x = layouts(np.float32)["a part of a block"]
    y = moved @ x
    assert moved.space.dtype == np.float32
    expected = here @ torch.tensor(x).to(torch.bfloat16)
    np.testing.assert_array_equal(y, expected.float().numpy())


@pytest.mark.parametrize("dtype", EPS, ids=str)
def test_jax_arrays_share_their_memory_with_torch(dtype):
    jnp = pytest.importorskip("jax.numpy", reason="JAX is not installed")
    seen = Seen(hessian(dtype))
    moved = on_backend(seen, "jax")
    for shape in ((43,), (43, 3)):
        x = jnp.asarray(np.random.default_rng(0).standard_normal(shape), dtype=moved.space.dtype)
        y = moved @ x
        assert seen.given.data_ptr() == x.unsafe_buffer_pointer()
        assert seen.returned.data_ptr() == y.unsafe_buffer_pointer()
        assert y.dtype == x.dtype
        expected = seen.operator @ torch.tensor(np.asarray(x, dtype=np.float32)).to(dtype)
        atol = 8 * EPS[dtype] if dtype != torch.float64 else 1e-6  # x went through float32 above
        np.testing.assert_allclose(
            np.asarray(y, dtype=np.float64), expected.double().numpy(), atol=atol
        )


@pytest.mark.parametrize("name", ["numpy", "jax"])
@pytest.mark.parametrize("dtype", EPS, ids=str)
def test_estimates_are_those_of_the_torch_operator(dtype, name):
    pytest.importorskip(name, reason=f"{name} is not installed")
    here = hessian(dtype)
    expected, largest = estimates(here)
    found, found_largest = estimates(on_backend(here, name))
    rounding = 100 * EPS[dtype] if dtype != torch.bfloat16 else 8 * EPS[dtype]
    np.testing.assert_allclose(found, expected, atol=rounding * np.abs(expected).max())
    np.testing.assert_allclose(found_largest, largest, atol=rounding * np.abs(largest).max())


@pytest.mark.parametrize("name", ["torch", "numpy", "jax"])
def test_only_coefficients_go_home(name):
    pytest.importorskip(name, reason=f"{name} is not installed")
    counted = Traffic(on_backend(hessian(width=WIDTH), name))
    estimates(counted)
    assert counted.sizes
    assert max(counted.sizes) <= 3 * SKETCH < counted.space.dimension


def test_departures_are_noticed():
    x = torch.ones(7, 3)
    with Departures(source="cpu", target="meta") as sent:
        x.to("meta")
        torch.empty(21, device="meta").copy_(x.reshape(-1))
        x.add(1.0)
        x.sum().item()
        float(x[0, 0])
        bool(x[0, 0] > 0)
    assert sent.sizes == [21, 21, 1, 1, 1]


def test_gets_are_noticed(monkeypatch):
    class Array(np.ndarray):  # what CuPy's arrays offer
        def get(self, stream=None):
            return np.asarray(self)

    sizes = []
    note_gets(monkeypatch, Array, sizes)
    np.testing.assert_array_equal(np.arange(6.0).view(Array).get(stream=None), np.arange(6.0))
    assert sizes == [6]


def test_noticing_changes_nothing():
    moved = on_backend(hessian(), "numpy")
    expected, largest = estimates(moved)
    with Departures():
        found, found_largest = estimates(moved)
    assert np.array_equal(found, expected)
    assert np.array_equal(found_largest, largest)


@pytest.fixture
def cupy():
    """CuPy, where it and torch find a graphics processor."""
    if not torch.cuda.is_available():
        pytest.skip("torch finds no CUDA device")
    module = pytest.importorskip("cupy", reason="CuPy is not installed")
    if not module.cuda.is_available():
        pytest.skip("CuPy finds no graphics processor")
    return module


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("shape", [(43,), (43, 3)], ids=len)
def test_products_in_cupy_share_their_memory_with_torch(cupy, dtype, shape):
    seen = Seen(hessian(dtype, device="cuda"))
    moved = on_backend(seen, "cupy")
    host = np.random.default_rng(0).standard_normal(shape)
    x = cupy.asarray(host, dtype=moved.space.dtype)
    y = moved @ x
    assert seen.given.data_ptr() == x.data.ptr
    assert seen.returned.data_ptr() == y.data.ptr
    assert (y.shape, y.dtype, y.device) == (x.shape, x.dtype, x.device)
    expected = dense(mlp(), CE, *classes()).numpy() @ host
    atol = 50 * EPS[dtype] * np.abs(expected).max()
    np.testing.assert_allclose(cupy.asnumpy(y), expected, atol=atol)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_estimates_in_cupy_are_those_on_the_cpu(cupy, dtype):
    expected, largest = estimates(hessian(dtype))
    found, found_largest = estimates(on_backend(hessian(dtype, device="cuda"), "cupy"))
    atol = 1000 * EPS[dtype] * np.abs(expected).max()
    np.testing.assert_allclose(found, expected, atol=atol)
    atol = 1000 * EPS[dtype] * np.abs(largest).max()
    np.testing.assert_allclose(found_largest, largest, atol=atol)


@pytest.mark.gpu
@pytest.mark.parametrize("matrix", [Hessian, GaussNewton, GradientSecondMoment])
def test_only_coefficients_leave_the_graphics_processor(cupy, monkeypatch, matrix):
    on_device = hessian(width=WIDTH, device="cuda").risk
    moved = on_backend(matrix(on_device), "cupy")
    _ = moved @ cupy.ones(moved.space.dimension)  # the first product also looks at the data
    from_cupy = []
    note_gets(monkeypatch, cupy.ndarray, from_cupy)
    with Departures() as sent:
        estimates(moved)
    assert from_cupy, "coefficients must come home: the spy sees nothing"
    assert max(from_cupy) <= 3 * SKETCH < moved.space.dimension
    assert max(sent.sizes, default=0) <= 3 * SKETCH


@pytest.mark.gpu
def test_torch_vectors_stay_on_the_graphics_processor():
    if not torch.cuda.is_available():
        pytest.skip("torch finds no CUDA device")
    operator = hessian(width=WIDTH, device="cuda")
    with Departures() as sent:
        found, _ = estimates(operator)
    assert max(sent.sizes) <= 3 * SKETCH < operator.space.dimension
    expected, _ = estimates(hessian(width=WIDTH))
    np.testing.assert_allclose(found, expected, atol=1e-10 * np.abs(expected).max())
