"""Leaving everything as it was, and noticing changes: random states, modules, fingerprints."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class RandomState:
    """The state of every global generator that a forward pass or a data set may draw from."""

    python: tuple[Any, ...]
    numpy: tuple[Any, ...]
    devices: tuple[torch.device, ...]  # accelerators only
    tensors: tuple[Tensor, ...]  # of the CPU, then of each of `devices`

    @classmethod
    def now(cls, devices: Iterable[torch.device]) -> RandomState:
        """Return the present state, for the CPU and those of `devices` that are accelerators."""
        accelerators = tuple(d for d in devices if d.type in ("cuda", "xpu"))
        states = [torch.get_device_module(d).get_rng_state(d) for d in accelerators]
        numpy_state = np.random.get_state(legacy=True)  # noqa: NPY002 (data sets do draw from it)
        return cls(
            random.getstate(),
            tuple(numpy_state),
            accelerators,
            (torch.get_rng_state(), *states),
        )

    def restore(self) -> None:
        """Make this the present state again."""
        random.setstate(self.python)
        np.random.set_state(self.numpy)  # noqa: NPY002
        torch.set_rng_state(self.tensors[0])
        for device, state in zip(self.devices, self.tensors[1:], strict=True):
            torch.get_device_module(device).set_rng_state(state, device)

    def same_as(self, other: RandomState) -> bool:
        """Tell whether nothing was drawn between the two."""
        tensors = zip(self.tensors, other.tensors, strict=True)
        arrays = zip(self.numpy, other.numpy, strict=True)
        return (
            self.python == other.python
            and all(np.array_equal(mine, its) for mine, its in arrays)
            and all(torch.equal(mine, its) for mine, its in tensors)
        )


@contextmanager
def left_as_it_was(
    model: nn.Module,
    devices: Iterable[torch.device],
    generators: Iterable[torch.Generator],
    seed: int,
) -> Iterator[None]:
    """Seed the generators so that passes repeat, and put them and the modules' attributes back.

    Parameters and buffers need no protection here: forward passes see aliases and copies of them.
    """
    present = RandomState.now(devices)
    own = [(g, g.get_state()) for g in generators]
    attributes = [(module, dict(vars(module))) for module in model.modules()]
    try:
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        torch.default_generator.manual_seed(seed)
        for generator, _ in own:
            generator.manual_seed(seed)
        yield
    finally:
        for module, before in attributes:
            _put_back(vars(module), before)
        for generator, state in own:
            generator.set_state(state)
        present.restore()


def _put_back(now: dict[str, Any], before: dict[str, Any]) -> None:
    """Undo what a forward pass assigned to a module, such as cached outputs and counters."""
    for key in [key for key in now if key not in before]:
        del now[key]
    for key, value in before.items():
        if now.get(key, now) is not value:
            now[key] = value


@dataclass(frozen=True)
class Fingerprint:
    """Everything a kept graph depends on; equal fingerprints mean that the graph is still right.

    Identity, storage and version of every tensor are compared. The checksum sees what these miss,
    edits through ``.data``. The tensors themselves are held, so that no other can take their
    identity.
    """

    tensors: tuple[Tensor, ...]
    places: tuple[Any, ...]
    checksum: tuple[int, ...]
    settings: tuple[Any, ...]

    @classmethod
    def of(
        cls, summed: Iterable[Tensor], watched: Iterable[Tensor], settings: tuple[Any, ...]
    ) -> Fingerprint:
        """Return the fingerprint of tensors, the first ones with their values' checksum."""
        summed = tuple(summed)
        tensors = (*summed, *watched)
        places = tuple((id(t), t.data_ptr(), _version(t), t.shape, t.dtype) for t in tensors)
        return cls(tensors, places, _checksum(summed), settings)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Fingerprint):
            return NotImplemented
        mine = (self.places, self.checksum, self.settings)
        return mine == (other.places, other.checksum, other.settings)

    __hash__ = None  # type: ignore[assignment]


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes


def _checksum(tensors: Iterable[Tensor]) -> tuple[int, ...]:
    """Return sums of the entries' bits, modulo 2^64, with one transfer for each device."""
    by_device: dict[torch.device, list[Tensor]] = {}
    for tensor in tensors:
        if tensor.dtype.is_floating_point and tensor.numel() and not tensor.is_sparse:
            sums = by_device.setdefault(tensor.device, [])
            sums += [bits.sum(dtype=torch.int64) for bits in _bits(tensor.detach().reshape(-1))]
    return tuple(chain.from_iterable(torch.stack(sums).tolist() for sums in by_device.values()))


def _bits(entries: Tensor) -> list[Tensor]:
    """Return the memory of a vector as integers: of 64 bits, which add up without a copy."""
    size = entries.element_size()
    together = 8 // size
    whole = entries.numel() // together * together
    if entries.storage_offset() % together:
        whole = 0
    parts = (entries[:whole].view(torch.int64), entries[whole:].view(_INTEGERS[size]))
    return [part for part in parts if part.numel()]


def wide_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype that sums over many entries are accumulated in."""
    return torch.float32 if device.type == "mps" else torch.float64


def autocast_settings(device: torch.device) -> tuple[Any, ...]:
    """Return the caller's automatic mixed precision, which a graph is recorded in."""
    kind = device.type
    return torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
