"""Sweeps of the NumPy backend without compiled kernels give what the array API gives."""

import numpy as np
import pytest

from specdens.backends import get_backend
from specdens.backends import numpy as backend_module
from specdens.methods import columns


@pytest.fixture(autouse=True)
def _never_compiled(monkeypatch):
    monkeypatch.setattr(backend_module, "_compiled", lambda: None)
    monkeypatch.setattr(backend_module, "_CACHED", 4096)  # several blocks even of small arrays


def _blocks(n, p, dtype, count):
    rng = np.random.default_rng(0)
    return [rng.standard_normal((n, p)).astype(dtype) for _ in range(count)]


def _cases(n, p, dtype):
    x, y, z = _blocks(n, p, dtype, 3)
    factors = np.linspace(0.5, 2, p).astype(dtype)
    coefficients = np.array([0.5, -1.5, 2.0], dtype=dtype)
    signs = np.random.default_rng(1).choice(np.array([-1, 1], np.int8), n)
    wide = {"wide": np.float64}
    return [
        ("three_term", (x, y, z, factors), wide, {}),
        ("three_term", (x, y, z, factors), wide, {"overwrite": True}),
        ("chebyshev", (x, y, z, coefficients), wide, {}),
        ("subtract", (x, y, factors), wide, {}),
        ("scale", (x, factors), {}, {}),
        ("sketch", (x, signs, 64), {}, {}),
        ("sketch", (x, signs, 5), {}, {}),
    ]


# Rows laid end to end that do not fill the last block, one column, and rows too long to lay so.
@pytest.mark.parametrize(("n", "p"), [(1031, 5), (2500, 1), (64, 16), (70, 1500)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_every_sweep_gives_what_the_generic_one_gives(n, p, dtype):
    size = 1e-4 if dtype == np.float32 else 1e-12
    for name, arguments, options, own in _cases(n, p, dtype):
        found = get_backend("numpy").fast[name](
            *(np.copy(a) for a in arguments[:-1]), arguments[-1], **own
        )
        if name == "sketch":
            expected = columns.sketch(*arguments[:2], size=arguments[2])
        else:
            expected = getattr(columns, name)(*(a.copy() for a in arguments), **options)
        found, expected = (r if isinstance(r, tuple) else (r,) for r in (found, expected))
        for one, other in zip(found, expected, strict=True):
            assert one.dtype == other.dtype
            np.testing.assert_allclose(one, other, rtol=size, atol=size)


def test_only_what_may_be_overwritten_is():
    for name, arguments, _, own in _cases(300, 4, np.float64):
        before = [np.copy(a) for a in arguments]
        result = get_backend("numpy").fast[name](*arguments, **own)
        replaced = name in ("subtract", "scale") or "overwrite" in own
        assert (result[0] is arguments[0] or result is arguments[0]) == replaced
        for given, kept in list(zip(arguments, before, strict=True))[replaced:]:
            np.testing.assert_array_equal(given, kept)


def test_other_arguments_are_left_to_the_generic_forms():
    fast = get_backend("numpy").fast
    for name, (first, *others), _, own in _cases(300, 4, np.float64):
        for other_kind in (first.astype(complex), np.asfortranarray(first), first[::2]):
            assert fast[name](other_kind, *others, **own) is NotImplemented
