"""Diagonal blocks of a matrix by leaf or by subtree of the parameters."""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable
from typing import Any

from specdens import SpectralMeasure, slq
from specdens.arguments import checked_choice, shown
from specdens_jax.linearized import RiskMatrix


class Blocks(dict[str, RiskMatrix]):
    """Diagonal blocks by name; `spectra` estimates all their spectra in one call."""

    def spectra(
        self, estimator: Callable[..., SpectralMeasure] = slq, **options: Any
    ) -> dict[str, SpectralMeasure]:
        """Return the spectral measure of every block.

        Parameters
        ----------
        estimator : callable
            `slq`, `kpm`, `density`, `lanczos`, or any function of an operator.
        **options
            Passed to `estimator` with every block; ``num_steps`` is cut to the dimension of smaller
            blocks.

        Returns
        -------
        dict of str to SpectralMeasure
        """
        measures = {}
        for name, block in self.items():
            own = dict(options)
            if own.get("num_steps") is not None:
                own["num_steps"] = min(own["num_steps"], block.space.dimension)
            measures[name] = estimator(block, **own)
        return measures


def layerwise(
    operator: RiskMatrix, *, by: str | Callable[[str], str | None] = "parameter"
) -> Blocks:
    """Return the diagonal blocks of a matrix, one for each leaf or subtree of the parameters.

    A block is the same matrix with the other leaves held constant; what a product does not need of
    the rest of the network is not computed.

    Parameters
    ----------
    operator : RiskMatrix
        `Hessian`, `GaussNewton` or another matrix over the parameters of a risk.
    by : str or callable
        ``"parameter"``: a block for each leaf, by its name. ``"module"``: a block for each subtree
        that holds leaves itself, by its name. Or a function from a leaf's name to the name of its
        block, None for leaves to leave out.

    Returns
    -------
    Blocks
        A dictionary from names to operators, in the order of the parameters.

    Raises
    ------
    TypeError
        If `operator` is not a matrix over the parameters of a risk.
    ValueError
        If `by` is unknown, or leaves all parameters out.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> from specdens_jax import Hessian, SquaredError
    >>> params = {"a": {"w": jnp.ones((3, 2)), "b": jnp.zeros(2)}, "c": jnp.ones(2)}
    >>> predict = lambda p, x: jnp.tanh(x @ p["a"]["w"] + p["a"]["b"]) @ p["c"]
    >>> hessian = Hessian(predict, SquaredError(), params, (jnp.ones((4, 3)), jnp.zeros(4)))
    >>> {name: block.space.dimension for name, block in layerwise(hessian, by="module").items()}
    {'a': 8, '': 2}
    """
    if not isinstance(operator, RiskMatrix):
        msg = (
            f"operator has type {type(operator).__qualname__}; expected a matrix over the "
            "parameters of a risk, such as Hessian(risk)."
        )
        raise TypeError(msg)
    rules: dict[str, Callable[[str], str | None]] = {
        "parameter": lambda name: name,
        "module": lambda name: name.rpartition(".")[0],
    }
    advice = "or a function of names"
    rule = by if callable(by) else rules[checked_choice("by", by, rules, advice)]
    groups: dict[str, list[str]] = {}
    for name in operator.parameters.names:
        key = rule(name)
        if not isinstance(key, Hashable):
            msg = f"by({name!r}) returned {shown(key)}; expected the name of a block, or None."
            raise TypeError(msg)
        if key is not None:
            groups.setdefault(key, []).append(name)
    if not groups:
        msg = f"by={by!r} leaves out every parameter of {list(operator.parameters.names)}."
        raise ValueError(msg)
    return Blocks({key: _block(operator, names) for key, names in groups.items()})


def _block(operator: RiskMatrix, names: list[str]) -> RiskMatrix:
    block = copy.copy(operator)
    block.risk = operator.risk.restricted(lambda name: name in names)
    block.release()
    return block
