"""Matrices of risks where a mesh with explicit axes is set for all that is computed.

It has all devices of the process: one here, and four where `test_jax_sharding.py` runs this file.
"""

from contextlib import nullcontext

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import specdens_jax
from specdens import aslinearoperator, slq
from specdens_jax import (
    ClassStructure,
    CrossEntropy,
    Hessian,
    KroneckerFactors,
    Risk,
    along_line,
    gradient,
    pac_bayes,
    risk_value,
)

pytestmark = pytest.mark.usefixtures("doubles")

_RNG = np.random.default_rng(0)
_SHAPES = {"a": (3, 8), "b": (8,), "c": (8, 4)}
_PARAMS = {name: _RNG.normal(size=shape) for name, shape in _SHAPES.items()}
_DATA = _RNG.normal(size=(16, 3)), _RNG.integers(4, size=16)
_X = _RNG.normal(size=(64, 4))  # 64 parameters
_SPECS = {"a": (None, "x"), "b": ("x",), "c": ("x", None)}


def on(*spec):
    mesh = jax.make_mesh((jax.device_count(),), ("x",), axis_types=(AxisType.Explicit,))
    return NamedSharding(mesh, PartitionSpec(*spec))


def predict(params, inputs):
    return jnp.tanh(inputs @ params["a"] + params["b"]) @ params["c"]


def divided(spec=("x",), data=_DATA, **options):
    """The risk with parameters and examples divided, and vectors (n, k) as `spec` says."""
    params = {name: jax.device_put(leaf, on(*_SPECS[name])) for name, leaf in _PARAMS.items()}
    data = jax.device_put(data, on("x")) if isinstance(data, tuple) else data
    return Risk(predict, CrossEntropy(), params, data, sharding=on(*spec), **options)


def compared(compute, spec=("x",), is_set=True, rtol=1e-10, **options):
    """Compare what is computed with vectors of one device and of the mesh, and return the latter.

    ``compute(risk, put)`` may divide arrays by ``put(array, *spec)``.
    """
    risk = Risk(predict, CrossEntropy(), _PARAMS, _DATA, **options)
    expected = jax.tree.map(np.asarray, compute(risk, lambda x, *_: jnp.asarray(x)))
    with jax.set_mesh(on().mesh) if is_set else nullcontext():
        found = compute(divided(spec, **options), lambda x, *spec: jax.device_put(x, on(*spec)))
    for there, here in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(there, here, rtol=rtol, atol=rtol * np.abs(here).max())
        assert getattr(there, "sharding", on()).mesh == on().mesh
    return found


CASES = [("Hessian", ("x",), True), ("Hessian", (None, "x"), True)]
CASES += [("TangentKernel", ("x",), True)]
SLOW = [("Hessian", ("x",), False)]
SLOW += [(name, ("x",), True) for name in ("GaussNewton", "Residual", "Fisher")]
SLOW += [(name, ("x",), True) for name in ("GradientSecondMoment", "GradientCovariance")]
CASES += [pytest.param(*case, marks=pytest.mark.slow) for case in SLOW]


@pytest.mark.parametrize(("name", "spec", "is_set"), CASES)
def test_products_are_those_of_one_device(name, spec, is_set):
    """The mesh is that of the arrays, and may be set besides."""

    def products(risk, put):
        matrix = getattr(specdens_jax, name)(risk)
        x = put(_X, *spec)
        y = matrix @ x
        return y, 2.0 * y + x

    for y in compared(products, spec, is_set, weight_decay=0.1):
        assert y.sharding.is_equivalent_to(on(*spec), 2)


def test_values_gradients_and_trees():
    def everything(risk, put):
        slopes, flat = gradient(risk), risk.parameters
        tree = flat.unravel(put(_X, "x"))
        again = flat.ravel(tree), flat.ravel({name: put(leaf) for name, leaf in _PARAMS.items()})
        scaled = jax.tree.map(lambda leaf: 1.5 * leaf, risk.params)
        return risk_value(risk), slopes, tree, again, risk_value(risk.at(scaled))

    found = compared(everything, weight_decay=0.1)
    assert found[1].sharding.is_equivalent_to(on("x"), 1)


@pytest.mark.slow
def test_spectra():
    def nodes(risk, put):
        return slq(Hessian(risk), num_probes=2, num_steps=5, seed=1, progress=False).plain().nodes

    compared(nodes, rtol=1e-9)


