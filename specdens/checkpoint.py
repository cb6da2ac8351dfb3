"""Saving a run as it goes, and continuing it to the same bits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from specdens.arguments import checked_count, checked_path
from specdens.driver import Callback, Method, Progress, RunState
from specdens.interpretation import rule_from_arrays
from specdens.spaces import VectorSpace
from specdens.storage import read_npz, write_npz

_FORMAT = 1


@dataclass(frozen=True)
class Checkpoint:
    """Where and how often an estimator saves its run.

    Files are written atomically: whenever the process dies, the last complete one is there.

    Parameters
    ----------
    path : str or Path
        The ``.npz`` file.
    vectors : bool
        Also keep the Lanczos vectors of the block in progress, so that a resumed run loses no more
        than `every` products. Their size: two vectors per probe, and all of them with
        reorthogonalization. False keeps finished blocks only: kilobytes.
    every : int
        With `vectors`, save after this many products.

    Raises
    ------
    TypeError
        If `path` is no path, or `every` no integer.
    ValueError
        If `every` is below 1.
    """

    path: str | Path
    vectors: bool = False
    every: int = 1

    def __post_init__(self) -> None:
        checked_path("path", self.path)
        checked_count("every", self.every, advice="it is a number of products")

    def start(self, method: Method[Any], space: VectorSpace, state: RunState[Any]) -> Callback:
        """Write a first file, and return the callback that keeps it up to date."""
        save_run(self.path, state, method, space, vectors=self.vectors)

        def save(progress: Progress) -> None:
            state = progress.state
            if state.current is None:
                save_run(self.path, state, method, space, vectors=self.vectors)
            elif self.vectors and progress.done % self.every == 0:
                save_run(self.path, state, method, space, vectors=True)

        return save


def as_checkpoint(
    checkpoint: Checkpoint | str | Path | None, *, vectors: bool = False
) -> Checkpoint | None:
    """Return the checkpoint that an argument of this name stands for: a path, or one already."""
    if checkpoint is None or isinstance(checkpoint, Checkpoint):
        return checkpoint
    return Checkpoint(checked_path("checkpoint", checkpoint), vectors=vectors)


def checkpoint_every(path: str | Path, every: int = 1, *, vectors: bool = True) -> Checkpoint:
    """Return a `Checkpoint` that saves after so many products, by default with the vectors."""
    return Checkpoint(path, vectors=vectors, every=every)


def save_run(
    path: str | Path,
    state: RunState[Any],
    method: Method[Any],
    space: VectorSpace,
    *,
    vectors: bool = False,
) -> None:
    """Write a state with its settings; with `vectors` the block in progress too.

    Parameters
    ----------
    path : str or Path
    state : RunState
    method : Method
        Knows how to take its part of the state to pieces.
    space : VectorSpace
        The operator's.
    vectors : bool
    """
    parts = {f"rule{i}": rule.to_arrays() for i, rule in enumerate(state.rules)}
    for name in ("current", "last"):
        if vectors and getattr(state, name) is not None:
            parts[name] = method.to_arrays(space, getattr(state, name))
    header = {
        "format_version": _FORMAT,
        "settings": dict(state.settings),
        "next_probe": state.next_probe,
        "parts": list(parts),
    }
    arrays = {f"{part}/{name}": v for part, named in parts.items() for name, v in named.items()}
    write_npz(path, "checkpoint", header, arrays)


def saved_settings(path: str | Path) -> dict[str, Any]:
    """Return the settings of the run that `save_run` wrote to `path`, the argument `resume`."""
    settings: dict[str, Any] = read_npz(path, "checkpoint", _FORMAT, "resume")[0]["settings"]
    return settings


def load_run(path: str | Path, method: Method[Any], space: VectorSpace) -> RunState[Any]:
    """Return the state that `save_run` wrote to `path`, on the space's device.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If the file is damaged.
    """
    header, arrays = read_npz(path, "checkpoint", _FORMAT, "resume")
    parts: dict[str, dict[str, np.ndarray]] = {part: {} for part in header["parts"]}
    for name, value in arrays.items():
        part, _, key = name.partition("/")
        parts[part][key] = value
    vectors = {
        name: method.from_arrays(space, parts.pop(name))
        for name in ("current", "last")
        if name in parts
    }
    return RunState(
        tuple(rule_from_arrays(named) for named in parts.values()),
        header["next_probe"],
        settings=header["settings"],
        **vectors,
    )


def check_settings(
    theirs: Mapping[str, Any], ours: Mapping[str, Any], what: str = "resume"
) -> None:
    """Refuse to go on with a run of other settings.

    Raises
    ------
    ValueError
        Naming the first setting that differs.
    """
    for key in sorted({*ours, *theirs}):
        if theirs.get(key) != ours.get(key):
            msg = (
                f"{what} belongs to a run with {key}={theirs.get(key)!r}, this one has "
                f"{key}={ours.get(key)!r}; pass the same, or delete the file to start afresh."
            )
            raise ValueError(msg)
