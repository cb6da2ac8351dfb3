"""Passes over the data for class structure: sums by pair of classes, means, products, Gram."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from specdens import Arithmetic, VectorSpace, hierarchy
from specdens.class_parts import inverse_weights
from specdens_torch.class_products import ClassPasses, ClassRows, KeptRows, LinearizedRows
from specdens_torch.evaluation import Evaluation, accumulate, twice_differentiable
from specdens_torch.guards import Totals
from specdens_torch.linearized import check_vectors, columns_of
from specdens_torch.processes import Share
from specdens_torch.risk import Risk
from specdens_torch.state import Fingerprint, wide_dtype

_SLICE = 2**16  # coordinates that are made double precision, or added up in their own, at a time


class PairSums(NamedTuple):
    """Weights of the pairs before they are divided, and what they are divided by."""

    pairs: np.ndarray  # (C, C) float64
    divisor: float


class ClassSweeps:
    """All that a class structure asks of the data, remembered until the parameters change.

    Parameters
    ----------
    risk : Risk
    num_classes : int, optional
        Found in the first pass by default.
    uniform : bool
        Whether pairs are weighed without probabilities.
    """

    def __init__(self, risk: Risk, num_classes: int | None, uniform: bool) -> None:
        self.risk, self.uniform = risk, uniform
        self.num_classes = num_classes
        self._kept: KeptRows | None = None
        self._known: dict[str, tuple[Fingerprint, Any]] = {}

    def release(self) -> None:
        """Free all that is kept."""
        self._kept = None
        self._known.clear()
        self.risk.passes.forget_combined()

    def sums(self) -> PairSums:
        """Return the weights of the pairs."""

        def compute() -> Share:
            found: list[Tensor] = []

            def add(evaluation: Evaluation) -> None:
                rows, _ = self.rows_of(evaluation)
                if not found:
                    found.append(self._tables())
                found[0].add_(rows.pair_sums().to(found[0]))

            totals = self.risk.passes.sweep(add, cuts=True)
            return Share(totals, found[0] if found else self._tables())

        def combined() -> PairSums:
            return self._divided(self.risk.combined("pair weights", compute))

        return self._remembered("sums", combined)

    def class_rows(self, part: str = "class") -> Tensor:
        """Return the means of the classes as rows, (C, p), from one pass over the data.

        For ``part="equal"`` those of the pairs (c, c).
        """
        if part == "class":
            return self._remembered("means", self._class_rows)
        number = len(self.sums().pairs)
        return self._remembered("equal", lambda: self.pair_rows(range(0, number**2, number + 1)))

    def class_gram(self, part: str = "class") -> np.ndarray:
        """Return the inner products of `class_rows`, (C, C) float64."""
        rows = self.class_rows(part)
        return inner_products(rows, rows)

    def pair_gram(self) -> np.ndarray:
        """Return the inner products of the pair means, (C * C, C * C) float64."""
        return self._remembered("gram", self._pair_gram)

    def fits(self, vectors: int) -> bool:
        """Tell whether so many vectors fit into the risk's memory budget."""
        return vectors * self.risk.parameters.space.vector_bytes <= self.risk.memory_budget

    def known(self, name: str) -> bool:
        """Tell whether something is remembered that still holds."""
        return name in self._known and self._known[name][0] == self.risk.passes.fingerprint()

    def pair_rows(self, places: Sequence[int]) -> Tensor:
        """Return the means of the pairs with the numbers `places`, as rows, (len, p)."""
        inverse = inverse_weights(self.sums().pairs)
        number = len(inverse)
        by_class: dict[int, list[tuple[int, int]]] = {}
        for row, place in enumerate(places):
            by_class.setdefault(place // number, []).append((row, place % number))

        def compute() -> Share:
            total = self._vectors(len(places))

            def add(evaluation: Evaluation) -> None:
                rows, logits = self.rows_of(evaluation)
                for c in rows.memberships.present(rows.factor):
                    for row, other in by_class.get(c, []):
                        coefficients = rows.of_pair(c, other) * inverse[c, other]
                        self._pull_back(evaluation, logits, rows, coefficients, total[row])

            return Share(self._class_passes().sweep(add, cuts=True), total)

        with torch.inference_mode(False), torch.no_grad():
            operation = f"means of pairs {min(places)} to {max(places)}"
            return self.risk.combined(operation, compute).vector

    def combinations(self, coefficients: np.ndarray) -> Tensor:
        """Return sums of pair means with the columns of `coefficients` (C * C, r), (r, p)."""
        inverse = inverse_weights(self.sums().pairs)
        tables = coefficients.T.reshape(-1, *inverse.shape) * inverse

        def compute() -> Share:
            total = self._vectors(len(tables))
            weights = torch.from_numpy(tables)

            def visit(chunk: LinearizedRows) -> None:
                for table, row in zip(weights, total, strict=True):
                    self._add(chunk, chunk.rows.spread(table), row)

            return Share(self._visit(visit), total)

        with twice_differentiable(self.risk.model), torch.no_grad():
            return self.risk.combined("sums of pair means", compute).vector

    def product(self, x: Tensor, part: str) -> Tensor:
        """Return the product with a part: slopes by pair from one pass, vectors from another."""
        with twice_differentiable(self.risk.model), torch.no_grad():
            sums = self.sums()
            share = self.risk.combined(f"slopes for G_{part}", lambda: self._slopes(x))
            slopes = _on_host(share.vector) * inverse_weights(sums.pairs)  # (k, C, C)
            if part != "within":
                columns = hierarchy.part_tables(np.moveaxis(slopes, 0, -1), sums.pairs, part)
                slopes = np.ascontiguousarray(np.moveaxis(columns, -1, 0))
            tables = torch.from_numpy(slopes)
            total = self.risk.combined(
                f"product with G_{part}", lambda: self._spread(x, tables, part == "within")
            ).vector
            total = (total / sums.divisor).to(x.dtype)
        return total[0] if x.ndim == 1 else total.t()

    def class_product(self, x: Tensor) -> Tensor:
        """Return the product with the part of the class means, from these."""
        check_vectors(x, self.risk.parameters.space)
        means, sums = self.class_rows(), self.sums()
        weights = hierarchy.class_weights(sums.pairs) / sums.divisor
        columns = (x if x.ndim == 2 else x[:, None]).detach().to(means.dtype)
        parts = (slice(at, at + _SLICE) for at in range(0, means.shape[1], _SLICE))
        products = torch.stack([means[:, some] @ columns[some] for some in parts]).sum(0)
        slopes = torch.from_numpy(weights).to(means)[:, None] * products
        return (means.t() @ slopes).to(x.dtype).reshape(x.shape)

    def _class_rows(self) -> Tensor:
        def compute() -> Share:
            found: list[Tensor] = []

            def allocate() -> None:
                table = self._tables()
                found.extend([self._vectors(len(table)), table])

            def add(evaluation: Evaluation) -> None:
                rows, logits = self.rows_of(evaluation)
                if not found:
                    allocate()
                found[1].add_(rows.pair_sums().to(found[1]))
                for c in rows.memberships.present(rows.factor):
                    self._pull_back(evaluation, logits, rows, rows.of_others(c), found[0][c])

            totals = self._class_passes().sweep(add, cuts=True)
            if not found:
                allocate()
            local.append(Share(totals, found[1]))
            return Share(totals, found[0])

        local: list[Share] = []
        with torch.inference_mode(False), torch.no_grad():
            total = self.risk.combined("class means", compute).vector
            sums = self._remembered(
                "sums",
                lambda: self._divided(self.risk.combined("pair weights", lambda: local[0])),
            )
            weights = hierarchy.class_weights(sums.pairs)
            return total.mul_(torch.from_numpy(inverse_weights(weights)).to(total)[:, None])

    def _pair_gram(self) -> np.ndarray:
        number = len(self.sums().pairs)
        if 8 * number**4 > self.risk.memory_budget:
            msg = (
                f"num_classes={number}: the inner products of all {number**2:,} pair means take "
                f"{8 * number**4:,} bytes, more than memory_budget={self.risk.memory_budget:,} of "
                "the risk. What belongs to classes still works: class_means, the operators G_class "
                "to G_equal, principal_subspace, and 'class' and 'equal' as parts."
            )
            raise ValueError(msg)
        count = number**2
        size = self.risk.memory_budget // self.risk.parameters.space.vector_bytes
        size = count if size >= count else max(1, size // 2)  # two blocks at a time
        gram = np.zeros((count, count))
        starts = range(0, count, size)
        for start in starts:
            mine = range(start, min(start + size, count))
            left = self.pair_rows(mine)
            for other in starts[: starts.index(start) + 1]:
                its = range(other, min(other + size, count))
                right = left if other == start else self.pair_rows(its)
                block = inner_products(left, right)
                gram[mine.start : mine.stop, its.start : its.stop] = block
                gram[its.start : its.stop, mine.start : mine.stop] = block.T
        return gram

    def _slopes(self, x: Tensor) -> Share:
        """Return the weighted sums of the slopes along every column by pair, (k, C, C)."""
        rows = self._columns(x)
        columns = columns_of(self.risk.parameters, rows)
        total = self._tables(len(rows))

        def visit(chunk: LinearizedRows) -> None:
            for column, table in zip(columns, total, strict=True):
                table.add_(chunk.rows.pair_products(chunk.tangents(column)).to(table))

        return Share(self._visit(visit), total, rows)

    def _spread(self, x: Tensor, tables: Tensor, within: bool) -> Share:
        """Return the weighted sums of h with factors from `tables`, or slopes less these."""
        columns = columns_of(self.risk.parameters, self._columns(x))
        total = self._vectors(len(columns))

        def visit(chunk: LinearizedRows) -> None:
            for column, table, target in zip(columns, tables, total, strict=True):
                coefficients = chunk.rows.spread(table)
                if within:
                    slopes = chunk.rows.slopes(chunk.tangents(column))
                    coefficients = chunk.rows.shares * slopes - coefficients
                self._add(chunk, coefficients, target)

        return Share(self._visit(visit), total)

    def _columns(self, x: Tensor) -> Tensor:
        check_vectors(x, self.risk.parameters.space)
        own = x.detach().clone() if x.is_inference() else x.detach()
        return (own.reshape(1, -1) if own.ndim == 1 else own.t()).contiguous()

    def _add(self, chunk: LinearizedRows, coefficients: Tensor, target: Tensor) -> None:
        blocks = list(self.risk.parameters.unravel(target).values())
        accumulate(blocks, chunk.transposed(coefficients, len(blocks)))

    def _pull_back(
        self,
        evaluation: Evaluation,
        logits: tuple[Tensor, ...],
        rows: ClassRows,
        coefficients: Tensor,
        target: Tensor,
    ) -> None:
        """Add the sum of h with `coefficients` to a vector, from a graph that is not kept."""
        if not logits:
            return
        cotangents = [rows.cotangents(coefficients)]
        pieces = torch.autograd.grad(
            logits, evaluation.leaves, cotangents, retain_graph=True, allow_unused=True
        )
        with torch.no_grad():
            accumulate(list(self.risk.parameters.unravel(target).values()), pieces)

    def _visit(self, visit: Callable[[LinearizedRows], None]) -> Totals:
        """Hand every linearized chunk to `visit`, kept ones or from a pass over the data."""
        passes = self.risk.passes
        fingerprint = passes.fingerprint()
        if self._kept is None or self._kept.fingerprint != fingerprint:
            self._kept = None
            if not passes.plan().keeps_graphs:
                return passes.sweep(lambda e: visit(self._linearized(e)), cuts=True)
            chunks: list[LinearizedRows] = []
            totals = passes.sweep(lambda e: chunks.append(self._linearized(e)), cuts=True)
            self._kept = KeptRows(fingerprint, chunks, totals)
        for chunk in self._kept.chunks:
            visit(chunk)
        return self._kept.totals

    def _linearized(self, evaluation: Evaluation) -> LinearizedRows:
        return LinearizedRows.of(evaluation, *self.rows_of(evaluation))

    def rows_of(self, evaluation: Evaluation) -> tuple[ClassRows, tuple[Tensor, ...]]:
        """Return the rows of a chunk, and the logits in the model's graph if they vary."""
        rows, logits = ClassRows.of(evaluation, self.uniform)
        self.num_classes = self.num_classes or rows.num_classes
        if rows.num_classes != self.num_classes:
            msg = (
                f"num_classes={self.num_classes}, but the model returns logits of "
                f"{rows.num_classes} classes; pass num_classes={rows.num_classes}, or None."
            )
            raise ValueError(msg)
        return rows, logits

    def _class_passes(self) -> ClassPasses:
        return ClassPasses.like(self.risk.passes)

    def _vectors(self, count: int) -> Tensor:
        space = self.risk.parameters.space
        dtype = self.risk.accumulation_dtype
        return torch.zeros(count, space.dimension, dtype=dtype, device=space.device)

    def _tables(self, *count: int) -> Tensor:
        """Return zeros by pair, (C, C), or so many of them."""
        if self.num_classes is None:
            msg = (
                "num_classes=None cannot be found by a process without data; pass the number of "
                "classes on every process."
            )
            raise ValueError(msg)
        device = self.risk.parameters.space.device
        shape = (*count, self.num_classes, self.num_classes)
        return torch.zeros(shape, dtype=wide_dtype(device), device=device)

    def _divided(self, share: Share) -> PairSums:
        return PairSums(_on_host(share.vector), share.totals.weight if self.risk.divides else 1.0)

    def _remembered(self, name: str, compute: Callable[[], Any]) -> Any:
        fingerprint = self.risk.passes.fingerprint()
        known = self._known.get(name)
        if known is None or known[0] != fingerprint:
            known = self._known[name] = fingerprint, compute()
        return known[1]


@dataclass(frozen=True, repr=False, eq=False)
class PartOperator(Arithmetic):
    """One part of a Gauss-Newton matrix, or the sum of those that are made of means."""

    sweeps: ClassSweeps
    part: str

    @property
    def space(self) -> VectorSpace:
        """The flat vectors: length p, dtype and device of the parameters."""
        return self.sweeps.risk.parameters.space

    def __matmul__(self, x: Tensor, /) -> Tensor:
        sweeps = self.sweeps
        # Processes may have different budgets, but must do the same.
        if self.part == "class" and sweeps.risk.processes is None:
            number = len(sweeps.sums().pairs)
            if sweeps.known("means") or sweeps.fits(number):
                return sweeps.class_product(x)
        return sweeps.product(x, self.part)

    def __repr__(self) -> str:
        return f"G_{self.part}(n={self.space.dimension:,}, {self.sweeps.risk!r})"


def inner_products(left: Tensor, right: Tensor) -> np.ndarray:
    """Return the inner products of rows, accumulated in double precision, on the host."""
    wide = wide_dtype(left.device)
    total = torch.zeros(len(left), len(right), dtype=wide, device=left.device)
    for start in range(0, left.shape[1], _SLICE):
        some = slice(start, start + _SLICE)
        total += left[:, some].to(wide) @ right[:, some].to(wide).t()
    return _on_host(total)


def orthonormalized(rows: Tensor) -> Tensor:
    """Make rows (r, p) that are almost orthonormal so, in place, and return them.

    Their Gram matrix in double precision tells what is missing, where a QR factorization of such
    long columns would itself lose digits of single precision.
    """
    for _ in range(2):
        gram = inner_products(rows, rows)
        if abs(gram - np.eye(len(gram))).max(initial=0.0) <= torch.finfo(rows.dtype).eps:
            break
        eigenvalues, vectors = np.linalg.eigh(gram)
        factor = torch.from_numpy(vectors / np.sqrt(eigenvalues) @ vectors.T).to(rows)
        for start in range(0, rows.shape[1], _SLICE):
            some = slice(start, start + _SLICE)
            rows[:, some] = factor @ rows[:, some]
    return rows


def _on_host(tensor: Tensor) -> np.ndarray:
    return np.asarray(tensor.cpu().double().numpy())
