"""Eigenvalues of simulated random matrices, for the tests of laws and gaps."""

import numpy as np


def gaussian_ensemble(n, seed):
    """Return eigenvalues of a symmetric matrix, descending, with bulk edge 2."""
    x = np.random.default_rng(seed).standard_normal((n, n))
    return np.linalg.eigvalsh((x + x.T) / np.sqrt(2 * n))[::-1]


def wishart(n, samples, seed, variance=1.0):
    """Return eigenvalues of a sample covariance matrix of noise, descending."""
    x = np.sqrt(variance) * np.random.default_rng(seed).standard_normal((n, samples))
    return np.linalg.eigvalsh(x @ x.T / samples)[::-1]


def spiked(n, spikes, seed):
    """Return eigenvalues, descending, of a symmetric matrix with spikes in random directions."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, n))
    directions = np.linalg.qr(rng.standard_normal((n, len(spikes))))[0]
    noise = (x + x.T) / np.sqrt(2 * n)
    return np.linalg.eigvalsh(noise + (directions * spikes) @ directions.T)[::-1]
