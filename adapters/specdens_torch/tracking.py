"""Following the top of a spectrum during training: sharpness, top eigenspace, gradient's share."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from specdens import EigenResult, LinearOperator, eigsh, energy_in, subspace_overlap
from specdens.arguments import (
    checked_count,
    checked_integer,
    checked_nonnegative,
    checked_number,
    checked_positive,
    checked_seed,
)
from specdens_torch.history import SpectrumHistory, SpectrumRecord
from specdens_torch.linearized import RiskMatrix
from specdens_torch.values import gradient


class SpectrumTracker:
    r"""Follows the largest eigenvalues of a curvature matrix while its model is trained.

    Every so many steps the top eigenpairs are computed by `specdens.eigsh`, from the eigenvectors
    of the last time: their largest, the sharpness, is compared with what the optimizer can stand,
    the eigenspace with the last one and with the gradient. Gradient descent with learning rate
    :math:`\eta` is stable on a quadratic of sharpness below :math:`2 / \eta`; networks come to
    that edge by themselves and stay there.

    Parameters
    ----------
    operator : LinearOperator
        Such as `Hessian` of a risk on a fixed part of the training data, at the present parameters.
        Of an operator without a risk nothing is known about the gradient.
    num_eigenvalues : int
        Number k of eigenpairs.
    every : int
        `update` measures when at least so many steps have passed since the last record.
    tol : float
        Residuals asked for, relative to the largest eigenvalue, as in `specdens.eigsh`. The error
        of an eigenvalue is about residual ** 2 / gap, that of its vector residual / gap.
    max_products : int
        Products per update at most: what has not converged then says so and is taken up next time.
    max_overhead : float, optional
        `update` puts a measurement off while those since the first call have taken more than this
        part of the other time, 0.1 for instance. None measures every so many steps regardless, at
        steps that do not depend on the clock.
    block_size : int, optional
        Columns per product, as in `specdens.eigsh`.
    seed : int
        Of the random vectors of `specdens.eigsh`; no global generator is touched.

    Raises
    ------
    TypeError
        If `operator` has no products or not of torch's vectors, or a count is not an integer.
    ValueError
        If a count is below 1, or `max_overhead` not above 0.

    Notes
    -----
    An update costs one gradient of the risk and at most `max_products` products; 25 to 40 are
    usual, for one eigenvalue as for ten, since most of them prove that no other eigenvalue has
    overtaken those that are followed. Each takes about as long as 1.5 gradients over the data of
    the risk, more for very small networks. Full-batch training thus pays about 50 steps per
    update; with small batches, take some batches' worth of data, a larger `every`, or
    `max_overhead`. Between updates k vectors of length n are kept, and no graphs.

    The model is left as it was, its `.grad` and the random generators too. Where dropout or batch
    norm make the risk random, wrap the update in ``model.eval()`` and ``model.train()``.

    References
    ----------
    Cohen, Kaur, Li, Kolter, Talwalkar (2021), Gradient descent on neural networks typically occurs
    at the edge of stability, arXiv 2103.00065, section 3.
    Gur-Ari, Roberts, Dyer (2018), arXiv 1812.04754, equation 1 and section 2.

    Examples
    --------
    >>> from specdens_torch import Hessian
    >>> inputs = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> hessian = Hessian(model, torch.nn.MSELoss(), (inputs, torch.ones(2, 1)))
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.25)
    >>> tracker = SpectrumTracker(hessian, num_eigenvalues=1, every=10)
    >>> for step in range(20):
    ...     _ = tracker.update(step, optimizer)  # then train
    >>> tracker.history.arrays()["sharpness"].round(4)
    array([4., 4.])
    >>> round(tracker.history[-1].ratio, 4)
    0.5
    """

    def __init__(
        self,
        operator: LinearOperator,
        *,
        num_eigenvalues: int = 3,
        every: int = 100,
        tol: float = 1e-3,
        max_products: int = 100,
        max_overhead: float | None = None,
        block_size: int | None = None,
        seed: int = 0,
    ) -> None:
        if not isinstance(operator, LinearOperator):
            msg = (
                f"operator has type {type(operator).__qualname__}; pass one, such as Hessian(risk)."
            )
            raise TypeError(msg)
        if operator.space.backend.name != "torch":
            msg = (
                f"operator has vectors of {operator.space.backend.name}; expected those of torch, "
                "as specdens.on_backend(A, 'torch') makes them."
            )
            raise TypeError(msg)
        counts = {"num_eigenvalues": num_eigenvalues, "every": every, "max_products": max_products}
        for name, value in counts.items():
            checked_count(name, value)
        if block_size is not None:
            checked_count("block_size", block_size)
        checked_nonnegative("tol", tol, "it is relative to the norm")
        checked_seed(seed)
        self.operator = operator
        self.num_eigenvalues, self.every, self.max_products = num_eigenvalues, every, max_products
        self.tol, self.block_size, self.seed = tol, block_size, seed
        if max_overhead is not None:
            checked_positive("max_overhead", max_overhead, "None sets no limit")
        self.max_overhead = max_overhead
        self._began: float | None = None  # when `update` was first called
        self._tracking = 0.0  # seconds of measurements since then
        self._records: list[SpectrumRecord] = []
        self.eigenvectors: Tensor | None = None  # (n, k) of the last update, largest first

    @property
    def history(self) -> SpectrumHistory:
        """The records so far, as a sequence that does not change."""
        return SpectrumHistory(self._records)

    def update(
        self, step: int, learning_rate: float | torch.optim.Optimizer | None = None
    ) -> SpectrumRecord | None:
        """Measure if it is time to, and return the new record; call it at every step.

        Parameters
        ----------
        step : int
            Number of the training step; it never decreases.
        learning_rate : float or torch.optim.SGD, optional
            As in `stability_edge`. Pass it anew at each step: schedules change it.

        Returns
        -------
        SpectrumRecord or None

        Raises
        ------
        ValueError
            As `measure`, in particular when training has diverged. The history stays.
        """
        if self._began is None:
            self._began = time.perf_counter()
        if self._records:
            if step < self._records[-1].step + self.every:
                return None
            if self.max_overhead is not None:
                elapsed = time.perf_counter() - self._began
                if self._tracking > self.max_overhead * (elapsed - self._tracking):
                    return None
        return self.measure(step, learning_rate)

    def measure(
        self, step: int, learning_rate: float | torch.optim.Optimizer | None = None
    ) -> SpectrumRecord:
        """Measure now and append the record to the history.

        Parameters
        ----------
        step, learning_rate
            As in `update`.

        Returns
        -------
        SpectrumRecord

        Raises
        ------
        ValueError
            If `step` is not beyond the last record's, the learning rate is out of range, or the
            risk is not a finite, repeatable function (see `Risk`).
        TypeError
            If the stability of the optimizer is not known.
        """
        step = checked_integer("step", step)
        if self._records and step <= self._records[-1].step:
            msg = f"step={step} must lie beyond the last record, step {self._records[-1].step}."
            raise ValueError(msg)
        began = time.perf_counter()
        edge = math.nan if learning_rate is None else stability_edge(learning_rate)
        pairs = self._pairs()
        vectors = pairs.eigenvectors
        norm, energy = self._gradient_in(vectors)
        last = self.eigenvectors
        record = SpectrumRecord(
            step=step,
            eigenvalues=pairs.eigenvalues[::-1].copy(),
            residuals=pairs.residuals[::-1].copy(),
            converged=pairs.converged[::-1].copy(),
            edge=edge,
            gradient_norm=norm,
            energy=energy,
            overlap=math.nan if last is None else subspace_overlap(last, vectors),
            num_products=pairs.num_products,
            seconds=time.perf_counter() - began,
        )
        self.eigenvectors = vectors.flip(1)
        self._tracking += record.seconds
        self._records.append(record)
        return record

    def state_dict(self, *, eigenvectors: bool = True) -> dict[str, Any]:
        """Return what a checkpoint of the run should hold beside model and optimizer.

        Parameters
        ----------
        eigenvectors : bool
            Whether to keep the (n, k) eigenvectors, without which the next update starts anew and
            knows no overlap.

        Returns
        -------
        dict
            For `torch.save`, and for `torch.load` with ``weights_only=True``.
        """
        vectors = self.eigenvectors if eigenvectors else None
        return {"records": self.history.rows(), "eigenvectors": vectors}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state that `state_dict` returned.

        Parameters
        ----------
        state : mapping

        Raises
        ------
        ValueError
            If `state` is no such state, or of an operator of another size.
        """
        try:
            records = list(SpectrumHistory.of_rows(state["records"]))
            vectors = state["eigenvectors"]
        except (KeyError, TypeError, ValueError, IndexError) as error:
            msg = f"state is not what SpectrumTracker.state_dict returns ({error!r})."
            raise ValueError(msg) from error
        space = self.operator.space
        if vectors is not None:
            if vectors.ndim != 2 or vectors.shape[0] != space.dimension:
                msg = (
                    f"state holds eigenvectors of shape {tuple(vectors.shape)}; the operator has "
                    f"dimension {space.dimension}. Pass the state of a run of the same model."
                )
                raise ValueError(msg)
            vectors = vectors.to(device=space.device, dtype=space.working_dtype)
        self._records, self.eigenvectors = records, vectors

    def _pairs(self) -> EigenResult:
        """Return the top eigenpairs at the present parameters, and free what they needed."""
        try:
            return eigsh(
                self.operator,
                self.num_eigenvalues,
                which="LA",
                tol=self.tol,
                max_products=self.max_products,
                start=self.eigenvectors,
                block_size=self.block_size,
                seed=self.seed,
                progress=False,
            )
        finally:
            if isinstance(self.operator, RiskMatrix):
                self.operator.release()  # the next update finds other parameters anyway

    def _gradient_in(self, vectors: Tensor) -> tuple[float, float]:
        """Return the norm of the gradient, and the share of its square in the span of `vectors`."""
        risk = getattr(self.operator, "risk", None)
        if risk is None:
            return math.nan, math.nan
        slope = gradient(risk)
        norm = float(torch.linalg.vector_norm(slope, dtype=torch.float64))
        return norm, float(energy_in(vectors, slope)) if norm > 0 else math.nan

    def __repr__(self) -> str:
        return (
            f"SpectrumTracker({self.num_eigenvalues} eigenvalues every {self.every} steps, at most "
            f"{self.max_products} products per update, {self.history!r})"
        )


