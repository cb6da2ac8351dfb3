"""Kronecker factors of a layer's Gauss-Newton matrix: one product, one per class, corrected."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from specdens import Arithmetic, LinearOperator, VectorSpace, restrict
from specdens.gram import check_number
from specdens.kronecker_structure import (
    Correspondence,
    KroneckerEigenpairs,
    RankRatio,
    correspondence,
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
from specdens_torch.class_products import check_softmax
from specdens_torch.kronecker_sums import Factors, FactorSums, add_squares, host
from specdens_torch.layer_passes import LayerPasses
from specdens_torch.parameters import FlatParameters
from specdens_torch.processes import Share
from specdens_torch.risk import Risk
from specdens_torch.state import Fingerprint


class KroneckerFactors:
    r"""Kronecker factors :math:`E[M] \otimes E[x x^\top]` of a layer's Gauss-Newton matrix.

    The block of a layer :math:`z = W x` is the average of
    :math:`M_i \otimes x_i x_i^\top` with :math:`M = U^\top A U`, where U is the derivative of the
    outputs in z and A the Hessian of the loss in the outputs. Averaging the two apart gives the
    approximation of K-FAC. It is exact for one example, where M and x are independent, and
    where one of them is constant, if an example uses the layer at one position.

    Parameters
    ----------
    risk : Risk
    layer : str
        Name of a module ``nn.Linear`` (with any axes between examples and features, so also the
        projections of an attention written with it), ``nn.Conv1d`` or ``nn.Conv2d`` without groups.
        It may be called several times in a forward pass; every call is one more position.
    per_class : bool
        Take the factors of each class apart, :math:`\sum_c \pi_c E_c[M] \otimes E_c[x x^\top]`
        (CFAC), where the loss is softmax cross-entropy with a class, or probabilities of classes,
        for each row of logits. It is exact for one example per class, at one position.
    bias : bool
        Include the bias, as weight of one more input that is always 1.
    weight_sharing : {"expand", "reduce"}
        What to do with several positions s of an example (of a convolution, or tokens). "expand"
        takes each for an example: :math:`E \sum_s M_{ss}` and the mean of
        :math:`x_s x_s^\top` over positions. "reduce" adds M over all pairs of positions and
        averages x over positions first.

    Attributes
    ----------
    risk : Risk
        With the layer's parameters alone as those that vary.
    parameters : FlatParameters
        The order of the entries of all vectors here: the weight row by row, then the bias.
    space : VectorSpace
        As that of ``GaussNewton(factors.risk)``, in float32 for half precision.
    shape : tuple of int
        (m, d): outputs of the layer, inputs (of a patch; one more with `bias`).

    Raises
    ------
    ValueError
        If there is no such layer, or its matrix is not of this form (the message says why); when
        first used also if the examples are not along the first axis of the layer's inputs, if they
        depend on each other, or if `per_class` has no classes or too many for the risk's
        ``memory_budget``.
    TypeError
        If `risk` is no `Risk`.

    Notes
    -----
    The factors are those of the parameters the model has when they are used. They take one pass
    over the data, with one pass back for each logit of an example (for C classes C, times the
    number of rows of logits, so that a language model takes one for each position and token of its
    vocabulary; twice as many for other losses than softmax cross-entropy), in which no gradient of
    the weight is formed. Factors are added up in float64.

    With class weights and ignored targets, M counts with them as in the risk, and so does
    :math:`x x^\top`, by the sum of an example's weights, the same at all its positions. With
    ``reduction="sum"``, :math:`E[M]` is a sum, and :math:`E[x x^\top]` still an average. Weight
    decay has no part in the factors.

    References
    ----------
    Martens, Grosse (2015), arXiv 1503.05671, section 3.
    Wu, Zhu, Wu, Wang, Ge (2020), arXiv 2010.04261, section 3.
    Papyan (2020), arXiv 2008.11865, definitions 7.1 and 7.2.
    Eschenhagen, Immer, Turner, Schneider, Hennig (2023), arXiv 2311.00636, section 3.

    Examples
    --------
    >>> model = torch.nn.Linear(2, 2, bias=False)
    >>> _ = torch.nn.init.zeros_(model.weight)
    >>> data = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([0, 1])
    >>> factors = KroneckerFactors(Risk(model, torch.nn.CrossEntropyLoss(), data), "")
    >>> factors.left.tolist()  # diag(p) - p p^T at p = (1/2, 1/2)
    [[0.25, -0.25], [-0.25, 0.25]]
    >>> factors.right.tolist()
    [[0.5, 0.0], [0.0, 2.0]]
    >>> factors.eigsh(1).eigenvalues
    array([1.])
    """

    def __init__(
        self,
        risk: Risk,
        layer: str,
        per_class: bool = False,
        bias: bool = False,
        weight_sharing: str = "expand",
    ) -> None:
        check_weight_sharing(weight_sharing)
        if per_class and risk.processes is not None:
            msg = (
                "per_class=True with a process_group: a process does not know the classes of the "
                "others; use the factors of all classes, or one process."
            )
            raise ValueError(msg)
        self._passes = LayerPasses(risk, layer, bias=bias)
        if per_class:
            check_softmax(risk._loss)
        self.layer, self.per_class, self.weight_sharing = layer, per_class, weight_sharing
        self.bias = bias
        self.shape = self._passes.shape
        self._kept: tuple[Fingerprint, Factors] | None = None
        self._order = _order(self.parameters, self.shape) if bias else None

    @property
    def risk(self) -> Risk:
        """The risk with the layer's parameters alone as those that vary."""
        return self._passes.risk

    @property
    def parameters(self) -> FlatParameters:
        """The layer's weight, and its bias if that is included."""
        return self.risk.parameters

    @property
    def space(self) -> VectorSpace:
        """The flat vectors of the layer's parameters."""
        own = self.parameters.space
        return VectorSpace(own.dimension, own.working_dtype, own.device, own.backend)

    @property
    def left(self) -> np.ndarray:
        r""":math:`E[M]`, (m, m) float64."""
        return self._present().on_host[0]

    @property
    def right(self) -> np.ndarray:
        r""":math:`E[x x^\top]`, (d, d) float64."""
        return self._present().on_host[1]

    @property
    def class_factors(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        r"""Shares :math:`\pi_c`, (C,), and factors :math:`\pi_c E_c[M]` and :math:`E_c[x x^\top]`.

        Of shapes (C, m, m) and (C, d, d), float64. A class without examples has zeros. Without
        `per_class` there is one group of all examples, C = 1.
        """
        factors = self._present()
        return host(factors.shares), host(factors.lefts), host(factors.rights)

    def operator(self) -> LinearOperator:
        """Return the matrix of these factors, at the present parameters, as an operator.

        Returns
        -------
        LinearOperator
            Entry by entry comparable with ``GaussNewton(factors.risk)``.
        """
        return self._operator(self.space.dtype)

    def _operator(self, dtype: torch.dtype) -> LinearOperator:
        factors = self._present()
        shares, lefts, rights = host(factors.shares), factors.lefts, factors.rights
        return self._ordered(kronecker_sum(shares, lefts, rights, lambda own: own.to(dtype)))

    def _ordered(self, matrix: LinearOperator) -> LinearOperator:
        return matrix if self._order is None else restrict(matrix, self._order)

    def eigsh(self, k: int) -> KroneckerEigenpairs:
        r"""Return the k largest eigenvalues, descending, with their eigenvectors.

        Those of one Kronecker product are exact, the products of the eigenvalues of both factors.
        With `per_class` the sum has no such form, and `specdens.eigsh` computes them in float64, to
        a relative accuracy of about 1e-6.

        Parameters
        ----------
        k : int
            From 1 to m d.

        Returns
        -------
        KroneckerEigenpairs
            Eigenvectors of shape (m * d, k) in the order of `parameters`; ``pairs`` names the
            eigenvectors of `left` and `right` that they are products of, None with `per_class`.

        Raises
        ------
        ValueError
            If k is below 1 or above m d.
        """
        factors = self._present()
        if not self.per_class:
            found = kronecker_eigenpairs(*factors.bases, k)
            return found._replace(eigenvectors=self._columns(found.eigenvectors))
        check_number(k, self.space.dimension)
        found = largest_eigenpairs(self._operator(factors.left.dtype), k)
        return found._replace(eigenvectors=found.eigenvectors.to(self.space.dtype))

    def corrected(self) -> CorrectedKronecker:
        r"""Return the matrix with the same Kronecker eigenvectors and the best eigenvalues.

        These are :math:`E[(u_i^\top \delta\, x^\top v_j)^2]` summed over the columns
        :math:`\delta` of M: the diagonal of the exact block in the eigenvectors
        :math:`u_i \otimes v_j` of `left` and `right`. Nothing with these eigenvectors is closer to
        the block in the Frobenius norm. It takes one more pass over the data, at the present
        parameters, in which layers with several positions form gradients of the weight example by
        example.

        Returns
        -------
        CorrectedKronecker
            An operator with ``eigenvalues`` and ``eigsh``.

        References
        ----------
        George, Laurent, Bouthillier, Ballas, Vincent (2018), arXiv 1806.03884, section 3.

        Examples
        --------
        Inputs of length 1 in one class and 3 in the other, at probabilities of 1/2:

        >>> model = torch.nn.Linear(2, 2, bias=False)
        >>> _ = torch.nn.init.zeros_(model.weight)
        >>> data = torch.tensor([[1.0, 0.0], [0.0, 3.0]]), torch.tensor([0, 1])
        >>> risk = Risk(model, torch.nn.CrossEntropyLoss(), data)
        >>> KroneckerFactors(risk, "").corrected().eigsh(2).eigenvalues
        array([2.25, 0.25])
        """
        (_, U), (_, V) = self._present().bases  # noqa: N806

        def compute() -> Share:
            total = torch.zeros(self.shape, dtype=U.dtype, device=U.device)
            totals = self._passes.sweep(lambda chunk: add_squares(total, chunk, U, V))
            return Share(totals, total)

        with torch.inference_mode(False), torch.no_grad():
            totals, total, _ = self.risk.combined(f"corrected factors of {self.layer!r}", compute)
            total = total / totals.weight if self.risk.divides else total
        return CorrectedKronecker(self, (U, V), total)

    def correspondence(self, eigenvectors: Tensor) -> Correspondence:
        r"""Return how much of each eigenvector lies along each eigenvector of `left` and `right`.

        Parameters
        ----------
        eigenvectors : tensor of shape (m * d, k)
            Of the layer's Hessian or Gauss-Newton matrix, in the order of `parameters`.

        Returns
        -------
        Correspondence
            ``left`` (m, k) and ``right`` (d, k), see `specdens.kronecker_structure.correspondence`.
        """
        (_, U), (_, V) = self._present().bases  # noqa: N806
        return correspondence(self._row_major(eigenvectors), U, V)

    def rank_ratio(self, eigenvectors: Tensor) -> RankRatio:
        """Return how close eigenvectors, as matrices of shape (m, d), are to rank one.

        See `specdens.kronecker_structure.reshaped_rank_ratio`; the entries of `eigenvectors`,
        (m * d,) or (m * d, k), are in the order of `parameters`.
        """
        return reshaped_rank_ratio(self._row_major(eigenvectors), self.shape)

    def _columns(self, row_major: Tensor) -> Tensor:
        """Return vectors in the order of the parameters, in their dtype."""
        order = slice(None) if self._order is None else torch.from_numpy(self._order)
        return row_major[order].to(self.space.dtype)

    def _row_major(self, vectors: Tensor) -> Tensor:
        """Return vectors in the order of matrices (m, d), with the bias as the last column."""
        if self._order is None or len(vectors) != len(self._order):
            return vectors
        return vectors[torch.from_numpy(np.argsort(self._order))]

    def _present(self) -> Factors:
        fingerprint = self.risk.passes.fingerprint()
        if self._kept is None or self._kept[0] != fingerprint:
            with torch.inference_mode(False), torch.no_grad():
                self._kept = fingerprint, self._computed()
        return self._kept[1]

    def _computed(self) -> Factors:
        def compute() -> Share:
            reduces, budget = self.weight_sharing == "reduce", self.risk.memory_budget
            sums = FactorSums(self.shape, self.space.device, reduce=reduces, budget=budget)
            add = sums.add_by_class if self.per_class else sums.add
            totals = self._passes.sweep(add)
            return Share(totals, sums.vector)

        operation = f"Kronecker factors ({self.weight_sharing}) of {self.layer!r}"
        totals, vector, _ = self.risk.combined(operation, compute)
        return Factors.of(vector, self.shape, totals.weight if self.risk.divides else 1.0)

    def __repr__(self) -> str:
        weight = max(self.parameters.shapes.values(), key=len)
        return factors_repr(self.layer, self.per_class, self.bias, weight)


class CorrectedKronecker(Arithmetic):
    """A matrix with the eigenvectors of a Kronecker product and eigenvalues of its own.

    Made by `KroneckerFactors.corrected`.

    Parameters
    ----------
    factors : KroneckerFactors
    bases : pair of tensors of shape (m, m) and (d, d)
    eigenvalues : tensor of shape (m, d)

    Attributes
    ----------
    eigenvalues : ndarray of shape (m, d)
        Of the products of eigenvectors i of `left` and j of `right`.
    space : VectorSpace
    """

    def __init__(
        self, factors: KroneckerFactors, bases: tuple[Tensor, Tensor], eigenvalues: Tensor
    ) -> None:
        self.eigenvalues: np.ndarray = host(eigenvalues)
        self.space: VectorSpace = factors.space
        self._factors, self._bases = factors, bases
        U, V, own = (t.to(self.space.dtype) for t in (*bases, eigenvalues))  # noqa: N806
        self._operator = factors._ordered(kronecker_diagonal(U, V, own))

    def __matmul__(self, x: Tensor, /) -> Any:
        return self._operator @ x

    def eigsh(self, k: int) -> KroneckerEigenpairs:
        """Return the k largest eigenvalues, descending, with their eigenvectors, exactly.

        The parameter and the result are those of `KroneckerFactors.eigsh`.
        """
        U, V = self._bases  # noqa: N806
        found = kronecker_eigenpairs((None, U), (None, V), k, eigenvalues=self.eigenvalues)
        return found._replace(eigenvectors=self._factors._columns(found.eigenvectors))

    def __repr__(self) -> str:
        return f"CorrectedKronecker({self._factors!r})"


def _order(parameters: FlatParameters, shape: tuple[int, int]) -> np.ndarray:
    """Return where in a matrix (m, d), its last column the bias, each parameter stands."""
    places = np.arange(shape[0] * shape[1]).reshape(shape)
    order = np.empty(places.size, dtype=np.int64)
    for name, place in parameters.slices.items():
        is_weight = len(parameters.shapes[name]) > 1
        order[place] = (places[:, :-1] if is_weight else places[:, -1]).ravel()
    return order
