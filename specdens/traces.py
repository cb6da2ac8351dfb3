"""Front doors for single numbers: `trace`, `diagonal` and `logdet` of an operator or of f(A)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from specdens.arguments import (
    checked_callable,
    checked_choice,
    checked_count,
    checked_seed,
    shown,
)
from specdens.backends import Array
from specdens.estimate import Estimate, over_probes
from specdens.estimators import slq
from specdens.functions import NUM_STEPS, MatrixFunction, SpectralFunction, dense_matrix, evaluate
from specdens.krylov_aware import krylov_density
from specdens.methods.lanczos import check_finite
from specdens.methods.leave_one_out import (
    diagonal_hutchinson,
    hutch_plus_plus,
    hutchinson,
    xdiag,
    xnystrace,
    xtrace,
)
from specdens.operators import aslinearoperator
from specdens.probes import EXPECTED_SAMPLER, ProbeSampler, draw, rademacher, sphere
from specdens.quadrature import rounding
from specdens.runs import MEMORY_BUDGET, checked_steps
from specdens.spaces import LinearOperator, VectorSpace

#: Fewest columns of A or f(A) that a method can do with.
_FEWEST = {"hutchinson": 1, "hutch++": 3, "xtrace": 2, "xnystrace": 1, "xdiag": 2}
_TRACES = ("xtrace", "xnystrace", "hutch++", "hutchinson", "krylov")
_COLUMNS = 120  # of A by default, and a third as many of f(A)


def trace(
    A: LinearOperator | Array,  # noqa: N803
    f: SpectralFunction | None = None,
    *,
    method: str = "xtrace",
    num_products: int | None = None,
    num_steps: int | None = None,
    seed: int = 0,
    probes: ProbeSampler = sphere,
    memory_budget: int = MEMORY_BUDGET,
) -> Estimate:
    r"""Estimate the trace of a Hermitian operator A, or of f(A).

    Parameters
    ----------
    A : LinearOperator or array-like of shape (n, n)
        Real symmetric or complex Hermitian, of any sign; wrapped by `aslinearoperator`.
    f : callable, optional
        Real function of the eigenvalues, called with arrays of Ritz values (`apply_function`).
    method : str
        How the products are spent. All but the last see f(A) through `apply_function` only.

        - ``"xtrace"`` (default): every probe deflates the others. The best choice for operators of
          either sign when eigenvalues decay; when they do not, its standard error is about 1.5
          times that of ``"hutchinson"``, as half the products go into deflation.
        - ``"xnystrace"``: the same with one product instead of two for every probe. For positive
          semidefinite f(A) only.
        - ``"hutch++"``: a third of the columns deflates, a third corrects.
        - ``"hutchinson"``: no deflation; independent samples.
        - ``"krylov"``: deflates with all of a block Krylov space; see `krylov_density`, which
          returns the measure that this trace is taken of. Best of these for f(A);
          ``slq(A).trace(f)`` is as good or better, since its probes share a Krylov space too.
    num_products : int, optional
        Columns that are multiplied by A, at most; by default 120, or 40 times `num_steps` with f.
        From n on the trace is exact, from n products.
    num_steps : int, optional
        Lanczos steps for every column of f(A), by default 30, at most n; without f for
        ``"krylov"`` only.
    seed : int
        With the index of a probe it determines the probe.
    probes : ProbeSampler
        `sphere` (default), `rademacher`, or another whose unit vectors have mean square 1 / n in
        every basis. For `sphere` the norm of what deflation leaves of a probe is divided out.
    memory_budget : int
        Bytes for Lanczos vectors of f(A) x.

    Returns
    -------
    Estimate
        The trace and its standard error over the probes, 0 where the trace is exact and nan for
        a single probe. For ``"xtrace"`` it is the spread of samples that are exchangeable, not
        independent: 0.6 to 1.2 times the true one in our tests. For ``"xnystrace"``, where such a
        spread can be six times too small, it is a jackknife: 1 to 3 times the true one, and up to
        8 times where eigenvalues decay exponentially or nearly n products are spent. The error of
        too few Lanczos steps is not part of it.

    Raises
    ------
    ValueError
        If `method` is unknown, a count is too small, a product or a value of f is not finite, or
        ``"xnystrace"`` sees a negative Ritz value of f(A).
    TypeError
        If `A` is not an operator, f no function or complex, or a count is not an integer.

    References
    ----------
    Epperly, Tropp, Webber (2024), XTrace, SIAM J. Matrix Anal. Appl. 45(1), 1. arXiv:2301.07825
    Epperly, Tropp (2024), SIAM J. Sci. Comput. 46(1), A508 (the jackknife). arXiv:2207.06342
    Meyer, Musco, Musco, Woodruff (2021), Hutch++, SOSA, algorithm 1. arXiv:2010.09649
    Chen, Hallman (2023), SIAM J. Matrix Anal. Appl. 44(3), 1218, algorithm 3.1. arXiv:2205.01736
    Hutchinson (1990), Commun. Stat. Simul. Comput. 19, 433; Girard (1987).

    Examples
    --------
    >>> A = np.diag(0.5 ** np.arange(200))
    >>> estimate = trace(A, num_products=100)
    >>> bool(abs(estimate.value - 2) < 1e-10)
    True
    >>> float(trace(A[:3, :3], np.sqrt).value.round(6))  # exact: n products are enough
    2.207107
    """
    A = aslinearoperator(A)  # noqa: N806
    checked_choice("method", method, _TRACES)
    _check_common(f, seed, probes, memory_budget)
    if method == "krylov":
        if probes is not sphere:
            msg = "method='krylov' takes probes=sphere only; use method='xtrace' for others."
            raise ValueError(msg)
        options: dict[str, Any] = {"num_products": num_products, "num_steps": num_steps}
        measure = krylov_density(A, seed=seed, memory_budget=memory_budget, **options)
        return measure.trace(lambda x: _real(evaluate(f or np.asarray, x, A.space.precision)))
    products, steps = _budget(f, A.space.dimension, num_products, num_steps)
    if products >= A.space.dimension:
        return Estimate(np.sum(_exact_diagonal(A, f)), np.zeros(()))
    B, columns = _columns(A, f, method, products, steps, memory_budget)  # noqa: N806
    return _estimate(B, method, columns, seed, probes)


def diagonal(
    A: LinearOperator | Array,  # noqa: N803
    f: SpectralFunction | None = None,
    *,
    method: str = "xdiag",
    num_products: int | None = None,
    num_steps: int | None = None,
    seed: int = 0,
    probes: ProbeSampler = rademacher,
    memory_budget: int = MEMORY_BUDGET,
) -> Estimate:
    """Estimate the diagonal of a Hermitian operator A, or of f(A), with its standard errors.

    Parameters
    ----------
    A, f
        As in `trace`.
    method : str
        ``"xdiag"`` (default): every probe deflates the others. ``"hutchinson"``: independent
        samples v * A v, entry by entry.
    num_products, num_steps, seed
        As in `trace`.
    probes : ProbeSampler
        `rademacher` (default), with which ``"hutchinson"`` is exact for diagonal operators, or as
        in `trace`.
    memory_budget
        As in `trace`.

    Returns
    -------
    Estimate
        Value and standard error of shape ``(n,)``, on the host.

    Raises
    ------
    ValueError, TypeError
        As in `trace`.

    References
    ----------
    Epperly, Tropp, Webber (2024), SIAM J. Matrix Anal. Appl. 45(1), 1, section 2.4.
    arXiv:2301.07825
    Bekas, Kokiopoulou, Saad (2007), An estimator for the diagonal of a matrix, Appl. Numer. Math.
    57, 1214.

    Examples
    --------
    >>> estimate = diagonal(np.diag([3.0, -1.0, 0.0]), num_products=3)
    >>> estimate.value.round(12), estimate.stderr
    (array([ 3., -1.,  0.]), array([0., 0., 0.]))
    """
    A = aslinearoperator(A)  # noqa: N806
    checked_choice("method", method, ("xdiag", "hutchinson"))
    _check_common(f, seed, probes, memory_budget)
    space, xp = A.space, A.space.backend.xp
    products, steps = _budget(f, space.dimension, num_products, num_steps)
    if products >= space.dimension:
        return Estimate(_exact_diagonal(A, f), np.zeros(space.dimension))
    B, columns = _columns(A, f, method, products, steps, memory_budget)  # noqa: N806
    count = columns // 2 if method == "xdiag" else columns
    v = draw(probes, space, seed, range(count))
    samples = (xdiag if method == "xdiag" else diagonal_hutchinson)(B, v)
    value = space.to_numpy(xp.mean(samples, axis=0)).astype(np.float64)
    check_finite(value, "an entry of the diagonal")
    if count == 1:
        return Estimate(value, np.full(space.dimension, np.nan))
    spread = space.to_numpy(xp.std(samples, axis=0, correction=1)).astype(np.float64)
    return Estimate(value, spread / count**0.5)


def logdet(
    A: LinearOperator | Array,  # noqa: N803
    *,
    num_probes: int = 10,
    num_steps: int | None = None,
    seed: int = 0,
    probes: ProbeSampler = sphere,
    memory_budget: int = MEMORY_BUDGET,
) -> Estimate:
    """Estimate the logarithm of the determinant of a positive definite operator.

    By stochastic Lanczos quadrature, `slq`; its measure gives other functions of the same run.

    Parameters
    ----------
    A : LinearOperator or array-like of shape (n, n)
        Positive definite; ``shift(A, c)`` adds a ridge.
    num_probes : int
        Independent probes. If `num_probes` times `num_steps` is n or more, n products give the
        exact determinant instead.
    num_steps : int, optional
        Lanczos steps per probe, by default 80, or n if that is less. Small eigenvalues need many:
        compare with twice as many.
    seed, probes, memory_budget
        As in `slq`.

    Returns
    -------
    Estimate
        The standard error is that of the probes, not of the finite number of steps.

    Raises
    ------
    ValueError
        If a Ritz value is negative, or zero to rounding.

    References
    ----------
    Ubaru, Chen, Saad (2017), SIAM J. Matrix Anal. Appl. 38(4), 1075. doi:10.1137/16M1104974

    Examples
    --------
    >>> float(logdet(np.diag([1.0, 2.0, 3.0])).value.round(6))
    1.791759
    """
    A = aslinearoperator(A)  # noqa: N806
    space = A.space
    _check_common(None, seed, probes, memory_budget)
    num_steps = checked_steps(num_steps, space.dimension)
    if checked_count("num_probes", num_probes) * num_steps >= space.dimension:
        theta = np.linalg.eigvalsh(dense_matrix(A))
        _refuse_singular(theta, space)
        return Estimate(np.sum(np.log(theta)), np.zeros(()))
    measure = slq(
        A,
        num_probes=num_probes,
        num_steps=num_steps,
        seed=seed,
        probes=probes,
        memory_budget=memory_budget,
    )
    _refuse_singular(measure.nodes[measure.weights != 0], space)
    return measure.trace(np.log)


def _estimate(
    B: LinearOperator,  # noqa: N803
    method: str,
    columns: int,
    seed: int,
    sampler: ProbeSampler,
) -> Estimate:
    """Return the trace of B from `columns` products."""

    def probes(*indices: int) -> Array:
        return draw(sampler, B.space, seed, range(*indices))

    resphere = sampler is sphere
    if method == "hutchinson":
        return over_probes(hutchinson(B, probes(columns)))
    if method == "hutch++":
        sketch = columns // 3
        fresh = probes(sketch, columns - sketch)
        return over_probes(hutch_plus_plus(B, probes(sketch), fresh, resphere=resphere))
    if method == "xtrace":
        return over_probes(xtrace(B, probes(columns // 2), resphere=resphere))
    samples, without_one = xnystrace(B, probes(columns), resphere=resphere)
    # The jackknife: `columns` - 1 times the variance of the replicates.
    return Estimate(samples.mean(), without_one.std() * np.sqrt(columns - 1.0))


def _budget(
    f: Callable[..., Any] | None, dimension: int, num_products: int | None, num_steps: int | None
) -> tuple[int, int]:
    """Return the number of products and of Lanczos steps for every column."""
    if f is None:
        if num_steps is not None:
            msg = f"num_steps={shown(num_steps)} is for functions of A; pass f, or leave it out."
            raise ValueError(msg)
        steps, columns = 1, _COLUMNS
    else:
        steps = min(NUM_STEPS, dimension)
        steps = steps if num_steps is None else checked_steps(num_steps, dimension)
        columns = _COLUMNS // 3
    if num_products is None:
        return columns * steps, steps
    return checked_count("num_products", num_products), steps


def _columns(
    A: LinearOperator,  # noqa: N803
    f: SpectralFunction | None,
    method: str,
    products: int,
    steps: int,
    memory_budget: int,
) -> tuple[LinearOperator, int]:
    """Return f(A) as an operator, and how many columns may be multiplied by it."""
    columns, fewest = products // steps, _FEWEST[method]
    if columns < fewest:
        each = f": {fewest} columns of {steps} steps" if f is not None else ""
        least = fewest * steps
        msg = f"num_products={products} must be at least {least} for method={method!r}{each}."
        raise ValueError(msg)
    if f is None:
        return A, columns
    return MatrixFunction(lambda x: _real(np.asarray(f(x))), A, steps, memory_budget), columns


def _exact_diagonal(A: LinearOperator, f: SpectralFunction | None) -> np.ndarray:  # noqa: N803
    """Return the diagonal (n,) of A or f(A) from n products."""
    matrix = dense_matrix(A)
    if f is None:
        return np.diagonal(matrix).real
    theta, vectors = np.linalg.eigh(matrix)
    return np.abs(vectors) ** 2 @ _real(evaluate(f, theta, A.space.precision))


def _refuse_singular(theta: np.ndarray, space: VectorSpace) -> None:
    smallest, resolution = float(theta.min()), rounding(space.precision, theta)
    if smallest <= resolution:
        msg = (
            f"operator is not positive definite: it has the Ritz value {smallest:.6g}, 0 being "
            f"anything up to {resolution:.1g}. logdet needs all above 0; add a ridge with "
            "shift(A, c), or use slq(A).trace(f) with an f that is finite there."
        )
        raise ValueError(msg)


def _real(values: np.ndarray) -> np.ndarray:
    if np.iscomplexobj(values):
        msg = f"f returns {values.dtype}; estimate its real and its imaginary part separately."
        raise TypeError(msg)
    return values


def _check_common(
    f: SpectralFunction | None, seed: int, probes: ProbeSampler, memory_budget: int
) -> None:
    if f is not None:
        checked_callable("f", f, "a function of an array of eigenvalues")
    checked_seed(seed)
    checked_callable("probes", probes, EXPECTED_SAMPLER)
    checked_count("memory_budget", memory_budget)
