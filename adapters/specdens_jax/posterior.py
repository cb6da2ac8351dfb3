r"""Gaussian posteriors over a model's parameters, with an orthonormal basis for each leaf.

The covariance of a leaf is :math:`Q \operatorname{diag}(s^2) Q^\top`. A basis is a matrix Q, or a
pair (U, V) that stands for :math:`U \otimes V`, which is never formed; None is the identity.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from specdens.arguments import checked_seed, shown
from specdens.certificates.checks import check_basis_names, check_counts, check_orthonormal
from specdens.certificates.fitting import between, matrix_shape, squared_overlap
from specdens_jax.gauss_newton import GaussNewton
from specdens_jax.kronecker_factors import KroneckerFactors
from specdens_jax.parameters import FlatParameters
from specdens_jax.risk import Risk
from specdens_jax.sharding import automatic, on_automatic_axes

Basis: TypeAlias = Any  # an array Q (D, D) or a pair (U, V) of arrays or None
Bases: TypeAlias = list[Basis]  # of the leaves, in the order of the flat vector


@dataclass(frozen=True, eq=False)
class GaussianPosterior:
    r"""The distribution :math:`N(w, Q \operatorname{diag}(s^2) Q^\top)` of a model's parameters.

    Attributes
    ----------
    parameters : FlatParameters
    mean : array of shape (n,)
    bases : list of arrays or pairs of arrays
        Of each leaf, in the order of the flat vector; Q is block diagonal.
    scales : array of shape (n,)
        Standard deviations s along the bases, one after the other.
    """

    parameters: FlatParameters
    mean: jax.Array
    bases: Bases
    scales: jax.Array

    @on_automatic_axes
    def sample(self, num_samples: int, *, seed: int = 0) -> jax.Array:
        """Return independent draws of the parameters, the same for the same seed.

        Parameters
        ----------
        num_samples : int
        seed : int

        Returns
        -------
        array of shape (n, num_samples)
            ``parameters.unravel(draws[:, 0])`` gives a pytree.

        Raises
        ------
        ValueError
            If `num_samples` is not a positive integer, or `seed` not in [0, 2**64).
        TypeError
            If `seed` is no integer.
        """
        check_counts(num_samples=num_samples)
        keys = jax.random.split(seed_key(checked_seed(seed)), num_samples)
        mean = automatic(self.mean)
        normals = [jax.random.normal(key, mean.shape, mean.dtype) for key in keys]
        return jnp.stack([mean + self.noise(z) for z in normals], axis=1)

    @on_automatic_axes
    def noise(self, normal: jax.Array) -> jax.Array:
        """Return a draw less the mean, from standard normal numbers of shape (n,).

        Raises
        ------
        ValueError
            If `normal` has another shape.
        """
        if np.shape(normal) != self.scales.shape:
            msg = f"normal={shown(normal)} must be an array of shape {self.scales.shape}."
            raise ValueError(msg)
        bases, scales = jax.tree.map(automatic, (self.bases, self.scales))
        return rotated(self.parameters, bases, scales * normal)

    def __repr__(self) -> str:
        return f"GaussianPosterior(n={len(self.mean):,})"


def seed_key(seed: int) -> jax.Array:
    """Return the random key of an integer of 64 bits, of which JAX takes those with a sign."""
    return jax.random.key(seed - 2**64 if seed >= 2**63 else seed)


def rotated(parameters: FlatParameters, bases: Bases, coordinates: jax.Array) -> jax.Array:
    """Return the flat vector Q c from its coordinates c along the bases."""
    return _by_leaf(_forward, parameters, bases, coordinates)


def coordinates_of(parameters: FlatParameters, bases: Bases, x: jax.Array) -> jax.Array:
    """Return the coordinates Q^T x of a flat vector along the bases."""
    return _by_leaf(_forward, parameters, [_mapped(jnp.transpose, b) for b in bases], x)


def transferred(parameters: FlatParameters, old: Bases, scales: jax.Array, new: Bases) -> jax.Array:
    r"""Return the scales along `new` of the covariance that has `scales` along `old`.

    The square roots of the diagonal of :math:`Q'^\top \Sigma Q'`: of all covariances that are
    diagonal in the new basis, the one closest to :math:`\Sigma` in KL, with the same trace. Its
    entropy is no smaller, so KL from an isotropic prior never grows.

    Raises
    ------
    ValueError
        If a leaf has a matrix in one and a pair in the other.
    """
    overlaps: Bases = []
    for name, now, before in zip(parameters.names, new, old, strict=True):
        if isinstance(now, tuple) != isinstance(before, tuple):
            msg = f"basis of {name!r} was a matrix or a pair before; give the same kind throughout."
            raise ValueError(msg)
        if isinstance(now, tuple):
            sides = zip(now, before, strict=True)
            overlaps.append(tuple(squared_overlap(a, b) for a, b in sides))
        else:
            overlaps.append(squared_overlap(now, before))
    return jnp.sqrt(_by_leaf(_forward, parameters, overlaps, jnp.square(scales)))


def choose_bases(risk: Risk, basis: Any) -> Bases:
    """Return the basis of every leaf that varies, at the risk's parameters, checked.

    Raises
    ------
    ValueError
        If `basis` or a leaf in it is unknown, or one is not orthonormal.
    TypeError
        If a basis is of another type.
    """
    found: Any = basis
    if isinstance(basis, str):
        named = {"standard": lambda _: {}, "kronecker": kronecker_bases, "exact": exact_bases}
        if basis not in named:
            msg = (
                f"basis={basis!r} is unknown; expected one of {', '.join(named)}, a mapping by the "
                "names of leaves or a function from the risk to one."
            )
            raise ValueError(msg)
        found = named[basis](risk)
    elif callable(basis):
        found = basis(risk)
    if not isinstance(found, Mapping):
        msg = f"basis gives {type(found).__qualname__}; expected a mapping by the names of leaves."
        raise TypeError(msg)
    names = risk.parameters.names
    check_basis_names(found, names, "leaves")
    return [_checked(found.get(name), name, risk.parameters) for name in names]


def exact_bases(risk: Risk) -> dict[str, jax.Array]:
    """Return the eigenvectors of the Gauss-Newton matrix's diagonal block of every leaf."""
    bases, operator = {}, GaussNewton(risk)
    space = operator.space
    for name, place in risk.parameters.slices.items():
        # Blocks of the whole matrix: its compiled product serves every mean, that of a part not.
        columns = np.eye(space.dimension)[:, place]
        block = np.asarray(operator @ space.from_numpy(columns), dtype=np.float64)[place]
        bases[name] = jnp.asarray(np.linalg.eigh((block + block.T) / 2)[1])
    return bases


