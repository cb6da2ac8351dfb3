"""Krylov-aware density: its deflated part is exact, the rest unbiased, few dimensions are exact."""

import numpy as np

from specdens import VectorSpace, sphere
from specdens.krylov_aware import krylov_density
from tests.cases import SPECTRA, dense, dense_case
from tests.cases import diagonal as diagonal_operator


def orthonormal_basis(y):
    """Return a basis of the range of Y, from its singular vectors."""
    u, sigma, _ = np.linalg.svd(y, full_matrices=False)
    return u[:, sigma > 1e-12 * sigma.max(initial=1e-300)]


def rms(x):
    return float(np.sqrt(np.mean(np.square(x))))


def test_krylov_density_integrates_its_deflated_part_exactly():
    matrix = dense(SPECTRA["indefinite"])
    measure = krylov_density(matrix, num_products=36, num_steps=3)  # m = 3, b = 3, 6 fresh probes
    space = VectorSpace.like(matrix)
    v = np.stack([sphere(space, 0, i) for i in range(9)], axis=1)
    powers = [np.linalg.matrix_power(matrix, j) @ v[:, :3] for j in range(3)]
    q = orthonormal_basis(np.concatenate(powers, axis=1))
    fresh = v[:, 3:] - q @ (q.T @ v[:, 3:])
    fresh /= np.linalg.norm(fresh, axis=0)
    assert measure.nodes.shape[0] == 6
    np.testing.assert_allclose(measure.weights.sum(axis=1), 1.0)
    for degree in range(6):
        power = np.linalg.matrix_power(matrix, degree)
        rest = np.sum(fresh * (power @ fresh), axis=0)
        exact = np.trace(q.T @ power @ q) + (40 - 9) * rest
        found = 40 * np.sum(measure.weights * measure.nodes**degree, axis=1)
        np.testing.assert_allclose(found, exact, rtol=1e-9)


def test_krylov_density_is_a_density_with_honest_errors():
    eigenvalues = np.sort(np.r_[np.geomspace(5, 50, 15), np.linspace(0, 1, 485)])
    x = np.array([0.25, 0.5, 2.0, 20.0])
    exact = np.searchsorted(eigenvalues, x) / 500
    deviations, error, stderr = [], [], []
    for seed in range(20):
        measure = krylov_density(diagonal_operator(eigenvalues), num_products=400, seed=seed)
        cdf = measure.cdf(x)
        deviations.append(cdf.value - exact)
        error.append(measure.trace().value - eigenvalues.sum())
        stderr.append(measure.trace().stderr)
        assert (np.diff(cdf.value) > 0).all()
    assert np.abs(np.mean(deviations, axis=0)).max() < 0.02
    assert abs(np.mean(error)) < 4 * np.std(error, ddof=1) / len(error) ** 0.5
    assert 0.6 < rms(stderr) / rms(error) < 1.6


def test_krylov_density_of_few_dimensions_is_the_spectrum(spectrum):
    measure = krylov_density(dense_case(spectrum))
    np.testing.assert_allclose(measure.nodes[0], SPECTRA[spectrum], atol=1e-12)
    assert measure.trace(np.exp).stderr == 0


def test_low_rank_needs_fewer_steps_than_asked_for():
    eigenvalues = np.r_[np.zeros(290), np.arange(1.0, 11.0)]
    measure = krylov_density(dense(eigenvalues), num_products=280, num_steps=20)
    np.testing.assert_allclose(measure.trace().value, 55.0, rtol=1e-10)
