r"""Gaussian posteriors over a model's parameters, with a basis of their own for each block.

The covariance of a block is :math:`Q \operatorname{diag}(s^2) Q^\top`. Q is never formed where it
is a Kronecker product: of a weight W with :math:`Q = U \otimes V` (rows of W first, as torch
flattens it) the noise is :math:`U (s \circ E) V^\top` with E standard normal.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from specdens.certificates.checks import check_counts, check_orthonormal
from specdens.certificates.fitting import between, matrix_shape, squared_overlap
from specdens_torch.parameters import FlatParameters

Bases = Mapping[str, "Basis"]


class Basis(Protocol):
    """An orthonormal basis of the parameters in one block, of D entries."""

    @property
    def multiplicities(self) -> Tensor:
        """Number of directions (k,) for each scale, D in all."""

    def noise(self, scales: Tensor, normal: Tensor) -> Tensor:
        """Return a draw (D,) with these scales (k,), from standard normal numbers (D,)."""

    def variances_of(self, covariance: Basis, variances: Tensor) -> Tensor:
        """Return the variances (k,) along this basis of a covariance in another of its kind."""

    def lengths(self, x: Tensor) -> Tensor:
        """Return the absolute coordinates (k,) of a vector (D,), root mean squares of many."""

    def deviation(self) -> float:
        """Return how far the basis is from orthonormal, in the largest entry of Q^T Q - I."""


@dataclass(frozen=True, eq=False)
class KroneckerBasis:
    r"""The basis :math:`U \otimes V` of matrices with m rows and d columns, flattened by rows.

    Attributes
    ----------
    rows, columns : int
        m and d.
    left : tensor of shape (m, m), optional
        U, None for the identity.
    right : tensor of shape (d, d), optional
        V, None for the identity.
    """

    rows: int
    columns: int
    left: Tensor | None = None
    right: Tensor | None = None

    @property
    def multiplicities(self) -> Tensor:
        """One direction for each scale."""
        return torch.ones(self.rows * self.columns, dtype=torch.int64)

    def noise(self, scales: Tensor, normal: Tensor) -> Tensor:
        """Return a draw, see `Basis`."""
        return between(self.left, self._matrix(scales * normal), self.right).reshape(-1)

    def variances_of(self, covariance: Basis, variances: Tensor) -> Tensor:
        r"""Return :math:`(R \circ R)\, S^2\, (T \circ T)^\top`, R and T from the old to the new."""
        if not isinstance(covariance, KroneckerBasis):
            raise TypeError(_other_kind(self, covariance))
        left = squared_overlap(self.left, covariance.left)
        right = squared_overlap(self.right, covariance.right)
        return between(left, self._matrix(variances), right).reshape(-1)

    def lengths(self, x: Tensor) -> Tensor:
        """Return absolute coordinates, see `Basis`."""
        left, right = (None if q is None else q.T for q in (self.left, self.right))
        return between(left, self._matrix(x), right).reshape(-1).abs()

    def deviation(self) -> float:
        """Return the deviation from orthonormal, see `Basis`."""
        return max(_deviation(q) for q in (self.left, self.right))

    def _matrix(self, x: Tensor) -> Tensor:
        return x.reshape(self.rows, self.columns)


@dataclass(frozen=True, eq=False)
class DenseBasis:
    """Orthonormal columns; the space they do not span has one scale for all its directions.

    Attributes
    ----------
    vectors : tensor of shape (D, k)
    """

    vectors: Tensor

    @property
    def multiplicities(self) -> Tensor:
        """One direction for each column, and the number of all others if there are any."""
        size, k = self.vectors.shape
        rest = [size - k] if size > k else []
        return torch.tensor([1] * k + rest)

    def noise(self, scales: Tensor, normal: Tensor) -> Tensor:
        """Return a draw, see `Basis`."""
        size, k = self.vectors.shape
        if size == k:
            return self.vectors @ (scales * normal)
        rest = scales[k]
        return rest * normal + self.vectors @ ((scales[:k] - rest) * (self.vectors.T @ normal))

    def variances_of(self, covariance: Basis, variances: Tensor) -> Tensor:
        """Return variances along this basis; those of the rest keep the trace."""
        if not isinstance(covariance, DenseBasis):
            raise TypeError(_other_kind(self, covariance))
        k, old = self.vectors.shape[1], covariance.vectors.shape[1]
        rest = variances[old] if len(variances) > old else torch.zeros_like(variances[0])
        squares = squared_overlap(self.vectors, covariance.vectors)
        mine = rest + squares @ (variances[:old] - rest)
        if len(self.vectors) == k:
            return mine
        total = (variances * covariance.multiplicities.to(variances)).sum()
        return torch.cat([mine, ((total - mine.sum()) / (len(self.vectors) - k))[None]])

    def lengths(self, x: Tensor) -> Tensor:
        """Return absolute coordinates, see `Basis`."""
        inside = self.vectors.T @ x
        size, k = self.vectors.shape
        if size == k:
            return inside.abs()
        outside = (x - self.vectors @ inside).norm() / (size - k) ** 0.5
        return torch.cat([inside.abs(), outside[None]])

    def deviation(self) -> float:
        """Return the deviation from orthonormal, see `Basis`."""
        return _deviation(self.vectors)


def _deviation(vectors: Tensor | None) -> float:
    if vectors is None:
        return 0.0
    identity = torch.eye(vectors.shape[1], dtype=vectors.dtype, device=vectors.device)
    return float((vectors.T @ vectors - identity).abs().max())


def _other_kind(new: Basis, old: Basis) -> str:
    return (
        f"basis gave a {type(old).__name__} at first and a {type(new).__name__} later for the same "
        "parameter; give pairs (U, V) or matrices Q throughout."
    )


def as_basis(value: Any, name: str, parameters: FlatParameters) -> Basis:
    """Return one of a user's bases for the block called `name`, checked.

    Parameters
    ----------
    value : tensor, array, pair of them or None
        Q of shape (D, k) with orthonormal columns; (U, V), orthogonal of the orders of the
        weight's first axis and of the product of the others, either of them None for the identity;
        or None for the standard basis.
    name : str
        Of a parameter.
    parameters : FlatParameters

    Raises
    ------
    ValueError
        If shapes do not fit or columns are not orthonormal.
    TypeError
        If `value` is none of these.
    """
    shape, place = parameters.shapes[name], parameters.slices[name]
    size = place.stop - place.start
    rows, columns = matrix_shape(shape)
    kept = {"dtype": parameters.space.working_dtype, "device": parameters.space.device}
    basis: Basis
    if isinstance(value, np.ndarray):
        value = torch.as_tensor(value)
    if value is None:
        basis = KroneckerBasis(rows, columns)
    elif isinstance(value, Tensor):
        if value.ndim != 2 or value.shape[0] != size or not 1 <= value.shape[1] <= size:
            msg = (
                f"basis of {name!r} has shape {tuple(value.shape)}; expected ({size}, k) with "
                f"1 <= k <= {size}, one row for each entry of the parameter."
            )
            raise ValueError(msg)
        basis = DenseBasis(value.detach().to(**kept))
    elif isinstance(value, tuple | list) and len(value) == 2:
        sides: list[Tensor | None] = []
        for given, order in zip(value, (rows, columns), strict=True):
            side = None if given is None else torch.as_tensor(given)
            if side is not None and tuple(side.shape) != (order, order):
                msg = (
                    f"basis of {name!r} has a factor of shape {tuple(side.shape)}; expected "
                    f"({rows}, {rows}) and ({columns}, {columns}), or None for the identity."
                )
                raise ValueError(msg)
            sides.append(None if side is None else side.detach().to(**kept))
        basis = KroneckerBasis(rows, columns, *sides)
    else:
        msg = (
            f"basis of {name!r} has type {type(value).__qualname__}; expected a tensor Q, a pair "
            "(U, V) or None."
        )
        raise TypeError(msg)
    epsilon = torch.finfo(kept["dtype"]).eps
    check_orthonormal(name, basis.deviation(), order=size, epsilon=epsilon, library="torch.linalg")
    return basis


class GaussianPosterior:
    r"""The distribution :math:`N(w, Q \operatorname{diag}(s^2) Q^\top)` of a model's parameters.

    Attributes
    ----------
    parameters : FlatParameters
    mean : tensor of shape (n,)
    bases : mapping of str to Basis
        By parameter, in the order of the flat vector; Q is block diagonal.
    scales : tensor of shape (k,)
        Standard deviations s along the bases, one after the other.
    """

    def __init__(
        self, parameters: FlatParameters, mean: Tensor, bases: Bases, scales: Tensor
    ) -> None:
        self.parameters, self.mean, self.bases, self.scales = parameters, mean, bases, scales

    @property
    def multiplicities(self) -> Tensor:
        """Number of directions that each scale stands for."""
        return torch.cat([basis.multiplicities for basis in self.bases.values()])

    def sample(self, num_samples: int, *, seed: int = 0) -> Tensor:
        """Return independent draws of the parameters, the same for the same seed.

        Parameters
        ----------
        num_samples : int
        seed : int

        Returns
        -------
        tensor of shape (n, num_samples)
            ``parameters.unravel(draws[:, 0])`` is what `torch.func.functional_call` takes.

        Raises
        ------
        ValueError
            If `num_samples` is not a positive integer.
        """
        check_counts(num_samples=num_samples)
        generator = torch.Generator().manual_seed(seed)
        draws = [
            self.mean + self.noise(normal_numbers(self.mean, generator)) for _ in range(num_samples)
        ]
        return torch.stack(draws, dim=1)

    def noise(self, normal: Tensor) -> Tensor:
        """Return a draw less the mean, from standard normal numbers of shape (n,)."""
        return rotated_noise(self.bases, self.scales, normal)

    def __repr__(self) -> str:
        return f"GaussianPosterior(n={len(self.mean):,})"


def normal_numbers(like: Tensor, generator: torch.Generator) -> Tensor:
    """Return standard normal numbers shaped like a tensor, drawn on the host on every device."""
    return torch.randn(like.shape, dtype=like.dtype, generator=generator).to(like.device)


def split_scales(bases: Bases, scales: Tensor) -> tuple[Tensor, ...]:
    """Return the scales of each basis."""
    return torch.split(scales, [len(basis.multiplicities) for basis in bases.values()])


def rotated_noise(bases: Bases, scales: Tensor, normal: Tensor) -> Tensor:
    """Return Q (s * normal) by blocks, differentiable in the scales."""
    sizes = [int(basis.multiplicities.sum()) for basis in bases.values()]
    blocks = zip(
        bases.values(), split_scales(bases, scales), torch.split(normal, sizes), strict=True
    )
    return torch.cat([basis.noise(s, z) for basis, s, z in blocks])


def transferred(old: Bases, scales: Tensor, new: Bases) -> Tensor:
    r"""Return the scales along `new` of the covariance that has `scales` along `old`.

    The square roots of the diagonal of :math:`Q'^\top \Sigma Q'`: of all covariances that are
    diagonal in the new basis, the one closest to :math:`\Sigma` in KL, with the same trace. Its
    entropy is no smaller, so KL from an isotropic prior never grows.
    """
    parts = zip(split_scales(old, scales), old.values(), new.values(), strict=True)
    variances = [basis.variances_of(before, s.square()) for s, before, basis in parts]
    return torch.cat(variances).sqrt()
