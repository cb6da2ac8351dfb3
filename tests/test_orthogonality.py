"""Partial reorthogonalization: what is promised of the basis, seen from the basis itself."""

import numpy as np
import pytest

from specdens import FunctionOperator, VectorSpace, aslinearoperator, slq
from specdens.methods.block import BlockLanczos
from specdens.methods.orthogonality import Overlaps
from specdens.probes import draw, sphere
from specdens.testing import matrix_with_spectrum
from tests.cases import dense, home, move

_BULK = np.linspace(0, 1, 150)
SPECTRA = {
    "outliers": np.concatenate([_BULK, [10.0, 100.0, 1000.0]]),
    "uniform": np.linspace(-1, 1, 400),
    "geometric": np.geomspace(1e-6, 1, 200),
    "repeated": np.repeat([-3.0, 0.0, 1.0, 2.0, 50.0], 40),
    "shifted": 1e3 + np.linspace(-1, 1, 200),
    "low rank": np.concatenate([np.zeros(180), [1.0, 2.0, 30.0]]),
}


def _states(operator, p, steps):
    """Yield every state that has a new block in its basis."""
    iteration = BlockLanczos(steps)
    state = iteration.init(operator, draw(sphere, operator.space, 0, range(p)))
    while not iteration.done(state):
        state = iteration.step(operator, state)
        if len(state.basis) > len(state.diagonal):
            yield state


def _drift(state):
    """Return the length of the newest vectors' components in the span of the older blocks."""
    old = np.concatenate([home(q).astype(np.complex128) for q in state.basis[:-1]])
    return np.linalg.norm(old.conj() @ home(state.basis[-1]).T, axis=0)


def _told(state):
    return np.sqrt((np.abs(state.overlaps.newer) ** 2).sum(axis=(0, 1)))


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.complex64, np.complex128])
@pytest.mark.parametrize("p", [1, 4])
@pytest.mark.parametrize("name", SPECTRA)
def test_new_vectors_are_orthogonal_to_the_square_root_of_the_precision(name, p, dtype):
    matrix = matrix_with_spectrum(SPECTRA[name], like=np.zeros(1, dtype))
    operator = aslinearoperator(matrix)
    precision = operator.space.precision
    for state in _states(operator, p, 35):
        drift = _drift(state)
        assert drift.max() <= precision**0.5
        # The estimate may be too low only where nothing depends on it.
        assert (drift <= np.maximum(10 * _told(state), 100 * precision)).all()


def test_new_vectors_are_orthogonal_on_every_library(library):
    operator = aslinearoperator(move(matrix_with_spectrum(SPECTRA["outliers"]), library))
    assert max(_drift(state).max() for state in _states(operator, 3, 20)) <= 1.5e-8


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", SPECTRA)
def test_T_is_the_projection_of_A_to_full_precision(name, dtype):  # noqa: N802
    matrix = matrix_with_spectrum(SPECTRA[name]).astype(dtype)
    operator = aslinearoperator(matrix)
    *_, state = _states(operator, 3, 30)
    k = len(state.diagonal)
    basis = np.concatenate(state.basis[:k]).T.astype(float)
    kept = np.linalg.norm(basis, axis=0) > 0.5
    orthonormal, r = np.linalg.qr(basis[:, kept])
    orthonormal *= np.sign(np.diag(r))  # the orthonormal basis next to ours
    projection = orthonormal.T @ matrix.astype(float) @ orthonormal
    theta, _, _ = BlockLanczos(k).ritz(state)
    exact = np.linalg.eigvalsh(projection)
    bound = 50 * operator.space.precision * np.abs(SPECTRA[name]).max()
    np.testing.assert_allclose(theta, exact, rtol=0, atol=bound)


def _blocks_read(monkeypatch, operator, p, steps):
    """Return how many blocks were cleaned of, and how many full reorthogonalization reads."""
    counts = []
    to_clean = Overlaps.to_clean

    def counted(self, precision):
        counts.append(to_clean(self, precision))
        return counts[-1]

    monkeypatch.setattr(Overlaps, "to_clean", counted)
    for _ in _states(operator, p, steps):
        pass
    return sum(c.sum() for c in counts), sum(len(c) for c in counts)


