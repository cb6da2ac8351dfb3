"""Diagonal blocks of a matrix by parameter or module, all from the graphs of the whole."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from specdens import Arithmetic, SpectralMeasure, VectorSpace, slq
from specdens.arguments import checked_choice
from specdens_torch.linearized import RiskMatrix
from specdens_torch.parameters import FlatParameters
from specdens_torch.risk import Risk


class Block(Arithmetic):
    """A diagonal block of a matrix: its rows and columns that belong to some parameters.

    Attributes
    ----------
    whole : RiskMatrix
        The matrix whose graphs the products use.
    parameters : FlatParameters
        The parameters of the block.
    space : VectorSpace
    """

    def __init__(self, whole: RiskMatrix, names: Sequence[str]) -> None:
        self.whole = whole
        self.parameters = FlatParameters(whole.risk.model, names)
        self._chosen = [whole.parameters.names.index(name) for name in self.parameters.names]
        self._alone: RiskMatrix | None = None

    @property
    def space(self) -> VectorSpace:
        """The flat vectors over the block's parameters."""
        return self.parameters.space

    @property
    def risk(self) -> Risk:
        """The risk of the whole matrix."""
        return self.whole.risk

    def release(self) -> None:
        """Free the graphs that this block keeps for itself."""
        self._alone = None

    def __matmul__(self, x: Tensor, /) -> Tensor:
        # Of many processes some may keep their graphs and others not; all do the same here.
        if self.risk.processes is not None or self.risk.passes.plan().keeps_graphs:
            return self.whole.product(x, self.parameters, self._chosen)
        # Graphs that are made anew in every product are recorded for this block alone.
        if self._alone is None:
            self._alone = copy.copy(self.whole)
            self._alone.risk = self.risk.restricted(self.parameters.names)
            self._alone.release()
        return self._alone @ x

    def __repr__(self) -> str:
        kind, size = type(self.whole).__name__, len(self.parameters.names)
        names = self.parameters.names[0] if size == 1 else f"{size} parameters"
        return f"Block({names}, n={self.space.dimension:,}, of {kind})"


class Blocks(dict[str, Block]):
    """Diagonal blocks by name; `spectra` estimates all their spectra in one call."""

    def spectra(
        self, estimator: Callable[..., SpectralMeasure] = slq, **options: Any
    ) -> dict[str, SpectralMeasure]:
        """Return the spectral measure of every block.

        Parameters
        ----------
        estimator : callable
            `slq`, `kpm`, `density`, `lanczos`, or any function of an operator.
        **options
            Passed to `estimator` with every block, such as ``num_probes`` and ``seed``;
            ``num_steps`` is cut to the dimension of smaller blocks.

        Returns
        -------
        dict of str to SpectralMeasure
        """
        return {name: self._spectrum(block, estimator, options) for name, block in self.items()}

    @staticmethod
    def _spectrum(
        block: Block, estimator: Callable[..., SpectralMeasure], options: dict[str, Any]
    ) -> SpectralMeasure:
        if options.get("num_steps") is not None:
            options = {**options, "num_steps": min(options["num_steps"], block.space.dimension)}
        measure = estimator(block, **options)
        block.release()  # the next block needs the memory
        return measure


def layerwise(
    operator: RiskMatrix, *, by: str | Callable[[str], str | None] = "parameter"
) -> Blocks:
    r"""Return the diagonal blocks of a matrix, one for each parameter or module.

    The blocks are operators that share the graphs which the whole matrix keeps between products:
    a product with a block is a pass through the part of the graph that leads from its parameters
    to the loss and back. Where the graphs do not fit the risk's memory budget, a block records
    its own part, again and again if it must.

    Parameters
    ----------
    operator : RiskMatrix
        `Hessian`, `GaussNewton` or another matrix over the parameters of a risk.
    by : str or callable
        ``"parameter"``: a block for each parameter, by its name. ``"module"``: a block for each
        module that holds parameters itself, by its name. Or a function from a parameter's name to
        the name of its block, None for parameters to leave out.

    Returns
    -------
    Blocks
        A dictionary from names to operators, in the model's order, each with `space` and
        `parameters`. ``layerwise(operator).spectra(num_probes=3)`` gives the spectra of all.

    Raises
    ------
    TypeError
        If `operator` is not a matrix over the parameters of a risk.
    ValueError
        If `by` is unknown, or leaves all parameters out.

    Notes
    -----
    A block that is deep in the network costs nearly as much as the whole matrix, one near the
    loss nearly nothing. Rows, heads or neurons within a parameter are
    ``restrict(operator, operator.parameters.indices(name)[rows].ravel())``.

    Examples
    --------
    >>> import torch
    >>> from specdens_torch import Hessian
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Tanh(), torch.nn.Linear(2, 2))
    >>> data = torch.ones(4, 3), torch.zeros(4, dtype=torch.int64)
    >>> blocks = layerwise(Hessian(model, torch.nn.CrossEntropyLoss(), data), by="module")
    >>> {name: block.space.dimension for name, block in blocks.items()}
    {'0': 8, '2': 6}
    >>> (blocks["2"] @ torch.ones(6)).shape
    torch.Size([6])
    """
    if not isinstance(operator, RiskMatrix):
        msg = (
            f"operator has type {type(operator).__qualname__}; expected a matrix over the "
            "parameters of a risk, such as Hessian(risk)."
        )
        raise TypeError(msg)
    rules: dict[str, Callable[[str], str | None]] = {
        "parameter": lambda name: name,
        "module": lambda name: name.rpartition(".")[0],
    }
    advice = "or a function of names"
    rule = by if callable(by) else rules[checked_choice("by", by, rules, advice)]
    groups: dict[str, list[str]] = {}
    for name in operator.parameters.names:
        key = rule(name)
        if key is not None:
            groups.setdefault(key, []).append(name)
    if not groups:
        msg = f"by={by!r} leaves out every parameter of {list(operator.parameters.names)}."
        raise ValueError(msg)
    return Blocks({key: Block(operator, names) for key, names in groups.items()})
