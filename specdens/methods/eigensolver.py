r"""The runs of an eigensolver: thick-restart Lanczos until the wanted pairs are found, and all.

A run from a random vector sees one direction of every eigenspace only. The other copies of a
repeated eigenvalue are found by further runs, orthogonal to what is locked, from new random
vectors. A run without finds ends when it proves that there is nothing to find: if
:math:`A V = [V, F] G`, an eigenvector z of an eigenvalue :math:`\lambda` that is no eigenvalue of
T, the part of G that belongs to V, has

.. math:: z^* V = (z^* F) \, G_F (\lambda - T)^{-1}
          \quad\Rightarrow\quad |z^* x| \le \| G_F (\lambda - T)^{-1} V^* x \|,

and a random unit vector x hardly ever has a component that small: one below :math:`\epsilon` with
probability at most :math:`\epsilon \sqrt{2 n / \pi}`. A run from a block of them proves it by
itself, and multiplies of F only what residuals or that proof still need.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from specdens.backends import Array
from specdens.methods.thick_restart import (
    Decomposition,
    RitzPairs,
    Targets,
    append,
    combine,
    component_density,
    expand,
    hideable,
    least_tol,
    lock,
    restart,
    ritz_pairs,
    roundoff,
    steer,
)
from specdens.probes import draw, sphere
from specdens.spaces import LinearOperator

MISS = 1e-3  # probability that a search ends before it has found what is there
LEAST_SEARCH = 40  # products that a search may always take


@dataclass(frozen=True)
class Goal:
    """What is asked for."""

    count: int
    which: str
    tol: float

    def ranking(self, values: np.ndarray) -> np.ndarray:
        """Return the indices of `values`, the most wanted first."""
        if self.which == "SA":
            return np.argsort(values, kind="stable")
        if self.which == "LM":
            return np.argsort(-np.abs(values), kind="stable")
        descending = np.argsort(-values, kind="stable")
        if self.which == "LA":
            return descending
        both = np.stack([descending, descending[::-1]], axis=1).ravel()
        return both[np.sort(np.unique(both, return_index=True)[1])]

    def sides(self, values: np.ndarray) -> list[tuple[int, np.ndarray]]:
        """Return the wanted ends (sign 1 for the high one) and the wanted values of each.

        Multiplied with the sign, values beyond the smallest of an end are wanted more.
        """
        wanted = values[self.ranking(values)[: self.count]]
        if self.which == "LM":
            return [(1, np.abs(wanted)), (-1, np.abs(wanted))]
        if self.which == "BE":
            high = np.sort(wanted)[::-1]
            half = (self.count + 1) // 2
            ends = [(1, high[:half]), (-1, -high[half:])]
            return [end for end in ends if len(end[1])]
        return [(1, wanted)] if self.which == "LA" else [(-1, -wanted)]

    def away(self, values: np.ndarray, others: np.ndarray, distance: float) -> np.ndarray:
        """Return `values` moved towards the wanted end by `distance`."""
        if self.which == "BE":
            both = np.concatenate([values, others])
            middle = (both.max() + both.min()) / 2 if both.size else 0.0
            return values + distance * np.where(values < middle, -1, 1)
        if self.which == "LM":
            return values + distance * np.where(values < 0, -1, 1)
        return values + distance * (1 if self.which == "LA" else -1)


class Eigensolver:
    """The runs of `eigsh`: what is locked, the run in progress, and what it has cost."""

    def __init__(
        self,
        A: LinearOperator,  # noqa: N803
        goal: Goal,
        *,
        capacity: int,
        block_size: int,
        max_products: int,
        seed: int,
        bar: Any,
    ) -> None:
        self.A, self.goal, self.seed, self.bar = A, goal, seed, bar
        self.block_size, self.max_products = block_size, max_products
        self.state = Decomposition.empty(A.space, capacity)
        self.locked = self.locked_residuals = np.zeros(0)
        self.targets: Targets | None = None
        self.num_own = 0  # random vectors that a run without targets began with
        self.num_products = self.num_random = self.num_visible = 0
        self.num_given, self.is_testing = 0, False  # vectors to start from that still wait
        self.has_guests, self.may_hide, self.is_stuck = False, True, False
        self.hidden = np.zeros(0)  # (targets,) how much guests may lower an eigenvalue there

    def solve(self, start: Array | None) -> None:
        """Run until all wanted pairs are converged and searched for, or products run out."""
        if start is None:
            self.add_random()
            if self.block_size > 1:
                self.num_own = self.state.size
        else:
            self.give(start)
        self.run(np.inf)
        while self.num_products < self.max_products and not self.is_whole:
            targets = self.open_targets()
            if not targets:
                return
            self.lock(targets)
            known, visible = len(self.locked), self.num_visible
            self.search(targets)
            if self.is_stuck and self.has_guests:
                # Once more without guests; what this run has found is lost.
                self.may_hide, self.num_visible = False, visible
                self.lock(targets)
                self.search(targets)
            if self.is_stuck:
                self.polish()
            elif not (self.chosen(self.union()[0]) >= known).any():
                return

    def give(self, vectors: Array) -> None:
        """Have the run begin with the sum of `vectors`, then multiply all of them if that pays.

        It does if they have nearly converged, as the first product tells, or if products are few.
        """
        self.state = append(self.state, vectors)
        count = self.state.num_pending
        self.state = steer(self.state, np.linalg.svd(np.ones((count, 1)))[0])
        is_short = self.max_products - self.num_products <= 4 * count
        self.num_given, self.is_testing = count, count > 1 and not is_short

    def polish(self) -> None:
        """Start again from the best vectors, none of them locked."""
        vectors = self.best()[1]
        empty = Decomposition.empty(self.A.space, int(self.state.basis.shape[0]))
        self.state = replace(empty, norm=self.state.norm)
        self.locked = self.locked_residuals = np.zeros(0)
        self.targets, self.num_own, self.has_guests = None, 0, False
        self.give(vectors)
        self.run(np.inf)

    def search(self, targets: list[tuple[int, float]]) -> None:
        """Run from new random vectors for eigenvalues at the targets and beyond."""
        before = self.state.size
        self.add_random()
        added = np.eye(self.state.size)[:, before:]
        signs, values = np.array(targets).T
        seen = np.array([added] * len(targets))
        self.targets = Targets(signs, values - self.hidden, seen)
        self.run(max(LEAST_SEARCH, self.num_products))

    def best(self) -> tuple[np.ndarray, Array, np.ndarray]:
        """Return the most wanted values, ascending, their vectors (n, k), and residuals."""
        values, residuals = self.union()
        chosen = np.sort(self.chosen(values))
        chosen = chosen[np.argsort(values[chosen], kind="stable")]
        locked, multiplied = len(self.locked), self.state.num_multiplied
        coefficients = np.zeros((self.state.size, locked + multiplied), self.state.matrix.dtype)
        coefficients[:locked, :locked] = np.eye(locked)
        coefficients[self.state.multiplied, locked:] = self.pairs.vectors
        return values[chosen], combine(self.state, coefficients[:, chosen]), residuals[chosen]

    def run(self, search: float) -> None:
        """Extend the Krylov space until what is wanted of it has converged, and is all there is.

        The proof may take `search` products as long as nothing new is in sight.
        """
        last, self.is_stuck = self.num_products + search, False
        while True:
            pairs = ritz_pairs(self.state)
            self.pairs = pairs
            size = float(np.abs(pairs.values).max(initial=0.0))
            self.state = replace(self.state, norm=max(self.state.norm, size))
            values, _ = self.union()
            chosen = self.chosen(values)
            wanted = chosen[chosen >= len(self.locked)] - len(self.locked)
            is_open = pairs.residuals[wanted] > self.threshold
            enough = len(values) >= self.goal.count
            needs = self.needs(pairs, wanted[is_open])
            if enough and not is_open.any():
                last = min(last, self.num_products + max(LEAST_SEARCH, self.num_products))
                if self.num_products >= last or self.is_proved(values, needs):
                    return
            if self.num_products >= self.max_products:
                return
            inside = np.linalg.norm(pairs.coupling[:, wanted[is_open]], axis=0)
            if len(self.locked) and is_open.any() and (inside <= self.threshold).all():
                self.is_stuck = True  # what keeps them from converging are the locked vectors
                return
            if self.is_whole:
                return
            if not self.state.num_pending:
                if enough:
                    return
                self.num_own = 0
                self.add_random()
                if not self.state.num_pending:  # rounding leaves no room for another direction
                    return
                continue
            self.step(pairs, wanted, needs if enough else needs[:, :0])

    def step(self, pairs: RitzPairs, wanted: np.ndarray, needs: np.ndarray) -> None:
        """Multiply a block of vectors, after a restart if there is no room for it."""
        count = min(self.block_size, self.state.num_pending, self.max_products - self.num_products)
        if self.num_own and needs.size:
            rotation, sizes, _ = np.linalg.svd(needs)
            count = min(count, self.width(int((sizes > 1).sum())))
        if self.state.room < min(count, self.A.space.dimension - self.state.size):
            # Rounding has brought other copies into the Ritz vectors, which fine tolerances notice.
            rounding = roundoff(self.A.space) ** 0.5 * self.state.norm
            self.may_hide, self.num_own = self.may_hide and self.threshold > rounding, 0
            spare = self.state.num_multiplied - len(wanted)
            num_kept = min(len(wanted) + int(0.45 * spare), self.state.num_multiplied - count)
            kept = self.goal.ranking(pairs.values)[:num_kept]
            if self.targets is not None:
                self.targets = self.targets.after_restart(self.state, pairs, kept)
            self.state = restart(self.state, pairs.vectors[:, kept])
        elif self.num_own and needs.size:
            self.state = steer(self.state, rotation)
        elif self.may_steer and len(wanted):
            self.state = steer(self.state, np.linalg.svd(pairs.coupling[:, wanted])[0])
        before = self.state.size
        self.state = expand(self.A, self.state, count)
        self.num_given = max(0, self.num_given - count)
        if self.is_testing and np.linalg.norm(self.state.matrix[before:]) > 2 * self.threshold:
            self.num_given = 0
        self.is_testing = False
        if self.targets is not None:
            self.targets = self.targets.after_step(self.state.size)
        self.num_products += count
        self.bar.update(count)

    def needs(self, pairs: RitzPairs, open_pairs: np.ndarray) -> np.ndarray:
        """Return what F is needed for: residuals and proof, 1 being as small as they must be."""
        parts = [pairs.coupling[:, open_pairs] / self.threshold] if len(open_pairs) else []
        targets = self.own_targets()
        if targets is not None:
            density = component_density(self.A.space.dimension, targets.seen.shape[2])
            parts += [left * density / MISS for left in targets.left(self.state, pairs)]
        nothing = np.zeros((self.state.num_pending, 0))
        return np.concatenate([nothing, *parts], axis=1)

    def width(self, needed: int) -> int:
        """Return at least `needed` columns: few different numbers, each may need compiling."""
        part = -(-self.block_size // 5)
        return min(max(1, -(-needed // part)) * part, self.block_size)

    @property
    def may_steer(self) -> bool:
        """Whether the next product is free to go where the wanted residuals are largest."""
        is_free = self.targets is None and not self.num_given
        return is_free and self.state.num_pending > self.block_size

    @property
    def is_whole(self) -> bool:
        """Whether V and what is locked are a basis of the whole space."""
        state = self.state
        return state.num_locked + state.num_multiplied == state.space.dimension

    @property
    def threshold(self) -> float:
        """Residual norm up to which a pair has converged."""
        return max(self.goal.tol, least_tol(self.A.space)) * self.state.norm

    def union(self) -> tuple[np.ndarray, np.ndarray]:
        """Return eigenvalues and residuals of the locked pairs, then of the run's Ritz pairs."""
        return (
            np.concatenate([self.locked, self.pairs.values]),
            np.concatenate([self.locked_residuals, self.pairs.residuals]),
        )

    def chosen(self, values: np.ndarray) -> np.ndarray:
        """Return the indices of the most wanted; of equal ones those that are locked."""
        values = values.copy()
        locked = len(self.locked)
        values[:locked] = self.goal.away(values[:locked], values[locked:], self.threshold)
        return self.goal.ranking(values)[: self.goal.count]

    def groups(self) -> list[tuple[int, list[np.ndarray]]]:
        """Return signs of ends and the wanted values there, ascending, equal ones together.

        Without the least: more copies of it could only replace it.
        """
        values, _ = self.union()
        ends = []
        for sign, wanted in self.goal.sides(values[self.chosen(values)]):
            wanted = np.sort(wanted)
            cuts = np.flatnonzero(np.diff(wanted) > 4 * self.threshold) + 1
            ends.append((sign, np.split(wanted, cuts)[1:]))
        return ends

    def open_targets(self) -> list[tuple[int, float]]:
        """Return ends and places where an eigenvalue may still be hidden.

        Random vectors see as many copies of an eigenvalue as there are vectors.
        """
        if not self.num_visible:
            values, _ = self.union()
            sides = self.goal.sides(values[self.chosen(values)])
            return [(sign, float(wanted.min() + self.threshold)) for sign, wanted in sides]
        return [
            (sign, float(group[0] - 2 * self.threshold))
            for sign, groups in self.groups()
            for group in groups
            if len(group) >= self.num_visible
        ]

    def own_targets(self) -> Targets | None:
        """Return the places down to which the run's own random vectors must have shown all.

        Of them as many serve as the most frequent eigenvalue has known copies, and one.
        """
        ends = [end for end in self.groups() if end[1]] if self.num_own else []
        if not ends:
            return None
        signs = np.array([sign for sign, _ in ends])
        places = np.array([groups[0][0] - 2 * self.threshold for _, groups in ends])
        copies = max(len(group) for _, groups in ends for group in groups)
        # They are the first of V: all of them are multiplied before any are left out.
        seen = np.eye(self.state.size, min(copies + 1, self.num_own))
        return Targets(signs, places, np.array([seen] * len(ends)))

    def is_proved(self, values: np.ndarray, needs: np.ndarray) -> bool:
        """Tell whether the run's random vectors would have shown an eigenvalue at the targets."""
        if self.targets is None:
            return not needs.size or bool(np.linalg.norm(needs, 2) <= 1)
        missed = self.targets.missed(self.state, self.pairs, self.pairs.residuals <= self.threshold)
        for sign, wanted in self.goal.sides(values[self.chosen(values)]):
            # What is not wanted any more need not be searched.
            places = self.targets.values + self.hidden
            relevant = (self.targets.signs == sign) & (places > wanted.min())
            n = self.A.space.dimension
            if (missed[relevant] * component_density(n) > MISS).any():
                return False
        return True

    def add_random(self) -> None:
        """Add a block of random vectors to the run."""
        space = self.A.space
        free = min(space.dimension - self.state.size, self.state.room)
        indices = range(self.num_random, self.num_random + min(self.block_size, free))
        self.state = append(self.state, draw(sphere, space, self.seed, indices))
        self.num_random += len(indices)
        self.num_visible += len(indices)

    def lock(self, targets: list[tuple[int, float]]) -> None:
        """Lock what has converged, a few more than are wanted, and end the run.

        Other Ritz vectors y that are far from the targets are locked too, as guests.
        """
        values, residuals = self.union()
        old = len(self.locked)
        done = np.flatnonzero(residuals <= self.threshold)
        order = done[self.goal.ranking(values[done])][: self.goal.count + 10]
        kept = np.sort(order[order < old])
        new = order[order >= old]
        guests = self.guests(targets, np.setdiff1d(np.arange(old, len(values)), new))
        columns = np.concatenate([new, guests]) - old
        self.state = lock(self.state, self.pairs.vectors[:, columns], kept)
        self.has_guests, self.num_own = len(guests) > 0, 0
        picked = np.concatenate([kept, new])
        self.locked, self.locked_residuals = values[picked], residuals[picked]
        self.pairs = ritz_pairs(self.state)

    def guests(self, targets: list[tuple[int, float]], candidates: np.ndarray) -> np.ndarray:
        """Return those of the run's unconverged Ritz vectors that the next run need not see."""
        values, residuals = self.union()
        signs, places = np.array(targets).T
        self.hidden = np.zeros(len(targets))
        limit = int(self.state.basis.shape[0]) // 2 - self.goal.count - 10
        if not self.may_hide or limit <= 0:
            return candidates[:0]
        distances = places[:, None] - signs[:, None] * values[candidates]
        picked, self.hidden = hideable(distances, residuals[candidates], self.threshold, limit)
        return candidates[picked]
