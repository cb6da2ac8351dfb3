"""Many processes of `torch.distributed`: what each finds on its own, checked and added up.

Every process does its own part without talking to the others, keeps what goes wrong to itself, and
meets them once: a few numbers are gathered that say whether all went well and belongs together,
then the sums are added up. So an error on one process is an error on all, and none waits for ever.
"""

from __future__ import annotations

import sys
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple
from itertools import zip_longest
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from specdens_torch.guards import Totals

# Sums over the same float64 numbers in another order agree much better than this.
_SAME_STATE = 1e-9


class Share(NamedTuple):
    """What one process contributes to an operation, and what it did it with."""

    totals: Totals
    vector: Tensor = torch.empty(0)  # added up in place
    argument: Tensor = torch.empty(0)  # (k, n); the same on all processes


class Processes:
    """The processes that share a risk or a run, as seen from one of them.

    Parameters
    ----------
    process_group : ProcessGroup or "world"
    device : torch.device, optional
        Where the sums are that will be added up.

    Attributes
    ----------
    rank, size : int
        The number of this process in the group, and of all.

    Raises
    ------
    ValueError
        If `torch.distributed` is not initialized, this process is not in the group, or the group
        cannot add up tensors on `device`.
    TypeError
        If `process_group` is neither a group nor ``"world"``.
    """

    def __init__(self, process_group: Any, device: torch.device | None = None) -> None:
        self._group = _as_group(process_group)
        self.rank, self.size = dist.get_rank(self._group), dist.get_world_size(self._group)
        backends = dict(pair.split(":") for pair in dist.get_backend_config(self._group).split(","))
        if device is not None and device.type not in backends:
            msg = (
                f"process_group works with {', '.join(sorted(backends))} tensors only and the "
                f"parameters are on {device}; make it with init_process_group() without a "
                "backend, or move the model first."
            )
            raise ValueError(msg)
        on_host = "cpu" in backends
        self._messages = torch.device("cpu" if on_host else device or next(iter(backends)))

    def combined(
        self,
        compute: Callable[[], Share],
        facts: Sequence[str] = (),
        state: Mapping[str, Tensor] = MappingProxyType({}),
        changed: Callable[[], bool] = lambda: False,
    ) -> tuple[Share, bool]:
        """Compute this process's share and return the sum of all, the same on all processes.

        Parameters
        ----------
        compute : callable
            Does not communicate.
        facts : sequence of str
            ``"name: value"`` of everything that must be the same.
        state : mapping of str to tensor
            Tensors that must be the same.
        changed : callable
            Whether this process will compute something anew that it kept.

        Returns
        -------
        share : Share
            With totals and vector summed.
        mixed : bool
            Whether some processes have changed and others have not.

        Raises
        ------
        Exception
            What `compute` raised.
        RuntimeError
            If it failed on another process, naming it.
        ValueError
            If facts, state or argument differ.
        """
        share, failure, own = Share(Totals()), None, [0.0] * 6
        kinds = [f"tensor {name}: {t.dtype} of {tuple(t.shape)}" for name, t in state.items()]
        facts = [*facts, *kinds]
        try:
            share = compute()
            if share.argument.numel():
                rows = share.argument
                facts = [*facts, f"vectors: {len(rows)} of {rows.shape[1]} numbers, {rows.dtype}"]
            code = float(zlib.crc32("\n".join(facts).encode()))
            own = [
                0.0,
                code,
                float(changed()),
                *checksum([*state.values()]),
                *checksum([share.argument]),
            ]
        except Exception as error:
            failure, own = error, [1.0] + [0.0] * 6
        table = self.gather_numbers([*own, *astuple(share.totals)])
        self._raise_failures(table[:, 0], failure)
        if len(set(table[:, 1])) > 1:
            self._raise_difference(facts)
        epsilon = torch.finfo(share.argument.dtype).eps ** 0.5
        self._check_same(table[:, 5:7], epsilon, "x", "multiply the same vectors in the same order")
        self._check_state(table[:, 3:5], state)
        if share.vector.numel():
            dist.all_reduce(share.vector, group=self._group)
        sums = [sum(column.tolist()) for column in table[:, 7:].T]
        own_totals = astuple(share.totals)
        totals = Totals(*(type(v)(s) for v, s in zip(own_totals, sums, strict=True)))
        return share._replace(totals=totals), len(set(table[:, 2])) > 1

    def gather_numbers(self, numbers: Sequence[float]) -> np.ndarray:
        """Return the numbers of all processes, (size, len(numbers)), in the order of the ranks."""
        mine = torch.tensor(numbers, dtype=torch.float64, device=self._messages)
        rows = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(rows, mine, group=self._group)
        return torch.stack(rows).cpu().numpy()

    def gather_bytes(self, content: bytes) -> list[bytes]:
        """Return the contents of all processes, of any lengths, in the order of the ranks."""
        lengths = self.gather_numbers([len(content)])[:, 0].astype(int)
        padded = np.zeros(max(1, lengths.max()), dtype=np.uint8)
        padded[: len(content)] = np.frombuffer(content, dtype=np.uint8)
        mine = torch.from_numpy(padded).to(self._messages)
        rows = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(rows, mine, group=self._group)
        pairs = zip(rows, lengths, strict=True)
        return [row.cpu().numpy()[:length].tobytes() for row, length in pairs]

    def _gather_texts(self, text: str) -> list[str]:
        return [content.decode() for content in self.gather_bytes(text.encode())]

    def _raise_failures(self, failed: np.ndarray, failure: Exception | None) -> None:
        """Raise the error of this process, or say what happened on the others."""
        if not failed.any():
            return
        text = "" if failure is None else f"{type(failure).__name__}: {failure}"
        texts = self._gather_texts(text)
        if failure is not None:
            failure.add_note(f"This happened on rank {self.rank} of {self.size} processes.")
            raise failure
        rank = int(failed.argmax())
        others = f" (and {int(failed.sum()) - 1} more)" if failed.sum() > 1 else ""
        msg = f"rank {rank}{others} of {self.size} processes failed: {texts[rank]}"
        raise RuntimeError(msg)

    def _raise_difference(self, facts: Sequence[str]) -> None:
        """Name the first fact in which another process differs from rank 0."""
        lists = [text.split("\n") for text in self._gather_texts("\n".join(facts))]
        rank = next(r for r, other in enumerate(lists) if other != lists[0])
        pairs = zip_longest(lists[0], lists[rank], fillvalue="nothing more")
        here, there = next((a, b) for a, b in pairs if a != b)
        msg = (
            f"the processes do different things: rank 0 has {here!r}, rank {rank} has {there!r}; "
            "all must call the same operations with the same settings, each with its own data."
        )
        raise ValueError(msg)

    def _check_same(self, table: np.ndarray, tolerance: float, what: str, hint: str) -> None:
        """Refuse sums and norms, (size, 2), that differ by more than rounding."""
        scale = tolerance * max(1e-300, float(table[0, 1]))
        same = np.isclose(table, table[0], rtol=0.0, atol=scale, equal_nan=True).all(axis=1)
        if not same.all():
            rank = int(same.argmin())
            (sum0, norm0), (sum1, norm1) = table[0], table[rank]
            msg = (
                f"{what} differs between rank 0 (sum {sum0:.10g}, norm {norm0:.10g}) and rank "
                f"{rank} (sum {sum1:.10g}, norm {norm1:.10g}); {hint}."
            )
            raise ValueError(msg)

    def _check_state(self, table: np.ndarray, state: Mapping[str, Tensor]) -> None:
        """Refuse parameters that differ between the processes, and name the first."""
        try:
            self._check_same(table, _SAME_STATE, "the model's state", _BROADCAST)
        except ValueError:  # on all processes, as they have the same table
            tables = self.gather_numbers(sums_of([*state.values()]).ravel().tolist())
            for name, sums in zip(state, np.split(tables, len(state), axis=1), strict=True):
                self._check_same(sums, _SAME_STATE, repr(name), _BROADCAST)
            raise

    def __repr__(self) -> str:
        return f"Processes(rank {self.rank} of {self.size})"


