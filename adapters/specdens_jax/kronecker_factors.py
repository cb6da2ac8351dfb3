"""Kronecker factors of the Gauss-Newton matrix of one layer, for all examples or by class."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding

from specdens import Arithmetic, LinearOperator, VectorSpace, restrict
from specdens.arguments import checked_integer, checked_numbers, shown
from specdens.gram import check_number
from specdens.kronecker_structure import (
    Correspondence,
    KroneckerEigenpairs,
    RankRatio,
    correspondence,
    eigenbasis,
    kronecker_diagonal,
    kronecker_eigenpairs,
    reshaped_rank_ratio,
)
from specdens.model_structure import (
    check_weight_sharing,
    factors_repr,
    kronecker_sum,
    largest_eigenpairs,
)
from specdens_jax.class_products import NO_PROBABILITIES, check_softmax
from specdens_jax.layer_passes import LayerPasses
from specdens_jax.linearized import check_vectors
from specdens_jax.parameters import FlatParameters
from specdens_jax.risk import Risk, check_risk
from specdens_jax.sharding import whole


class _Factors(NamedTuple):
    """Sums over the data, divided; of every class, or of one group. Host float64."""

    lefts: np.ndarray  # (C, m, m), they add up to E[M]
    rights: np.ndarray  # (C, d, d), each an average
    shares: np.ndarray  # (C,), what the classes weigh, adding up to 1


class KroneckerFactors:
    r"""Factors :math:`E[M] \otimes E[x x^\top]` of the Gauss-Newton matrix of one layer.

    A layer multiplies its inputs x, (d,), by a matrix and gives z, (m,). With U the Jacobian of the
    model's outputs in z and A the Hessian of the loss in the outputs, its block of the Gauss-Newton
    matrix is :math:`E[M \otimes x x^\top]`, :math:`M = U^\top A U`, which the product of the two
    expectations approximates (K-FAC). Expectations weigh examples as the risk does.

    Parameters
    ----------
    risk : Risk
    layer : str
        The name of the leaf that multiplies, as in ``risk.parameters.names`` for the whole tree: a
        dense kernel of either orientation, or that of a convolution with one group. It need not be
        among the parameters that vary.
    per_class : bool
        Approximate by :math:`\sum_c \pi_c E_c[M] \otimes E_c[x x^\top]` with expectations over the
        examples of class c and its share :math:`\pi_c` (CFAC). Softmax cross-entropy only.
    bias : bool
        Append 1 to x, for a layer that adds a bias of shape (m,) to z.
    weight_sharing : str
        What to do with S > 1 places (tokens, or patches of a convolution) of an example.
        ``"expand"``: each is a datum of its own, M is the sum of those of the places, and
        :math:`x x^\top` their mean. ``"reduce"``: M is summed over pairs of places, x is the mean.

    Attributes
    ----------
    risk : Risk
        With the leaf alone as what varies.
    parameters : FlatParameters
        Of the leaf. Vectors here are in its order, with the bias after it.

    Raises
    ------
    ValueError
        If no leaf, or more than one, is called `layer`, `weight_sharing` is unknown, or the loss is
        not softmax cross-entropy with `per_class`. When first used: if the leaf is not used in
        exactly one product with a matrix (tied weights, loops), or examples of a batch are mixed;
        and as `Hessian`.
    TypeError
        If `risk` is no `Risk`, or `per_class` or `bias` no truth value.

    Notes
    -----
    One pass over the data, with one reverse pass for each logit of an example (for other losses
    than softmax cross-entropy two for each output), compiled once for every shape of a batch.
    Nothing is sampled, and no gradient of the leaf is formed. Batches are added up in float64.

    With class weights and ignored targets, M counts with them as in the risk, and so does
    :math:`x x^\top`, by the sum of an example's weights; E[M] has the unit of the risk. With
    ``reduction="sum"`` it is a sum, and :math:`E[x x^\top]` still an average. Weight decay has no
    part in the factors.

    References
    ----------
    Martens, Grosse (2015), arXiv:1503.05671, section 3.
    Wu, Zhu, Wu, Wang, Ge (2020), arXiv:2010.04261, section 3.
    Papyan (2020), JMLR 21(252), arXiv:2008.11865, definitions 7.1 and 7.2.
    Grosse, Martens (2016), arXiv:1602.01407. Eschenhagen, Immer, Turner, Schneider, Hennig (2023),
    arXiv:2311.00636, sections 3.1 and 3.2.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> from specdens_jax import GaussNewton, SquaredError
    >>> inputs, targets = jnp.array([[1.0, 2.0]]), jnp.zeros((1, 1))
    >>> params = {"kernel": jnp.ones((2, 1)), "scale": jnp.ones(1)}
    >>> predict = lambda params, x: x @ params["kernel"] * params["scale"]
    >>> risk = Risk(predict, SquaredError(), params, (inputs, targets))
    >>> factors = KroneckerFactors(risk, "kernel")
    >>> factors.left, factors.right
    (array([[2.]]), array([[1., 2.], [2., 4.]]))
    >>> (factors.operator() @ jnp.ones(2)).tolist()
    [6.0, 12.0]
    >>> (GaussNewton(risk.restricted("kernel")) @ jnp.ones(2)).tolist()
    [6.0, 12.0]
    """

    def __init__(
        self,
        risk: Risk,
        layer: str,
        per_class: bool = False,
        bias: bool = False,
        weight_sharing: str = "expand",
    ) -> None:
        check_risk(risk)
        for name, value in (("per_class", per_class), ("bias", bias)):
            if not isinstance(value, bool | np.bool_):
                msg = f"{name}={shown(value)} must be True or False."
                raise TypeError(msg)
        check_weight_sharing(weight_sharing)
        if per_class:
            check_softmax(risk.loss)
        self._passes = LayerPasses(
            risk, layer, bias=bias, per_class=per_class, reduced=weight_sharing == "reduce"
        )
        self.layer, self.per_class, self.weight_sharing = layer, per_class, weight_sharing
        self.bias = bias

    @property
    def risk(self) -> Risk:
        """The risk with the leaf alone as what varies."""
        return self._passes.risk

    @property
    def parameters(self) -> FlatParameters:
        """The leaf; ``ravel`` and ``unravel``."""
        return self.risk.parameters

    @property
    def shape(self) -> tuple[int, int]:
        """(m, d): outputs of the layer and inputs, of a patch; one more with `bias`."""
        m, d = self._passes.places.shape
        return m, d

    @property
    def space(self) -> VectorSpace:
        """The flat vectors, in float32 for half precision; whole on every device."""
        own = self.parameters.space
        device = whole(own.device) if isinstance(own.device, NamedSharding) else own.device
        return VectorSpace(self._passes.places.size, own.working_dtype, device, own.backend)

    @property
    def left(self) -> np.ndarray:
        r""":math:`E[M]`, (m, m) float64."""
        return self._factors.lefts.sum(axis=0)

    @property
    def right(self) -> np.ndarray:
        r""":math:`E[x x^\top]`, (d, d) float64."""
        return np.tensordot(self._factors.shares, self._factors.rights, axes=1)

    @property
    def class_factors(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        r"""Shares :math:`\pi_c`, (C,), and factors :math:`\pi_c E_c[M]` and :math:`E_c[x x^\top]`.

        Of shapes (C, m, m) and (C, d, d), float64. A class without examples has zeros. Without
        `per_class` there is one group of all examples, C = 1.
        """
        return self._factors.shares, self._factors.lefts, self._factors.rights

    def operator(self) -> LinearOperator:
        """Return the matrix of these factors as an operator.

        Returns
        -------
        LinearOperator
            ``E[M] (x) E[x x^T]`` for a leaf of shape (m, d), and ``E[x x^T] (x) E[M]`` for one of
            shape (d, m), as in Flax; with `per_class` the sum of those of the classes. Entry by
            entry comparable with ``GaussNewton(factors.risk)``.
        """
        return self._sum(self.space.from_numpy)

    def _sum(self, convert: Callable[[np.ndarray], Any]) -> LinearOperator:
        return self._ordered(kronecker_sum(*self.class_factors, convert))

    def _ordered(self, matrix: LinearOperator) -> LinearOperator:
        """Return a matrix of row-major (m, d) in the order of the leaf."""
        order = np.argsort(self._passes.places, axis=None)
        return restrict(matrix, order) if (np.diff(order) != 1).any() else matrix

    def eigsh(self, k: int) -> KroneckerEigenpairs:
        r"""Return the k largest eigenvalues, descending, with their eigenvectors.

        Those of one Kronecker product are exact, the products of the eigenvalues of both factors.
        With `per_class` the sum has no such form, and `specdens.eigsh` computes them on the host in
        float64, with residuals of about 1e-10 relative to the largest.

        Parameters
        ----------
        k : int
            From 1 to m d.

        Returns
        -------
        KroneckerEigenpairs
            Eigenvectors of shape (m * d, k); ``pairs`` names the eigenvectors of `left` and `right`
            that they are products of, None with `per_class`.

        Raises
        ------
        ValueError
            If k is below 1 or above m d.
        TypeError
            If k is no integer.
        """
        check_number(checked_integer("k", k), self.space.dimension)
        if not self.per_class:
            found = kronecker_eigenpairs(*self._bases, k)
            return found._replace(eigenvectors=self._columns(found.eigenvectors))
        found = largest_eigenpairs(self._sum(np.asarray), k, tol=1e-10, progress=False)
        return found._replace(eigenvectors=self.space.from_numpy(found.eigenvectors))

    def corrected(self) -> CorrectedKronecker:
        r"""Return the matrix with the same Kronecker eigenvectors and the best eigenvalues.

        These are :math:`(u_i \otimes v_j)^\top G\, (u_i \otimes v_j)`, the diagonal of the exact
        block G in the eigenvectors of `left` and `right`: nothing of this form is closer to the
        block in the Frobenius norm. It takes one more pass over the data, in which layers with
        several places form gradients of the leaf example by example.

        Returns
        -------
        CorrectedKronecker
            An operator with ``eigenvalues`` and ``eigsh``.

        References
        ----------
        George, Laurent, Bouthillier, Ballas, Vincent (2018), arXiv:1806.03884, section 3.
        """
        (_, U), (_, V) = self._bases  # noqa: N806
        (total,), weight = self._passes.diagonal(U, V)
        return CorrectedKronecker(self, total / weight if self.risk.divides else total)

    def correspondence(self, eigenvectors: jax.Array) -> Correspondence:
        r"""Return how much of each eigenvector lies along each eigenvector of `left` and `right`.

        Parameters
        ----------
        eigenvectors : array of shape (m * d, k)
            Of the layer's Hessian or Gauss-Newton matrix, in the order of the leaf.

        Returns
        -------
        Correspondence
            ``left`` (m, k) and ``right`` (d, k), see `specdens.kronecker_structure.correspondence`.
        """
        (_, U), (_, V) = self._bases  # noqa: N806
        return correspondence(self._row_major(eigenvectors), U, V)

    def rank_ratio(self, eigenvectors: jax.Array) -> RankRatio:
        """Return how close eigenvectors, as matrices of shape (m, d), are to rank one.

        Parameters
        ----------
        eigenvectors : array of shape (m * d,) or (m * d, k)
            In the order of the leaf.

        Returns
        -------
        RankRatio
            See `specdens.kronecker_structure.reshaped_rank_ratio`.
        """
        return reshaped_rank_ratio(self._row_major(eigenvectors), self.shape)

    def _row_major(self, vectors: Any) -> np.ndarray:
        host = checked_numbers("eigenvectors", vectors)
        if not host.ndim:
            msg = f"eigenvectors={shown(vectors)} must be an array of shape (m * d, k)."
            raise ValueError(msg)
        return host[self._passes.places.ravel()] if len(host) == self._passes.places.size else host

    def _columns(self, row_major: np.ndarray) -> Any:
        """Return vectors of row-major (m, d) in the order of the leaf, on its device."""
        return self.space.from_numpy(row_major[np.argsort(self._passes.places, axis=None)])

    @cached_property
    def _factors(self) -> _Factors:
        (left, right, weights), weight = self._passes.factors()
        if not np.isfinite(weights).all():
            raise ValueError(NO_PROBABILITIES)
        left = (left + left.mT) / (2 * weight if self.risk.divides else 2)
        right = (right + right.mT) / (2 * np.where(weights > 0, weights, 1.0)[:, None, None])
        return _Factors(left, right, weights / (weights.sum() or 1.0))

    @cached_property
    def _bases(self) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
        return eigenbasis(self.left), eigenbasis(self.right)

    def __repr__(self) -> str:
        shape = self.parameters.shapes[self.layer]
        return factors_repr(self.layer, self.per_class, self.bias, shape)


class CorrectedKronecker(Arithmetic):
    """A matrix with the eigenvectors of a Kronecker product and eigenvalues of its own.

    Made by `KroneckerFactors.corrected`.

    Parameters
    ----------
    factors : KroneckerFactors
    eigenvalues : ndarray of shape (m, d)

    Attributes
    ----------
    eigenvalues : ndarray of shape (m, d)
        Of the products of eigenvectors i of `left` and j of `right`.
    space : VectorSpace
    """

    def __init__(self, factors: KroneckerFactors, eigenvalues: np.ndarray) -> None:
        if not isinstance(factors, KroneckerFactors):
            msg = (
                f"factors has type {type(factors).__qualname__}; expected KroneckerFactors, whose "
                "method corrected makes this."
            )
            raise TypeError(msg)
        self.eigenvalues = eigenvalues
        self.space: VectorSpace = factors.space
        self._factors, (left, right) = factors, factors._bases
        parts = (self.space.from_numpy(part) for part in (left[1], right[1], eigenvalues))
        self._operator = factors._ordered(kronecker_diagonal(*parts))

    def __matmul__(self, x: jax.Array, /) -> Any:
        check_vectors(x, self.space)
        return self._operator @ x

    def eigsh(self, k: int) -> KroneckerEigenpairs:
        """Return the k largest eigenvalues, descending, with their eigenvectors, exactly.

        Parameters
        ----------
        k : int
            From 1 to m d.

        Returns
        -------
        KroneckerEigenpairs

        Raises
        ------
        ValueError
            If k is below 1 or above m d.
        TypeError
            If k is no integer.
        """
        check_number(checked_integer("k", k), self.space.dimension)
        found = kronecker_eigenpairs(*self._factors._bases, k, eigenvalues=self.eigenvalues)
        return found._replace(eigenvectors=self._factors._columns(found.eigenvectors))

    def __repr__(self) -> str:
        return f"CorrectedKronecker({self._factors!r})"
