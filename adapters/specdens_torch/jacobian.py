"""The Jacobian of recorded tensors with respect to the parameters, both ways from one record."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from specdens_torch.orders import linear_only


class Jacobian:
    r"""The Jacobian :math:`J` of some tensors with respect to leaves, for many products.

    :math:`J^\top u` is one pass back through the record of the tensors. It is linear in
    :math:`u`, so that its own record, made once at any :math:`u`, gives :math:`J v = \nabla_u
    \langle J^\top u, v \rangle` by a pass back: no forward-mode rules, and the model is not
    evaluated again.

    Parameters
    ----------
    leaves : sequence of tensors
        What is differentiated for, the columns.
    outputs : sequence of tensors
        What is differentiated, the rows; all recorded on the graph of `leaves`.

    Attributes
    ----------
    rows : list of tensors
        Zeros like each of the outputs, of one number's memory.

    References
    ----------
    Townsend (2017), A new trick for calculating Jacobian vector products.
    """

    def __init__(self, leaves: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        self._leaves = list(leaves)
        # Any u will do, as only the structure is recorded: one zero, as large as needed.
        self.rows = [
            torch.zeros((), dtype=o.dtype, device=o.device).expand(o.shape).requires_grad_()
            for o in outputs
        ]
        gradients: Sequence[Tensor | None] = [None] * len(self._leaves)
        if self.rows:
            with linear_only():
                gradients = torch.autograd.grad(
                    outputs, self._leaves, self.rows, create_graph=True, allow_unused=True
                )
        self._outputs = [get_gradient_edge(o) for o in outputs]  # their numbers are not needed
        self._edges = [
            get_gradient_edge(g) if g is not None and g.requires_grad else None for g in gradients
        ]

    def __call__(self, blocks: Sequence[Tensor], chosen: Sequence[int]) -> list[Tensor]:
        """Return :math:`J v`, one tensor for each output, for v given on the chosen leaves."""
        pairs = [(self._edges[i], block) for i, block in zip(chosen, blocks, strict=True)]
        edges = [edge for edge, _ in pairs if edge is not None]
        if not edges:
            return [torch.zeros_like(row) for row in self.rows]
        vectors = [block for edge, block in pairs if edge is not None]
        with linear_only():
            found = torch.autograd.grad(
                edges, self.rows, vectors, retain_graph=True, allow_unused=True
            )
        return [
            torch.zeros_like(row) if product is None else product
            for row, product in zip(self.rows, found, strict=True)
        ]

    def transposed(
        self, cotangents: Sequence[Tensor | None], chosen: Sequence[int]
    ) -> Sequence[Tensor | None]:
        r"""Return :math:`J^\top u` by chosen leaf; None stands for zeros on both sides."""
        pairs = zip(self._outputs, cotangents, strict=True)
        live = [(output, u) for output, u in pairs if u is not None]
        leaves = [self._leaves[i] for i in chosen]
        if not live:
            return [None] * len(leaves)
        outputs, vectors = zip(*live, strict=True)
        return torch.autograd.grad(outputs, leaves, vectors, retain_graph=True, allow_unused=True)
