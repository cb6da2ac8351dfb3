"""Orthonormal bases of a model's parameters, block by block, from the curvature of a risk."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from specdens import eigsh
from specdens.certificates.checks import check_basis_names
from specdens_torch.gauss_newton import GaussNewton
from specdens_torch.kronecker_factors import KroneckerFactors
from specdens_torch.layerwise import Block, layerwise
from specdens_torch.posterior import Bases, as_basis
from specdens_torch.risk import Risk
from specdens_torch.state import wide_dtype

_LARGEST_DENSE = 2000  # parameters of a block whose matrix is formed


def choose_bases(risk: Risk, basis: Any, num_eigenvectors: int) -> Bases:
    """Return the basis of every parameter that varies, at the present parameters.

    Parameters
    ----------
    risk : Risk
    basis : str, mapping or callable
        As in `pac_bayes`.
    num_eigenvectors : int
        Of large blocks in the exact basis.

    Raises
    ------
    ValueError
        If `basis` or a parameter in it is unknown, or one is not orthonormal.
    TypeError
        If `basis` is of another type.
    """
    found: Any
    if basis == "standard":
        found = {}
    elif basis == "kronecker":
        found = kronecker_bases(risk)
    elif basis == "exact":
        found = exact_bases(risk, num_eigenvectors)
    elif isinstance(basis, Mapping) or callable(basis):
        found = basis(risk) if callable(basis) else basis
    else:
        msg = (
            f"basis={basis!r} is unknown; expected 'standard', 'kronecker', 'exact', a mapping by "
            "parameter name or a function from the risk to one."
        )
        raise ValueError(msg) if isinstance(basis, str) else TypeError(msg)
    if not isinstance(found, Mapping):
        msg = f"basis returned {type(found).__qualname__}; expected a mapping by parameter name."
        raise TypeError(msg)
    names = risk.parameters.names
    check_basis_names(found, names, "parameters")
    return {name: as_basis(found.get(name), name, risk.parameters) for name in names}


def kronecker_bases(risk: Risk) -> dict[str, tuple[Tensor, Tensor | None]]:
    """Return (U, V) of the weight of every linear layer and convolution, (U, None) of its bias.

    References
    ----------
    Wu, Zhu, Wu, Wang, Ge (2020), arXiv 2010.04261 (the decoupling conjecture).
    """
    bases: dict[str, tuple[Tensor, Tensor | None]] = {}
    for layer, module in risk.model.named_modules():
        weight, bias = (f"{layer}.{kind}" if layer else kind for kind in ("weight", "bias"))
        if not _has_factors(module) or weight not in risk.parameters.names:
            continue
        factors = KroneckerFactors(risk, layer)
        space = factors.space
        left, right = (
            space.from_numpy(np.linalg.eigh(side)[1]) for side in (factors.left, factors.right)
        )
        bases[weight] = left, right
        if bias in risk.parameters.names:
            bases[bias] = left, None
    return bases


def _has_factors(module: nn.Module) -> bool:
    is_convolution = isinstance(module, nn.Conv1d | nn.Conv2d) and module.groups == 1
    return isinstance(module, nn.Linear) or is_convolution


def exact_bases(risk: Risk, num_eigenvectors: int) -> dict[str, Tensor]:
    """Return the eigenvectors of the Gauss-Newton matrix's diagonal block of every parameter.

    All of them for blocks of up to 2,000 parameters, the leading ones for others.
    """
    bases: dict[str, Tensor] = {}
    for name, block in layerwise(GaussNewton(risk)).items():
        bases[name] = _block_eigenvectors(block, num_eigenvectors)
        block.release()
    return bases


def _block_eigenvectors(block: Block, num_eigenvectors: int) -> Tensor:
    space = block.space
    if space.dimension > _LARGEST_DENSE:
        number = min(num_eigenvectors, space.dimension)
        vectors: Tensor = eigsh(block, number, progress=False).eigenvectors
        return torch.linalg.qr(vectors).Q
    return _eigenvectors(block @ torch.eye(space.dimension, dtype=space.dtype, device=space.device))


def _eigenvectors(matrix: Tensor) -> Tensor:
    """Return the eigenvectors of a symmetric matrix, computed in double precision."""
    wide = matrix.to(wide_dtype(matrix.device))
    return torch.linalg.eigh((wide + wide.T) / 2).eigenvectors
