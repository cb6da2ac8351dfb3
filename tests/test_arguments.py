"""Plausible mistakes at every front door: errors name the argument, its value and what to do."""

import math

import numpy as np
import pytest

import specdens as sd
from specdens import laws, testing
from specdens.arguments import shown, values_of
from specdens.subspaces import random_overlap

_A = np.diag(np.arange(1.0, 9.0))
_SPACE = sd.VectorSpace.like(np.zeros(8))
_FUNCTION = "cannot be called; pass a function of an array of eigenvalues"

#: What a user may write, the error and its first words.
_MISTAKES = {
    "no operator": (
        lambda: sd.slq(np.ndarray),
        TypeError,
        "operator is the class ndarray; pass an",
    ),
    "ragged": (lambda: sd.slq([[1.0], [1.0, 2.0]]), ValueError, "operator is a list whose rows"),
    "true": (lambda: sd.slq(_A, num_probes=True), TypeError, "num_probes=True must be an integer"),
    "budget": (lambda: sd.kpm(_A, memory_budget=1e9), TypeError, "memory_budget=1000000000.0 must"),
    "probes": (
        lambda: sd.trace(_A, probes="sphere"),
        TypeError,
        "probes='sphere' cannot be called",
    ),
    "sampler": (
        lambda: sd.slq(_A, probes=lambda space, seed, index: [1.0] * 8),
        TypeError,
        "probe 0 has type list, which is not an array",
    ),
    "deflate": (
        lambda: sd.slq(_A, deflate=(1.0, 2.0)),
        TypeError,
        "deflate has type tuple; expected",
    ),
    "checkpoint": (
        lambda: sd.slq(_A, checkpoint=True),
        TypeError,
        "checkpoint=True must be the path",
    ),
    "resume": (lambda: sd.kpm(_A, resume=3), TypeError, "resume=3 must be the path of a file"),
    "gone": (
        lambda: sd.lanczos(_A, resume="gone.npz"),
        FileNotFoundError,
        "resume='gone.npz': there is no such file",
    ),
    "callback": (
        lambda: sd.slq(_A, callback="x"),
        TypeError,
        "callback='x' cannot be called; pass",
    ),
    "interval": (
        lambda: sd.kpm(_A, interval=5.0),
        TypeError,
        r"interval=5.0 must be a pair \(low, hi",
    ),
    "three ends": (
        lambda: sd.kpm(_A, interval=(0, 1, 2)),
        TypeError,
        r"interval=\(0, 1, 2\) must be",
    ),
    "tolerance": (
        lambda: sd.density(_A, tolerance="1%"),
        TypeError,
        "tolerance='1%' must be a real",
    ),
    "budget of density": (
        lambda: sd.density(_A, memory_budget="1GB"),
        TypeError,
        "memory_budget='1GB' must be an integer",
    ),
    "margin": (
        lambda: sd.spectral_interval(_A, margin="a"),
        TypeError,
        "margin='a' must be a real",
    ),
    "trace of log": (lambda: sd.trace(_A, "log"), TypeError, f"f='log' {_FUNCTION}"),
    "swapped": (
        lambda: sd.apply_function(_A, np.sqrt, np.ones(8)),
        TypeError,
        rf"f=ndarray of shape \(8, 8\) {_FUNCTION}",
    ),
    "list as x": (
        lambda: sd.apply_function(np.sqrt, _A, [1.0] * 8),
        TypeError,
        "x has type l",
    ),
    "log of math": (lambda: sd.trace(_A, math.log), TypeError, "can be converted|0-dimensional"),
    "f of None": (
        lambda: sd.diagonal(_A, lambda x: None),
        TypeError,
        "f returns object for an array",
    ),
    "list as b": (lambda: sd.solve(_A, [1.0] * 8), TypeError, "b has type list"),
    "complex b": (
        lambda: sd.solve(_A, np.full(8, 1j)),
        TypeError,
        "b is complex, the operator real",
    ),
    "nan in b": (lambda: sd.solve(_A, np.full(8, np.nan)), ValueError, "b is not finite: column 0"),
    "shift": (lambda: sd.shift(_A, None), TypeError, r"c=None must be a real number\.$"),
    "times a vector": (
        lambda: sd.aslinearoperator(_A) * np.ones(8),
        TypeError,
        r"factor=ndarray of shape \(8,\) must be a real number; A @ x multiplies|unsupported",
    ),
    "low_rank": (lambda: sd.low_rank([[1.0]], [1.0]), TypeError, "Q has type list"),
    "words": (
        lambda: sd.low_rank(np.eye(2), ["a", "b"]),
        TypeError,
        r"values=\['a', 'b'\] must be re",
    ),
    "no columns": (
        lambda: sd.project_out(_A, np.ones((8, 0))),
        ValueError,
        r"Q has shape \(8, 0\)",
    ),
    "one block": (
        lambda: sd.block_diagonal(_A),
        TypeError,
        "blocks has type ndarray; expected a list",
    ),
    "backend": (
        lambda: sd.on_backend(_A, 3),
        TypeError,
        "backend=3 is unknown; expected one of 'num",
    ),
    "space": (
        lambda: sd.VectorSpace(3, np.dtype(float), "cpu", "numpy"),
        TypeError,
        r"backend='numpy' must be a Backend, .* VectorSpace\.like",
    ),
    "function returns": (
        lambda: sd.slq(sd.FunctionOperator(lambda x: None, _SPACE, blocks=False)),
        ValueError,
        r"function returns NoneType for x of shape \(8,\); expected A @ x",
    ),
    "pair": (
        lambda: sd.congruence((np.sin, np.cos), _A, space=8),
        TypeError,
        "needs two callables.*space=VectorSpace",
    ),
    "uniforms": (
        lambda: sd.uniforms(-1, 0, 0, 4),
        ValueError,
        r"seed=-1 must lie in \[0, 2\*\*64\)",
    ),
    "jackson": (lambda: sd.jackson(2.5), TypeError, "degree=2.5 must be an integer"),
    "degree": (lambda: sd.Chebyshev(2.5, (0, 1)), TypeError, "degree=2.5 must be an integer"),
    "damping": (
        lambda: sd.Chebyshev(4, (0, 1), sd.LorentzDamping),
        ValueError,
        r"damping=LorentzDamping returns factors of shape \(\) .*LorentzDamping\(4.0\)",
    ),
    "width": (lambda: sd.Gaussian("wide"), TypeError, "width='wide' must be a real number"),
    "load": (lambda: sd.load(3), TypeError, "path=3 must be the path of a file, a str or a Path"),
    "load gone": (
        lambda: sd.load("gone.npz"),
        FileNotFoundError,
        "path='gone.npz': there is no such",
    ),
    "every": (lambda: sd.Checkpoint("a.npz", every=0.5), TypeError, "every=0.5 must be an integer"),
    "overlap": (lambda: random_overlap(9, 2.5, 3), TypeError, "k=2.5 must be an integer"),
    "list as U": (lambda: sd.energy_in([[1.0]], np.ones(1)), TypeError, "U has type list"),
    "ratio": (lambda: laws.MarchenkoPastur("a"), TypeError, "ratio='a' must be a real number"),
    "source": (
        lambda: laws.Semicircle.fit(["a"]),
        TypeError,
        r"source=\['a'\] must be a real number",
    ),
    "law": (
        lambda: laws.goodness_of_fit([1.0, 2.0], laws.Semicircle),
        TypeError,
        "law=<class .*Semicircle'> is no law; pass a MarchenkoPastur",
    ),
    "gaps": (
        lambda: laws.outlier_gap_test("abc"),
        TypeError,
        "eigenvalues_descending='abc' must be",
    ),
    "bulk": (
        lambda: laws.outlier_gap_test([3.0, 2.0, 1.0], [np.nan], num_samples=19),
        ValueError,
        "bulk has 1 of 1 eigenvalues that are NaN or Inf",
    ),
    "candidates": (
        lambda: laws.PowerLaw.fit(np.arange(1.0, 40.0), num_candidates=0),
        ValueError,
        "num_candidates=0 must be at least 1",
    ),
    "square": (
        lambda: testing.matrix_with_spectrum(np.ones((2, 3))),
        ValueError,
        r"eigenvalues has shape \(2, 3\); expected \(n,\)",
    ),
    "outliers": (
        lambda: testing.spiked_spectrum(10, 20),
        ValueError,
        "dimension=10 must be at least 20",
    ),
}