def stability_edge(learning_rate: float | torch.optim.Optimizer) -> float:
    r"""Return the largest sharpness at which gradient descent with these settings is stable.

    On a quadratic of curvature :math:`\lambda` plain steps stay bounded up to :math:`2 / \eta`,
    with momentum :math:`\beta` up to :math:`2 (1 + \beta) / \eta`, with Nesterov's up to
    :math:`2 (1 + \beta) / (\eta (1 + 2 \beta))`. Dampening shrinks :math:`\eta`, weight decay
    adds to the curvature.

    Parameters
    ----------
    learning_rate : float or torch.optim.SGD
        The learning rate of plain gradient descent, or an optimizer whose present settings are
        read.

    Returns
    -------
    float
        In loss per squared parameter, infinite where nothing moves.

    Raises
    ------
    ValueError
        If the learning rate is negative or not finite, or parameter groups have different edges.
    TypeError
        If the optimizer is not `torch.optim.SGD`: adaptive ones are stable up to a sharpness of
        another, preconditioned matrix.

    References
    ----------
    Cohen, Kaur, Li, Kolter, Talwalkar (2021), arXiv 2103.00065, equation 1 and appendix B.

    Examples
    --------
    >>> stability_edge(0.1)
    20.0
    >>> weight = torch.nn.Parameter(torch.ones(1))
    >>> stability_edge(torch.optim.SGD([weight], lr=0.1, momentum=0.5, weight_decay=3.0))
    27.0
    """
    if not isinstance(learning_rate, torch.optim.Optimizer):
        return _edge(checked_number("learning_rate", learning_rate))
    if not isinstance(learning_rate, torch.optim.SGD):
        msg = (
            f"learning_rate has type {type(learning_rate).__qualname__}, whose edge is not that of "
            "the operator's own eigenvalues; pass a torch.optim.SGD, a number, or None."
        )
        raise TypeError(msg)
    names = ("lr", "momentum", "dampening", "weight_decay", "nesterov")
    edges = {_edge(*(float(group[name]) for name in names)) for group in learning_rate.param_groups}
    if len(edges) > 1:
        msg = (
            f"learning_rate: parameter groups have the different edges {sorted(edges)}; pass the "
            "learning rate as a number, or None."
        )
        raise ValueError(msg)
    return edges.pop()


def _edge(
    rate: float,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: float = 0.0,
) -> float:
    if not 0 <= rate < math.inf:
        msg = f"learning_rate={rate} must be a finite number from 0 up."
        raise ValueError(msg)
    step = rate * (1 - dampening if momentum else 1.0)  # torch dampens only what has momentum
    lag = 1 + 2 * momentum if nesterov else 1.0
    return 2 * (1 + momentum) / (step * lag) - weight_decay if step else math.inf
