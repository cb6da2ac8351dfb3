"""A run whose probes are divided over processes that all hold all of the data."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from specdens import (
    LinearOperator,
    ProbeSampler,
    SpectralMeasure,
    VectorSpace,
    kpm,
    load,
    rademacher,
    sphere,
)
from specdens.arguments import checked_callable, checked_count
from specdens_torch.guards import Totals
from specdens_torch.processes import Processes, Share


class _Shifted:
    """The probes of a sampler from another index on."""

    def __init__(self, sampler: ProbeSampler, first: int) -> None:
        self._sampler, self._first = sampler, first
        self.__name__ = f"{getattr(sampler, '__name__', type(sampler).__name__)} from {first}"

    def __call__(self, space: VectorSpace, seed: int, index: int) -> Any:
        return self._sampler(space, seed, self._first + index)


def spread_probes(
    estimator: Callable[..., SpectralMeasure],
    A: LinearOperator,  # noqa: N803
    *,
    num_probes: int = 10,
    block_size: int | None = None,
    process_group: Any = "world",
    probes: ProbeSampler = sphere,
    **settings: Any,
) -> SpectralMeasure:
    """Run an estimator with its probes divided over processes that all hold all of the data.

    A probe depends on the seed and its index alone, so the result is that of one process with the
    same `block_size`, to the rounding of the products.

    Parameters
    ----------
    estimator : callable
        `specdens.slq` or `specdens.kpm`, or another function with their arguments `num_probes`,
        `block_size` and `probes`.
    A : LinearOperator
        The same on all processes. It must not itself add up over processes, as the matrices of a
        risk with a process group do.
    num_probes : int
        Of all processes together.
    block_size : int, optional
        Probes advanced together; by default as many as make one block for each process (with one
        process the choice of the estimator). Processes take whole blocks, the first ones one more
        if need be.
    process_group : ProcessGroup or "world"
        Or None for one process.
    probes : ProbeSampler
        As in the estimator.
    **settings
        Further arguments of the estimator, the same on all processes; for `specdens.kpm` the
        `interval` is one of them. Files of `checkpoint` and `resume` must be others on each.

    Returns
    -------
    SpectralMeasure
        The measure of all probes, the same on all processes.

    Raises
    ------
    ValueError
        If a count is below 1, settings differ between processes, `A` adds up over processes, or
        the interval of `kpm` is missing.
    RuntimeError
        If the estimator fails on another process.

    Notes
    -----
    `slq` keeps its Krylov bases if those of all probes that it is given fit into memory. Divided,
    they may fit where those of one process do not: give `reorthogonalize` for the same choice.

    Examples
    --------
    >>> import numpy as np
    >>> import specdens
    >>> matrix = np.diag(np.arange(1.0, 9.0))
    >>> spread_probes(specdens.slq, matrix, num_probes=4, process_group=None).num_probes
    4
    """
    checked_callable("estimator", estimator, "slq or kpm")
    checked_count("num_probes", num_probes)
    if block_size is not None:
        checked_count("block_size", block_size)
    if getattr(getattr(A, "risk", None), "processes", None) is not None:
        msg = (
            f"A={A!r} adds up over processes already, which must therefore all multiply the same "
            "vectors; make its Risk with all of the data and without process_group."
        )
        raise ValueError(msg)
    if estimator is kpm and settings.get("interval") is None:
        msg = (
            "interval=None would be found from different probes on every process; pass "
            "interval=specdens.spectral_interval(A)."
        )
        raise ValueError(msg)
    if process_group is None:
        options = settings | {"block_size": block_size, "probes": probes}
        return estimator(A, num_probes=num_probes, **options)
    processes = Processes(process_group)
    block_size = block_size or -(-num_probes // processes.size)
    mine = _own_probes(num_probes, block_size, processes)
    parts: list[SpectralMeasure] = []

    def run() -> Share:
        if mine:
            sampler = _Shifted(probes, mine.start)
            options = settings | {"block_size": block_size, "probes": sampler}
            parts.append(estimator(A, num_probes=len(mine), **options))
        return Share(Totals())

    told = {"num_probes": num_probes, "block_size": block_size, "probes": probes, **settings}
    own = ("checkpoint", "resume", "callback", "progress")
    facts = [f"{key}: {_told(value)}" for key, value in told.items() if key not in own]
    processes.combined(run, [f"operation: {_told(estimator)}", *facts])
    return _joined(processes.gather_bytes(_packed(parts)), probes)


def _told(value: Any) -> str:
    """Return a text of a setting that does not depend on where in memory it is."""
    if value is None or isinstance(value, bool | int | float | str | tuple):
        return repr(value)
    return str(getattr(value, "__name__", type(value).__name__))


def _own_probes(num_probes: int, block_size: int, processes: Processes) -> range:
    """Return the probes of this process: whole blocks, the first processes one more if need be."""
    blocks, more = divmod(-(-num_probes // block_size), processes.size)
    start = processes.rank * blocks + min(processes.rank, more)
    stop = start + blocks + (processes.rank < more)
    return range(min(num_probes, start * block_size), min(num_probes, stop * block_size))


def _packed(parts: Sequence[SpectralMeasure]) -> bytes:
    """Return the file of a measure, or nothing."""
    if not parts:
        return b""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "measure.npz"
        parts[0].save(path)
        return path.read_bytes()


def _joined(files: Sequence[bytes], probes: ProbeSampler) -> SpectralMeasure:
    """Return the measure of the probes of all, read as what they are: independent and random."""
    measures = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "measure.npz"
        for content in files:
            if content:
                path.write_bytes(content)
                measures.append(load(path))
    rules: list[Any] = [measure.rule for measure in measures]
    rule = type(rules[0]).concatenate(rules)
    provenance = dict(measures[0].provenance)
    random = probes in (sphere, rademacher)
    provenance |= {
        "num_probes": rule.num_probes,
        "isotropic": random,
        "probes": probes.__name__ if random else provenance["probes"],
        "seconds": max(measure.provenance["seconds"] for measure in measures),
    }
    return SpectralMeasure.from_rule(rule, measures[0].dimension, provenance)
