"""The one product that a leaf of the parameters takes part in: what goes in, and what comes out."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Literal

# Equations that hold a function; the leaf is followed into it.
_CALLS = {
    "jit", "pjit", "closed_call", "core_call", "call", "remat", "remat2", "checkpoint",
    "custom_jvp_call",
}  # fmt: skip
_LOOPS = {"scan", "while", "cond", "shard_map", "pmap", "xla_pmap"}
# Equations that leave every entry at its place.
_COPIES = {"convert_element_type", "copy", "copy_p", "device_put", "name", "sharding_constraint"}
_PRODUCTS = {"dot_general", "conv_general_dilated"}


@dataclass(frozen=True, eq=False)
class Use:
    """An equation that a leaf enters as an operand.

    Attributes
    ----------
    primitive : str
        The name of the equation's primitive.
    params : mapping
        Those of the equation.
    side : int
        Which operand the leaf is.
    places : ndarray of int
        For each entry of the operand its place in the flat leaf.
    """

    primitive: str
    params: Mapping[str, Any]
    side: int
    places: np.ndarray


@dataclass(frozen=True, eq=False)
class Product:
    """A product with a matrix, the leaf: which entries belong to which inputs and outputs.

    Attributes
    ----------
    use : Use
    inputs, outputs : ndarray of int of shapes (d,) and (m,)
        The inputs and outputs of the equation in the order in which the leaf has them.
    places : ndarray of int of shape (m, d)
        For each output and input the place of its entry in the flat leaf.
    """

    use: Use
    inputs: np.ndarray
    outputs: np.ndarray
    places: np.ndarray

    def input_rows(self, x: jax.Array, examples: int) -> jax.Array:
        """Return what the leaf multiplies as (N, S, d), S places for each of N examples."""
        if self.use.primitive == "dot_general":
            contracted = self.use.params["dimension_numbers"][0][1 - self.use.side]
            free = [axis for axis in range(x.ndim) if axis not in contracted]
            rows = _by_example(x, free, contracted, examples)
        else:
            patches = _patches(x, self.use)  # (N, d, *places)
            rows = _by_example(patches, [0, *range(2, patches.ndim)], [1], examples)
        return rows[..., self.inputs]

    def output_rows(self, z: jax.Array, examples: int) -> jax.Array:
        """Return the outputs of the product as (N, S, m)."""
        if self.use.primitive == "dot_general":
            own = len(self.use.places.shape) - len(self.use.params["dimension_numbers"][0][0])
            first = z.ndim - own if self.use.side == 1 else 0  # of the axes that the leaf gives
            kernel = list(range(first, first + own))
            free = [axis for axis in range(z.ndim) if axis not in kernel]
        else:
            batch, channels, *places = self.use.params["dimension_numbers"].out_spec
            kernel, free = [channels], [batch, *places]
        return _by_example(z, free, kernel, examples)[..., self.outputs]


class Tapped(NamedTuple):
    """A function whose leaf has been followed to its product.

    Attributes
    ----------
    run : callable
        From a change of the product's outputs, of shape `shape`, to the outputs of the function
        and what the leaf multiplies.
    product : Product
    shape, dtype
        Those of the product's outputs.
    """

    run: Callable[[jax.Array], tuple[list[jax.Array], jax.Array]]
    product: Product
    shape: tuple[int, ...]
    dtype: Any


def tapped(function: Callable[..., list[jax.Array]], arguments: Any, name: str) -> Tapped:
    """Follow a leaf to the product that it takes part in, to see and change what happens there.

    The function is traced and evaluated again equation by equation, so that it may be anything that
    JAX can trace. A function with a derivative of its own (`jax.custom_jvp`) that takes the leaf is
    differentiated through its code; all others keep their own derivatives.

    Parameters
    ----------
    function : callable
        From `arguments` to a list of arrays.
    arguments : tuple of pytrees of arrays
        The first array in it is the leaf.
    name : str
        The leaf's, for errors.

    Returns
    -------
    Tapped

    Raises
    ------
    ValueError
        If the leaf takes part in no product, or in more than one equation, or in a product that is
        none with a single matrix.

    References
    ----------
    Dangel, Kunstner, Hennig (2020), BackPACK, arXiv:1912.10985, does so with modules.

    Examples
    --------
    >>> w, x = jnp.array([[2.0], [3.0]]), jnp.ones((1, 2))
    >>> found = tapped(lambda w, x: [jnp.tanh(x @ w)], (w, x), "w")
    >>> found.shape, found.product.places.tolist()
    ((1, 1), [[0, 1]])
    >>> outputs, multiplied = found.run(jnp.array([[-5.0]]))
    >>> outputs[0].tolist(), multiplied.tolist()
    ([[0.0]], [[1.0, 1.0]])
    """
    closed = jax.make_jaxpr(function)(*arguments)
    leaves = jax.tree.leaves(arguments)
    entries = np.arange(math.prod(leaves[0].shape)).reshape(leaves[0].shape)

    def evaluate(change: jax.Array | None) -> tuple[list[jax.Array], _Walk]:
        walk = _Walk(change)
        known = {closed.jaxpr.invars[0]: entries}
        outputs, places = walk.through(closed.jaxpr, closed.consts, leaves, known)
        for kept in places:
            if kept is not None:
                walk.uses.append(Use("return", {}, 0, kept))
        return outputs, walk

    seen: list[_Walk] = []
    jax.eval_shape(lambda: seen.append(evaluate(None)[1]))
    (walk,) = seen
    product = _product(walk.uses, name, leaves[0].shape)

    def run(change: jax.Array) -> tuple[list[jax.Array], jax.Array]:
        outputs, walk = evaluate(change)
        return outputs, walk.multiplied

    return Tapped(run, product, tuple(walk.result.shape), walk.result.dtype)


class _Walk:
    """An evaluation of a traced function that follows the entries of one leaf."""

    def __init__(self, change: jax.Array | None) -> None:
        self.change = change  # of the outputs of the product
        self.uses: list[Use] = []
        self.multiplied: Any = None
        self.result: Any = None

    def through(
        self, jaxpr: Any, consts: Sequence[Any], arguments: Sequence[Any], known: dict[Any, Any]
    ) -> tuple[list[Any], list[np.ndarray | None]]:
        """Return the values of a jaxpr, and the places in the leaf of those that are its copies."""
        values: dict[Any, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
        values.update(zip(jaxpr.invars, arguments, strict=True))
        places: dict[Any, np.ndarray] = dict(known)

        def read(atom: Any) -> Any:
            return atom.val if isinstance(atom, Literal) else values[atom]

        def place(atom: Any) -> np.ndarray | None:
            return None if isinstance(atom, Literal) else places.get(atom)

        for equation in jaxpr.eqns:
            inner = [place(atom) for atom in equation.invars]
            results, found = self._step(equation, [read(a) for a in equation.invars], inner)
            for variable, value, kept in zip(equation.outvars, results, found, strict=True):
                values[variable] = value
                if kept is not None:
                    places[variable] = kept
        return [read(a) for a in jaxpr.outvars], [place(a) for a in jaxpr.outvars]

    def _step(
        self, equation: Any, arguments: list[Any], places: list[np.ndarray | None]
    ) -> tuple[list[Any], list[np.ndarray | None]]:
        name, params = equation.primitive.name, equation.params
        sides = [side for side, kept in enumerate(places) if kept is not None]
        if sides and name in _CALLS:
            body = params.get("jaxpr", params.get("call_jaxpr"))
            jaxpr, consts = getattr(body, "jaxpr", body), getattr(body, "consts", ())
            known = {jaxpr.invars[side]: places[side] for side in sides}
            return self.through(jaxpr, consts, arguments, known)
        results = _bind(equation, arguments)
        found: list[np.ndarray | None] = [None] * len(results)
        if len(sides) == 1:
            found[0] = _moved(equation, places[sides[0]])
        if found[0] is None:
            self.uses += [Use(name, params, side, _known(places[side])) for side in sides]
            if sides and name in _PRODUCTS:
                self.multiplied, self.result = arguments[1 - sides[0]], results[0]
                if self.change is not None:
                    results = [results[0] + self.change]
        return results, found


def _known(places: np.ndarray | None) -> np.ndarray:
    assert places is not None
    return places


def _bind(equation: Any, arguments: list[Any]) -> list[Any]:
    """Evaluate one equation."""
    bound = equation.primitive.get_bind_params(equation.params)
    functions, params = bound if isinstance(bound, tuple) else ((), bound)  # JAX before 0.10
    with equation.ctx.manager:
        results = equation.primitive.bind(*functions, *arguments, **params)
    return list(results) if equation.primitive.multiple_results else [results]


def _moved(equation: Any, places: Any) -> np.ndarray | None:
    """Return the places of what an equation only rearranges, None if it does more."""
    name, params, result = equation.primitive.name, equation.params, equation.outvars[0].aval
    shape = tuple(getattr(result, "shape", ()))
    if len(equation.outvars) > 1 or places.size != math.prod(shape):
        return None
    if name in _COPIES and jnp.issubdtype(result.dtype, jnp.floating):
        return places
    if name == "transpose":
        return places.transpose(params["permutation"])
    if name == "rev":
        return np.flip(places, params["dimensions"])
    if name in ("squeeze", "broadcast_in_dim", "expand_dims"):
        return places.reshape(shape)
    if name == "reshape" and params.get("dimensions") is None:
        return places.reshape(shape)
    return None


def _product(uses: list[Use], name: str, shape: tuple[int, ...]) -> Product:
    """Return the product with a matrix that the only use of a leaf is, or say what is wrong."""
    instead = f"GaussNewton with parameters={name!r} needs no such product."
    if not uses:
        msg = f"layer={name!r} has no effect on the outputs of predict; name a leaf that has."
        raise ValueError(msg)
    if len(uses) > 1:
        listed = ", ".join(use.primitive for use in uses)
        msg = (
            f"layer={name!r} is used {len(uses)} times ({listed}); Kronecker factors are those of "
            f"one product. Give every use a leaf of its own, or do without factors: {instead}"
        )
        raise ValueError(msg)
    (use,) = uses
    if use.primitive in _LOOPS:
        msg = (
            f"layer={name!r} is used inside {use.primitive}, where a product may happen any number "
            f"of times; write a loop out in Python with a leaf for every step. {instead}"
        )
        raise ValueError(msg)
    matrix = _matrix(use)
    if matrix is None:
        msg = (
            f"layer={name!r} of shape {shape} is used by {use.primitive}, not as one matrix that "
            "multiplies inputs; name the kernel of a dense layer or of a convolution of one group. "
            f"{instead}"
        )
        raise ValueError(msg)
    inputs, outputs = np.argsort(matrix[:, 0]), np.argsort(matrix[0])
    return Product(use, inputs, outputs, matrix[inputs][:, outputs].T)


def _matrix(use: Use) -> np.ndarray | None:
    """Return the places of a leaf's entries as (inputs, outputs), None if it is no such matrix."""
    if use.primitive == "dot_general":
        contracted, batch = (axes[use.side] for axes in use.params["dimension_numbers"])
        if batch:
            return None
        own = [axis for axis in range(use.places.ndim) if axis not in contracted]
        order = [*contracted, *own]
        outputs = math.prod(use.places.shape[axis] for axis in own)
    elif use.primitive == "conv_general_dilated" and use.side == 1:
        groups = (use.params["feature_group_count"], use.params["batch_group_count"])
        channels, *inputs = use.params["dimension_numbers"].rhs_spec
        if groups != (1, 1):
            return None
        order, outputs = [*inputs, channels], use.places.shape[channels]
    else:
        return None
    return use.places.transpose(order).reshape(-1, outputs)


