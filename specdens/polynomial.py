"""The front door of the kernel polynomial method: `kpm`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from specdens.arguments import checked_count, checked_interval, checked_seed
from specdens.backends import Array
from specdens.checkpoint import Checkpoint, as_checkpoint, load_run, saved_settings
from specdens.deflation import Eigenpairs, complement
from specdens.driver import Callback, RunState
from specdens.eigenpairs import spectral_interval
from specdens.measure import SpectralMeasure
from specdens.methods.chebyshev import ChebyshevMoments
from specdens.operators import aslinearoperator
from specdens.probes import ProbeSampler, sphere
from specdens.runs import MEMORY_BUDGET, execute, fitting, is_there, sampler_name
from specdens.spaces import LinearOperator


def kpm(
    A: LinearOperator | Array,  # noqa: N803
    *,
    num_probes: int = 10,
    num_moments: int = 256,
    interval: tuple[float, float] | None = None,
    seed: int = 0,
    block_size: int | None = None,
    probes: ProbeSampler = sphere,
    deflate: Eigenpairs | None = None,
    memory_budget: int = MEMORY_BUDGET,
    progress: bool | None = None,
    checkpoint: Checkpoint | str | Path | None = None,
    resume: RunState[Any] | str | Path | None = None,
    callback: Callback | None = None,
) -> SpectralMeasure:
    r"""Estimate the spectral density of a Hermitian operator by the kernel polynomial method.

    The average over probes of the Chebyshev moments :math:`\mu_r = v^* T_r(\tilde A) v`, two from
    every product, is a series for the density. Cut after `num_moments` terms it rings; damping
    smooths that at the price of resolution, and is chosen afterwards: the moments are kept as they
    are, and ``measure.pdf(x, Chebyshev(degree, interval, damping))`` takes any.

    Next to `slq`: no inner products inside the iteration, three vectors per probe, stable in low
    precision; but resolution is a fixed part of the whole interval, so a few large eigenvalues hide
    the bulk (deflate them).

    Parameters
    ----------
    A : LinearOperator or array-like of shape (n, n)
        Real symmetric or complex Hermitian; wrapped by `aslinearoperator`.
    num_probes : int
        Independent probes p.
    num_moments : int
        K, at least 2: of :math:`T_0, ..., T_{K-1}`. Features narrower than about
        ``pi / K`` times half the interval are smeared out.
    interval : tuple of float, optional
        Ends ``(low, high)`` of an interval that holds the spectrum. None finds one by
        `spectral_interval`, with the same probes. If the moments prove that an eigenvalue lies
        outside, the run ends with an error.
    seed, block_size, probes
        As in `slq`.
    deflate : EigenResult, optional
        Eigenpairs to take out before, as `eigsh` returns them; see `slq`.
    memory_budget, progress, checkpoint
        As in `slq`.
    resume : path or RunState, optional
        As in `slq`. A run that was kept with its vectors, ``Checkpoint(path, vectors=True)``, in
        one block of probes, is also extended to a larger `num_moments` without repeating a product.
    callback
        As in `slq`.

    Returns
    -------
    SpectralMeasure
        Its nodes are the K Chebyshev points of the interval, its weights (signed) have exactly
        these moments; smoothed by `Chebyshev` of degree K - 1 with `jackson` damping by default.
        More probes by `SpectralMeasure.extend`, from a run with another seed on the same interval.

    Raises
    ------
    ValueError
        If a count is too small, the interval is empty or misses part of the spectrum, a product is
        not finite, or the file to resume is damaged or of another run.
    TypeError
        If `A` is not an operator or a count is not an integer.

    Notes
    -----
    Cost: ``num_moments // 2`` products with every block, and an eighth of that, at least 10, with
    the first block to find the interval.

    References
    ----------
    Weisse, Wellein, Alvermann, Fehske (2006), Rev. Mod. Phys. 78, 275.
    doi:10.1103/RevModPhys.78.275
    Lin, Saad, Yang (2016), SIAM Review 58(1), 34. doi:10.1137/130934283

    Examples
    --------
    >>> import numpy as np
    >>> measure = kpm(np.diag([1.0, 2.0, 2.0, 5.0]), num_probes=3, num_moments=16, interval=(0, 6))
    >>> float(measure.integrate(np.ones_like).value.round(6))
    1.0
    """
    A = aslinearoperator(A)  # noqa: N806
    num_probes = checked_count("num_probes", num_probes)
    num_moments = checked_count("num_moments", num_moments, 2)
    if interval is not None:
        interval = _checked_interval(interval)
    checkpoint = as_checkpoint(checkpoint)
    name, operator, extra = sampler_name(probes), A, None
    if deflate is not None:
        extra = complement(A, probes, deflate)
        operator, probes = extra.operator, extra.probes
    if resume is not None and is_there(resume, checkpoint):
        saved = resume.settings if isinstance(resume, RunState) else saved_settings(resume)
        block_size = saved.get("block_size") if block_size is None else block_size
        interval = saved.get("interval") if interval is None else interval
    if block_size is None:
        split = 5 if checkpoint is not None and not checkpoint.vectors else 1
        block_size = fitting(4 * A.space.vector_bytes, -(-num_probes // split), memory_budget)
    block_size = min(checked_count("block_size", block_size), num_probes)
    if interval is None:
        steps = min(max(10, num_moments // 16), A.space.dimension)
        interval = spectral_interval(
            operator, num_steps=steps, num_probes=block_size, seed=seed, probes=probes
        )
    method = ChebyshevMoments(num_moments, _checked_interval(interval))
    settings = {
        "method": "kpm",
        "num_moments": method.num_moments,
        "interval": list(method.interval),
        "seed": checked_seed(seed),
        "block_size": block_size,
        "probes": name,
        "deflated": [] if extra is None else extra.eigenvalues.tolist(),
    }
    if resume is not None and is_there(resume, checkpoint):
        resume = _extended(resume, method, A)
    return execute(
        operator, method, settings, num_probes, probes, checkpoint, resume, callback, progress,
        extra,
    )  # fmt: skip


def _extended(
    resume: RunState[Any] | str | Path,
    method: ChebyshevMoments,
    A: LinearOperator,  # noqa: N803
) -> RunState[Any]:
    """Return the run to go on with; a finished one of fewer moments goes on from its vectors.

    Raises
    ------
    ValueError
        If moments are to be added, and the vectors were not kept.
    """
    state = resume if isinstance(resume, RunState) else load_run(resume, method, A.space)
    before = state.settings.get("num_moments", method.num_moments)
    if state.settings.get("method") != "kpm" or before >= method.num_moments:
        return state
    settings = {**state.settings, "num_moments": method.num_moments}
    vectors = state.current if not state.rules else state.last
    if vectors is None or len(state.rules) > 1:
        msg = (
            f"num_moments={method.num_moments}, but the run to resume has {before} and kept no "
            "vectors to go on from; that takes one block of probes and Checkpoint(path, "
            "vectors=True)."
        )
        raise ValueError(msg)
    return RunState(current=vectors, settings=settings)


def _checked_interval(interval: tuple[float, float]) -> tuple[float, float]:
    low, high = checked_interval("interval", interval, point=True)
    if low == high:  # a multiple of the identity: any interval around it will do
        margin = abs(low) or 1.0
        return low - margin, high + margin
    return low, high
