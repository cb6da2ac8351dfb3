"""Flat vectors and the parameters they stand for: the only place where one becomes the other."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from specdens import VectorSpace, backend_of
from specdens_torch.selection import Selection, promoted_dtype, select_parameters


class FlatParameters:
    """Names, shapes and places of a model's parameters in one flat vector of length n.

    Parameters
    ----------
    model : torch.nn.Module
    parameters : str, module, tensor, or several of these, optional
        None takes every trainable parameter (``requires_grad``). Otherwise names, glob patterns
        over names, submodules or parameters; what is named is taken even if frozen. The order in
        the vector is always the model's own, and tied parameters are there once.

    Attributes
    ----------
    size : int
        Length n of the flat vector.
    names : tuple of str
        Parameter names in the order of the vector.
    slices : dict of str to slice
        Place of each parameter in the vector.
    shapes : dict of str to torch.Size
        Shape of each parameter.
    tensors : dict of str to torch.nn.Parameter
        The model's own parameters, not copies.
    space : VectorSpace
        Vectors of length n in the promoted dtype of the parameters, on the first one's device.

    Raises
    ------
    ValueError
        If a name or pattern matches nothing (close names are listed), nothing is selected, or a
        parameter is not real floating point.
    TypeError
        If `model` is not a module, or a selector is none of the above.

    Examples
    --------
    >>> model = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 1))
    >>> parameters = FlatParameters(model, "*.weight")
    >>> parameters
    FlatParameters(2 tensors, 8 parameters, float32, cpu)
    >>> parameters.slices
    {'0.weight': slice(0, 6, None), '2.weight': slice(6, 8, None)}
    >>> {name: tuple(block.shape) for name, block in parameters.unravel(torch.zeros(8)).items()}
    {'0.weight': (2, 3), '2.weight': (1, 2)}
    """

    def __init__(self, model: nn.Module, parameters: Selection = None) -> None:
        selected = select_parameters(model, parameters)
        self._model = model
        self.names: tuple[str, ...] = tuple(selected)
        self.shapes: dict[str, torch.Size] = {name: p.shape for name, p in selected.items()}
        self._kinds = {name: (p.shape, p.dtype, p.device) for name, p in selected.items()}
        self.slices: dict[str, slice] = {}
        stop = 0
        for name, parameter in selected.items():
            start, stop = stop, stop + parameter.numel()
            self.slices[name] = slice(start, stop)
        self.size: int = stop
        first = next(iter(selected.values()))
        dtype = promoted_dtype(selected.values())
        self.space: VectorSpace = VectorSpace(stop, dtype, first.device, backend_of(first))

    @property
    def tensors(self) -> dict[str, nn.Parameter]:
        """The model's own selected parameters, as they are now."""
        named = dict(self._model.named_parameters())
        return {name: named[name] for name in self.names if name in named}

    def check_unchanged(self) -> None:
        """Refuse a model whose selected parameters are not of the kind they were any more.

        Raises
        ------
        ValueError
            If a parameter was removed, or has another shape, dtype or device.
        """
        kinds = {name: (p.shape, p.dtype, p.device) for name, p in self.tensors.items()}
        for name, kind in self._kinds.items():
            if kinds.get(name) != kind:
                now = kinds.get(name, "gone")
                msg = (
                    f"parameter {name!r} was {kind} when it was selected and is {now} now; make a "
                    "new Risk after changing the model's structure, dtype or device."
                )
                raise ValueError(msg)

    def ravel(
        self,
        blocks: Mapping[str, Tensor | None] | Sequence[Tensor | None] | None = None,
    ) -> Tensor:
        """Return one flat vector from one block per parameter.

        Parameters
        ----------
        blocks : mapping of str to tensor, or sequence of tensors, optional
            Blocks by parameter name, or in the order of `names`, of the parameters' shapes; with
            one more trailing axis of length k for k vectors at once. None stands for a block of
            zeros, so ``[p.grad for p in ...]`` can be passed. Without `blocks`, the current
            parameters.

        Returns
        -------
        tensor of shape (n,) or (n, k)
            On the space's device, in its dtype. Where that is half precision, wider blocks give a
            float32 vector.

        Raises
        ------
        ValueError
            If a name is missing or unknown, or a block has the wrong shape.
        TypeError
            If a block is no tensor.
        """
        tensors = self._ordered(blocks)
        width = self._width(tensors)
        present = [t for t in tensors if t is not None]
        dtype = self.space.dtype
        if present and promoted_dtype(present) != dtype:
            dtype = self.space.working_dtype
        flat = torch.zeros((self.size, *width), dtype=dtype, device=self.space.device)
        for name, tensor in zip(self.names, tensors, strict=True):
            if tensor is not None:
                flat[self.slices[name]] = tensor.detach().reshape(-1, *width).to(flat)
        return flat

    def unravel(self, x: Tensor) -> dict[str, Tensor]:
        """Return the blocks of a flat vector by parameter name, as views where possible.

        Parameters
        ----------
        x : tensor of shape (n,) or (n, k)

        Returns
        -------
        dict of str to tensor
            In the dtype and on the device of `x`, of the parameter's shape, with a trailing axis of
            length k if `x` has one.

        Raises
        ------
        ValueError
            If the first axis of `x` does not have length n.
        TypeError
            If `x` is no tensor.
        """
        if not isinstance(x, Tensor):
            msg = (
                f"x has type {type(x).__qualname__}; expected a torch.Tensor of length {self.size}."
            )
            raise TypeError(msg)
        if x.ndim not in (1, 2) or x.shape[0] != self.size:
            msg = (
                f"x has shape {tuple(x.shape)}; expected ({self.size},) or ({self.size}, k), one "
                "entry for each selected parameter."
            )
            raise ValueError(msg)
        width = x.shape[1:]
        return {
            name: x[self.slices[name]].reshape(*self.shapes[name], *width) for name in self.names
        }

    def indices(self, name: str) -> np.ndarray:
        """Return the places of one parameter's entries in the flat vector.

        Rows, heads and neurons are slices of it: ``restrict(hessian,
        hessian.parameters.indices("0.weight")[3])`` is the block of the fourth neuron.

        Parameters
        ----------
        name : str

        Returns
        -------
        ndarray of int64, of the parameter's shape

        Raises
        ------
        ValueError
            If no selected parameter has that name.

        Examples
        --------
        >>> FlatParameters(nn.Linear(3, 2)).indices("weight")[1]
        array([3, 4, 5])
        """
        if not isinstance(name, str) or name not in self.slices:
            msg = f"name={name!r} is none of the selected parameters {list(self.names)}."
            raise ValueError(msg)
        place = self.slices[name]
        return np.arange(place.start, place.stop).reshape(self.shapes[name])

    def _ordered(
        self, blocks: Mapping[str, Tensor | None] | Sequence[Tensor | None] | None
    ) -> list[Tensor | None]:
        if blocks is None:
            return list(self.tensors.values())
        if isinstance(blocks, Mapping):
            missing = [name for name in self.names if name not in blocks]
            unknown = [name for name in blocks if name not in self.slices]
            if missing or unknown:
                msg = (
                    f"blocks lacks the parameters {missing} and has the unknown ones {unknown}; "
                    f"expected exactly {list(self.names)}."
                )
                raise ValueError(msg)
            return [blocks[name] for name in self.names]
        tensors = list(blocks) if isinstance(blocks, Iterable) else [blocks]
        if len(tensors) != len(self.names):
            msg = f"blocks has {len(tensors)} tensors; expected one for each of {list(self.names)}."
            raise ValueError(msg)
        return tensors

    def _width(self, tensors: Sequence[Tensor | None]) -> tuple[int, ...]:
        """Return ``()`` for one vector and ``(k,)`` for k, checking every block's shape."""
        widths = set()
        for name, tensor in zip(self.names, tensors, strict=True):
            shape = self.shapes[name]
            if tensor is None:
                continue
            if not isinstance(tensor, Tensor):
                kind = type(tensor).__qualname__
                msg = f"the block of {name!r} has type {kind}; expected a tensor."
                raise TypeError(msg)
            extra = tuple(tensor.shape[len(shape) :])
            if tuple(tensor.shape[: len(shape)]) != tuple(shape) or len(extra) > 1:
                msg = (
                    f"the block of {name!r} has shape {tuple(tensor.shape)}; expected "
                    f"{tuple(shape)} or that with one trailing axis."
                )
                raise ValueError(msg)
            widths.add(extra)
        if len(widths) > 1:
            msg = f"blocks have different trailing axes, {sorted(widths)}; they must be the same."
            raise ValueError(msg)
        return widths.pop() if widths else ()

    def __len__(self) -> int:
        return len(self.names)

    def __repr__(self) -> str:
        dtype = str(self.space.dtype).removeprefix("torch.")
        tensors = "1 tensor" if len(self) == 1 else f"{len(self)} tensors"
        return f"FlatParameters({tensors}, {self.size:,} parameters, {dtype}, {self.space.device})"
