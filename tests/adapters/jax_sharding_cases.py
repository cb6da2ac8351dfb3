"""Tests that need eight devices, which `test_jax_sharding.py` runs in a process that has them."""

from contextlib import nullcontext

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import specdens_jax
from specdens import (
    FunctionOperator,
    VectorSpace,
    eigsh,
    kpm,
    project_out,
    restrict,
    slq,
)
from specdens.testing import check_operator
from specdens_jax import CrossEntropy, FlatParameters, Hessian, Risk, layerwise
from specdens_jax.risk import new_total

NUM_DEVICES = 8
WIDTH = 64  # hidden units: n = 25 * WIDTH = 1600
MATRICES = (
    "Hessian",
    "GaussNewton",
    "Residual",
    "GradientSecondMoment",
    "GradientCovariance",
    "Fisher",
    "TangentKernel",
)
QUIET = {"num_probes": 8, "seed": 1, "progress": False}


def predict(params, inputs):
    return jnp.tanh(inputs @ params["a"] + params["b"]) @ params["c"]


def host(width=WIDTH, number=32):
    rng = np.random.default_rng(0)
    shapes = {"a": (16, width), "b": (width,), "c": (width, 8)}
    params = {name: rng.standard_normal(shape) / 4 for name, shape in shapes.items()}
    return params, (rng.standard_normal((number, 16)), rng.integers(8, size=number))


def mesh(kind=AxisType.Auto):
    return jax.make_mesh((NUM_DEVICES,), ("x",), axis_types=(kind,))


def on(spec, kind=AxisType.Auto):
    return NamedSharding(mesh(kind), PartitionSpec(*spec))


def tensor_parallel(kind=AxisType.Auto):
    return {"a": on((None, "x"), kind), "b": on(("x",), kind), "c": on(("x", None), kind)}


def one(loss=CrossEntropy(), width=WIDTH, **options):  # noqa: B008 (has no state)
    params, data = host(width)
    return Risk(predict, loss, jax.tree.map(jnp.asarray, params), data, **options)


def many(layout, width=WIDTH, kind=AxisType.Auto, loss=CrossEntropy(), **options):  # noqa: B008
    """The same risk with examples, parameters, vectors or columns divided."""
    params, data = host(width)
    params = jax.device_put(params, tensor_parallel(kind) if "params" in layout else on((), kind))
    data = jax.device_put(data, on(("x",), kind) if "examples" in layout else on((), kind))
    spec = (None, "x") if "columns" in layout else ("x",) if "vectors" in layout else ()
    return Risk(predict, loss, params, data, sharding=on(spec, kind), **options)


LAYOUTS = ("examples", "vectors", "columns", "params", "examples vectors", "params vectors")


def vectors(size, number=8):
    return np.random.default_rng(1).standard_normal((size, number))


def assert_same(here, there, rtol=1e-10):
    here, there = np.asarray(here), np.asarray(there)
    np.testing.assert_allclose(here, there, rtol=rtol, atol=rtol * np.abs(there).max())


def bytes_per_device(array):
    return {shard.device: shard.data.nbytes for shard in array.addressable_shards}


def test_there_are_eight_devices():
    assert jax.device_count() == NUM_DEVICES


ALL = [(name, "examples vectors") for name in MATRICES]
ALL += [("Hessian", layout) for layout in LAYOUTS if layout != "examples vectors"]
ALL += [("GaussNewton", "params vectors"), ("GradientSecondMoment", "columns")]


@pytest.mark.parametrize(("name", "layout"), ALL)
def test_products_are_those_of_one_device(name, layout):
    here = getattr(specdens_jax, name)(one(weight_decay=0.1))
    there = getattr(specdens_jax, name)(many(layout, weight_decay=0.1))
    x = vectors(here.space.dimension)
    assert_same(there @ there.space.from_numpy(x), here @ jnp.asarray(x))


