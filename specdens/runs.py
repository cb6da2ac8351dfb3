"""What the front doors share: checked arguments, resumed runs, and the measure with its history."""

from __future__ import annotations

import datetime
import time
from pathlib import Path
from typing import Any

from specdens.arguments import checked_callable, checked_count, checked_path
from specdens.backends import dtype_name
from specdens.checkpoint import Checkpoint, check_settings, load_run
from specdens.deflation import Complement
from specdens.driver import Callback, Method, RunState, run
from specdens.interpretation import Rule
from specdens.measure import SpectralMeasure
from specdens.probes import EXPECTED_SAMPLER, ProbeSampler, is_isotropic
from specdens.spaces import LinearOperator, VectorSpace
from specdens.version import __version__

#: Bytes that a run may use for its vectors unless told otherwise: 2 GiB.
MEMORY_BUDGET = 2 * 2**30


def execute(
    A: LinearOperator,  # noqa: N803
    method: Method[Any],
    settings: dict[str, Any],
    num_probes: int,
    probes: ProbeSampler,
    checkpoint: Checkpoint | None,
    resume: RunState[Any] | str | Path | None,
    callback: Callback | None,
    progress: bool | None,
    known: Complement | None = None,
) -> SpectralMeasure:
    """Run the method on all probes, and wrap its rule with the provenance.

    With `known` eigenpairs `A` and `probes` are those of their complement.
    """
    began = time.perf_counter()
    space = A.space
    if callback is not None:
        checked_callable("callback", callback, "a function of a Progress")
    settings |= _kind(space)
    state: RunState[Any] = RunState(settings=settings)
    if resume is not None and is_there(resume, checkpoint):
        state = resume if isinstance(resume, RunState) else load_run(resume, method, space)
        what = "resume" if isinstance(resume, RunState) else f"resume={str(resume)!r}"
        check_settings(state.settings, settings, what)
    if state.next_probe > num_probes:
        msg = (
            f"num_probes={num_probes}, but the run to resume has finished {state.next_probe}; pass "
            "that many or more."
        )
        raise ValueError(msg)
    callbacks = [] if checkpoint is None else [checkpoint.start(method, space, state)]
    rule = run(
        method,
        A,
        num_probes=num_probes,
        seed=settings["seed"],
        block_size=settings["block_size"],
        probes=probes,
        state=state,
        callbacks=tuple(callbacks if callback is None else [*callbacks, callback]),
        progress=progress,
    )
    provenance = provenance_of(settings, space, num_probes, began)
    whole: Rule = rule if known is None else known.add_to(rule)
    return SpectralMeasure.from_rule(whole, space.dimension, provenance)


def _kind(space: VectorSpace) -> dict[str, Any]:
    """Return what of the operator a run that goes on must share."""
    return {
        "dimension": space.dimension,
        "dtype": dtype_name(space.dtype),
        "backend": space.backend.name,
    }


def provenance_of(
    settings: dict[str, Any], space: VectorSpace, num_probes: int, began: float
) -> dict[str, Any]:
    """Return how a measure was made: settings, and when, where and with what."""
    random = settings["probes"] in ("sphere", "rademacher")
    return (
        settings
        | _kind(space)
        | {
            "num_probes": num_probes,
            "seeds": [settings["seed"]],
            "isotropic": random and settings["method"] != "lanczos",
            "complex": space.is_complex,
            "device": str(space.device),
            "specdens": __version__,
            "seconds": time.perf_counter() - began,
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        }
    )


def is_there(resume: RunState[Any] | str | Path, checkpoint: Checkpoint | None) -> bool:
    """Tell whether there is a run to go on with; a missing file means no if it is also written."""
    if isinstance(resume, RunState):
        return True
    path = checked_path("resume", resume)
    return path.exists() or checkpoint is None or Path(checkpoint.path) != path


def fitting(bytes_per_probe: int, limit: int, memory_budget: int) -> int:
    """Return how many probes, at most `limit` and at least one, fit into the budget together."""
    budget = checked_count("memory_budget", memory_budget)
    return max(1, min(limit, budget // bytes_per_probe))


def checked_steps(num_steps: int | None, dimension: int) -> int:
    if num_steps is None:
        return min(80, dimension)
    steps = checked_count("num_steps", num_steps)
    if steps > dimension:
        msg = (
            f"num_steps={steps} exceeds the operator's dimension {dimension}; "
            f"pass num_steps <= {dimension}."
        )
        raise ValueError(msg)
    return steps


def sampler_name(probes: ProbeSampler) -> str:
    """Return the name of a sampler; only specdens' own, whose law is known, go without a module."""
    checked_callable("probes", probes, EXPECTED_SAMPLER)
    name = str(getattr(probes, "__name__", type(probes).__name__))
    return name if is_isotropic(probes) else f"{getattr(probes, '__module__', '?')}.{name}"