@pytest.mark.parametrize(
    ("name", "dtype", "share"),
    [("uniform", np.float64, 0.1), ("uniform", np.float32, 0.1), ("outliers", np.float64, 0.3)],
)
def test_fewer_blocks_are_read_than_full_reorthogonalization_reads(monkeypatch, name, dtype, share):
    operator = aslinearoperator(np.diag(SPECTRA[name]).astype(dtype))
    read, full = _blocks_read(monkeypatch, operator, 4, 30)
    assert read <= share * full


def test_orthogonality_is_lost_where_nothing_is_cleaned(monkeypatch):
    monkeypatch.setattr(
        Overlaps, "to_clean", lambda self, _: np.zeros(max(len(self.newer) - 2, 0), bool)
    )
    operator = aslinearoperator(np.diag(SPECTRA["outliers"]))
    assert max(_drift(state).max() for state in _states(operator, 4, 30)) > 0.1


@pytest.mark.parametrize("error", [1e-12, 1e-9, 1e-6])
def test_operators_less_exact_than_their_dtype_are_cleaned_more_often(error):
    values, rng = SPECTRA["outliers"], np.random.default_rng(0)

    def product(x):
        y = values[:, None] * x
        return y + error * rng.standard_normal(x.shape) * np.linalg.norm(y, axis=0) / 150**0.5

    operator = FunctionOperator(product, VectorSpace.like(values), blocks=True)
    for state in _states(operator, 3, 25):
        assert _drift(state).max() <= 1.5e-8


def test_eigenvalues_of_a_semiorthogonal_basis_have_no_ghosts():
    values = np.concatenate([np.linspace(0, 1, 300), [5.0, 7.0, 11.0]])
    measure = slq(dense(values), num_probes=1, num_steps=60)
    found = measure.rule.shared.nodes[0]
    assert (found > 4).sum() == 3
    np.testing.assert_allclose(found[-3:], [5.0, 7.0, 11.0], atol=1e-12)


def test_the_recurrence_is_exact_for_blocks_that_drift():
    """Without rounding the recurrence is an identity: let it follow blocks that are not clean."""
    rng = np.random.default_rng(0)
    matrix = matrix_with_spectrum(np.linspace(-1, 2, 60))
    blocks = [np.linalg.qr(rng.standard_normal((60, 2)))[0]]
    diagonal, coupling = [], [np.eye(2)]
    overlaps = Overlaps.of_first_block(2, np.dtype(float))
    for k in range(8):
        q = blocks[-1]
        w = matrix @ q
        if k:
            w -= blocks[-2] @ coupling[-1].T
        # Symmetric, as the iteration makes it, and not the best: the blocks drift at once.
        m = q.T @ matrix @ q + 1e-3 * np.eye(2)
        w -= q @ m
        new, r = np.linalg.qr(w)
        overlaps = overlaps.predict(np.array([*diagonal, m]), np.array(coupling), r, rounding=0.0)
        diagonal.append(m)
        coupling.append(r)
        true = np.array([b.T @ new for b in blocks])
        if k < 2:
            overlaps = Overlaps(overlaps.older, true, overlaps.rounding)
            blocks.append(new)
            continue
        np.testing.assert_allclose(overlaps.newer[: k - 1], true[: k - 1], atol=1e-9)
        overlaps = Overlaps(overlaps.older, true, overlaps.rounding)
        blocks.append(new)
    assert np.abs(true).max() > 1e-3


def test_reorthogonalization_may_be_needed_twice():
    """A direction of which rounding has left little is cleaned until it is orthogonal or gone."""
    values = np.concatenate([[1e8], 1 + 1e-6 * np.linspace(-1, 1, 80)])
    operator = aslinearoperator(np.diag(values))
    for state in _states(operator, 2, 12):
        newest = home(state.basis[-1])
        norms = np.linalg.norm(newest, axis=1)
        assert np.all((np.abs(norms - 1) < 1e-12) | (norms < 1e-12))
        assert _drift(state).max() <= operator.space.precision**0.5
