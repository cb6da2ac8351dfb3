"""Risk and curvature on the line between two parameter vectors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from specdens.arguments import checked_callable, checked_numbers
from specdens.line_path import LinePath, line_path
from specdens_jax.parameters import FlatParameters, PyTree
from specdens_jax.risk import Risk, check_risk, risk_value
from specdens_jax.sharding import on_automatic_axes, on_callers_axes


def along_line(
    risk: Risk,
    start: PyTree,
    end: PyTree,
    alphas: ArrayLike,
    *,
    quantity: Callable[[Risk], Any] | None = None,
    statistics: Callable[[PyTree], PyTree] | None = None,
) -> LinePath:
    r"""Evaluate a risk at :math:`(1 - \alpha) \theta_0 + \alpha \theta_1`.

    No barrier between two solutions means that they lie in one basin, as far as the line can tell.
    A barrier is measured from the chord, the straight line between the values at both ends: on a
    slope between unequal ends there is none. Nothing is compiled anew from point to point.

    Parameters
    ----------
    risk : Risk
        What it needs besides parameters that vary (constants, data) is the same at all points,
        except for what `statistics` gives.
    start, end : array of shape (n,), or pytree of arrays
        Flat vectors, such as ``risk.parameters.ravel(params)`` returns for each solution, or
        pytrees like ``risk.params``, of which only the leaves that vary are used.
    alphas : array_like of shape (m,)
        Places on the line, also beyond its ends. Where 0 and 1 are missing, the ends are evaluated
        in addition.
    quantity : callable, optional
        ``quantity(risk)`` returns a number, or an array of one shape at all points; by default
        `risk_value`. ``lambda risk: eigsh(Hessian(risk), 1).eigenvalues[0]`` is the sharpness.
    statistics : callable, optional
        ``statistics(params)`` returns a pytree like ``risk.params``; at each point its leaves that
        do not vary take the place of the constants, such as the batch statistics of the model
        there. By default the constants of the risk are kept. See the notes.

    Returns
    -------
    LinePath

    Raises
    ------
    TypeError
        If `risk` is not a `Risk`, `quantity` or `statistics` cannot be called, or `quantity` or a
        point is no real numbers.
    ValueError
        If a point does not have the shape of the parameters, `alphas` are not finite numbers, or
        `statistics` returns another pytree; and whatever `quantity` and `statistics` raise.

    Notes
    -----
    Statistics of one solution are wrong at the other, and a barrier may be theirs. A JAX model is a
    pure function, and only its author knows how it computes its statistics. So they are leaves of
    `params` that do not vary, read by ``predict``, and `statistics` is the pass over the data that
    makes them. For Flax, with ``nn.BatchNorm(momentum=0.0)`` and `inputs` all inputs at once, they
    are exactly those of the data::

        def statistics(variables):
            _, new = model.apply(variables, inputs, train=True, mutable="batch_stats")
            return {**variables, **new}

        risk = Risk(
            lambda variables, x: model.apply(variables, x, train=False),
            CrossEntropy(), variables, data, parameters="params",
        )

    References
    ----------
    Sagun, Evci, Guney, Dauphin, Bottou (2017), Empirical analysis of the Hessian of
    over-parametrized neural networks. arXiv:1706.04454, on large and small batches.
    Frankle, Dziugaite, Roy, Carbin (2020), arXiv:1912.05671, section 2, for barriers.

    Examples
    --------
    >>> from specdens_jax import Risk, SquaredError
    >>> data = jnp.ones((4, 1)), jnp.zeros((4, 1))
    >>> risk = Risk(lambda w, x: w * x, SquaredError(), jnp.zeros(1), data)  # the square of w
    >>> path = along_line(risk, jnp.array([1.0]), jnp.array([-3.0]), [0, 0.25, 0.5, 1])
    >>> path.values
    array([1., 0., 1., 9.])
    >>> path.barrier  # a convex function has none
    0.0

    A model that is divided by the largest of its outputs does not depend on its weight:

    >>> x = jnp.array([[1.0], [2.0]])
    >>> def divided(params, x):
    ...     return params["w"] * x / params["largest"]
    >>> def statistics(params):
    ...     return {**params, "largest": params["w"] * x.max()}
    >>> params = {"w": jnp.ones(()), "largest": jnp.full((), 2.0)}
    >>> risk = Risk(divided, SquaredError(), params, (x, x / 2), parameters="w")
    >>> ends = jnp.array([1.0]), jnp.array([3.0])
    >>> along_line(risk, *ends, [0, 0.5, 1]).values
    array([0.   , 0.625, 2.5  ])
    >>> along_line(risk, *ends, [0, 0.5, 1], statistics=statistics).values.round(9)
    array([0., 0., 0.])
    """
    check_risk(risk)
    if statistics is not None and not callable(statistics):
        msg = (
            f"statistics={statistics!r} cannot be called; pass a function that returns params with "
            "their batch statistics, or None to keep those of the risk."
        )
        raise TypeError(msg)
    if quantity is not None:
        checked_callable("quantity", quantity, "a function of a Risk, or None for risk_value")
    parameters = risk.parameters
    first, last = _flat(start, parameters, "start"), _flat(end, parameters, "end")
    measure = quantity or risk_value

    @on_automatic_axes
    def point(first: jax.Array, last: jax.Array, alpha: float) -> list[jax.Array]:
        rows = ((1 - alpha) * first + alpha * last)[None]
        return [block[0] for block in parameters.blocks(rows)]

    def value(alpha: float) -> np.ndarray:
        blocks = point(first, last, alpha)
        params = parameters.merge(blocks, on_callers_axes(risk.constants))
        if statistics is not None:
            params = parameters.merge(blocks, _constants(statistics(params), parameters))
        return checked_numbers("quantity(risk)", measure(risk.at(params)))

    return line_path(alphas, value)


@on_automatic_axes
def _constants(params: PyTree, parameters: FlatParameters) -> list[Any]:
    """Return what does not vary of a pytree that the caller's function made."""
    try:
        return parameters.split(params)[1]
    except ValueError as error:
        msg = f"statistics(params) must return a pytree like the params it is given. {error}"
        raise ValueError(msg) from error


@on_automatic_axes
def _flat(point: PyTree, parameters: FlatParameters, name: str) -> jax.Array:
    """Return a point as one vector, in the widest precision there is."""
    is_vector = isinstance(point, jax.Array | np.ndarray) and point.shape == (parameters.size,)
    vector: Any
    if is_vector:
        vector = point
    else:
        try:
            vector = parameters.ravel(point)
        except ValueError as error:
            msg = (
                f"{name} is neither a vector of shape ({parameters.size},) nor a pytree like the "
                f"parameters. {error}"
            )
            raise ValueError(msg) from error
    if not jnp.issubdtype(vector.dtype, jnp.floating):
        msg = f"{name} has dtype {vector.dtype}; expected real floating-point parameters."
        raise TypeError(msg)
    wide = jax.dtypes.canonicalize_dtype(np.float64)
    return parameters.placed(jnp.asarray(vector, wide))
