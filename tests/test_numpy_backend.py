"""Sweeps of the NumPy backend without compiled kernels give what the array API gives."""

import numpy as np
import pytest

from specdens.backends import get_backend
from specdens.backends import numpy as backend_module
from specdens.methods import columns
from tests.cases import flat


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


@pytest.mark.parametrize(("p", "n"), [(1, 3000), (2, 2049), (4, 1031), (16, 700), (22, 90)])
@pytest.mark.parametrize("unthreaded", [2**18, 2**11])
def test_every_product_of_rows_is_the_generic_one(monkeypatch, p, n, unthreaded):
    monkeypatch.setattr(backend_module, "_UNTHREADED", unthreaded)
    fast = get_backend("numpy").fast
    x, y, z = _blocks(p, n, np.float64, 3)
    c, d = _blocks(p, p, np.float64, 2)
    cases = [
        ("products", columns.products, (x, y)),
        ("products", columns.products, (x, x)),
        ("products", columns.products, (x[:1], y)),
        ("transform", columns.transform, (x, c)),
        ("recur", columns.recur, (x, (y, z), (c, d))),
        ("recur", columns.recur, (x, (y,), (c,))),
    ]
    for name, generic, arguments in cases:
        first, others = arguments[0], arguments[1:]
        own = first.copy()
        found = fast[name](own, *(own if a is first else a for a in others))
        options = {"wide": np.float64} if name == "recur" else {}
        expected = generic(first.copy(), *others, **options)
        for one, other in zip(flat(found), flat(expected), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-11, atol=1e-10)


@pytest.mark.parametrize("kind", [np.float32, complex])
def test_products_of_other_rows_are_left_to_the_generic_forms(kind):
    fast = get_backend("numpy").fast
    x, y = _blocks(3, 200, kind, 2)
    c = np.eye(3, dtype=kind)
    assert fast["recur"](x, (y,), (c,)) is NotImplemented
    if kind is complex:
        assert fast["products"](x, y) is NotImplemented
        assert fast["transform"](x, c) is NotImplemented
    many = np.zeros((40, 50))
    assert fast["products"](many, many) is NotImplemented  # there BLAS may use all cores


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
