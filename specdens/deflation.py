"""Known eigenvectors taken out of a run: the operator and the probes of their complement."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import ArrayLike

from specdens.algebra import project_out
from specdens.arguments import checked_numbers
from specdens.backends import Array
from specdens.interpretation import DeflatedRule, Rule
from specdens.probes import ProbeSampler, is_own
from specdens.spaces import LinearOperator, VectorSpace, checked_vectors


class Eigenpairs(Protocol):
    """What `eigsh` returns, or anything with these three."""

    @property
    def eigenvalues(self) -> ArrayLike:
        """Of shape (k,)."""
        ...

    @property
    def eigenvectors(self) -> Array:
        """Of shape (n, k), on the operator's device."""
        ...

    @property
    def residuals(self) -> ArrayLike:
        """Of shape (k,): norms of ``A u - lambda u``."""
        ...


class Complement(NamedTuple):
    """A run on the orthogonal complement of known eigenvectors."""

    operator: LinearOperator
    probes: ProbeSampler
    eigenvalues: np.ndarray  # (k,) ascending
    bounds: np.ndarray  # (k,) residual norms

    def add_to(self, rule: Any) -> Rule:
        """Return the rule of the whole operator, from that of the complement."""
        return DeflatedRule(rule, self.eigenvalues, self.bounds)


def complement(A: LinearOperator, probes: ProbeSampler, known: Eigenpairs) -> Complement:  # noqa: N803
    """Return the operator ``(I - P) A (I - P)`` and probes ``(I - P) v``.

    A probe uniform on the sphere is then uniform on the sphere of the complement.

    Parameters
    ----------
    A : LinearOperator of dimension n
    probes : ProbeSampler
    known : Eigenpairs
        k < n of them.

    Raises
    ------
    ValueError
        If the parts of `known` do not fit together or leave no complement, or a number is not
        finite.
    TypeError
        If `known` has no such parts.
    """
    space = A.space
    if not all(hasattr(known, name) for name in ("eigenvalues", "eigenvectors", "residuals")):
        msg = (
            f"deflate has type {type(known).__qualname__}; expected what eigsh returns, or "
            "anything with eigenvalues, eigenvectors and residuals."
        )
        raise TypeError(msg)
    eigenvalues = np.atleast_1d(checked_numbers("deflate.eigenvalues", known.eigenvalues))
    bounds = np.atleast_1d(checked_numbers("deflate.residuals", known.residuals))
    vectors, count = known.eigenvectors, len(eigenvalues)
    shape = tuple(getattr(vectors, "shape", ()))
    if shape != (space.dimension, count) or bounds.shape != (count,):
        msg = (
            f"deflate has eigenvectors of shape {shape}, {count} eigenvalues and "
            f"{len(bounds)} residuals; expected ({space.dimension}, k), k and k."
        )
        raise ValueError(msg)
    if count >= space.dimension:
        msg = f"deflate holds {count} of {space.dimension} eigenvectors: nothing is left to probe."
        raise ValueError(msg)
    if not (np.isfinite(eigenvalues).all() and np.isfinite(bounds).all()):
        msg = "deflate holds an eigenvalue or residual that is not finite; drop that pair."
        raise ValueError(msg)
    xp = space.backend.xp
    basis, _ = xp.linalg.qr(checked_vectors("deflate.eigenvectors", vectors, space), mode="reduced")

    def projected(space: VectorSpace, seed: int, index: int) -> Array:
        v = probes(space, seed, index)
        v = xp.astype(v, space.working_dtype) if is_own(v, space) else space.from_numpy(v)
        v = v[:, None]
        for _ in range(2):  # once more for what rounding left
            v = v - xp.matmul(basis, xp.matmul(xp.conj(xp.permute_dims(basis, (1, 0))), v))
        return v[:, 0]

    order = np.argsort(eigenvalues, kind="stable")
    return Complement(project_out(A, basis), projected, eigenvalues[order], bounds[order])