@pytest.mark.slow
def test_class_structure():
    def everything(risk, put):
        structure = ClassStructure(risk)
        basis, x = structure.basis("class"), put(_X, "x")
        inner = put(np.asarray(basis).T @ _X)
        projected = structure.parameters.placed(put(np.asarray(basis) @ np.asarray(inner)))
        parts = [getattr(structure, f"G_{part}") @ x for part in ("class", "cross", "within")]
        layer = structure.layer("a")
        means = structure.class_means, structure.pair_means() * 1.0
        return parts, means, projected, structure.eigenvalues("cross"), layer.feature_means

    compared(everything, rtol=1e-9)


@pytest.mark.slow
def test_kronecker_factors():
    def everything(risk, put):
        factors = KroneckerFactors(risk, "a")
        operator, x = factors.operator(), factors.space.from_numpy(_X[:24])
        return operator @ x, factors.corrected() @ x, factors.eigsh(3).eigenvalues

    compared(everything)


@pytest.mark.slow
def test_what_the_caller_does_on_a_line_is_explicit():
    def values(risk, put):
        start, end = put(_X[:, 0], "x"), {name: put(leaf) for name, leaf in _PARAMS.items()}

        def quantity(risk):
            kept = put(_X[:, 1], "x")
            return float((kept * gradient(risk)).sum()) + risk_value(risk)

        def statistics(params):
            return {**params, "b": params["b"] + put(_PARAMS["b"])}

        path = along_line(risk, start, end, [0, 0.5], quantity=quantity, statistics=statistics)
        return path.values

    compared(values)


class Loader:
    """Batches that are computed on the mesh whenever they are read."""

    def __iter__(self):
        inputs, labels = _DATA
        for place in (0, 8):
            batch = inputs[place : place + 8], labels[place : place + 8]
            yield jax.tree.map(lambda part: part * 1, jax.device_put(batch, on("x")))


def test_batches_may_be_computed_on_the_mesh():
    expected = gradient(Risk(predict, CrossEntropy(), _PARAMS, _DATA))
    with jax.set_mesh(on().mesh):
        found = gradient(divided(data=Loader()))
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.slow
def test_posteriors():
    def drawn(risk, put):
        prior, short = put(_X[:, 0], "x"), {"epochs": 2, "num_monte_carlo": 3, "batch_size": 8}
        posterior = pac_bayes(risk.at(_PARAMS), prior, **short).posterior
        noise = posterior.noise(put(_X[:, 1], "x"))
        return posterior.sample(2, seed=3), noise, posterior.mean * 1.0, posterior.scales

    compared(drawn, rtol=1e-8)


@pytest.mark.parametrize(
    "model",
    [
        lambda params, x: predict(params, x) * jnp.ones(4),
        lambda params, x: jnp.matmul(x, params["a"], out_sharding=PartitionSpec("x")),
    ],
)
def test_what_a_model_may_not_do_is_said(model):
    with jax.set_mesh(on().mesh):
        weights = jnp.ones(4)
        params = jax.device_put(_PARAMS, on())
        data = jax.device_put(_DATA, on("x"))
        risk = Risk(lambda p, x: model(p, x)[:, :4] * weights, CrossEntropy(), params, data)
        with pytest.raises(ValueError, match=r"mesh|Auto") as caught:
            risk_value(risk)
    assert "not in the closures of predict and loss" in " ".join(caught.value.__notes__)


@pytest.mark.parametrize("spec", [("x",), (None, "x")])
@pytest.mark.parametrize("is_set", [True, False])
def test_dense_matrices(spec, is_set):
    symmetric = _RNG.normal(size=(64, 64))
    symmetric = symmetric + symmetric.T
    crooked = symmetric.copy()
    crooked[-1, 0] += 1.0
    with jax.set_mesh(on().mesh) if is_set else nullcontext():
        operator = aslinearoperator(jax.device_put(symmetric, on(*spec)))
        found = operator @ operator.space.from_numpy(_X)
        np.testing.assert_allclose(found, symmetric @ _X, rtol=1e-12, atol=1e-12)
        with pytest.raises(ValueError, match=r"not Hermitian: max \|A - A\^H\| = 1 "):
            aslinearoperator(jax.device_put(crooked, on(*spec)))
