"""The Jacobian of recorded tensors with respect to the parameters, both ways from one record."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge


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

    References
    ----------
    Townsend (2017), A new trick for calculating Jacobian vector products.
    """

    def __init__(self, leaves: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        self._leaves, self._outputs = list(leaves), list(outputs)
        # Any u will do, as only the structure is recorded: one zero, as large as needed.
        self._duals = [
            torch.zeros((), dtype=o.dtype, device=o.device).expand(o.shape).requires_grad_()
            for o in outputs
        ]
        gradients: Sequence[Tensor | None] = [None] * len(self._leaves)
        if self._outputs:
            gradients = torch.autograd.grad(
                self._outputs, self._leaves, self._duals, create_graph=True, allow_unused=True
            )
        self._edges = [
            get_gradient_edge(g) if g is not None and g.requires_grad else None for g in gradients
        ]

    def __call__(self, blocks: Sequence[Tensor], chosen: Sequence[int]) -> list[Tensor]:
        """Return :math:`J v`, one tensor for each output, for v given on the chosen leaves."""
        pairs = [(self._edges[i], block) for i, block in zip(chosen, blocks, strict=True)]
        edges = [edge for edge, _ in pairs if edge is not None]
        if not edges:
            return [torch.zeros_like(o) for o in self._outputs]
        vectors = [block for edge, block in pairs if edge is not None]
        found = torch.autograd.grad(
            edges, self._duals, vectors, retain_graph=True, allow_unused=True
        )
        return [
            torch.zeros_like(o) if product is None else product
            for o, product in zip(self._outputs, found, strict=True)
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