_BROADCAST = (
    "load the same checkpoint everywhere, or broadcast it from rank 0 with "
    "torch.distributed.broadcast (DistributedDataParallel leaves the running statistics of batch "
    "norm different)"
)


def sums_of(tensors: Sequence[Tensor]) -> np.ndarray:
    """Return sum and norm of every tensor, (len(tensors), 2) in float64; zeros for integers."""
    sums = np.zeros((len(tensors), 2))
    places: dict[torch.device, list[int]] = {}
    for i, tensor in enumerate(tensors):
        if tensor.is_floating_point() and tensor.numel() and not tensor.is_sparse:
            places.setdefault(tensor.device, []).append(i)
    wide = torch.float64
    for chosen in places.values():  # one transfer from each device
        own = [tensors[i].detach() for i in chosen]
        pairs = [(t.sum(dtype=wide), torch.linalg.vector_norm(t, dtype=wide)) for t in own]
        sums[chosen] = (
            torch.stack([number for pair in pairs for number in pair]).reshape(-1, 2).cpu()
        )
    return sums


def checksum(tensors: Sequence[Tensor]) -> tuple[float, float]:
    """Return the sum and the norm of all finite tensors together; masks hold infinities."""
    sums = sums_of(tensors)
    sums = sums[np.isfinite(sums).all(axis=1)]
    return float(sums[:, 0].sum()), float(np.linalg.norm(sums[:, 1]))


