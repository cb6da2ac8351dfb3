"""The front door that chooses for itself: `density`, to a requested accuracy."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from scipy.special import exprel

from specdens.arguments import checked_count, checked_fraction, checked_seed
from specdens.backends import Array
from specdens.driver import progress_bar
from specdens.estimate import Accuracy
from specdens.interpolation import residual_distance, statistical_distance
from specdens.measure import SpectralMeasure
from specdens.methods.block import BlockLanczos
from specdens.methods.lanczos import Lanczos
from specdens.operators import aslinearoperator
from specdens.probes import draw, sphere
from specdens.quadrature import KrylovRule
from specdens.runs import MEMORY_BUDGET, fitting, provenance_of
from specdens.spaces import LinearOperator

_FIRST_CHECK = 4  # steps before anything is estimated
_GROWTH = 1.2  # from one check to the next
_STATISTICAL_SHARE = 0.8  # of the tolerance at least, for the probes
_LONG_RUN = 128  # steps that the memory for a basis is judged by
_SHARED = 4  # probes that a limited run starts with, in one Krylov space
_STEPS_EACH = 20  # that they should be able to take: a smooth density needs about as many


def density(
    A: LinearOperator | Array,  # noqa: N803
    *,
    tolerance: float = 0.01,
    confidence: float = 0.95,
    max_products: int | None = None,
    seed: int = 0,
    memory_budget: int = MEMORY_BUDGET,
    progress: bool | None = None,
) -> SpectralMeasure:
    r"""Estimate the spectral density to a requested accuracy, choosing probes and steps itself.

    Stochastic Lanczos quadrature that goes on until the Wasserstein-1 distance to the true
    distribution of the eigenvalues, divided by the range of the spectrum, is estimated to be below
    `tolerance` with probability `confidence`. The estimate has a statistical part (too few probes)
    and a quadrature part (too few steps), see `specdens.interpolation`; probes are added for the
    first, steps for the second.

    Parameters
    ----------
    A : LinearOperator or array-like of shape (n, n)
        Real symmetric or complex Hermitian; wrapped by `aslinearoperator`.
    tolerance : float
        Wasserstein-1 distance over range, between 0 and 1.
    confidence : float
        Between 0 and 1.
    max_products : int, optional
        Columns to multiply at most. None sets no limit; n products, one with every unit vector,
        would give all eigenvalues. If the tolerance does not fit into the limit, steps go on until
        new probes with as many steps are predicted to do more with the products that are left, see
        the notes.
    seed : int
        Determines the probes.
    memory_budget : int
        Bytes for Lanczos vectors, the operator's own not counted.
    progress : bool, optional
        As in `slq`.

    Returns
    -------
    SpectralMeasure
        Eigenvalues that were resolved one by one are atoms of their exact mass; between the nodes
        of all others the distribution function is interpolated. `SpectralMeasure.accuracy` holds
        both parts of the error and whether the tolerance was met; ``plain()`` is the Gauss rule.

    Raises
    ------
    ValueError
        If `tolerance` or `confidence` is out of range, a count is too small, or a product is not
        finite.
    TypeError
        If `A` is not an operator or a count is not an integer.

    Notes
    -----
    With a limit of L products, of which p probes need p m to take m steps, stopping at m leaves
    room for L/m probes. Then the statistical part, s for p probes, would be
    :math:`a = s \sqrt{p m / L}`. Per doubling of m it grows by a factor :math:`\sqrt 2`, for half
    the probes, but falls by the factor by which s itself falls: with more steps more eigenvalues
    are resolved, whose masses do not fluctuate. The quadrature part q is the change from half the
    steps; if it falls by a factor r per doubling, the error that is left is
    :math:`q / (r - 1)`. Both factors are measured between checks at about m/2 and m. Steps go on
    while the sum of both parts is falling with m:

    .. math:: a \, (\log \sqrt 2 - \log(s_{m/2} / s_m)) < q \, \log(r) / (r - 1).

    A limited run starts with up to four probes, not one, since probes that are added later do not
    share the Krylov space of the first.

    References
    ----------
    Chen, Trogdon, Ubaru (2021), ICML. arXiv:2105.06595

    Examples
    --------
    >>> import numpy as np
    >>> measure = density(np.diag(np.linspace(0.0, 1.0, 500)), tolerance=0.05)
    >>> measure.accuracy.converged, bool(measure.distance(np.linspace(0.0, 1.0, 500)) < 0.05)
    (True, True)
    """
    A = aslinearoperator(A)  # noqa: N806
    checked_fraction("tolerance", tolerance, "it is a part of the range")
    checked_fraction("confidence", confidence, "it is a probability")
    checked_count("memory_budget", memory_budget)
    limit = math.inf if max_products is None else checked_count("max_products", max_products)
    search = _Search(A, tolerance, confidence, checked_seed(seed), memory_budget, limit)
    with A.space.backend.session(), progress_bar(None, 0, progress, unit="column") as bar:
        for result in search.measures():
            measure = result
            bar.update(search.num_products - bar.n)
    return measure


@dataclass
class _Block:
    """Probes that share a run, and how far it is."""

    count: int
    method: Any  # BlockLanczos or Lanczos
    state: Any

    @property
    def is_done(self) -> bool:
        """Whether the Krylov space is exhausted."""
        return bool(self.method.done(self.state))

    def rule(self, A: LinearOperator, steps: int) -> KrylovRule:  # noqa: N803
        """Return the rule after so many steps, or all if there are fewer."""
        part = self.method.truncate(self.state, steps)
        cut = replace(self.method, num_steps=self.method.steps_taken(part))
        rule: KrylovRule = cut.finish(A, part)
        return rule


@dataclass(frozen=True)
class _Check:
    """Both parts of the error at some number of steps."""

    steps: int
    statistical: float  # for a single probe: times the root of their number
    quadrature: float


@dataclass
class _Search:
    """Blocks of probes, all taken to the same number of steps, and what they give on the way."""

    A: LinearOperator
    tolerance: float
    confidence: float
    seed: int
    memory_budget: int
    limit: float
    blocks: list[_Block] = field(default_factory=list)
    checks: list[_Check] = field(default_factory=list)
    num_products: int = 0
    began: float = field(default_factory=time.perf_counter)

    @property
    def num_probes(self) -> int:
        """Probes of all blocks."""
        return sum(block.count for block in self.blocks)

    @property
    def freedoms(self) -> int:
        """Real numbers per entry of a vector."""
        return 2 if self.A.space.is_complex else 1

    @property
    def is_exhausted(self) -> bool:
        """Whether no block has a step left to take."""
        return all(block.is_done for block in self.blocks)

    def measures(self) -> Iterator[SpectralMeasure]:
        """Yield a measure at every check, the last one being the result."""
        n = self.A.space.dimension
        self.add(self.first_probes())
        steps = int(min(_FIRST_CHECK, n, self.limit // self.num_probes))
        while True:
            self.advance(steps)
            measure, accuracy = self.measure(steps)
            yield measure
            spent = self.num_products + self.num_probes > self.limit
            more = self.missing_probes(accuracy, steps)
            if accuracy.converged or spent or (not more and self.is_exhausted):
                return
            self.add(more)
            affordable = self.limit // self.num_probes  # a block cut short would count in full
            steps = int(max(steps, min(math.ceil(_GROWTH * steps), n, affordable)))

    def first_probes(self) -> int:
        """Return how many probes to start with.

        One is enough for a large n, and the first steps tell how many more. With a limit there may
        be better use for the products than more probes, and only the first share a Krylov space.
        """
        if math.isinf(self.limit):
            return 1
        room = min(self.limit, self.A.space.dimension)
        wanted = min(_SHARED, int(room // _STEPS_EACH) + 1)
        return fitting(self.memory_of_probe(), wanted, self.memory_budget)

    def memory_of_probe(self) -> int:
        """Return the bytes of a long run of one probe that keeps its basis."""
        space = self.A.space
        return BlockLanczos(min(_LONG_RUN, space.dimension)).memory(space)

    def add(self, count: int) -> None:
        """Start a block of `count` probes."""
        if count < 1:
            return
        space, first = self.A.space, self.num_probes
        kind = BlockLanczos if self.memory_of_probe() * count <= self.memory_budget else Lanczos
        method = kind(space.dimension)
        probes = draw(sphere, space, self.seed, range(first, first + count))
        self.blocks.append(_Block(count, method, method.init(self.A, probes)))

    def advance(self, steps: int) -> None:
        """Take all blocks to so many steps."""
        for block in self.blocks:
            while block.method.steps_taken(block.state) < steps and not block.is_done:
                block.state = block.method.step(self.A, block.state)
                self.num_products += block.count

    def measure(self, steps: int) -> tuple[SpectralMeasure, Accuracy]:
        """Return the measure of all blocks, and its accuracy."""
        fine, coarse = (
            KrylovRule.concatenate([block.rule(self.A, m) for block in self.blocks])
            for m in (steps, (steps + 1) // 2)
        )
        n, space = self.A.space.dimension, self.A.space
        settings = {
            "method": "density",
            "num_steps": steps,
            "seed": self.seed,
            "block_size": max(block.count for block in self.blocks),
            "reorthogonalize": all(isinstance(b.method, BlockLanczos) for b in self.blocks),
            "probes": "sphere",
            "tolerance": self.tolerance,
        }
        provenance = provenance_of(settings, space, self.num_probes, self.began)
        measure = SpectralMeasure.from_rule(fine, n, provenance)
        size = float(np.ptp(measure.support)) or 1.0
        quadrature = 0.0
        if not self.is_exhausted:
            halved = measure.distance(SpectralMeasure.from_rule(coarse, n, provenance))
            quadrature = min(halved, residual_distance(fine)) / size
        known = measure.outliers.eigenvalues[measure.outliers.stderr == 0]
        statistical = statistical_distance(
            measure.nodes, measure.weights, known, n, self.confidence, self.freedoms
        )
        accuracy = Accuracy(
            statistical / size, quadrature, self.tolerance, self.confidence, self.num_products
        )
        full = {**provenance, "accuracy": accuracy._asdict()}
        return replace(measure, provenance=full), accuracy

    def missing_probes(self, accuracy: Accuracy, steps: int) -> int:
        """Return how many probes to add: none before the steps are enough, or if it is no gain."""
        trend = self.checked(accuracy, steps)
        allowed = max(_STATISTICAL_SHARE * self.tolerance, self.tolerance - accuracy.quadrature)
        if accuracy.statistical <= allowed:
            return 0
        more = math.ceil(self.num_probes * ((accuracy.statistical / allowed) ** 2 - 1))
        enough = accuracy.quadrature <= self.tolerance
        affordable = (self.limit - self.num_products) // steps
        if more > affordable:  # the tolerance is out of reach: do what is possible
            more, enough = int(affordable), not self.steps_pay(*trend)
        n = self.A.space.dimension
        if self.is_exhausted:  # repeated eigenvalues: few steps are enough, few probes are not
            return min(more, n)
        # All eigenvalues may be had for less, by going on with the probes that there are.
        exhausting = n - self.num_products if len(self.blocks) == 1 else n
        return more if enough and more * steps < exhausting else 0

    def checked(self, accuracy: Accuracy, steps: int) -> tuple[_Check | None, _Check]:
        """Note a check, and return the last one at no more than half the steps with it."""
        single = accuracy.statistical * self.num_probes**0.5
        check = _Check(steps, single, accuracy.quadrature)
        earlier = [old for old in self.checks if 2 * old.steps <= steps]
        self.checks.append(check)
        return (earlier[-1] if earlier else None), check

    def steps_pay(self, half: _Check | None, now: _Check) -> bool:
        """Tell whether the error at the limit is falling with the steps, see `density`."""
        if half is None:
            return True
        doublings = math.log2(now.steps / half.steps)
        statistical = now.statistical * (now.steps / self.limit) ** 0.5
        resolving = _fall(half.statistical, now.statistical) / doublings
        converging = _fall(half.quadrature, now.quadrature) / doublings
        loss = statistical * (math.log(2) / 2 - resolving)
        return bool(loss < now.quadrature / exprel(converging))


def _fall(before: float, now: float) -> float:
    """Return the logarithm of the factor between two errors, which may be zero."""
    tiny = np.finfo(np.float64).tiny
    return math.log(max(before, tiny) / max(now, tiny))
