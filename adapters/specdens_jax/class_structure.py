"""The parts of a Gauss-Newton matrix that come from means over classes and pairs of classes."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from specdens import Arithmetic, LinearOperator, VectorSpace, hierarchy
from specdens.arguments import checked_numbers, shown
from specdens.class_parts import check_part, is_integer
from specdens.layer_structure import LayerStructure
from specdens.model_structure import attribution, without_part
from specdens_jax.class_layers import layer_structure
from specdens_jax.class_means import ClassMeans, gram_of, inner_products, matmul
from specdens_jax.linearized import check_vectors
from specdens_jax.sharding import on_automatic_axes


class ClassStructure(ClassMeans):
    r"""The parts of a Gauss-Newton matrix by classes and pairs of classes.

    With softmax probabilities :math:`p_i`, weights :math:`\kappa_i` of the terms and memberships
    :math:`y_{ic}` of term i in class c, the Gauss-Newton matrix is the weighted second moment of
    extended gradients, :math:`G = \sum_{icc'} \omega_{icc'} h_{icc'} h_{icc'}^\top`. Their weighted
    means are the pair means :math:`g_{cc'}`, of weight :math:`w_{cc'} = \sum_i \omega_{icc'}`, and
    the class means :math:`g_c = \sum_{c' \ne c} w_{cc'} g_{cc'} / w_c` with
    :math:`w_c = \sum_{c' \ne c} w_{cc'}`. They split G into four parts that add up to it,

    .. math::
        G_\text{class} &= \sum_c w_c g_c g_c^\top, \qquad
        G_\text{cross} = \sum_{c,\, c' \ne c} w_{cc'} (g_{cc'} - g_c)(g_{cc'} - g_c)^\top, \\
        G_\text{equal} &= \sum_c w_{cc} g_{cc} g_{cc}^\top, \qquad
        G_\text{within} = \sum_{icc'} \omega_{icc'} (h_{icc'} - g_{cc'})(h_{icc'} - g_{cc'})^\top.

    Parameters
    ----------
    risk : Risk
        Its loss is `CrossEntropy`, `token_loss` or `next_token_loss`.
    num_classes : int, optional
        The number C of classes, by default that of the logits; another one is refused.
    weighting : {"probability", "uniform"}
        ``"probability"``: :math:`h_{icc'} = J_i^\top (p_i - e_{c'})` and :math:`\omega_{icc'} =
        \kappa_i y_{ic} p_{ic'} / W`. ``"uniform"``: :math:`h_{icc'} = \sqrt{p_{ic'}} J_i^\top (p_i
        - e_{c'})` and :math:`\omega_{icc'} = \kappa_i y_{ic} / W`. W is what the risk divides by.

    Attributes
    ----------
    risk : Risk
    weighting : str
    parameters : FlatParameters
    space : VectorSpace

    Raises
    ------
    TypeError
        If `risk` is not a Risk.
    ValueError
        If its loss is not known to be softmax cross-entropy, `weighting` is unknown or
        `num_classes` not an integer from 2; or, when it is first used, if the logits have another
        number of classes, or targets are no classes.

    Notes
    -----
    Nothing is computed until it is asked for. A product with a part is two passes over the data
    that hold C * C numbers for each column; ``G_class`` takes none where the class means are
    affordable. Class means are one pass with C products of the transposed Jacobian, less those of
    classes that a batch has no examples of: batches of one class each make it as cheap as a
    gradient. A label that is smoothed still belongs to its class alone, and a target that is a
    distribution to all classes in proportion. Weight decay has no part in it.

    References
    ----------
    Papyan (2019), Measurements of three-level hierarchical structure in the outliers in the
    spectrum of deepnet Hessians, Eq. 28 (uniform weighting). arXiv:1901.08244
    Papyan (2020), Traces of class/cross-class structure pervade deep learning spectra, JMLR
    21(252), Eqs. 6.2-6.4 (probability weighting). arXiv:2008.11865

    Examples
    --------
    >>> from specdens_jax import CrossEntropy, GaussNewton, Risk
    >>> data = jnp.array([[1.0, 0.0], [1.0, 0.5], [0.0, 1.0]]), jnp.array([0, 0, 1])
    >>> risk = Risk(lambda w, x: x @ w, CrossEntropy(), jnp.zeros((2, 2)), data)
    >>> structure = ClassStructure(risk)
    >>> structure.class_weights.round(3)
    array([0.333, 0.167])
    >>> parts = structure.G_class + structure.G_cross + structure.G_equal + structure.G_within
    >>> x = jnp.array([1.0, 2.0, 3.0, 5.0])
    >>> bool(jnp.allclose(parts @ x, GaussNewton(risk) @ x))
    True
    """

    @property
    def G_class(self) -> LinearOperator:  # noqa: N802
        """The second moment of the class means, of rank C at most."""
        return _Part(self, "class")

    @property
    def G_cross(self) -> LinearOperator:  # noqa: N802
        """The spread of the pair means of different classes about their class means."""
        return _Part(self, "cross")

    @property
    def G_within(self) -> LinearOperator:  # noqa: N802
        """The spread of the extended gradients about their pair means."""
        return _Part(self, "within")

    @property
    def G_equal(self) -> LinearOperator:  # noqa: N802
        """The second moment of the pair means of equal classes, of rank C at most."""
        return _Part(self, "equal")

    @on_automatic_axes
    def eigenvalues(self, part: str) -> np.ndarray:
        """Return the nonzero eigenvalues of a part, from a matrix of inner products.

        Parameters
        ----------
        part : {"class", "cross", "equal", "means"}
            ``"means"`` is the sum of the other three.

        Returns
        -------
        ndarray, float64
            Descending: C for ``"class"`` and ``"equal"``, C * (C - 1) for ``"cross"``, C * C for
            ``"means"``. Some may be zero up to rounding.

        Raises
        ------
        ValueError
            If `part` is none of these, or C ** 4 numbers do not fit `MEMORY_BUDGET`.
        """
        check_part(part, of_model=True)
        if part in ("class", "equal"):
            means, weights = self._class_vectors(part)
            return hierarchy.weighted_eigenvalues(gram_of(means), weights)
        return hierarchy.part_eigenvalues(self.pair_gram(), self.pair_weights, part)

    @on_automatic_axes
    def principal_subspace(self, k: int) -> jax.Array:
        """Return an orthonormal basis of the k leading directions of the class means.

        They are the leading eigenvectors of ``G_class``, without an eigenanalysis of G.

        Parameters
        ----------
        k : int
            At most C, and at most the rank of ``G_class``.

        Returns
        -------
        array of shape (p, k)

        Raises
        ------
        ValueError
            If `k` is not such a number.
        """
        count = self.num_classes
        if not is_integer(k) or not 1 <= k <= count:
            msg = (
                f"k={k!r} must be an integer from 1 to the number {count} of classes; for more "
                "directions use basis('means'), or eigsh(GaussNewton(risk), k)."
            )
            raise ValueError(msg)
        basis = self.basis("class")
        if k > basis.shape[1]:
            msg = f"k={k} exceeds the rank {basis.shape[1]} of the class means; pass k up to that."
            raise ValueError(msg)
        return basis[:, :k]

    @on_automatic_axes
    def basis(self, part: str) -> jax.Array:
        """Return an orthonormal basis of the range of a part, leading eigenvectors first.

        Parameters
        ----------
        part : {"class", "cross", "equal", "means"}

        Returns
        -------
        array of shape (p, r)
            The rank r counts eigenvalues above the rounding of the parameters' dtype.

        Raises
        ------
        ValueError
            As `eigenvalues`.
        """
        check_part(part, of_model=True)
        precision = self._rounding(part)
        if part in ("class", "equal"):
            means, weights = self._class_vectors(part)
            factors = hierarchy.weighted_basis(gram_of(means), weights, precision)
            columns = matmul(means, jnp.asarray(factors, dtype=means.dtype))
        else:
            _, factors = hierarchy.part_basis(self.pair_gram(), self.pair_weights, part, precision)
            columns = self._combined(factors)
        if not columns.shape[1]:
            return columns
        basis, triangle = jnp.linalg.qr(columns)
        signs = jnp.where(jnp.diagonal(triangle) < 0, -1, 1).astype(basis.dtype)
        return self.parameters.placed(basis * signs)

    def knockout(self, operator: Any, part: str = "class", how: str = "project") -> LinearOperator:
        """Return an operator without a part of the class structure.

        Parameters
        ----------
        operator : LinearOperator or array of shape (p, p)
            Such as ``Hessian(risk)``.
        part : {"class", "cross", "equal", "means"}
        how : {"project", "subtract"}
            ``(I - Q Q^T) A (I - Q Q^T)`` with Q the basis of the part's range, or A minus the part.

        Returns
        -------
        LinearOperator

        Raises
        ------
        ValueError
            If `part` or `how` is unknown, or the dimensions differ, or as `eigenvalues`.

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
        return without_part(operator, _Part(self, part), lambda: self.basis(part), how)

    def attribution(
        self, eigenvalues: ArrayLike, eigenvectors: jax.Array, part: str = "class"
    ) -> hierarchy.Attribution:
        r"""Return how much of given eigenpairs lies in the range of a part.

        Parameters
        ----------
        eigenvalues : array of shape (k,)
            Such as those of the leading eigenpairs of the Hessian, by `eigsh`.
        eigenvectors : array of shape (p, k)
            Of length one; other lengths do not count.
        part : {"class", "cross", "equal", "means"}

        Returns
        -------
        Attribution
            ``share`` is :math:`\sum_j |\lambda_j| \|Q^\top v_j\|^2 / \sum_j |\lambda_j|` with Q =
            ``basis(part)``, ``baseline`` its expectation for random vectors, the dimension of the
            range divided by p.

        Raises
        ------
        ValueError
            If the shapes do not belong together, and as `eigenvalues`.
        TypeError
            If `eigenvectors` is no array, or `eigenvalues` are no real numbers.
        """
        if not isinstance(eigenvectors, jax.Array | np.ndarray):
            msg = f"eigenvectors={shown(eigenvectors)} must be an array of shape (p, k)."
            raise TypeError(msg)
        values = checked_numbers("eigenvalues", eigenvalues)
        return attribution(self.basis(part), values, eigenvectors)

    def squared_distances(self) -> np.ndarray:
        """Return the squared distances between all class means and pair means.

        Returns
        -------
        ndarray of shape (C + C * C, C + C * C), float64
            The class means first, then the pair means (c, c') at C + c * C + c'; for
            `specdens.hierarchy.embedding`.

        Raises
        ------
        ValueError
            If C ** 4 numbers do not fit `MEMORY_BUDGET`.
        """
        return hierarchy.squared_distances(self.pair_gram(), self.pair_weights)

    def layer(self, name: str) -> LayerStructure:
        """Return means and moments of the inputs and errors of one linear layer, from one pass.

        Parameters
        ----------
        name : str
            The leaf that multiplies the layer's inputs, as for `KroneckerFactors`: a dense kernel
            of either orientation, used once, on one vector for each example. It need not be among
            the parameters that vary.

        Returns
        -------
        LayerStructure

        Raises
        ------
        ValueError
            If there is no such leaf, its moments do not fit `MEMORY_BUDGET`, or targets are no
            classes.

        Examples
        --------
        >>> from specdens_jax import CrossEntropy, Risk
        >>> data = jnp.array([[4.0, 0.0], [2.0, 0.0], [0.0, 6.0]]), jnp.array([0, 0, 1])
        >>> params = {"kernel": jnp.zeros((2, 2))}  # all probabilities are 1/2
        >>> risk = Risk(lambda params, x: x @ params["kernel"], CrossEntropy(), params, data)
        >>> layer = ClassStructure(risk).layer("kernel")
        >>> layer.feature_means
        array([[3., 0.],
               [0., 6.]])
        >>> layer.error_means[:, 0, 1]  # of the first class, as if the second were the label
        array([ 0.5, -0.5])
        """
        _ = self.num_classes  # which checks it
        return layer_structure(self.risk, name, self.weighting)

    def _multiplied(self, part: str, rows: jax.Array) -> jax.Array:
        """Return the products of a part with rows (k, p)."""
        if part == "class" and self.num_classes <= self._affordable():
            means = self.class_means
            weights = jnp.asarray(self.class_weights, dtype=means.dtype)
            slopes = inner_products(rows.astype(means.dtype), means)
            return matmul(slopes * weights, means.T)
        products = self._products(rows)
        if part == "within":
            new = self._passes.combinations(-products, rows)
        else:
            columns = np.moveaxis(products, 0, -1)
            tables = hierarchy.part_tables(columns, self.pair_weights, part)
            new = self._passes.combinations(np.moveaxis(tables, -1, 0))
        return new / self._mass

    def __repr__(self) -> str:
        number = self.__dict__.get("num_classes") or self._asked or "?"
        return f"ClassStructure({number} classes, weighting={self.weighting!r}, {self.risk!r})"


class _Part(Arithmetic):
    """One part of the class structure, known through its products."""

    def __init__(self, structure: ClassStructure, part: str) -> None:
        self._structure, self._part = structure, part

    @property
    def space(self) -> VectorSpace:
        return self._structure.space

    @on_automatic_axes
    def __matmul__(self, x: jax.Array, /) -> jax.Array:
        check_vectors(x, self.space)
        parameters = self._structure.parameters
        rows = x[None] if x.ndim == 1 else x.T
        rows = jax.device_put(rows, parameters.rows_layout(len(rows)))
        total = self._structure._multiplied(self._part, rows).astype(x.dtype)
        return parameters.placed(total[0] if x.ndim == 1 else total.T)

    def __repr__(self) -> str:
        return f"G_{self._part}(n={self.space.dimension:,}, {self._structure.risk!r})"
