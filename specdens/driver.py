"""One loop for every method: blocks of probes, progress, callbacks, and a resumable state."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import numpy as np
import tqdm

from specdens.backends import Array
from specdens.interpretation import Rule, join
from specdens.probes import ProbeSampler, draw
from specdens.spaces import LinearOperator, VectorSpace

S = TypeVar("S")


class Method(Protocol[S]):
    """An iteration of one product a step. Pure: each function returns new values."""

    @property
    def num_steps(self) -> int:
        """Products that one block of probes needs at most."""
        ...

    @property
    def extendable(self) -> bool:
        """Whether a finished block can be taken further by a method of more steps."""
        ...

    def init(self, operator: LinearOperator, probes: Array) -> S: ...
    def step(self, operator: LinearOperator, state: S) -> S: ...  # exactly one product
    def steps_taken(self, state: S) -> int: ...  # products so far
    def done(self, state: S) -> bool: ...
    def finish(self, operator: LinearOperator, state: S) -> Rule: ...
    def memory(self, space: VectorSpace) -> int: ...  # bytes per probe of a block
    def to_arrays(self, space: VectorSpace, state: S) -> dict[str, np.ndarray]: ...
    def from_arrays(self, space: VectorSpace, arrays: Mapping[str, np.ndarray]) -> S: ...


@dataclass(frozen=True)
class RunState(Generic[S]):
    """All that a run needs to go on. Immutable: an interrupted step leaves the last one intact."""

    rules: tuple[Rule, ...] = ()  # of the finished blocks of probes
    next_probe: int = 0
    current: S | None = None  # vectors of the block in progress; a small checkpoint leaves them out
    settings: Mapping[str, Any] = field(default_factory=dict)  # what a run that goes on must share
    last: S | None = None  # vectors of the block finished last, if the method can go on from them


class Progress(NamedTuple):
    """What a callback is told after every product, and after every finished block of probes."""

    state: RunState[Any]
    done: int  # products so far, a block of probes counting as one
    total: int  # products in all


Callback = Callable[[Progress], None]


def iterate(
    method: Method[S],
    operator: LinearOperator,
    *,
    num_probes: int,
    seed: int,
    block_size: int,
    probes: ProbeSampler,
    state: RunState[S] | None = None,
) -> Iterator[RunState[S]]:
    """Yield the state after every product and after every finished block of probes."""
    state = RunState() if state is None else state
    while state.next_probe < num_probes:
        block = range(state.next_probe, min(state.next_probe + block_size, num_probes))
        current = state.current
        if current is None:
            current = method.init(operator, draw(probes, operator.space, seed, block))
        while not method.done(current):
            current = method.step(operator, current)
            state = replace(state, current=current)
            yield state
        rules = (*state.rules, method.finish(operator, current))
        last = current if method.extendable else None
        state = replace(state, rules=rules, next_probe=block.stop, current=None, last=last)
        yield state


def run(
    method: Method[S],
    operator: LinearOperator,
    *,
    num_probes: int,
    seed: int,
    block_size: int,
    probes: ProbeSampler,
    state: RunState[S] | None = None,
    callbacks: tuple[Callback, ...] = (),
    progress: bool | None = None,
) -> Rule:
    """Run all probes and return their rules, one row per probe, in the order of the probes."""
    start = RunState() if state is None else state
    total = -(-num_probes // block_size) * method.num_steps
    finished = -(-start.next_probe // block_size) * method.num_steps
    kept = 0 if start.current is None else method.steps_taken(start.current)
    done, state = finished + kept, start
    session = operator.space.backend.session()
    with session, progress_bar(total, done, progress) as bar:
        for state in iterate(
            method,
            operator,
            num_probes=num_probes,
            seed=seed,
            block_size=block_size,
            probes=probes,
            state=start,
        ):
            if state.current is None:  # a block is finished, perhaps early
                finished += method.num_steps
                done = finished
            else:
                done += 1
            bar.update(done - bar.n)
            for callback in callbacks:
                callback(Progress(state, done, total))
    rule: Rule = join(state.rules)
    return rule


def progress_bar(total: int | None, done: int, progress: bool | None, unit: str = "block") -> Any:
    """Return a progress bar, hidden unless asked for or watched by somebody for two seconds."""
    watched = sys.stderr.isatty() or "ipykernel" in sys.modules
    hidden = not watched if progress is None else not progress
    delay = 2 if progress is None else 0
    return tqdm.tqdm(
        total=total, initial=done, disable=hidden, delay=delay, desc="products", unit=unit
    )
