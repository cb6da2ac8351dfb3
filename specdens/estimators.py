"""Front doors: `slq` for the whole spectrum, `lanczos` for the measure that one vector sees."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from specdens.arguments import checked_count, checked_seed, shown
from specdens.backends import Array, backend_of, dtype_name
from specdens.checkpoint import Checkpoint, as_checkpoint, saved_settings
from specdens.deflation import Eigenpairs, complement
from specdens.driver import Callback, RunState
from specdens.measure import SpectralMeasure
from specdens.methods.block import BlockLanczos
from specdens.methods.lanczos import Lanczos
from specdens.operators import aslinearoperator
from specdens.probes import ProbeSampler, from_vectors, sphere
from specdens.runs import (
    MEMORY_BUDGET,
    checked_steps,
    execute,
    fitting,
    is_there,
    sampler_name,
)
from specdens.spaces import LinearOperator, VectorSpace


def slq(
    A: LinearOperator | Array,  # noqa: N803
    *,
    num_probes: int = 10,
    num_steps: int | None = None,
    seed: int = 0,
    block_size: int | None = None,
    reorthogonalize: bool | None = None,
    probes: ProbeSampler = sphere,
    deflate: Eigenpairs | None = None,
    memory_budget: int = MEMORY_BUDGET,
    progress: bool | None = None,
    checkpoint: Checkpoint | str | Path | None = None,
    resume: RunState[Any] | str | Path | None = None,
    callback: Callback | None = None,
) -> SpectralMeasure:
    r"""Estimate the spectral density of a Hermitian operator by stochastic Lanczos quadrature.

    From each random probe :math:`v_i`, `num_steps` Lanczos steps give a Jacobi matrix whose
    eigenvalues :math:`\theta_{ij}` and squared first eigenvector components :math:`w_{ij}` are the
    Gauss rule of the measure that :math:`v_i` sees. Their average approximates the
    distribution of the eigenvalues. Probes of a block share their Krylov spaces
    (`specdens.methods.block`), and eigenvalues that are resolved one by one get their exact mass
    (`specdens.sharpening`).

    Parameters
    ----------
    A : LinearOperator or array-like of shape (n, n)
        Real symmetric or complex Hermitian; wrapped by `aslinearoperator`.
    num_probes : int
        Independent probes p. The standard error of every estimate falls as ``p ** -0.5``.
    num_steps : int, optional
        Lanczos steps m per probe, at most n; by default 80, or n if that is less. Moments up to
        degree ``2 * m - 1`` of each probe are exact; features narrower than about (range of the
        bulk) / m are not resolved.
    seed : int
        With the index of a probe it determines the probe, on every library, whatever `block_size`
        is.
    block_size : int, optional
        Probes advanced together, as columns of one product. With reorthogonalization they share
        their Krylov space: larger blocks resolve more eigenvalues and cost fewer passes over the
        data, but each probe's own Gauss rule (`SpectralMeasure.plain`) stays the same. None
        takes as many as `memory_budget` allows.
    reorthogonalize : bool, optional
        Keep all Lanczos vectors, orthonormal to the square root of the precision, which gives the
        nodes of exact orthogonality (Simon 1984). Without it, converged eigenvalues reappear as
        clusters of nodes (ghosts) whose weights still add up: densities stay valid, but fewer nodes
        are left for the bulk and bands are wider. None keeps them if those of all `num_probes` fit
        into `memory_budget`.
    probes : ProbeSampler
        `sphere` (default), `rademacher`, or any ``(space, seed, index) -> (n,)``.
    deflate : EigenResult, optional
        Eigenpairs to take out before, as `eigsh` returns them: probes and products are projected on
        their complement, whose measure gets the mass (n - k)/n, and each known eigenvalue, of
        whatever sign, gets 1/n. Saves steps and memory where outliers are known; not needed for
        outliers that Lanczos resolves by itself.
    memory_budget : int
        Bytes for Lanczos vectors, the operator's own not counted.
    progress : bool, optional
        Show a progress bar. None shows it on a terminal or in a notebook when a run is long.
    checkpoint : path or Checkpoint, optional
        File to save the run to as it goes; a path alone keeps finished blocks of probes
        (kilobytes), and limits a block to a fifth of the probes unless `block_size` is given.
    resume : path or RunState, optional
        An interrupted run of the same operator and settings to continue, to the same bits; a
        `block_size` or `reorthogonalize` that is None is taken from it. May be the same file as
        `checkpoint`; then a missing file means a fresh start.
    callback : callable, optional
        Called with a `Progress` after every product and every finished block of probes.

    Returns
    -------
    SpectralMeasure
        In the unit of the eigenvalues, on the host in float64. ``plain()`` has nodes of shape
        ``(num_probes, num_steps)``, the measure itself up to ``block_size * num_steps`` nodes per
        row.

    Raises
    ------
    ValueError
        If a count is below 1, `num_steps` exceeds n, a product is not finite, or the file to resume
        is damaged or of another run.
    TypeError
        If `A` is not an operator or a count is not an integer.

    Notes
    -----
    Cost: ``num_steps * ceil(num_probes / block_size)`` products with ``(n, block_size)`` arrays.
    Memory: four vectors per probe of a block, or ``num_steps`` more with `reorthogonalize`. Three
    errors add: probes (``stderr``), steps (compare with twice `num_steps`) and smoothing (compare
    widths); `SpectralMeasure.cdf_band` bounds the first two together.

    References
    ----------
    Ubaru, Chen, Saad (2017), SIAM J. Matrix Anal. Appl. 38(4), 1075. doi:10.1137/16M1104974
    Chen, Trogdon, Ubaru (2021), ICML. arXiv:2105.06595
    Golub, Meurant (2010), Matrices, Moments and Quadrature with Applications, ch. 6.
    Simon (1984), The Lanczos algorithm with partial reorthogonalization, Math. Comp. 42, 115.

    Examples
    --------
    >>> import numpy as np
    >>> measure = slq(np.diag([1.0, 2.0, 2.0, 5.0]), num_probes=3, num_steps=3)
    >>> round(float(measure.trace().value), 6)
    10.0
    """
    A = aslinearoperator(A)  # noqa: N806
    num_probes = checked_count("num_probes", num_probes)
    num_steps = checked_steps(num_steps, A.space.dimension)
    checkpoint = as_checkpoint(checkpoint)
    # What was chosen for the run to resume holds for its rest.
    if resume is not None and is_there(resume, checkpoint):
        saved = resume.settings if isinstance(resume, RunState) else saved_settings(resume)
        if block_size is None:
            block_size = saved.get("block_size")
        if reorthogonalize is None:
            reorthogonalize = saved.get("reorthogonalize")
    name, operator, extra = sampler_name(probes), A, None
    if deflate is not None:
        extra = complement(A, probes, deflate)
        operator, probes = extra.operator, extra.probes
        num_steps = min(num_steps, A.space.dimension - len(extra.eigenvalues))
    method = lanczos_method(A, num_steps, reorthogonalize, num_probes, memory_budget)
    if block_size is None:
        split = 5 if checkpoint is not None and not checkpoint.vectors else 1
        block_size = fitting(method.memory(A.space), -(-num_probes // split), memory_budget)
    settings = {
        "method": "slq",
        "num_steps": num_steps,
        "seed": checked_seed(seed),
        "block_size": min(checked_count("block_size", block_size), num_probes),
        "reorthogonalize": isinstance(method, BlockLanczos),
        "probes": name,
        "deflated": [] if extra is None else extra.eigenvalues.tolist(),
    }
    return execute(
        operator, method, settings, num_probes, probes, checkpoint, resume, callback, progress,
        extra,
    )  # fmt: skip


def lanczos(
    A: LinearOperator | Array,  # noqa: N803
    start: Array | None = None,
    *,
    num_steps: int | None = None,
    seed: int = 0,
    reorthogonalize: bool | None = None,
    memory_budget: int = MEMORY_BUDGET,
    progress: bool | None = None,
    checkpoint: Checkpoint | str | Path | None = None,
    resume: RunState[Any] | str | Path | None = None,
    callback: Callback | None = None,
) -> SpectralMeasure:
    r"""Return the spectral measure that one vector sees (also: local density of states).

    For a unit vector v it is :math:`\sum_i |u_i^* v|^2 \delta_{\lambda_i}`, here replaced by its
    Gauss rule of m nodes: with v a gradient, say where in the spectrum of the Hessian the gradient
    lies.

    Parameters
    ----------
    A : LinearOperator or array-like of shape (n, n)
        Real symmetric or complex Hermitian; wrapped by `aslinearoperator`.
    start : array of shape (n,), optional
        The vector, of any norm above 0, on the host or on the operator's device. None draws a
        random one from `seed`.
    num_steps, seed, reorthogonalize, memory_budget, progress, checkpoint, resume, callback
        As in `slq`.

    Returns
    -------
    SpectralMeasure
        One row. `SpectralMeasure.outliers` holds the converged Ritz values with their residuals; no
        weight is changed, since the weights are what the vector sees. The norm of `start` is not
        part of it.

    Raises
    ------
    ValueError
        If `start` has the wrong length, is zero or is not finite; otherwise as in `slq`.
    TypeError
        If `start` is no array, or complex and `A` real; otherwise as in `slq`.

    References
    ----------
    Golub, Meurant (2010), Matrices, Moments and Quadrature with Applications, ch. 4 and 6.

    Examples
    --------
    >>> import numpy as np
    >>> from specdens import Gaussian
    >>> seen = lanczos(np.diag([1.0, 2.0, 3.0]), np.array([1.0, 0.0, 1.0]), num_steps=3)
    >>> seen.cdf(np.array([1.5, 2.5]), smoothing=Gaussian(0)).value.round(6)
    array([0.5, 0.5])
    """
    A = aslinearoperator(A)  # noqa: N806
    if start is not None:
        _check_start(start, A.space)
    num_steps = checked_steps(num_steps, A.space.dimension)
    method = lanczos_method(A, num_steps, reorthogonalize, 1, memory_budget)
    settings = {
        "method": "lanczos",
        "num_steps": num_steps,
        "seed": checked_seed(seed),
        "block_size": 1,
        "reorthogonalize": isinstance(method, BlockLanczos),
        "probes": "sphere" if start is None else "from_vectors",
    }
    probes = sphere if start is None else from_vectors(start)
    kept = as_checkpoint(checkpoint, vectors=True)
    return execute(A, method, settings, 1, probes, kept, resume, callback, progress)


def _check_start(start: Array, space: VectorSpace) -> None:
    """Refuse a start that is no vector of the space, or has no direction."""
    backend, shape = backend_of(start, "start"), tuple(start.shape)
    if shape != (space.dimension,):
        msg = f"start has shape {shape}; expected ({space.dimension},)."
        raise ValueError(msg)
    if dtype_name(start.dtype).startswith("complex") and not space.is_complex:
        msg = "start is complex, the operator real; pass a real start."
        raise TypeError(msg)
    norm = float(np.linalg.norm(backend.to_numpy(start).astype(np.complex128)))
    if not 0 < norm < np.inf:
        msg = f"start has norm {norm}; it must be finite and not zero."
        raise ValueError(msg)


def lanczos_method(
    A: LinearOperator,  # noqa: N803
    num_steps: int,
    reorthogonalize: bool | None,
    num_probes: int,
    memory_budget: int,
) -> Lanczos | BlockLanczos:
    """Choose whether to keep the basis: by the bytes of all probes, not by the block."""
    checked_count("memory_budget", memory_budget)
    kept = BlockLanczos(num_steps)
    if not (reorthogonalize is None or isinstance(reorthogonalize, bool | np.bool_)):
        msg = f"reorthogonalize={shown(reorthogonalize)} must be True, False or None."
        raise TypeError(msg)
    if reorthogonalize is None:
        reorthogonalize = kept.memory(A.space) * num_probes <= memory_budget
    return kept if reorthogonalize else Lanczos(num_steps)