@pytest.mark.parametrize("layout", ["examples vectors", "params vectors", "columns"])
def test_values_and_gradients_are_those_of_one_device(layout):
    here, there = one(weight_decay=0.1), many(layout, weight_decay=0.1)
    assert specdens_jax.risk_value(there) == pytest.approx(specdens_jax.risk_value(here), rel=1e-12)
    found = specdens_jax.gradient(there)
    assert_same(found, specdens_jax.gradient(here), 1e-12)
    assert found.sharding == there.parameters.ravel(there.params).sharding


@pytest.mark.parametrize("accumulate", ["compensated", "float64"])
def test_accumulation_keeps_the_layout(accumulate):
    params, data = host()
    params = jax.tree.map(lambda leaf: leaf.astype(np.float32), params)
    batches = [tuple(part[i : i + 8] for part in data) for i in range(0, 32, 8)]
    options = {"accumulate": accumulate}
    here = Hessian(Risk(predict, CrossEntropy(), params, batches, **options))
    laid = [jax.device_put(batch, on(("x",))) for batch in batches]
    options["sharding"] = on(("x",))
    there = Hessian(Risk(predict, CrossEntropy(), jax.device_put(params, on(())), laid, **options))
    x = vectors(here.space.dimension, 3).astype(np.float32)
    found = there @ there.space.from_numpy(x)
    assert_same(found, here @ jnp.asarray(x), 2e-6)
    assert found.sharding.spec == PartitionSpec("x")
    for total in new_total(there.risk, 3):
        assert set(bytes_per_device(total).values()) == {total.nbytes // NUM_DEVICES}


@pytest.mark.parametrize(
    ("layout", "spec", "shape"),
    [("examples vectors", ("x",), (200, 8)), ("columns", (None, "x"), (1600, 1))],
)
def test_products_and_their_parts_are_divided(layout, spec, shape):
    hessian = Hessian(many(layout))
    x = hessian.space.from_numpy(vectors(1600))
    for array in (x, hessian @ x):
        assert array.sharding == hessian.space.device
        assert array.sharding.spec == PartitionSpec(*spec)
        assert {shard.data.shape for shard in array.addressable_shards} == {shape}
    (total,) = new_total(hessian.risk, 8)
    assert {shard.data.shape for shard in total.addressable_shards} == {shape[::-1]}


def test_parameters_and_examples_stay_divided():
    params = many("params vectors")
    for leaf in params.varying:
        assert set(bytes_per_device(leaf).values()) == {leaf.nbytes // NUM_DEVICES}
    (batch,) = many("examples").batches()
    assert {shard.data.shape for shard in batch.inputs.addressable_shards} == {(4, 16)}


def test_parameters_from_elsewhere_are_put_on_the_mesh_once():
    params, data = host()
    risk = Risk(predict, CrossEntropy(), params, data, sharding=on(("x",)))
    assert all(leaf.sharding.device_set == set(jax.devices()) for leaf in risk.varying)


@pytest.mark.parametrize(
    ("layout", "reorthogonalize"),
    [("examples vectors", True), ("params vectors", False), ("columns", True)],
)
def test_spectra_are_those_of_one_device(layout, reorthogonalize):
    options = QUIET | {"num_steps": 8, "reorthogonalize": reorthogonalize}
    here, there = slq(Hessian(one()), **options), slq(Hessian(many(layout)), **options)
    assert_same(there.plain().nodes, here.plain().nodes, 1e-8)


def test_moments_are_those_of_one_device():
    options = QUIET | {"num_moments": 16, "interval": (-2, 3)}
    here, there = (kpm(Hessian(r), **options) for r in (one(), many("examples vectors")))
    for order in range(4):
        assert there.moment(order).value == pytest.approx(here.moment(order).value, rel=1e-10)


@pytest.mark.parametrize("reorthogonalize", [True, False])
def test_vectors_of_a_run_are_divided(reorthogonalize):
    states = []
    hessian = Hessian(many("examples vectors"))
    options = QUIET | {"num_steps": 4, "reorthogonalize": reorthogonalize}
    slq(hessian, callback=lambda progress: states.append(progress.state.current), **options)
    (*_, state) = [state for state in states if state is not None]
    held = state.basis if reorthogonalize else (state.q, state.q_prev, state.signs)
    assert len(held) >= 3
    for array in held:
        assert set(bytes_per_device(array).values()) == {array.nbytes // NUM_DEVICES}


def test_eigenvectors_are_divided():
    here, there = eigsh(Hessian(one()), 3), eigsh(Hessian(many("examples vectors")), 3)
    assert_same(there.eigenvalues, here.eigenvalues)
    shapes = {shard.data.shape for shard in there.eigenvectors.addressable_shards}
    assert shapes == {(200, 3)}


@pytest.mark.parametrize("name", ["Hessian", "TangentKernel"])
def test_matrices_pass_the_checks_of_operators(name):
    check_operator(getattr(specdens_jax, name)(many("examples vectors")))


def test_a_run_is_continued_with_divided_vectors(tmp_path):
    hessian, options = Hessian(many("vectors")), QUIET | {"block_size": 4, "num_steps": 6}
    whole = slq(hessian, **options)
    slq(hessian, **options | {"num_probes": 4}, checkpoint=tmp_path / "run.npz")
    again = slq(hessian, **options, resume=tmp_path / "run.npz")
    np.testing.assert_array_equal(again.nodes, whole.nodes)


def test_blocks_and_restrictions():
    here, there = Hessian(one()), Hessian(many("examples vectors"))
    for name, block in layerwise(there).items():
        mine, x = layerwise(here)[name], vectors(block.space.dimension, 3)
        assert block.space.device.spec == PartitionSpec("x")  # each size is a multiple of eight
        assert_same(block @ block.space.from_numpy(x), mine @ jnp.asarray(x))
    x = vectors(5, 2)
    mine, its = (restrict(matrix, [0, 3, 77, 1204, 1599]) for matrix in (here, there))
    assert_same(its @ its.space.from_numpy(x), mine @ jnp.asarray(x))


def test_blocks_of_other_sizes_are_whole():
    there = Hessian(many("vectors", width=72))
    block = layerwise(there, by=lambda name: name if name == "b" else None)["b"]
    assert block.space.device.spec == PartitionSpec("x")
    params, data = host(72)
    params["b"] = params["b"][0]  # one bias for all hidden units: 1 + 24 * 72 parameters
    whole = Hessian(predict, CrossEntropy(), params, data, sharding=on(()))
    assert layerwise(whole)["b"].space.device.spec == PartitionSpec()


@pytest.mark.parametrize("layout", ["examples vectors", "params vectors"])
def test_meshes_with_explicit_axes(layout):
    there, x = Hessian(many(layout, kind=AxisType.Explicit)), vectors(1600)
    expected = Hessian(one()) @ jnp.asarray(x)
    assert_same(there @ there.space.from_numpy(x), expected)
    assert_same(there @ jax.device_put(x, on(("x",), AxisType.Explicit)), expected)


def test_projections_on_meshes_with_explicit_axes():
    """Columns and vectors of a mesh with explicit axes, also where the operator's are others."""
    columns, x = vectors(1600, 3), vectors(1600, 2)[::-1].copy()
    expected = project_out(Hessian(one()), jnp.asarray(columns)) @ jnp.asarray(x)
    divided = on(("x",), AxisType.Explicit)
    laid_columns, laid_x = jax.device_put((columns, x), divided)
    there = project_out(Hessian(many("examples vectors", kind=AxisType.Explicit)), laid_columns)
    assert_same(there @ laid_x, expected)
    assert_same(there @ there.space.from_numpy(x), expected)
    values = jax.device_put(np.linspace(-1, 2, 1600), divided)
    operator = FunctionOperator(lambda x: (values * x.T).T, VectorSpace.like(values), blocks=True)
    basis = np.linalg.qr(columns)[0]
    within = x - basis @ (basis.T @ x)
    product = np.linspace(-1, 2, 1600)[:, None] * within
    for context in (nullcontext(), jax.set_mesh(divided.mesh)):
        with context:
            found = project_out(operator, laid_columns) @ laid_x
        assert_same(found, product - basis @ (basis.T @ product))
        assert found.sharding.is_equivalent_to(laid_x.sharding, 2)


@pytest.mark.parametrize("reorthogonalize", [True, False])
def test_spectra_on_meshes_with_explicit_axes(reorthogonalize):
    values, columns = np.linspace(-1, 2, 1600), vectors(1600, 3)
    found = []
    for place in (jax.devices()[0], on(("x",), AxisType.Explicit)):
        diagonal, laid = jax.device_put((values, columns), place)
        operator = FunctionOperator(
            lambda x, diagonal=diagonal: (diagonal * x.T).T, VectorSpace.like(diagonal)
        )
        options = QUIET | {"num_steps": 6, "reorthogonalize": reorthogonalize}
        found.append(slq(project_out(operator, laid), **options).plain().nodes)
    assert_same(found[1], found[0], 1e-9)


def test_two_axes_divide_examples_and_vectors():
    grid = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    params, data = host()
    risk = Risk(
        predict,
        CrossEntropy(),
        jax.device_put(params, NamedSharding(grid, PartitionSpec())),
        jax.device_put(data, NamedSharding(grid, PartitionSpec("data"))),
        sharding=NamedSharding(grid, PartitionSpec("model")),
    )
    x = vectors(1600, 3)
    found = Hessian(risk) @ risk.parameters.space.from_numpy(x)
    assert_same(found, Hessian(one()) @ jnp.asarray(x))
    assert {shard.data.shape for shard in found.addressable_shards} == {(400, 3)}


def test_padding_to_a_multiple_of_the_devices():
    params, (inputs, labels) = host()
    uneven = inputs[:29], labels[:29]
    with pytest.raises(ValueError, match="evenly divide"):
        jax.device_put(uneven, on(("x",)))
    labels = np.where(np.arange(32) < 29, labels, -100)  # ignored, of weight zero
    padded = jax.device_put((inputs, labels), on(("x",)))
    there = Hessian(predict, CrossEntropy(), jax.device_put(params, on(())), padded)
    x = vectors(1600, 2)
    assert_same(
        there @ jnp.asarray(x), Hessian(predict, CrossEntropy(), params, uneven) @ jnp.asarray(x)
    )


def compiled(risk, count=16):
    """The compiled product of a Hessian with `count` columns."""
    hessian = Hessian(risk)
    (batch,) = risk.batches()
    rows = jax.device_put(
        vectors(risk.parameters.size, count).T, risk.parameters.rows_layout(count)
    )
    kernel = jax.jit(hessian._add_products, donate_argnums=5)
    arguments = risk.varying, risk.constants, batch, None, rows, new_total(risk, count)
    return kernel.lower(*arguments).compile().memory_analysis()


@pytest.mark.parametrize(("layout", "factor"), [("examples vectors", 4), ("params vectors", 6)])
def test_bytes_per_device_fall(layout, factor):
    alone, divided = compiled(one(width=1024)), compiled(many(layout, width=1024))
    assert divided.argument_size_in_bytes * factor < alone.argument_size_in_bytes
    assert divided.output_size_in_bytes * 7 < alone.output_size_in_bytes
    # What is left is one whole vector or two (0.2 MB each), not sixteen.
    n = 25 * 1024
    assert divided.temp_size_in_bytes < alone.temp_size_in_bytes / 2
    assert divided.argument_size_in_bytes < 16 * n * 8


@pytest.mark.parametrize(
    ("spec", "width", "words"),
    [(("x",), 65, r"n=1625 into 8 parts.*PartitionSpec\(None"), (("x", None, None), 64, "spec")],
)
def test_lengths_that_do_not_divide_are_explained(spec, width, words):
    params, _ = host(width)
    with pytest.raises(ValueError, match=words):
        FlatParameters(params, sharding=on(spec))


def test_a_mesh_is_no_sharding():
    with pytest.raises(TypeError, match="sharding has type Mesh"):
        FlatParameters(host()[0], sharding=mesh())