def _patches(x: jax.Array, use: Use) -> jax.Array:
    """Return the patches that a convolution multiplies, (N, inputs * window, *places)."""
    params, numbers = use.params, use.params["dimension_numbers"]
    window = tuple(use.places.shape[axis] for axis in numbers.rhs_spec[2:])
    axes = tuple(range(x.ndim))
    return jax.lax.conv_general_dilated_patches(
        x.transpose(numbers.lhs_spec),
        window,
        params["window_strides"],
        params["padding"],
        params["lhs_dilation"],
        params["rhs_dilation"],
        dimension_numbers=jax.lax.ConvDimensionNumbers(axes, axes, axes),
        precision=jax.lax.Precision.HIGHEST,
    )


def _by_example(
    array: jax.Array, free: Sequence[int], inner: Sequence[int], examples: int
) -> jax.Array:
    """Return an array as (N, S, inner), the axis of the examples among the free ones first."""
    sizes = {axis: array.shape[axis] for axis in free}
    own = [axis for axis in free if sizes[axis] == examples]
    own = own or [axis for axis in free if sizes[axis] % examples == 0]
    if not own:
        msg = (
            f"a layer has inputs or outputs of shape {array.shape} with no axis for the {examples} "
            "examples of a batch; let predict take batches, examples along the first axis."
        )
        raise ValueError(msg)
    order = [own[0], *(axis for axis in free if axis != own[0]), *inner]
    width = math.prod(array.shape[axis] for axis in inner)
    return array.transpose(order).reshape(examples, -1, width)
