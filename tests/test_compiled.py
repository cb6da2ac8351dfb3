"""Compiled sweeps give what the array API gives, whatever the number of threads."""

import gc

import numpy as np
import pytest
import scipy.sparse

from specdens import aslinearoperator, density, kpm, slq, spectral_interval
from specdens.backends import get_backend
from specdens.backends import numpy as backend_module
from specdens.methods import columns

numba = pytest.importorskip("numba", reason="numba is optional: pip install 'specdens[fast]'")

_N, _P = 700, 5


@pytest.fixture(autouse=True)
def _always(monkeypatch):
    monkeypatch.setattr(backend_module, "_LARGE", 1)
    monkeypatch.setattr(backend_module, "_LARGE_SPARSE", 1)


def _blocks(dtype, count):
    rng = np.random.default_rng(0)
    return [rng.standard_normal((_N, _P)).astype(dtype) for _ in range(count)]


def _parts(result):
    return result if isinstance(result, tuple) else (result,)


def _laplacian(dtype=np.float64):
    return scipy.sparse.diags_array(
        [-1.0, 2.0, -1.0], offsets=[-1, 0, 1], shape=(_N, _N), dtype=dtype
    ).tocsr()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_every_sweep_gives_what_the_generic_one_gives(dtype):
    fast = get_backend("numpy").fast
    size = 1e-4 if dtype == np.float32 else 1e-12
    tolerance = {"rtol": size, "atol": size}
    x, y, z = _blocks(dtype, 3)
    factors = np.linspace(0.5, 2, _P).astype(dtype)
    signs = np.random.default_rng(1).choice(np.array([-1, 1], np.int8), _N)
    cases = [
        ("three_term", columns.three_term, (x, y, z, factors), {"wide": np.float64}),
        ("chebyshev", columns.chebyshev, (x, y, z, factors[:3]), {"wide": np.float64}),
        ("subtract", columns.subtract, (x, y, factors), {"wide": np.float64}),
        ("scale", columns.scale, (x, factors), {}),
    ]
    for name, generic, arguments, options in cases:
        found = fast[name](*(a.copy() for a in arguments))
        expected = generic(*(a.copy() for a in arguments), **options)
        pairs = zip(_parts(found), _parts(expected), strict=True)
        for one, other in pairs:
            np.testing.assert_allclose(one, other, **tolerance)
    for size in (5, 64):
        found, expected = fast["sketch"](x, signs, size), columns.sketch(x, signs, size=size)
        np.testing.assert_allclose(found, expected, **tolerance)
    into = fast["three_term"](x.copy(), y, z, factors, overwrite=True)
    np.testing.assert_allclose(into[0], fast["three_term"](x, y, z, factors)[0], **tolerance)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_sparse_products(dtype):
    fast, matrix = get_backend("numpy").fast, _laplacian(dtype)
    x, before = _blocks(dtype, 2)
    beta = np.linspace(0.5, 2, _P).astype(dtype)
    np.testing.assert_allclose(fast["csr_product"](matrix, x), matrix @ x, rtol=1e-5, atol=1e-5)
    for p in (_P, 4, 1):  # vectors end to end, an odd number of them and an even one
        found = fast["csr_product"](matrix, np.asfortranarray(x[:, :p]))
        np.testing.assert_array_equal(found, matrix @ x[:, :p])  # the same sums in the same order
        assert found.flags.f_contiguous
    w, inner = fast["csr_three_term"](matrix, x, before, beta)
    expected = matrix @ x - beta * before
    np.testing.assert_allclose(w, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(inner, (x * expected).sum(axis=0), rtol=1e-4, atol=1e-3)


def test_other_arguments_are_left_to_the_generic_forms():
    fast, matrix = get_backend("numpy").fast, _laplacian()
    x, y, z = _blocks(np.float64, 3)
    beta = np.ones(_P)
    assert fast["three_term"](x.T.copy().T, y, z, beta) is NotImplemented  # columns end to end
    assert fast["subtract"](x.astype(complex), y.astype(complex), beta) is NotImplemented
    assert fast["scale"](x[::2], beta) is NotImplemented
    assert fast["csr_product"](matrix, x.astype(np.float32)) is NotImplemented
    assert fast["csr_product"](matrix, x[:, 0]) is NotImplemented


def test_without_numba_products_are_those_of_the_matrix(monkeypatch):
    monkeypatch.setattr(backend_module, "_compiled", lambda: None)
    x, y = _blocks(np.float64, 2)
    fast = get_backend("numpy").fast
    assert fast["csr_product"](_laplacian(), x) is NotImplemented
    rows = fast["csr_product"](_laplacian(), np.asfortranarray(x))
    assert rows.flags.f_contiguous
    np.testing.assert_array_equal(rows, _laplacian() @ x)
    assert fast["csr_three_term"](_laplacian(), x, y, np.ones(_P)) is NotImplemented
    assert slq(_laplacian(), num_probes=2, num_steps=5, reorthogonalize=False).num_probes == 2


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_estimates_do_not_depend_on_the_kernels(monkeypatch, dtype):
    matrix = _laplacian(dtype)

    def moments():
        gauss = slq(matrix, num_probes=_P, num_steps=12, reorthogonalize=False).plain()
        chebyshev = kpm(matrix, num_probes=_P, num_moments=24, interval=(-0.1, 4.1))
        powers = np.stack([(gauss.weights * gauss.nodes**k).sum(axis=1) for k in range(20)])
        return powers / 4.0 ** np.arange(20)[:, None], chebyshev.rule.moments

    compiled = moments()
    monkeypatch.setattr(backend_module, "_LARGE", 2**60)
    for one, other in zip(compiled, moments(), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5 if dtype == np.float32 else 1e-12)


def test_sums_do_not_depend_on_the_number_of_threads():
    results = []
    for threads in (1, numba.config.NUMBA_NUM_THREADS):
        numba.set_num_threads(threads)
        rule = slq(_laplacian(), num_probes=_P, num_steps=20, reorthogonalize=False).rule
        results.append((rule.gauss.nodes, rule.gauss.weights, rule.sketches))
    for one, other in zip(*results, strict=True):
        np.testing.assert_array_equal(one, other)


def test_memory_is_given_out_again_only_when_nobody_holds_it():
    recycler = backend_module._Recycler()
    like = np.ones((100, 3), dtype=np.float32)
    with recycler.session():
        first = recycler.empty_like(like)
        second = recycler.empty_like(like)
        assert not np.shares_memory(first, second)
        assert (second.shape, second.dtype) == ((100, 3), np.float32)
        view, address = first[:2], first.ctypes.data
        del first
        gc.collect()
        assert not np.shares_memory(recycler.empty_like(like), view)  # a view holds it as well
        del view
        again = [recycler.empty_like(like) for _ in range(3)]
        assert address in [x.ctypes.data for x in again]
        with recycler.session():
            pass
        assert recycler._owners  # an inner session leaves the outer one's memory alone
    assert recycler._owners == []


def test_states_that_are_kept_are_not_overwritten():
    """A callback that keeps all states sees the same vectors at the end as when it was called."""
    kept = []

    def keep(progress):
        if progress.state.current is not None:
            kept.append((progress.state.current, progress.state.current.q.copy()))

    slq(_laplacian(), num_probes=_P, num_steps=10, reorthogonalize=False, callback=keep)
    assert len(kept) == 10
    for state, q in kept:
        np.testing.assert_array_equal(state.q, q)


@pytest.mark.parametrize(
    "run",
    [
        lambda a: slq(a, num_probes=_P, num_steps=5, reorthogonalize=False),
        lambda a: kpm(a, num_probes=_P, num_moments=8),
        lambda a: spectral_interval(a, num_probes=_P),
        lambda a: density(a, tolerance=0.2, max_products=20),
        lambda a: aslinearoperator(a) @ np.ones((_N, _P)),
    ],
    ids=["slq", "kpm", "spectral_interval", "density", "product"],
)
def test_no_memory_is_kept_afterwards(run):
    run(_laplacian())
    assert backend_module._recycler._owners == []
