"""Two processes of torch.distributed for tests, and how the data are divided between them."""

from __future__ import annotations

import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

NUMBER, CUT = 12, 9  # examples, and how many of them rank 0 has
SECONDS = 100  # two processes need about ten; more is a deadlock


def vectors(size, number=3, dtype=torch.float64):
    generator = torch.Generator().manual_seed(4)
    return torch.randn(size, number, generator=generator, dtype=torch.float64).to(dtype)


def shard(data, rank, cut=CUT):
    """The first `cut` examples for rank 0, the others for rank 1; everything without a rank."""
    place = slice(None) if rank is None else slice(0, cut) if rank == 0 else slice(cut, None)
    return tuple(part[place] for part in data)


def enter(rank, function, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meeting",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=SECONDS / 2),
    )
    try:
        torch.save(function(rank, "world"), folder / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


def launch(function, folder):
    """Return what `function(rank, "world")` returns on each of two processes."""
    context = torch.multiprocessing.spawn(enter, (function, folder), nprocs=2, join=False)
    latest = time.monotonic() + SECONDS
    while not context.join(timeout=1):
        if time.monotonic() > latest:
            for process in context.processes:
                process.kill()
            pytest.fail("two processes wait for each other")
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in (0, 1)]


def relative(found, expected):
    return float((found - expected).abs().max() / expected.abs().max())
