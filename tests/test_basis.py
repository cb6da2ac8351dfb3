"""The basis of a Krylov space: a value, whose blocks share arrays and never change."""

import numpy as np
import pytest

from specdens import VectorSpace
from specdens.methods import basis as module
from specdens.methods.basis import Basis
from specdens.methods.columns import kernels
from tests.cases import home, import_library, move

P, N = 3, 40


def _blocks(count, dtype=float):
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((count * P, N)).astype(dtype)
    if np.iscomplexobj(rows):
        rows = rows + 1j * rng.standard_normal(rows.shape)
    rows = np.linalg.qr(rows.T)[0].T.astype(dtype)
    return [np.ascontiguousarray(rows[j * P : (j + 1) * P]) for j in range(count)]


def _filled(blocks, like=None):
    basis = Basis(len(blocks))
    for block in blocks:
        basis = basis.append(block if like is None else move(block, like))
    return basis


def _same(basis, blocks):
    return len(basis) == len(blocks) and all(
        np.array_equal(home(mine), block) for mine, block in zip(basis, blocks, strict=True)
    )


@pytest.fixture(autouse=True)
def small_arrays(monkeypatch):
    """Two blocks to an array."""
    monkeypatch.setattr(module, "_ROWS", 2 * P)


def test_blocks_come_back_as_they_were(library):
    blocks = _blocks(7)
    basis = _filled(blocks, library)
    assert _same(basis, blocks)
    for index in (0, 4, -1, -2):
        np.testing.assert_array_equal(home(basis[index]), blocks[index])
    for index in (slice(2, 5), slice(-2, None), slice(0, 0)):
        assert [home(q).tolist() for q in basis[index]] == [q.tolist() for q in blocks[index]]
    with pytest.raises(IndexError):
        basis[7]
    np.testing.assert_array_equal(
        np.concatenate([home(rows) for rows in basis.rows()]), np.concatenate(blocks)
    )


def test_values_that_part_do_not_change_each_other(library):
    blocks = _blocks(9)
    whole = [Basis(6)]
    for block in blocks[:6]:
        whole.append(whole[-1].append(move(block, library)))
    for j, earlier in enumerate(whole):
        other = earlier
        for block in blocks[6:]:
            other = other.append(move(block, library))
        assert _same(other, [*blocks[:j], *blocks[6:]])
        both = [[s.capacity for s in basis.slabs] for basis in (earlier, whole[-1])]
        full = len(both[0]) if library != "jax" else sum(earlier.counts) // 2
        assert both[0][:full] == both[1][:full]
    assert all(_same(basis, blocks[:j]) for j, basis in enumerate(whole))


@pytest.mark.parametrize("number", range(8))
def test_the_first_blocks_are_a_basis_that_can_go_on(number, library):
    blocks = _blocks(8)
    whole = _filled(blocks[:7], library)
    part = whole.first(number)
    assert _same(part, blocks[:number])
    assert _same(part.append(move(blocks[7], library)), [*blocks[:number], blocks[7]])
    assert _same(whole, blocks[:7])


@pytest.mark.parametrize("dtype", [float, complex])
@pytest.mark.parametrize("wanted", [[0, 0, 0, 0], [1, 0, 0, 0], [1, 0, 0, 1], [1, 1, 1, 1]])
def test_cleaning_is_a_projection(wanted, dtype):
    blocks, rng = _blocks(6, dtype), np.random.default_rng(1)
    last = blocks[-1] + 1e-6 * sum(blocks[:-2])  # has lost some of its orthogonality
    basis = _filled([*blocks[:-1], last])
    w = rng.standard_normal((P, N)).astype(dtype)
    space = VectorSpace.like(w[0])
    do, wanted = kernels(space.backend, space.wide_dtype), np.array(wanted, bool)

    cleaned, after = basis.clean(w.copy(), do, wanted)

    for q in (*after.newest, *(blocks[j] for j in np.flatnonzero(wanted))):
        np.testing.assert_allclose(q.conj() @ cleaned.T, 0, atol=1e-10)
    for q, gone in zip(blocks[:4], wanted, strict=True):
        left = (1 - gone) * 1e-6 * np.eye(P)
        np.testing.assert_allclose(q.conj() @ after[-1].T, left, atol=1e-14)
    assert _same(basis, [*blocks[:-1], last])  # the value that was cleaned is as it was


def test_arrays_are_as_large_as_pays(monkeypatch):
    blocks = _blocks(7)
    assert [slab.capacity for slab in _filled(blocks).slabs] == [2, 2, 1]
    monkeypatch.setattr(module, "_BYTES", P * N * 8)  # no more than one block
    assert [slab.capacity for slab in _filled(blocks).slabs] == [1] * 5


def test_arrays_that_cannot_be_written_are_joined_and_come_whole():
    library = import_library("jax")
    blocks = _blocks(7)
    basis = _filled(blocks, library)
    assert [slab.capacity for slab in basis.slabs] == [2, 2, 1]
    wanted = np.array([1, 0, 1, 0, 0], dtype=bool)  # one of each two
    assert [rows.shape for rows in basis.rows(wanted)] == [(2 * P, N)] * 2
    assert not list(basis.rows(np.zeros(5, dtype=bool)))
    np.testing.assert_array_equal(home(next(basis.rows(wanted))), np.concatenate(blocks[:2]))