def _as_group(process_group: Any) -> Any:
    if not (dist.is_available() and dist.is_initialized()):
        msg = (
            "process_group is given and torch.distributed is not initialized; call "
            "torch.distributed.init_process_group() first (torchrun starts the processes), or "
            "pass process_group=None for one process."
        )
        raise ValueError(msg)
    if isinstance(process_group, str) and process_group == "world":
        return dist.group.WORLD
    if process_group is dist.GroupMember.NON_GROUP_MEMBER:
        msg = (
            f"process_group does not contain this process (rank {dist.get_rank()} of the world); "
            "make the Risk on the group's own processes only."
        )
        raise ValueError(msg)
    if not isinstance(process_group, dist.ProcessGroup):
        msg = (
            f"process_group={process_group!r} must be a ProcessGroup, 'world' for all processes, "
            "or None for this one alone. A dimension of a device mesh is mesh.get_group(name)."
        )
        raise TypeError(msg)
    return process_group


def own_model(model: Any, process_group: Any) -> Any:
    """Return the model that `DistributedDataParallel` wraps; its hooks would synchronize.

    Raises
    ------
    ValueError
        If it is not said what a wrapped model's data are, or if the parameters are sharded.
    """
    if isinstance(model, DistributedDataParallel):
        if process_group is None:
            msg = (
                "model is a DistributedDataParallel and process_group is None; pass "
                "process_group='world' for the risk of the data of all processes, or model.module "
                "for that of this process's data alone."
            )
            raise ValueError(msg)
        model = model.module
    if isinstance(model, nn.Module):
        sharded = _sharded_part(model)
        if sharded:
            msg = (
                f"model is sharded over processes ({sharded}), and flat vectors stand for whole "
                "parameters. Load get_model_state_dict(model, options=StateDictOptions("
                "full_state_dict=True)) of torch.distributed.checkpoint.state_dict into a model "
                "that is not sharded."
            )
            raise ValueError(msg)
    return model


def _sharded_part(model: nn.Module) -> str:
    """Return which parameter or module is sharded, or an empty text."""
    tensors = sys.modules.get("torch.distributed.tensor")  # if not imported, nothing is sharded
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is not None:
        kinds = (fsdp.FullyShardedDataParallel, fsdp.FSDPModule)
        for name, module in model.named_modules():
            if isinstance(module, kinds):
                return f"module {name!r} is of type {type(module).__name__}"
    if tensors is not None:
        for name, parameter in model.named_parameters():
            if isinstance(parameter, tensors.DTensor):
                return f"parameter {name!r} is a DTensor"
    return ""
