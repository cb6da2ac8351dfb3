"""How much a linearized chunk keeps in memory: the size of chunks, and of blocks of columns."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from specdens_torch.structures import Batch, num_elements, num_examples

# A chunk whose saved tensors exceed the last-level cache is 1.2 to 2 times slower on a CPU, one
# much below it pays for the calls instead (measured on a multilayer perceptron, a convolutional
# network and a transformer, with 32 MiB of cache). An accelerator wants as much work at once as
# it can get.
CPU_CHUNK_BYTES = 20 * 2**20
ACCELERATOR_CHUNK_BYTES = 512 * 2**20
_LEAST_BUDGET = 2**30
PILOT_EXAMPLES = 32
# Least bytes of a chunk over those of the parameters. Timed on ResNet-18 (45 MB of parameters): a
# Hessian took 1.2 times as long in chunks of 100 MiB as in one of 290 MiB.
_PASSES = 8


class SavedBytes:
    """Counts the bytes that autograd saves, each storage once, leaving out what exists anyway."""

    def __init__(self, exclude: Iterable[Tensor]) -> None:
        self._excluded = {t.untyped_storage().data_ptr() for t in exclude}
        self._found: dict[int, int] = {}

    @property
    def total(self) -> int:
        """Bytes counted so far."""
        return sum(self._found.values())

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count what is saved inside the block."""
        with saved_tensors_hooks(self._pack, lambda tensor: tensor):
            yield

    def _pack(self, tensor: Tensor) -> Tensor:
        if tensor.layout == torch.strided:
            storage = tensor.untyped_storage()
            # A slice of the data shares a storage that is much larger, an expanded tensor a
            # smaller one.
            held = min(tensor.numel() * tensor.element_size(), storage.nbytes())
            place = storage.data_ptr()
            if place not in self._excluded:
                self._found[place] = max(self._found.get(place, 0), held)
        return (
            tensor.detach()
        )  # autograd reconnects it; the tensor itself would be a reference cycle


class WrittenBytes(SavedBytes):
    """Counts the bytes that operations write instead, of which saved ones are a part.

    Only inputs are saved and not written. It is for models with transforms of torch.func, which
    refuse to run where saved tensors are watched.
    """

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count what is written inside the block, memory that is written again once."""
        with _Writes(self._pack):
            yield


class _Writes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Shows every tensor that an operation returns."""

    def __init__(self, show: Callable[[Tensor], object]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._show = show

    def __torch_dispatch__(
        self,
        func: Any,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for part in result if isinstance(result, tuple | list) else (result,):
            if isinstance(part, Tensor):
                self._show(part)
        return result


@dataclass(frozen=True)
class Plan:
    """How a pass over the data is cut into chunks, and whether graphs are kept.

    Attributes
    ----------
    fixed_bytes, bytes_per_element : float
        Bytes that a linearized chunk saves, whatever its size and for each entry of its inputs.
    memory_budget : int
        Bytes that all kept graphs, or else the graph of one chunk, may take.
    chunk_bytes : int
        Bytes that a chunk should take for speed, the fixed ones apart.
    batches_columns : bool
        Whether the columns of a product should go through a chunk together.
    examples, elements : int
        What the whole data set has; 0 before it was read once.
    """

    fixed_bytes: float
    bytes_per_element: float
    memory_budget: int
    chunk_bytes: int
    batches_columns: bool = False
    examples: int = 0
    elements: int = 0

    @property
    def keeps_graphs(self) -> bool:
        """Whether the linearized graphs of all chunks fit the budget together."""
        growing = self.elements * self.bytes_per_element
        chunks = math.ceil(growing / self._share)
        return self.elements > 0 and growing + chunks * self.fixed_bytes <= self.memory_budget

    @property
    def columns_at_once(self) -> int:
        """The columns that go through a chunk together, each taking about what the chunk saves."""
        if not self.batches_columns:
            return 1
        growing = min(self.elements * self.bytes_per_element, self._share)
        return max(1, int(self.memory_budget / max(self.fixed_bytes + growing, 1.0)))

    def limit(self, batch: Batch) -> int:
        """Return the most examples of the kind of `batch` that a chunk may have, at least one."""
        examples = num_examples(batch)
        if not examples:
            return 1
        per_example = self.bytes_per_element * num_elements(batch) / examples
        most = max(1, int(self._share / max(per_example, 1.0)))
        if self.examples > most:  # chunks of equal size, rather than a small one at the end
            most = math.ceil(self.examples / math.ceil(self.examples / most))
        return most

    @property
    def _share(self) -> float:
        """Bytes of one chunk that grow with its size."""
        return max(1.0, min(self.chunk_bytes, self.memory_budget - self.fixed_bytes))


def fit_plan(
    sizes: list[tuple[int, int]], memory_budget: int, device: torch.device, parameter_bytes: int
) -> Plan:
    """Return a plan from the elements and saved bytes of one or two chunks, larger one first.

    Every chunk goes through the parameters, the vector and the product several times, however few
    examples it has. Chunks that save no more bytes than that would spend their time on it.
    """
    elements, saved = sizes[0]
    slope, fixed = saved / elements, 0.0
    if len(sizes) > 1 and sizes[1][0] < elements:
        slope = max(0.0, (saved - sizes[1][1]) / (elements - sizes[1][0]))
        fixed = max(0.0, saved - slope * elements)
    chunk_bytes = CPU_CHUNK_BYTES if device.type == "cpu" else ACCELERATOR_CHUNK_BYTES
    most = max(chunk_bytes, _PASSES * parameter_bytes)
    return Plan(fixed, slope, memory_budget, most, batches_columns(device))


def batches_columns(device: torch.device) -> bool:
    """Return whether columns go through a chunk together on `device`.

    Timed on an H100 with ten columns: a product took a quarter of the time of single columns on a
    multilayer perceptron, a third on ResNet-18. On a CPU it took as long, or twice as long where
    layers are convolutions.
    """
    return device.type != "cpu"


def default_memory_budget(device: torch.device) -> int:
    """Return 1 GiB, or an eighth of the memory of a graphics processor if that is more."""
    if device.type != "cuda":
        return _LEAST_BUDGET
    return max(_LEAST_BUDGET, torch.cuda.get_device_properties(device).total_memory // 8)
