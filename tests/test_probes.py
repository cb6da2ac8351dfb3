"""Probes: pure functions of (seed, index), and uniform on the sphere."""

import numpy as np
import pytest
import scipy.stats

from specdens import VectorSpace, from_vectors, rademacher, slq, sphere
from specdens.probes import draw, is_isotropic
from tests.cases import dense, home, move

_SPACE = VectorSpace.like(np.zeros(200))
_COMPLEX = VectorSpace.like(np.zeros(200, complex))


@pytest.mark.parametrize("sampler", [sphere, rademacher])
@pytest.mark.parametrize("space", [_SPACE, _COMPLEX], ids=["real", "complex"])
def test_a_probe_is_a_pure_function_of_seed_and_index(sampler, space):
    first = sampler(space, 5, 3)
    np.random.seed(0)  # noqa: NPY002 (the global state must not matter)
    sampler(space, 9, 0)
    np.testing.assert_array_equal(sampler(space, 5, 3), first)


def test_a_probe_comes_from_the_documented_generator():
    bits = np.random.Philox(key=np.array([5, 3], dtype=np.uint64))
    expected = np.random.Generator(bits).standard_normal(200)
    np.testing.assert_allclose(sphere(_SPACE, 5, 3), expected / np.linalg.norm(expected))


@pytest.mark.parametrize("sampler", [sphere, rademacher])
def test_neighbouring_seeds_and_indices_do_not_overlap(sampler):
    probes = {
        (seed, index): sampler(_SPACE, seed, index) for seed in range(4) for index in range(4)
    }
    stacked = np.stack([v / np.linalg.norm(v) for v in probes.values()])
    overlaps = np.abs(stacked @ stacked.T - np.eye(16))
    assert overlaps.max() < 0.3  # 16 random directions in 200 dimensions


def test_the_largest_seed_is_as_good_as_any():
    assert not np.array_equal(sphere(_SPACE, 2**64 - 1, 0), sphere(_SPACE, 2**63, 0))


def test_probes_are_the_same_on_every_library(library):
    space = VectorSpace.like(move(np.zeros(200), library))
    here = home(draw(sphere, space, 1, range(3)))
    np.testing.assert_allclose(here, draw(sphere, _SPACE, 1, range(3)), rtol=0, atol=1e-16)


def test_single_precision_sees_the_same_probes_rounded(library):
    space = VectorSpace.like(move(np.zeros(200, np.float32), library))
    here = home(draw(sphere, space, 1, range(2)))
    assert here.dtype == np.float32
    np.testing.assert_array_equal(here, draw(sphere, _SPACE, 1, range(2)).astype(np.float32))


@pytest.mark.parametrize("sampler", [sphere, rademacher])
@pytest.mark.parametrize("dtype", [float, complex])
def test_large_probes_drawn_on_several_cores_are_the_same(sampler, dtype, monkeypatch):
    space = VectorSpace.like(np.zeros(1000, dtype))
    vectors = np.stack([sampler(space, 5, i) for i in range(2, 9)], axis=1)
    expected = draw(sampler, space, 5, range(2, 9))
    np.testing.assert_allclose(expected, vectors / np.linalg.norm(vectors, axis=0), rtol=1e-14)
    monkeypatch.setattr("specdens.probes._LARGE", 1)
    monkeypatch.setattr("specdens.probes._ROWS", 300)
    for together in (1, 3, 16):
        monkeypatch.setattr("specdens.probes._TOGETHER", together)
        assert np.array_equal(draw(sampler, space, 5, range(2, 9)), expected)


def test_probes_do_not_depend_on_the_block_they_are_drawn_in():
    whole = draw(sphere, _SPACE, 4, range(5))
    parts = [draw(sphere, _SPACE, 4, block) for block in (range(2), range(2, 3), range(3, 5))]
    np.testing.assert_array_equal(whole, np.concatenate(parts, axis=1))


@pytest.mark.parametrize("sampler", [sphere, rademacher])
@pytest.mark.parametrize("space", [_SPACE, _COMPLEX], ids=["real", "complex"])
def test_columns_have_unit_norm(sampler, space):
    block = draw(sampler, space, 0, range(4))
    assert block.dtype == space.dtype
    np.testing.assert_allclose(np.linalg.norm(block, axis=0), 1.0, rtol=1e-15)


def test_signs_are_signs():
    v = rademacher(_SPACE, 0, 0)
    assert set(v) == {-1.0, 1.0}
    assert abs(v.sum()) < 4 * 200**0.5


