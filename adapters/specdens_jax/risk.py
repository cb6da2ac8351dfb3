"""The risk of a pure function on data: a sum of losses over a sum of weights."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from specdens.arguments import checked_choice, checked_count, checked_nonnegative
from specdens_jax.accumulation import accumulated, checked_accumulation, finished
from specdens_jax.data import EMPTY, Batch, DataSource, cut, num_examples
from specdens_jax.losses import Terms, terms_of
from specdens_jax.parameters import FlatParameters, PyTree, Selection
from specdens_jax.sharding import fitted, on_automatic_axes

Leaves = list[jax.Array]
_CHECKED_EXAMPLES = 32


class Totals(NamedTuple):
    """What a pass over the data adds up to, as float64 numbers of the host."""

    weight: float  # sum of the weights of all terms
    value: float  # sum of weight times loss
    magnitude: float  # sum of its absolute values, the scale for differences
    examples: int


class Risk:
    r"""The risk :math:`L(\theta) = \sum_i w_i \ell_i(\theta) / \sum_i w_i` of a model on data.

    Nothing is computed here. Matrices of the risk (`Hessian`, ...), `gradient` and `risk_value`
    refer to `params`; `at` gives the same risk at others without compiling anything anew.

    Parameters
    ----------
    predict : callable
        A pure function ``predict(params, inputs)``. For Flax ``model.apply``, for Equinox
        ``eqx.combine`` around the static part; dropout off, batch statistics among the constants.
    loss : callable
        ``loss(outputs, targets)`` gives one loss for each example or term (any shape but 0-d), or a
        pair ``(losses, weights)`` of equal shapes with the losses not yet weighted; weights are
        constants. `CrossEntropy`, `SquaredError`, `BinaryCrossEntropy`, `next_token_loss`, those of
        optax that do not average, or your own.
    params : pytree of arrays
    data : pair, list of pairs, or other iterable
        ``(inputs, targets)``, each an array or a pytree of arrays, examples along the first axis.
        A tuple is one pair, a mapping with ``"labels"`` stands for (everything else, labels);
        anything else is iterated over, in every pass, and must give the same examples.
    parameters : str, sequence of str, or callable, optional
        The leaves of `params` that vary, by default all real floating-point ones; see
        `FlatParameters`.
    reduction : str
        ``"mean"`` divides by the sum of weights, ``"sum"`` does not.
    weight_decay : float
        Adds ``weight_decay / 2`` times the sum of squares of the parameters that vary.
    accumulate : str or dtype, optional
        How products and gradients of the batches are added up: in a wider dtype, such as
        ``"float64"`` (which needs ``jax_enable_x64``), or ``"compensated"``: in their own, with the
        rounding errors added up beside them. By default in their own, in half precision float32.
    batch_size : int, optional
        Most examples at a time; larger batches are cut. Every shape of a batch is compiled once.
    sharding : jax.sharding.Sharding, optional
        How flat vectors (n, k) lie on devices, such as ``NamedSharding(mesh, PartitionSpec("x"))``
        with n a multiple of the number of parts, or ``PartitionSpec(None, "x")`` for the columns.
        Data and `params` keep the shardings they come with.

    Attributes
    ----------
    parameters : FlatParameters
        Names and places of the parameters that vary.
    divides : bool
        Whether the sum of losses is divided by the sum of weights.

    Raises
    ------
    TypeError
        If `predict` or `loss` cannot be called, `data` is a one-shot iterator or not made of pairs,
        or an option has another type.
    ValueError
        If an option is out of range, `parameters` selects nothing, or `data` is empty. When the
        risk is first used: if the loss returns no terms or couples the examples of a batch that
        may be cut, if the risk is not finite, or if data differ between two passes.

    Examples
    --------
    >>> from specdens_jax import SquaredError
    >>> inputs, targets = jnp.array([[1.0, 2.0], [0.0, 1.0]]), jnp.ones(2)
    >>> risk = Risk(lambda w, x: x @ w, SquaredError(), jnp.ones(2), (inputs, targets))
    >>> risk_value(risk)
    2.0
    >>> gradient(risk).tolist()
    [2.0, 4.0]
    """

    @on_automatic_axes
    def __init__(
        self,
        predict: Callable[[PyTree, Any], Any],
        loss: Callable[[Any, Any], Any],
        params: PyTree,
        data: Any,
        parameters: Selection = None,
        *,
        reduction: str = "mean",
        weight_decay: float = 0.0,
        accumulate: Any = None,
        batch_size: int | None = None,
        sharding: Any = None,
    ) -> None:
        for name, function in (("predict", predict), ("loss", loss)):
            if not callable(function):
                msg = f"{name} has type {type(function).__qualname__}; expected a function."
                raise TypeError(msg)
        if isinstance(loss, type):
            msg = f"loss is the class {loss.__qualname__}; pass {loss.__qualname__}()."
            raise TypeError(msg)
        self.predict = predict
        self.loss: Any = loss
        self.divides = checked_choice("reduction", reduction, ("mean", "sum")) == "mean"
        self.weight_decay = checked_nonnegative("weight_decay", weight_decay)
        if batch_size is not None:
            batch_size = checked_count("batch_size", batch_size, advice="None leaves batches whole")
        self.parameters = FlatParameters(params, parameters, sharding=sharding)
        self._accumulate = accumulate
        own = self.parameters.space.working_dtype
        self.accumulation_dtype, self.compensated = checked_accumulation(accumulate, own)
        self.batch_size = batch_size
        self._source = DataSource(data, batch_size)
        self._first_pass: Totals | None = None
        self._checked = False
        self._kernels: dict[Any, Callable[..., Any]] = {}
        self.varying, self.constants = self.parameters.split(params)

    @property
    @on_automatic_axes
    def params(self) -> PyTree:
        """The parameters that the risk refers to."""
        return self.parameters.merge(self.varying, self.constants)

    @on_automatic_axes
    def at(self, params: PyTree) -> Risk:
        """Return the same risk at other parameters of the same structure; data are shared.

        Parameters
        ----------
        params : pytree of arrays

        Returns
        -------
        Risk
        """
        other = copy.copy(self)
        other.varying, other.constants = self.parameters.split(params)
        other._first_pass, other._checked = None, False
        return other

    @on_automatic_axes
    def restricted(self, parameters: Selection) -> Risk:
        """Return the same risk with fewer parameters that vary."""
        other, params = copy.copy(self), self.params
        other.parameters = own = FlatParameters(params, parameters)
        device = fitted(self.parameters.space.device, (own.size,))
        other.parameters = FlatParameters(params, parameters, sharding=device)
        other.varying, other.constants = other.parameters.split(params)
        other._kernels = {}
        return other

    def terms(self, varying: Leaves, constants: list[Any], batch: Batch) -> Terms:
        """Return the terms of one batch at the given leaves; a pure function."""
        outputs = self.predict(self.parameters.merge(varying, constants), batch.inputs)
        return terms_of(self.loss, outputs, batch.targets)

    def batches(self) -> Iterator[Batch]:
        """Yield the batches of one pass; the first pass checks the risk."""
        if not self._checked:
            self._check()
            self._checked = True
        yield from self._source

    def added_up(self, sums: list[jax.Array], examples: int) -> Totals:
        """Return what a pass adds up to from the `statistics` of every batch.

        Raises
        ------
        ValueError
            If the risk is not finite, or data differ from those of the first pass.
        """
        if not sums:
            raise ValueError(EMPTY)
        weight, value, magnitude = np.asarray(jnp.stack(sums), dtype=np.float64).sum(axis=0)
        totals = Totals(float(weight), float(value), float(magnitude), examples)
        _check_finite(totals, self.divides)
        if self._first_pass is None:
            self._first_pass = totals
        elif not self._source.in_memory:
            _check_same(self._first_pass, totals, float(jnp.finfo(sums[0].dtype).eps))
        return totals

    @on_automatic_axes
    def _check(self) -> None:
        """Refuse a loss that couples the examples of a batch, which splits would change."""
        first = next(iter(self._source), None)
        if first is None:
            raise ValueError(EMPTY)
        examples = num_examples(first)
        if examples is None or examples < 2:
            return
        few = min(examples, _CHECKED_EXAMPLES)
        parts = ((0, few), (0, few // 2), (few // 2, few))
        whole, *halves = (
            np.asarray(statistics(self.terms(self.varying, self.constants, cut(first, a, b))))
            for a, b in parts
        )
        both = halves[0].astype(np.float64) + halves[1]
        tolerance = float(jnp.finfo(whole.dtype).eps) ** 0.5
        apart = np.abs(both - whole)[:2]
        if (apart > tolerance * np.array([abs(whole[0]), whole[2]]) + 1e-300).any():
            msg = (
                f"loss or predict couples the examples of a batch: {few} examples have losses "
                f"{whole[1]:.8g} and weights {whole[0]:.8g} in sum, but {both[1]:.8g} and "
                f"{both[0]:.8g} when evaluated as two halves. Return one loss per example (not "
                "their mean), and use running statistics in batch norm."
            )
            raise ValueError(msg)

    def kernel(self, key: Any, build: Callable[[], Callable[..., Any]]) -> Callable[..., Any]:
        """Return the compiled function called `key`, shared with this risk at other parameters."""
        if key not in self._kernels:
            self._kernels[key] = build()
        return self._kernels[key]

    def __repr__(self) -> str:
        name = getattr(self.predict, "__name__", type(self.predict).__name__)
        loss = getattr(self.loss, "__name__", type(self.loss).__name__)
        read = "data not read yet"
        if self._first_pass is not None:
            read = f"{self._first_pass.examples:,} examples"
        return f"Risk({name}, {loss}, {self.parameters.size:,} parameters, {read})"


def check_risk(risk: Any) -> None:
    """Refuse what is no risk.

    Raises
    ------
    TypeError
        If `risk` is not a `Risk`.
    """
    if not isinstance(risk, Risk):
        msg = (
            f"risk has type {type(risk).__qualname__}; expected a Risk, with its data: pass "
            "Risk(predict, loss, params, data), or the attribute risk of a matrix."
        )
        raise TypeError(msg)


def statistics(terms: Terms) -> jax.Array:
    """Return the sums of weights, weighted losses and their magnitudes."""
    wide = jnp.promote_types(terms.weighted.dtype, jnp.float32)
    weighted = jax.lax.stop_gradient(terms.weighted).astype(wide)
    sums = [terms.weights.astype(wide).sum(), weighted.sum(), jnp.abs(weighted).sum()]
    return jnp.stack(sums)


def new_total(risk: Risk, rows: int) -> Any:
    """Return zeros to add rows (k, n) to, with a second array for their rounding if asked for."""
    layout = risk.parameters.rows_layout(rows)
    shape, dtype = (rows, risk.parameters.size), risk.accumulation_dtype
    return tuple(jnp.zeros(shape, dtype, device=layout) for _ in range(1 + risk.compensated))


def _check_finite(totals: Totals, divides: bool) -> None:
    if not (math.isfinite(totals.value) and math.isfinite(totals.weight)):
        msg = (
            f"the risk is not finite: losses {totals.value} and weights {totals.weight} in sum; "
            "look for inputs, targets or parameters that are nan or infinite."
        )
        raise ValueError(msg)
    if divides and totals.weight == 0:
        msg = (
            "the weights of all terms sum to 0, so the mean loss is undefined; check ignored "
            "targets, class weights and padding, or use reduction='sum'."
        )
        raise ValueError(msg)


def _check_same(first: Totals, now: Totals, epsilon: float) -> None:
    close = abs(first.value - now.value) <= epsilon**0.5 * first.magnitude
    if first.examples != now.examples or not close:
        msg = (
            f"data differ between two passes: {first.examples} examples with losses "
            f"{first.value:.8g} in sum at first, then {now.examples} with {now.value:.8g}. Switch "
            "random augmentation off, and sample without replacement; the order may differ."
        )
        raise ValueError(msg)


@on_automatic_axes
def risk_value(risk: Risk) -> float:
    """Return the risk, added up over batches in double precision.

    Parameters
    ----------
    risk : Risk

    Returns
    -------
    float

    Raises
    ------
    TypeError
        If `risk` is not a `Risk`.
    ValueError
        If the risk is not one finite function of the parameters; see `Risk`.

    Examples
    --------
    >>> from specdens_jax import SquaredError
    >>> data = jnp.ones((4, 1)), jnp.zeros((4, 1))
    >>> risk_value(Risk(lambda w, x: w * x, SquaredError(), jnp.float32(3.0), data))
    9.0
    """
    check_risk(risk)
    kernel = risk.kernel("value", lambda: jax.jit(lambda *a: statistics(risk.terms(*a))))
    sums, examples = [], 0
    for batch in risk.batches():
        sums.append(kernel(risk.varying, risk.constants, batch))
        examples += num_examples(batch) or 1
    totals = risk.added_up(sums, examples)
    value = totals.value / totals.weight if risk.divides else totals.value
    if risk.weight_decay:
        for leaf in risk.varying:
            wide = leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32))
            value += 0.5 * risk.weight_decay * float(jnp.square(wide).sum())
    return value


@on_automatic_axes
def gradient(risk: Risk) -> jax.Array:
    """Return the gradient of the risk with respect to the parameters that vary.

    Parameters
    ----------
    risk : Risk

    Returns
    -------
    array of shape (n,)
        ``risk.parameters.unravel`` gives it as a pytree.

    Raises
    ------
    TypeError
        If `risk` is not a `Risk`.
    ValueError
        If the risk is not one finite function of the parameters; see `Risk`.

    Examples
    --------
    >>> from specdens_jax import SquaredError
    >>> data = jnp.ones((4, 1)), jnp.zeros((4, 1))
    >>> gradient(Risk(lambda w, x: w * x, SquaredError(), jnp.float32(3.0), data)).tolist()
    [6.0]
    """
    check_risk(risk)
    total, totals = summed_gradient(risk)
    if risk.divides:
        total = total / totals.weight
    if risk.weight_decay:
        own = risk.parameters.rows([leaf[None] for leaf in risk.varying], total.dtype)[0]
        total = total + risk.weight_decay * own
    return risk.parameters.placed(total.astype(risk.parameters.space.dtype))


def summed_gradient(risk: Risk) -> tuple[jax.Array, Totals]:
    """Return the gradient of the weighted sum of losses, (n,), and what the data add up to."""

    def add(varying: Leaves, constants: list[Any], batch: Batch, total: Any) -> Any:
        def value(leaves: Leaves) -> tuple[jax.Array, jax.Array]:
            terms = risk.terms(leaves, constants, batch)
            return terms.weighted.sum(), statistics(terms)

        blocks, sums = jax.grad(value, has_aux=True)(varying)
        rows = risk.parameters.rows([b[None] for b in blocks], risk.accumulation_dtype)
        return accumulated(total, rows), sums

    kernel = risk.kernel("gradient", lambda: jax.jit(add, donate_argnums=3))
    total, sums, examples = new_total(risk, 1), [], 0
    for batch in risk.batches():
        total, part = kernel(risk.varying, risk.constants, batch, total)
        sums.append(part)
        examples += num_examples(batch) or 1
    return finished(total)[0], risk.added_up(sums, examples)