def kronecker_bases(risk: Risk) -> dict[str, tuple[jax.Array, jax.Array]]:
    """Return the eigenvectors of both Kronecker factors of every leaf that is a matrix.

    References
    ----------
    Wu, Zhu, Wu, Wang, Ge (2020), arXiv 2010.04261 (the decoupling conjecture).
    """
    bases = {}
    for name, shape in risk.parameters.shapes.items():
        if len(shape) == 2:
            factors = KroneckerFactors(risk, name)
            sides = factors.left, factors.right
            u, v = (jnp.asarray(np.linalg.eigh(side)[1]) for side in sides)
            bases[name] = (u, v) if _outputs_first(factors, shape) else (v, u)
    return bases


def _outputs_first(factors: KroneckerFactors, shape: tuple[int, ...]) -> bool:
    """Tell whether the rows of a leaf are a layer's outputs, from a product with its factors."""
    if shape != shape[::-1]:
        return shape == factors.shape
    x = np.random.default_rng(0).normal(size=shape)
    product = factors.operator() @ factors.space.from_numpy(x.reshape(-1))
    found = np.asarray(product, dtype=np.float64).reshape(shape)
    one, other = factors.left @ x @ factors.right, factors.right @ x @ factors.left
    return bool(np.abs(found - one).max() <= np.abs(found - other).max())


def _checked(value: Any, name: str, parameters: FlatParameters) -> Basis:
    rows, columns = matrix_shape(parameters.shapes[name])
    if value is None:
        return None, None
    pair = isinstance(value, tuple | list) and len(value) == 2
    sides, orders = (value, (rows, columns)) if pair else ([value], (rows * columns,))
    dtype = parameters.space.working_dtype
    if not all(isinstance(side, jax.Array | np.ndarray | None) for side in sides):
        msg = (
            f"basis of {name!r} has type {type(value).__qualname__}; expected an array Q, a pair "
            "(U, V) or None."
        )
        raise TypeError(msg)
    arrays = [None if side is None else jnp.asarray(side, dtype) for side in sides]
    for array, order in zip(arrays, orders, strict=True):
        if array is None:
            continue
        if array.shape != (order, order):
            msg = (
                f"basis of {name!r} has shape {array.shape}; expected ({order}, {order}), for a "
                f"leaf seen as a matrix ({rows}, {columns})."
            )
            raise ValueError(msg)
        apart = float(jnp.abs(array.T @ array - jnp.eye(order, dtype=dtype)).max())
        epsilon = float(jnp.finfo(dtype).eps)
        check_orthonormal(name, apart, order=order, epsilon=epsilon, library="jnp.linalg")
    return tuple(arrays) if pair else arrays[0]


def _by_leaf(
    apply: Callable[..., jax.Array], parameters: FlatParameters, bases: Bases, x: jax.Array
) -> jax.Array:
    parts = [
        apply(basis, x[parameters.slices[name]].reshape(matrix_shape(parameters.shapes[name])))
        for name, basis in zip(parameters.names, bases, strict=True)
    ]
    return jnp.concatenate([part.reshape(-1) for part in parts])


def _forward(basis: Basis, x: jax.Array) -> jax.Array:
    if not isinstance(basis, tuple):
        return basis @ x.reshape(-1)
    left, right = basis
    return between(left, x, right)


def _mapped(function: Callable[[jax.Array], jax.Array], basis: Basis) -> Basis:
    return jax.tree.map(function, basis)
