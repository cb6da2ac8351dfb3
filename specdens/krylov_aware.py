"""Front door: `krylov_density`, quadrature on a block Krylov space and random probes beside it."""

from __future__ import annotations

import numpy as np

from specdens.arguments import checked_count, checked_seed
from specdens.backends import Array
from specdens.functions import NUM_STEPS, dense_matrix, krylov_space
from specdens.measure import SpectralMeasure
from specdens.methods.basis import Basis
from specdens.methods.block import BlockLanczos
from specdens.methods.columns import kernels
from specdens.operators import aslinearoperator
from specdens.probes import draw, sphere
from specdens.quadrature import QuadratureRule
from specdens.runs import MEMORY_BUDGET, checked_steps, fitting
from specdens.spaces import LinearOperator


def krylov_density(
    A: LinearOperator | Array,  # noqa: N803
    *,
    num_products: int | None = None,
    num_steps: int | None = None,
    seed: int = 0,
    memory_budget: int = MEMORY_BUDGET,
) -> SpectralMeasure:
    r"""Estimate the spectral density by deflation with a block Krylov space.

    Block Lanczos from b probes takes 2m steps. With Q the basis after m of them and T the
    projection of A on all, :math:`Q^* f(A) Q` is known from T for every f (for polynomials up to
    degree 2m + 1 exactly), without a product more: its trace is a quadrature rule with
    the Ritz values as nodes. On the complement of Q, fresh probes see the rest of the trace, each
    with m Lanczos steps.

    Parameters
    ----------
    A : LinearOperator or array-like of shape (n, n)
    num_products : int, optional
        Columns that are multiplied by A, at most, half of them for deflation; by default 40 times
        `num_steps`, and 3 times at least. From n on, the eigenvalues themselves are returned.
    num_steps : int, optional
        m, by default 30, at most n.
    seed : int
    memory_budget : int
        Bytes for the Lanczos vectors of the second part. Deflation keeps half as many vectors as
        there are products whatever this is.

    Returns
    -------
    SpectralMeasure
        A row for every fresh probe: the nodes of the deflated part, the same in all rows, and of
        what the probe sees. Its estimates have the standard error of the fresh probes.

    Raises
    ------
    ValueError
        If `num_products` is less than 3 times `num_steps`, or a product is not finite.

    References
    ----------
    Chen, Hallman (2023), Krylov-aware stochastic trace estimation, SIAM J. Matrix Anal. Appl.
    44(3), 1218, algorithm 3.1. arXiv:2205.01736

    Examples
    --------
    >>> A = np.diag(0.5 ** np.arange(200))
    >>> measure = krylov_density(A, num_products=100, num_steps=5)
    >>> bool(abs(measure.trace(np.exp).value - np.sum(np.exp(0.5 ** np.arange(200)))) < 1e-3)
    True
    """
    A = aslinearoperator(A)  # noqa: N806
    n, seed = A.space.dimension, checked_seed(seed)
    checked_count("memory_budget", memory_budget)
    steps = checked_steps(min(NUM_STEPS, n) if num_steps is None else num_steps, n)
    products = 40 * steps if num_products is None else checked_count("num_products", num_products)
    provenance = {"method": "krylov", "probes": "sphere", "seeds": [seed], "num_steps": steps}
    if products >= n:
        # Two equal rows: nothing is estimated, so that there is no spread.
        nodes = np.tile(np.linalg.eigvalsh(dense_matrix(A)), (2, 1))
        return SpectralMeasure(nodes, np.full(nodes.shape, 1 / n), n, provenance=provenance)
    if products < 3 * steps:
        msg = (
            f"num_products={products} must be at least 3 * num_steps = {3 * steps} for "
            "method='krylov'; pass more products or fewer steps."
        )
        raise ValueError(msg)
    width = max(1, products // (4 * steps))
    fresh = range(width, width + (products - 2 * steps * width) // steps)
    nodes, weights, basis = _deflated(A, draw(sphere, A.space, seed, range(width)), steps)
    rest = _complement_rule(A, basis, seed, fresh, steps, memory_budget)
    nodes, weights = (np.tile(row, (len(fresh), 1)) for row in (nodes, weights))
    left = n - weights.sum(axis=1, keepdims=True)
    return SpectralMeasure(
        np.concatenate([nodes, rest.nodes], axis=1),
        np.concatenate([weights, left * rest.weights], axis=1) / n,
        n,
        provenance=provenance,
    )


def _deflated(
    A: LinearOperator,  # noqa: N803
    probes: Array,
    num_steps: int,
) -> tuple[np.ndarray, np.ndarray, Basis]:
    """Return the rule for tr Q^* f(A) Q, and Q as blocks of rows, for 2m steps from probes."""
    method = BlockLanczos(2 * num_steps)
    state = krylov_space(method, A, probes)
    theta, vectors, active = method.ritz(state)
    dimension = int(active[:num_steps].sum())
    weights = np.sum(np.abs(vectors[:dimension]) ** 2, axis=0)
    return theta, weights, state.basis.first(min(num_steps, len(state.diagonal)))


def _complement_rule(
    A: LinearOperator,  # noqa: N803
    basis: Basis,
    seed: int,
    indices: range,
    num_steps: int,
    memory_budget: int,
) -> QuadratureRule:
    """Return the rules of what probes have in the complement of a basis."""
    space, method = A.space, BlockLanczos(num_steps)
    xp, do = space.backend.xp, kernels(space.backend, space.wide_dtype)
    size = fitting(method.memory(space), len(indices), memory_budget)
    rules = []
    for start in range(0, len(indices), size):
        v = xp.permute_dims(draw(sphere, space, seed, indices[start : start + size]), (1, 0))
        for rows in (*basis.rows(), *basis.rows()):  # twice is enough
            v, _ = do.remove(v, rows)
        norms = np.sqrt(np.diagonal(space.to_numpy(do.inner(v, v))).real)
        columns = xp.permute_dims(v / space.from_numpy(norms[:, None]), (1, 0))
        rules.append(method.finish(A, krylov_space(method, A, columns)).shared)
    return QuadratureRule.concatenate(rules)
