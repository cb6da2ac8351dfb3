"""The Hessian of a risk: the gradient is recorded once and differentiated for every vector."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from specdens_torch.evaluation import Evaluation
from specdens_torch.linearized import Linearized, RiskMatrix


class Hessian(RiskMatrix):
    r"""The Hessian :math:`\nabla^2 L(\theta)` of a risk with respect to the selected parameters.

    Each chunk of data is evaluated and its gradient recorded once; each column of a product is
    then one pass back through that record, :math:`\nabla^2 L \, v = \nabla_\theta \langle \nabla
    L(\theta), v \rangle` (Pearlmutter 1994). Products always refer to the present parameters,
    work under `torch.no_grad`, and leave the model as it was.

    Parameters
    ----------
    risk : Risk or torch.nn.Module
        A risk, or a model followed by `loss`, `data`, `parameters` and the options of `Risk`.
    loss, data, parameters, **options
        As in `Risk`, if `risk` is a model.

    Attributes
    ----------
    risk : Risk
    parameters : FlatParameters
        Names and places of the parameters; ``ravel`` and ``unravel``.
    space : VectorSpace
        Vectors of length n, in the dtype and on the device of the parameters.

    Raises
    ------
    ValueError
        At the first product, if the risk is not one finite, repeatable function (see `Risk`); or
        if `x` has another length or is on another device.
    TypeError
        If `x` is not a tensor, or has another dtype.

    Notes
    -----
    Where a loss or activation has a kink, such as ReLU, the Hessian is that of the smooth pieces.
    In half precision products are computed in that precision and added up in float32.

    References
    ----------
    Pearlmutter (1994), Fast exact multiplication by the Hessian, Neural Computation 6(1), 147.
    doi:10.1162/neco.1994.6.1.147

    Examples
    --------
    >>> inputs = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> hessian = Hessian(model, torch.nn.MSELoss(), (inputs, torch.ones(2, 1)))
    >>> hessian @ torch.eye(2)  # 2 / N times the Gram matrix of the inputs
    tensor([[1., 0.],
            [0., 4.]])
    >>> hessian.parameters.names
    ('weight',)
    """

    _decays = True

    def _linearize(self, evaluation: Evaluation) -> Linearized:
        return GradientGraph(evaluation.leaves, evaluation.gradients(create_graph=True))


class GradientGraph:
    """The recorded gradient of one chunk, differentiated once for every vector.

    Only the graph is held, by its edges: the gradient's own n numbers are freed.
    """

    def __init__(self, leaves: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> None:
        # A gradient that is missing or constant, as for a bias that enters linearly, has no
        # second derivative.
        self._edges = [
            get_gradient_edge(g) if g is not None and g.requires_grad else None for g in gradients
        ]
        self._leaves = list(leaves)

    def __call__(self, blocks: Sequence[Tensor], chosen: Sequence[int]) -> Sequence[Tensor | None]:
        """Return the product of the chosen block with a vector, by parameter."""
        pairs = [(self._edges[i], block) for i, block in zip(chosen, blocks, strict=True)]
        edges = [edge for edge, _ in pairs if edge is not None]
        leaves = [self._leaves[i] for i in chosen]
        if not edges:
            return [None] * len(leaves)
        vectors = [block for edge, block in pairs if edge is not None]
        return torch.autograd.grad(edges, leaves, vectors, retain_graph=True, allow_unused=True)