@pytest.mark.parametrize(("freedoms", "dtype"), [(1, float), (2, complex)])
def test_squared_components_of_sphere_probes_follow_the_beta_law(freedoms, dtype):
    n = 6
    space = VectorSpace.like(np.zeros(n, dtype))
    squares = np.stack([np.abs(sphere(space, 0, i)) ** 2 for i in range(3000)])
    law = scipy.stats.beta(freedoms / 2, freedoms * (n - 1) / 2)
    for j in (0, n - 1):
        assert scipy.stats.kstest(squares[:, j], law.cdf).pvalue > 1e-3
    # Two components together: Beta as well, so they are correlated as on a sphere.
    pair = scipy.stats.beta(freedoms, freedoms * (n - 2) / 2)
    assert scipy.stats.kstest(squares[:, :2].sum(axis=1), pair.cdf).pvalue > 1e-3


def test_sphere_probes_prefer_no_direction():
    n = 5
    space = VectorSpace.like(np.zeros(n))
    probes = np.stack([sphere(space, 3, i) for i in range(4000)])
    second = probes.T @ probes / 4000
    # Entries of v v^T have standard deviation below sqrt(2) / n.
    assert np.abs(second - np.eye(n) / n).max() < 4 * 2**0.5 / n / 4000**0.5
    assert np.abs(probes.mean(axis=0)).max() < 4 / (n * 4000) ** 0.5


def test_given_vectors_are_the_probes(library):
    vectors = np.random.default_rng(0).standard_normal((200, 3))
    space = VectorSpace.like(move(np.zeros(200), library))
    expected = vectors / np.linalg.norm(vectors, axis=0)
    for given in (vectors, move(vectors, library)):
        block = draw(from_vectors(given), space, 99, range(1, 3))
        assert type(block) is type(move(vectors, library))
        np.testing.assert_allclose(home(block), expected[:, 1:], rtol=1e-14)
    one = draw(from_vectors(move(vectors[:, 0].copy(), library)), space, 0, range(1))
    np.testing.assert_allclose(home(one), expected[:, :1], rtol=1e-14)


def test_vectors_of_any_norm_are_normalized():
    for factor in (1e-150, 1e150):
        block = draw(from_vectors(factor * np.ones(4)), VectorSpace.like(np.zeros(4)), 0, range(1))
        np.testing.assert_allclose(block, 0.5)


@pytest.mark.parametrize(
    ("vectors", "text"),
    [
        (np.ones((2, 2, 2)), r"vectors has shape \(2, 2, 2\); expected \(n,\) or \(n, p\)"),
        (np.float64(3.0), r"vectors has shape \(\)"),
    ],
)
def test_from_vectors_checks_its_argument(vectors, text):
    with pytest.raises(ValueError, match=text):
        from_vectors(vectors)
    with pytest.raises(TypeError, match="vectors has type list"):
        from_vectors([1.0, 2.0])


@pytest.mark.parametrize(
    ("vectors", "num_probes", "text"),
    [
        (np.ones((5, 2)), 1, "vectors has length 5; expected 4"),
        (np.eye(4, 2), 3, "vectors has 2 columns; pass num_probes <= 2"),
        (np.zeros((4, 1)), 1, "probe 0 has norm 0.0; a probe must be finite and not zero"),
        (np.full((4, 1), np.nan), 1, "probe 0 has norm nan"),
        (np.full((4, 1), np.inf), 1, "probe 0 has norm inf"),
    ],
)
def test_probes_are_checked_when_they_are_drawn(vectors, num_probes, text):
    with pytest.raises(ValueError, match=text):
        slq(np.eye(4), num_probes=num_probes, probes=from_vectors(vectors))


def test_zero_probes_on_the_device_are_refused(library):
    zero = move(np.zeros((4, 1)), library)
    with pytest.raises(ValueError, match=r"probe 0 has norm 0\.0"):
        slq(move(np.eye(4), library), num_probes=1, probes=from_vectors(zero))


def test_complex_probes_of_real_operators_are_refused(library):
    with pytest.raises(TypeError, match="probe 0 is complex, the operator real"):
        slq(
            move(np.eye(4), library),
            num_probes=1,
            probes=from_vectors(move(1j * np.ones((4, 1)), library)),
        )


def test_samplers_of_the_wrong_shape_are_refused():
    with pytest.raises(ValueError, match=r"probe 0 has shape \(3,\); expected \(4,\)"):
        slq(np.eye(4), probes=lambda space, seed, index: np.ones(3))


def test_own_samplers_work():
    matrix = dense(np.linspace(1, 2, 10))

    def unit_vector(space, seed, index):
        return np.eye(space.dimension)[index]

    measure = slq(matrix, num_probes=10, num_steps=10, probes=unit_vector).plain()
    means = (measure.nodes * measure.weights).sum(axis=1)
    np.testing.assert_allclose(means, np.diag(matrix), rtol=1e-12)


def test_only_our_own_random_probes_count_as_isotropic():
    assert is_isotropic(sphere)
    assert is_isotropic(rademacher)
    assert not is_isotropic(from_vectors(np.ones(3)))
