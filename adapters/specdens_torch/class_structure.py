"""Class structure of the Gauss-Newton matrix: means by class and by pair of classes."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from specdens import LinearOperator, VectorSpace, hierarchy
from specdens.class_parts import (
    CLASS_PARTS,
    check_num_classes,
    check_part,
    check_weighting,
    is_integer,
)
from specdens.layer_structure import LayerStructure
from specdens.model_structure import attribution, without_part
from specdens_torch.class_layers import layer_structure
from specdens_torch.class_products import check_softmax
from specdens_torch.class_sweeps import ClassSweeps, PartOperator, orthonormalized
from specdens_torch.parameters import FlatParameters
from specdens_torch.risk import Risk, check_risk


class ClassStructure:
    r"""The split of a Gauss-Newton matrix by the classes of softmax cross-entropy.

    Example i has softmax probabilities :math:`p_i`, a class weight :math:`\kappa_i`, and belongs to
    class c with :math:`y_{ic}`. With :math:`h_{icc'} = J_i^\top (p_i - e_{c'})`, the gradient as
    if c' were the label, and weights :math:`\omega_{icc'} = \kappa_i y_{ic} p_{ic'} / W` the
    Gauss-Newton matrix is :math:`G = \sum \omega_{icc'} h_{icc'} h_{icc'}^\top`. The weighted
    means :math:`g_{cc'}` over the examples of pairs (c, c'), of weights :math:`w_{cc'}`, and
    :math:`g_c` over the pairs with c' other than c, split it exactly:

    .. math:: G = \sum_c w_c g_c g_c^\top
                + \sum_{c, c' \ne c} w_{cc'} (g_{cc'} - g_c)(g_{cc'} - g_c)^\top
                + \sum_{icc'} \omega_{icc'} (h_{icc'} - g_{cc'})(h_{icc'} - g_{cc'})^\top
                + \sum_c w_{cc} g_{cc} g_{cc}^\top,

    which are `G_class`, `G_cross`, `G_within` and `G_equal`. Nothing is computed before it is
    needed, and everything refers to the parameters that the model then has.

    Parameters
    ----------
    risk : Risk
        Of a softmax cross-entropy: `torch.nn.CrossEntropyLoss`, `next_token_loss`, `token_loss`.
    num_classes : int, optional
        Number C of classes, that of the logits. By default it is found in the first pass; a process
        without data must be told.
    weighting : {"probability", "uniform"}
        ``"uniform"`` means without probabilities: :math:`h_{icc'} = \sqrt{p_{ic'}} J_i^\top (p_i -
        e_{c'})` and :math:`\omega_{icc'} = \kappa_i y_{ic} / W`. The sum is the same.

    Attributes
    ----------
    risk : Risk
    weighting : str

    Raises
    ------
    TypeError
        If `risk` is not a `Risk`.
    ValueError
        If the loss is no softmax cross-entropy, `weighting` is unknown or `num_classes` not an
        integer from 2; or, when it is first used, if the logits have another number of classes,
        targets are no classes, or the risk fails its checks.

    Notes
    -----
    A hard label is one class also with label smoothing; soft labels are shares of classes. Every
    token or pixel with a target counts as an example. Weight decay is in none of the parts. Classes
    without examples have weight zero and mean zero. With probability weights :math:`w_c g_c = -
    w_{cc} g_{cc}`, so that the three parts made of means have rank C (C - 1) together.

    A product takes two passes over the data and no memory for the C * C means; with `G_class`
    none, if the C class means fit into the risk's memory budget.

    References
    ----------
    Papyan (2020), Traces of class/cross-class structure pervade deep learning spectra, JMLR
    21(252), Eqs. 6.2-6.4 (probability). arXiv:2008.11865
    Papyan (2019), Measurements of three-level hierarchical structure in the outliers in the
    spectrum of deepnet Hessians, ICML, Eq. 28 (uniform, for balanced classes). arXiv:1901.08244

    Examples
    --------
    >>> from specdens_torch import GaussNewton
    >>> model = torch.nn.Linear(2, 2, bias=False)
    >>> _ = torch.nn.init.zeros_(model.weight)  # all probabilities are 1/2
    >>> data = 4 * torch.eye(2), torch.tensor([0, 1])
    >>> structure = ClassStructure(Risk(model, torch.nn.CrossEntropyLoss(), data))
    >>> structure.pair_weights
    array([[0.25, 0.25],
           [0.25, 0.25]])
    >>> structure.eigenvalues("class")
    array([2., 2.])
    >>> rest = structure.knockout(GaussNewton(structure.risk))
    >>> (rest @ structure.principal_subspace(2)).abs().max() < 1e-6
    tensor(True)
    """

    def __init__(
        self, risk: Risk, num_classes: int | None = None, weighting: str = "probability"
    ) -> None:
        check_risk(risk)
        check_num_classes(num_classes)
        check_weighting(weighting)
        check_softmax(risk._loss)
        self.risk, self.weighting = risk, weighting
        self._sweeps = ClassSweeps(risk, num_classes, weighting == "uniform")

    @property
    def parameters(self) -> FlatParameters:
        """Names and places of the parameters; ``ravel`` and ``unravel``."""
        return self.risk.parameters

    @property
    def space(self) -> VectorSpace:
        """The flat vectors: length p, dtype and device of the parameters."""
        return self.risk.parameters.space

    @property
    def num_classes(self) -> int:
        """Number C of classes."""
        return self._sweeps.num_classes or len(self._sweeps.sums().pairs)

    @property
    def pair_weights(self) -> np.ndarray:
        """Weights w_cc' of the pairs, (C, C) float64, from one pass forward."""
        sums = self._sweeps.sums()
        return np.asarray(sums.pairs / sums.divisor)

    @property
    def class_weights(self) -> np.ndarray:
        """Weights w_c of the classes, (C,) float64: the sums of `pair_weights` over c' != c."""
        return hierarchy.class_weights(self.pair_weights)

    @property
    def class_means(self) -> Tensor:
        """Means g_c of the classes, (p, C) on the device, from one pass; do not write to it."""
        return self._sweeps.class_rows().t().to(self.space.working_dtype)

    def pair_means(self) -> Tensor:
        """Return the means g_cc' of all pairs, (C, C, p) on the device: C * C vectors."""
        number = self.num_classes
        rows = self._sweeps.pair_rows(range(number * number))
        return rows.reshape(number, number, -1).to(self.space.working_dtype)

    @property
    def G_class(self) -> LinearOperator:  # noqa: N802 (the paper's name)
        """The part of the class means, of rank C at most."""
        return PartOperator(self._sweeps, "class")

    @property
    def G_cross(self) -> LinearOperator:  # noqa: N802
        """The part of the spread of pair means about their class mean, of rank C (C - 1)."""
        return PartOperator(self._sweeps, "cross")

    @property
    def G_within(self) -> LinearOperator:  # noqa: N802
        """The part of the spread of single examples about their pair mean."""
        return PartOperator(self._sweeps, "within")

    @property
    def G_equal(self) -> LinearOperator:  # noqa: N802
        """The part of the pairs with c' = c, of rank C at most."""
        return PartOperator(self._sweeps, "equal")

    def pair_gram(self) -> np.ndarray:
        """Return the inner products of all pair means, (C * C, C * C) float64, row-major pairs.

        Raises
        ------
        ValueError
            If that many numbers do not fit into the risk's memory budget.
        """
        return self._sweeps.pair_gram()

    def eigenvalues(self, part: str) -> np.ndarray:
        """Return the nonzero eigenvalues of a part, exactly, from the Gram matrix of the means.

        Parameters
        ----------
        part : {"class", "cross", "equal", "means"}
            ``"means"`` is the sum of the other three.

        Returns
        -------
        ndarray, float64
            Descending: C, C (C - 1), C and C * C of them. More may be zero, up to rounding.

        Raises
        ------
        ValueError
            If `part` is none of the four, or there are too many classes for `pair_gram`, which
            ``"class"`` and ``"equal"`` do without: they need C means only.
        """
        check_part(part, of_model=True)
        if part in CLASS_PARTS:
            gram, weights = self._sweeps.class_gram(part), self._weights_of(part)
            return hierarchy.weighted_eigenvalues(gram, weights)
        return hierarchy.part_eigenvalues(self.pair_gram(), self.pair_weights, part)

    def principal_subspace(self, k: int) -> Tensor:
        """Return an orthonormal basis of the k leading directions of `G_class`, (p, k).

        They come from a C x C matrix, without eigenanalysis of the Gauss-Newton matrix.

        Parameters
        ----------
        k : int
            From 1 to the rank of `G_class`, at most C.

        Returns
        -------
        tensor of shape (p, k)
            Eigenvectors of `G_class`, descending eigenvalues.

        Raises
        ------
        ValueError
            If `k` is out of range.
        """
        number = self.num_classes
        if not is_integer(k) or not 1 <= k <= number:
            msg = (
                f"k={k!r} must be an integer from 1 to the number of classes {number}; "
                "basis('means') spans C (C - 1) directions, and "
                "specdens.eigsh(GaussNewton(risk), k) finds any k."
            )
            raise ValueError(msg)
        basis = self._class_basis("class", k)
        if k > basis.shape[1]:
            msg = (
                f"k={k} exceeds the rank {basis.shape[1]} of G_class at these parameters; pass at "
                "most that, or use specdens.eigsh(GaussNewton(risk), k)."
            )
            raise ValueError(msg)
        return basis

    def basis(self, part: str) -> Tensor:
        """Return an orthonormal basis of the range of a part, (p, rank).

        Parameters
        ----------
        part : {"class", "cross", "equal", "means"}

        Returns
        -------
        tensor of shape (p, r)
            Eigenvectors of the part that belong to nonzero eigenvalues, which descend. What is
            below the rounding of the largest eigenvalue counts as zero.

        Raises
        ------
        ValueError
            As `eigenvalues`.
        """
        check_part(part, of_model=True)
        if part in CLASS_PARTS:
            return self._class_basis(part)
        _, coefficients = hierarchy.part_basis(
            self.pair_gram(), self.pair_weights, part, self._rounding
        )
        rows = orthonormalized(self._sweeps.combinations(coefficients))
        return rows.t().to(self.space.working_dtype)

    @property
    def _rounding(self) -> float:
        """Of the Gram matrix of vectors that are rounded to the precision of the parameters."""
        return (10 * self.space.precision) ** 2

    def _weights_of(self, part: str) -> np.ndarray:
        return self.class_weights if part == "class" else np.diagonal(self.pair_weights)

    def _class_basis(self, part: str, most: int | None = None) -> Tensor:
        gram, rows = self._sweeps.class_gram(part), self._sweeps.class_rows(part)
        factors = hierarchy.weighted_basis(gram, self._weights_of(part), self._rounding)[:, :most]
        basis = orthonormalized(torch.from_numpy(factors.T.copy()).to(rows) @ rows)
        return basis.t().to(self.space.working_dtype)

    def knockout(self, operator: Any, part: str = "class", how: str = "project") -> LinearOperator:
        """Return an operator without one of the parts, to see what it is responsible for.

        Parameters
        ----------
        operator : LinearOperator or array of shape (p, p)
            On the same space, such as a `Hessian`.
        part : {"class", "cross", "equal", "means"}
        how : {"project", "subtract"}
            ``(I - Q Q^T) A (I - Q Q^T)`` with Q the basis of the part's range, or A minus the part.

        Returns
        -------
        LinearOperator

        Raises
        ------
        ValueError
            If `part` or `how` is unknown, or as `eigenvalues`.

        Notes
        -----
        Subtraction can leave outliers, of either sign, where the eigenvectors of the operator
        that a part causes are not quite its own: it is then no evidence against the part.
        Projection takes away all that its range holds, whatever it came from. Show both.

        References
        ----------
        Papyan (2020), JMLR 21(252), Definitions 3.1-3.3. arXiv:2008.11865
        """
        check_part(part, of_model=True)
        own = PartOperator(self._sweeps, part)
        return without_part(operator, own, lambda: self.basis(part), how)

    def attribution(
        self, eigenvalues: Any, eigenvectors: Tensor, part: str = "class"
    ) -> hierarchy.Attribution:
        """Return which share of given eigenpairs lies in the range of a part.

        Parameters
        ----------
        eigenvalues : array of shape (k,)
        eigenvectors : tensor of shape (p, k)
            Such as those of `specdens.eigsh`.
        part : {"class", "cross", "equal", "means"}

        Returns
        -------
        Attribution
            ``share`` and ``baseline``: that of random directions, rank / p.

        Raises
        ------
        ValueError
            If the shapes do not fit, or as `eigenvalues`.
        """
        values = torch.as_tensor(eigenvalues).detach().cpu().numpy()
        return attribution(self.basis(part), values, eigenvectors)

    def squared_distances(self) -> np.ndarray:
        """Return the squared distances of class means and pair means, (C + C * C) square.

        `specdens.hierarchy.embedding` makes points in the plane of them.
        """
        return hierarchy.squared_distances(self.pair_gram(), self.pair_weights)

    def layer(self, name: str) -> LayerStructure:
        """Return means and moments of the inputs and errors of one linear layer, from one pass.

        Parameters
        ----------
        name : str
            Of a `torch.nn.Linear` that is used once, on one vector for each example.

        Returns
        -------
        LayerStructure

        Raises
        ------
        ValueError
            If there is no such layer, or its moments do not fit into the risk's memory budget.
        """
        return layer_structure(self.risk, name, self._sweeps.rows_of)

    def release(self) -> None:
        """Free all that is kept: graphs, means and Gram matrices."""
        self._sweeps.release()

    def __repr__(self) -> str:
        number = self._sweeps.num_classes or "?"
        return f"ClassStructure({number} classes, weighting={self.weighting!r}, {self.risk!r})"