@pytest.mark.parametrize("mistake", _MISTAKES)
def test_mistakes_are_explained(mistake, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    call, error, text = _MISTAKES[mistake]
    with pytest.raises(error, match=text):
        call()


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda m: m.moment(0.5), TypeError, "order=0.5 must be an integer; use integrate"),
        (lambda m: m.pdf("a"), TypeError, "x='a' must be a real number or an array"),
        (
            lambda m: m.cdf([0.0], sd.Gaussian),
            TypeError,
            "smoothing=<class .*; pass Gaussian.width",
        ),
        (lambda m: m.quantile(None), TypeError, "q=None must be a real number"),
        (
            lambda m: m.quantile([0.5, 2.0]),
            ValueError,
            "q=2 must lie between 0 and 1, ends included",
        ),
        (lambda m: m.count("a", 1), TypeError, "low='a' must be a real number"),
        (lambda m: m.count(3, 1), ValueError, "low=3 must not exceed high=1; swap them"),
        (lambda m: m.distance([]), ValueError, "other has 0 eigenvalues; expected one or more"),
        (lambda m: m.distance("a"), TypeError, "other='a' must be a real number"),
        (lambda m: m.extend([1.0]), TypeError, "other has type list; expected a SpectralMeasure"),
        (lambda m: m.integrate(3), TypeError, f"f=3 {_FUNCTION}"),
        (lambda m: m.integrate(lambda x: x[:1]), ValueError, "f returns shape"),
        (lambda m: m.cdf_band(0.0, "a"), TypeError, "confidence='a' must be a real number"),
        (lambda m: m.save(None), TypeError, "path=None must be the path of a file"),
        (lambda m: m.plot(kind=3), TypeError, "kind=3 is unknown; expected 'density' or 'cdf'"),
    ],
)
def test_questions_to_a_measure_are_explained(call, error, text):
    measure = sd.slq(_A, num_probes=2, num_steps=3)
    with pytest.raises(error, match=text):
        call(measure)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ((["a"], [[1.0]], 4), TypeError, r"nodes=\['a'\] must be a real number or an array"),
        (([[1.0]], [[1.0]], 2.5), TypeError, "dimension=2.5 must be an integer"),
        (([[1.0]], [[1.0]], 0), ValueError, "dimension=0 must be at least 1"),
        (([[]], [[]], 4), ValueError, r"nodes have shape \(1, 0\), .* expected one \(p, m\)"),
        (([[1.0]], [[1.0]], 4, "wide"), TypeError, "smoothing='wide' cannot broaden a measure"),
    ],
)
def test_measures_made_by_hand_are_checked(arguments, error, text):
    with pytest.raises(error, match=text):
        sd.SpectralMeasure(*arguments)


def test_values_are_shown_in_short():
    assert shown(np.zeros((3, 4))) == "ndarray of shape (3, 4)"
    assert shown(np.float64(2.5)) == "2.5"
    assert shown("a" * 200) == "'" + "a" * 76 + "..."


def test_constants_stand_for_arrays():
    assert values_of(lambda x: 2, np.zeros(3)).tolist() == [2, 2, 2]
