"""Front doors for eigenvalues: `eigsh` for a few pairs, `spectral_interval` around all of them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import tqdm
from scipy.linalg import eigvalsh_tridiagonal

from specdens.arguments import checked_choice, checked_count, checked_nonnegative, checked_seed
from specdens.backends import Array
from specdens.driver import progress_bar
from specdens.html import eigenpairs_html
from specdens.methods.eigensolver import MISS, Eigensolver, Goal
from specdens.methods.lanczos import Lanczos, check_finite
from specdens.methods.thick_restart import component_density, least_tol
from specdens.operators import aslinearoperator
from specdens.probes import ProbeSampler, draw, sphere
from specdens.quadrature import rounding
from specdens.runs import MEMORY_BUDGET, checked_steps
from specdens.spaces import LinearOperator, VectorSpace, checked_vectors, multiply

_WHICH = ("LA", "SA", "LM", "BE")


@dataclass(frozen=True, eq=False)
class EigenResult:
    """Some eigenpairs of a Hermitian operator, as `eigsh` returns them.

    Attributes
    ----------
    eigenvalues : ndarray of shape (k,)
        Ascending, on the host in float64.
    eigenvectors : array of shape (n, k)
        Orthonormal columns, on the operator's device in its working dtype.
    residuals : ndarray of shape (k,)
        ``|A u - lambda u|``, absolute: within that distance of each number lies an eigenvalue.
    num_products : int
        Columns that `A` was multiplied with.
    converged : ndarray of shape (k,)
        Whether each residual is small enough.
    """

    eigenvalues: np.ndarray
    eigenvectors: Array
    residuals: np.ndarray
    num_products: int
    converged: np.ndarray

    def __repr__(self) -> str:
        done = int(self.converged.sum())
        values = np.array2string(self.eigenvalues, precision=6, threshold=8, edgeitems=3)
        return (
            f"EigenResult(eigenvalues={values}, {done} of {len(self.eigenvalues)} converged, "
            f"residuals <= {self.residuals.max(initial=0.0):.2g}, "
            f"num_products={self.num_products})"
        )

    def _repr_html_(self) -> str:
        return eigenpairs_html(self)


def eigsh(
    A: LinearOperator | Array,  # noqa: N803
    num_eigenvalues: int = 6,
    *,
    which: str = "LA",
    tol: float = 1e-6,
    max_products: int | None = None,
    start: Array | None = None,
    seed: int = 0,
    block_size: int | None = None,
    memory_budget: int = MEMORY_BUDGET,
    progress: bool | None = None,
) -> EigenResult:
    r"""Compute a few eigenvalues at the ends of the spectrum, with eigenvectors and multiplicity.

    Thick-restart block Lanczos with full reorthogonalization. Residuals are those of the vectors
    that are returned, up to rounding, and need no product of their own.

    Parameters
    ----------
    A : LinearOperator or array-like of shape (n, n)
        Real symmetric or complex Hermitian; wrapped by `aslinearoperator`.
    num_eigenvalues : int
        How many, counted with multiplicity; n or more gives all n, from n products.
    which : {"LA", "SA", "LM", "BE"}
        Largest algebraic, smallest algebraic, largest magnitude, or both ends: half from each, the
        odd one from the high end.
    tol : float
        A pair has converged if its residual is at most ``tol * norm``, the norm of `A` being
        estimated by the largest \|Ritz value\|. Less than 16 roundings of the vectors, or two of
        the products in half precision, cannot be reached, and means those.
    max_products : int, optional
        Columns multiplied at most. When they run out, what there is is returned, with `converged`
        False where it has not: no error, but fewer pairs if there have been fewer products than
        pairs. By default ten times n, and at least 500.
    start : array of shape (n,) or (n, j), optional
        Approximate eigenvectors, on the host or on the operator's device: a run begins with their
        sum. They are multiplied one by one if they have nearly converged or if `max_products` is at
        most four times their number: then no run knows less than they do. None starts from random
        vectors.
    seed : int
        Of the random vectors.
    block_size : int, optional
        Columns per product at most, and random vectors to begin with. A product multiplies only
        the directions that something unconverged or unproved still needs. Where outliers stand
        above a bulk, as with Hessians, two columns at once take half the products of one, and
        hardly more columns; with more, products become fewer and columns more. That pays where
        columns share work: data that are read and evaluated again for every product, or a
        graphics processor. None takes 1.
    memory_budget : int
        Bytes for Lanczos vectors, the operator's own not counted. A large basis saves products: the
        default is ``max(2 k + 20, k + 60)`` vectors for k eigenvalues, and what `start` and
        `block_size` add, six for each column of a block. The least that works, about
        ``2 k + 3 * block_size`` and the columns of `start`, is taken whatever the budget.
    progress : bool, optional
        Show a progress bar. None shows it on a terminal or in a notebook when a run is long.

    Returns
    -------
    EigenResult

    Raises
    ------
    ValueError
        If an argument is out of range, `start` has the wrong shape, is zero or not finite, or a
        product is not finite.
    TypeError
        If `A` is not an operator or a count is not an integer.

    Notes
    -----
    A random start sees one direction of every eigenspace, a block of b columns sees b of them.
    Eigenvalues that occur as often among the results as random vectors have been used may have
    further copies. Those are searched for from new random vectors, orthogonal to what is locked,
    until it is proved that a copy would have been seen: with probability 0.999 at least, the only
    chance being that of the random vectors (`specdens.methods.eigensolver`). The last eigenvalue
    returned needs no such search, copies of it could only replace it. Nor is one needed with
    ``block_size`` above every multiplicity: unless it had to restart, the run itself goes on until
    its own random vectors prove as much. After a `start` all values beyond the last one
    returned are searched for, since the start may have missed an eigenspace. A search takes no
    more products than have been used before it, but may always take 40; differences below a few
    times the tolerance are not resolved.

    References
    ----------
    Wu, Simon (2000), Thick-restart Lanczos method for large symmetric eigenvalue problems, SIAM J.
    Matrix Anal. Appl. 22(2), 602. doi:10.1137/S0895479898334605
    Kuczynski, Wozniakowski (1992), Estimating the largest eigenvalue by the power and Lanczos
    algorithms with a random start, SIAM J. Matrix Anal. Appl. 13(4), 1094. doi:10.1137/0613066

    Examples
    --------
    >>> import numpy as np
    >>> result = eigsh(np.diag([3.0, 1.0, 7.0, 7.0, 2.0]), 3)
    >>> result.eigenvalues.round(9)
    array([3., 7., 7.])
    >>> result
    EigenResult(eigenvalues=[3. 7. 7.], 3 of 3 converged, residuals <= ..., num_products=5)
    """
    A = aslinearoperator(A)  # noqa: N806
    space, n = A.space, A.space.dimension
    goal = Goal(
        checked_count("num_eigenvalues", num_eigenvalues),
        checked_choice("which", which, _WHICH),
        checked_nonnegative("tol", tol, "it is relative to the norm of A"),
    )
    count = 1 if block_size is None else min(checked_count("block_size", block_size), n)
    limit = max(500, 10 * n)
    if max_products is not None:
        limit = checked_count("max_products", max_products)
    columns = None if start is None else _unit_columns(start, space)
    checked_seed(seed)
    with progress_bar(None, 0, progress, unit="column") as bar:
        if goal.count >= n and limit >= n:
            return _all_pairs(A, goal.tol, count, bar)
        goal = Goal(min(goal.count, n), goal.which, goal.tol)
        solver = Eigensolver(
            A,
            goal,
            capacity=_capacity(space, goal.count, count, columns, memory_budget),
            block_size=count,
            max_products=limit,
            seed=seed,
            bar=bar,
        )
        solver.solve(columns)
    values, vectors, residuals = solver.best()
    converged = residuals <= solver.threshold
    return EigenResult(values, vectors, residuals, solver.num_products, converged)


def _all_pairs(A: LinearOperator, tol: float, count: int, bar: tqdm.tqdm) -> EigenResult:  # noqa: N803
    """Return all n pairs from the products with the identity."""
    space, n = A.space, A.space.dimension
    identity = np.eye(n)
    blocks = []
    width = max(count, 64)
    for first in range(0, n, width):
        x = space.from_numpy(np.ascontiguousarray(identity[:, first : first + width]))
        blocks.append(space.to_numpy(multiply(A, x)))
        bar.update(int(x.shape[1]))
    matrix = np.concatenate(blocks, axis=1).astype(np.complex128 if space.is_complex else float)
    check_finite(matrix, "a product with the identity")
    values, vectors = np.linalg.eigh((matrix + matrix.conj().T) / 2)
    moved = space.from_numpy(vectors)
    exact = space.to_numpy(moved).astype(matrix.dtype)
    residuals = np.linalg.norm(matrix @ exact - exact * values, axis=0)
    threshold = max(tol, least_tol(space)) * np.abs(values).max()
    return EigenResult(values, moved, residuals, n, residuals <= threshold)


def _capacity(
    space: VectorSpace, num_eigenvalues: int, count: int, columns: Array | None, budget: int
) -> int:
    """Return the number of basis vectors: many, as far as the budget allows."""
    added = 2 * count if columns is None else max(2 * count, int(columns.shape[1]))
    # Blocks are at their best until the first restart: a run of many columns should not need one.
    roomy = added if count == 1 else added + 4 * count
    wanted = max(2 * num_eigenvalues + 20, num_eigenvalues + 60) + roomy
    # Beside the basis there are a block, its product and copies of it.
    affordable = checked_count("memory_budget", budget) // space.vector_bytes - 4 * count
    least = 2 * num_eigenvalues + 2 + added + count
    return min(space.dimension, max(least, min(wanted, affordable)))


def _unit_columns(start: Array, space: VectorSpace) -> Array:
    """Return `start` as unit columns (n, j) of the space, checked."""
    x, xp = checked_vectors("start", start, space), space.backend.xp
    shape = tuple(x.shape)
    if shape[1:] and shape[1] > space.dimension:
        msg = f"start has {shape[1]} columns; pass at most n = {space.dimension}."
        raise ValueError(msg)
    x = xp.astype(x[:, None] if len(shape) == 1 else x, space.wide_dtype)
    norms = xp.linalg.vector_norm(x, axis=0)
    sizes = space.to_numpy(norms)
    bad = np.flatnonzero(~(np.isfinite(sizes) & (sizes > 0)))
    if bad.size:
        msg = (
            f"start has norm {sizes[bad[0]]} in column {bad[0]}; every column must be finite and "
            "not zero."
        )
        raise ValueError(msg)
    return xp.astype(x / norms, space.working_dtype)


def spectral_interval(
    A: LinearOperator | Array,  # noqa: N803
    *,
    num_steps: int | None = None,
    num_probes: int = 1,
    seed: int = 0,
    margin: float = 0.01,
    probes: ProbeSampler = sphere,
) -> tuple[float, float]:
    r"""Return an interval that contains the whole spectrum, from some Lanczos steps.

    Extreme Ritz values lie inside the spectrum. How far outside an eigenvalue can be is known from
    the recurrence itself: after m steps from a unit vector v, an eigenvector z of an eigenvalue
    :math:`\lambda` beyond all Ritz values :math:`\theta_i` has

    .. math:: |z^* v| \le \prod_{i=1}^m \frac{\beta_i}{|\lambda - \theta_i|},

    and a random v has a component below :math:`\epsilon` with probability at most
    :math:`\epsilon \sqrt{2 n / \pi}`. The ends are where that probability is 0.001.

    Parameters
    ----------
    A : LinearOperator or array-like of shape (n, n)
        Real symmetric or complex Hermitian; wrapped by `aslinearoperator`.
    num_steps : int, optional
        Lanczos steps m; by default 40, or n if that is less. The excess over the spectrum falls as
        ``num_steps ** -2``.
    num_probes : int
        Random vectors, as columns of one product. To miss an eigenvalue all have to miss it.
    seed : int
        Of the random vectors.
    margin : float
        Part of its width that is added to the interval on either side.
    probes : ProbeSampler
        Where the random vectors come from; the probability below is that of `sphere`.

    Returns
    -------
    low, high : float
        Equal if `A` is a multiple of the identity and its products are exact, as for ``A = 0``.

    Raises
    ------
    ValueError
        If a count or `margin` is out of range, or a product is not finite.

    Notes
    -----
    Safe: with probability 0.998 over the random vectors, whatever the operator, outliers and
    repeated eigenvalues included, every eigenvalue lies inside (rounding is allowed for). The bound
    of Zhou and Li (2011), the extreme Ritz value plus its residual norm, has no such guarantee: a
    Ritz value may have converged to the second eigenvalue.

    References
    ----------
    Zhou, Li (2011), Bounding the spectrum of large Hermitian matrices, Linear Algebra Appl. 435,
    480. doi:10.1016/j.laa.2010.06.034
    Kuczynski, Wozniakowski (1992), SIAM J. Matrix Anal. Appl. 13(4), 1094. doi:10.1137/0613066
    Lin, Saad, Yang (2016), SIAM Review 58(1), 34. arXiv:1308.5467

    Examples
    --------
    >>> import numpy as np
    >>> low, high = spectral_interval(np.diag(np.linspace(-1.0, 3.0, 200)))
    >>> low <= -1.0, 3.0 <= high, high - low < 1.2 * 4.0
    (True, True, True)
    """
    A = aslinearoperator(A)  # noqa: N806
    n = A.space.dimension
    method = Lanczos(min(40, n) if num_steps is None else checked_steps(num_steps, n))
    margin = checked_nonnegative("margin", margin, "it is a part of the interval's width")
    indices = range(checked_count("num_probes", num_probes))
    state = method.init(A, draw(probes, A.space, checked_seed(seed), indices))
    with A.space.backend.session():
        while not method.done(state):
            state = method.step(A, state)
    low = -_upper_end(-state.alphas, state.betas, n)
    high = _upper_end(state.alphas, state.betas, n)
    slack = rounding(A.space.precision, np.array([low, high])) + margin * (high - low)
    return float(low - slack), float(high + slack)


def _upper_end(alphas: np.ndarray, betas: np.ndarray, dimension: int) -> float:
    """Return the number that eigenvalues exceed with probability `MISS` only.

    Coefficients of the recurrences of p random vectors, (p, m).
    """
    theta = np.array([eigvalsh_tridiagonal(a, b[:-1]) for a, b in zip(alphas, betas, strict=True)])
    largest = float(theta.max())
    tiny = np.finfo(np.float64).tiny
    with np.errstate(divide="ignore"):
        gains = np.log(betas).sum(axis=1)  # of an exhausted Krylov space nothing can be missed

    def is_safe(end: float) -> bool:
        logs = gains - np.log(np.maximum(end - theta, tiny)).sum(axis=1)
        chances = np.minimum(np.log(component_density(dimension)) + logs, 0.0)
        return bool(chances.sum() <= np.log(MISS))

    step = np.finfo(np.float64).eps * float(np.abs(theta).max())
    if is_safe(largest + step):
        return largest
    inside, outside = largest, largest + float(betas.max()) + step
    while not is_safe(outside):
        outside = largest + 2 * (outside - largest)
    for _ in range(30):
        middle = (inside + outside) / 2
        inside, outside = (inside, middle) if is_safe(middle) else (middle, outside)
    return outside
