"""The search itself: along the front that the probe expects, then by single changes.

1. The probe rates every candidate by expected time and damage. Those that no other beats in both are the front: a line from fast and
   harmful to slow and harmless.
2. On that line the target is bracketed. Every odd run tries the candidate at which the last run says the target lies (PSNR falls by
   10 dB where the damage grows tenfold), every even one the middle of what is left. The line gets two thirds of the budget.
3. From the fastest candidate that met the target one or two things are changed that make it cheaper (more sparsity, a dense step or layer
   less, with or without one of the others more; the first frame no longer whole), the least harmful first, as long as runs are left. What
   is bolder in every respect than a candidate that missed is not tried.

The only state is the outcomes by candidate: handed in again, the search goes the same way without running anything twice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import combinations

from ditattn.tune.candidate import Candidate, Outcome, Target
from ditattn.tune.sensitivity import SPARSITIES, Sensitivity

__all__ = ["Search", "disagreements"]

Evaluate = Callable[[Candidate], Outcome]

FRONT_SHARE = 2 / 3

# of the dense time: less is no gain
SMALL_GAIN = 1e-3

# decibels by which the pixels must contradict the probe to be worth a word
CONTRADICTION_DB = 0.5


@dataclass
class Search:
    """One search.

    Args:
        sensitivity: what the probe found.
        target: what to meet.
        evaluate: runs a candidate; an exception ends the search and leaves `outcomes` as they are.
        budget: runs at most.
        may_drop_first_frame: the backend keeps the first frame whole unless told otherwise.
        psnr_of_cache: of the step cache alone, whose error is in every run; infinite without one.
        outcomes: of earlier runs; grows.
    """

    sensitivity: Sensitivity
    target: Target
    evaluate: Evaluate
    budget: int
    may_drop_first_frame: bool = False
    psnr_of_cache: float = math.inf
    outcomes: dict[Candidate, Outcome] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._asked: list[Candidate] = []

    @property
    def best(self) -> Candidate | None:
        """The candidate with the least expected time among those that met the target and beat dense, and the step cache alone; None if
        there is none yet.

        The expected time counts, since the probe timed dense and sparse calls side by side; the clock of whole runs wavers with whatever
        else the machine does.
        """
        good = [(self._expected(one), one) for one, outcome in self.outcomes.items() if outcome.meets and self._beats_dense(one, outcome)]
        return min(good)[1] if good else None

    def _expected(self, candidate: Candidate) -> float:
        """Of two that differ in the first frame alone, the one that does not keep it whole is the faster one."""
        return self.sensitivity.time_share(candidate) - (0 if candidate.whole_first_frame else SMALL_GAIN)

    def _beats_dense(self, candidate: Candidate, outcome: Outcome) -> bool:
        return min(self._expected(candidate), outcome.time_share) < self.sensitivity.time_share_to_beat

    def run(self) -> Candidate | None:
        """Search; returns `best`."""
        front = self.sensitivity.front()
        if not front:
            # the probe's times may err: the boldest candidate decides
            self._try(self.sensitivity.boldest())
            return self.best
        self._bracket(front)
        self._change_singly()
        return self.best

    def _try(self, candidate: Candidate) -> Outcome:
        if candidate not in self.outcomes:
            self.outcomes[candidate] = self.evaluate(candidate)
        if candidate not in self._asked:
            self._asked.append(candidate)
        return self.outcomes[candidate]

    def _left(self) -> int:
        return self.budget - len(self._asked)

    def _bracket(self, front: list[Candidate]) -> None:
        misses, meets = -1, len(front)
        runs = max(1, math.ceil(FRONT_SHARE * self.budget))
        for turn in range(runs):
            if meets - misses <= 1:
                return
            middle = (misses + meets) // 2
            guess = self._guess(front) if turn % 2 else middle
            position = min(max(guess, misses + 1), meets - 1)
            if self._try(front[position]).meets:
                meets = position
            else:
                misses = position

    def _guess(self, front: list[Candidate]) -> int:
        """Where the last run says that the target lies: what it lost beyond the step cache grows with the damage."""
        last = self._asked[-1]
        damage, of_cache = self.sensitivity.damage(last), _error(self.psnr_of_cache)
        of_attention = _error(self.outcomes[last].psnr) - of_cache
        if of_attention <= 0 or damage <= 0:
            return 0
        wanted = damage * (_error(self.target.psnr) - of_cache) / of_attention
        return next((n for n, one in enumerate(front) if self.sensitivity.damage(one) <= wanted), len(front) - 1)

    def _change_singly(self) -> None:
        while self._left() > 0 and (best := self.best) is not None:
            candidate = next((one for one in self._cheaper(best) if self._is_open(one)), None)
            if candidate is None:
                return
            self._try(candidate)

    def _is_open(self, candidate: Candidate) -> bool:
        """Not tried, and not bolder than one that missed."""
        missed = [one for one in self._asked if not self.outcomes[one].meets]
        return candidate not in self._asked and not any(candidate.is_bolder_than(one) for one in missed)

    def _cheaper(self, best: Candidate) -> list[Candidate]:
        """Neighbours that should be faster, the least harmful first."""
        time_share = self._expected(best)
        near = {other for one in _neighbours(best, self.sensitivity) for other in (one, *_neighbours(one, self.sensitivity))}
        rated = [(self.sensitivity.damage(one), one) for one in near if self._expected(one) < time_share - SMALL_GAIN / 2]
        found = [one for _, one in sorted(rated)]
        if self.may_drop_first_frame and best.whole_first_frame:
            found.insert(0, replace(best, whole_first_frame=False))
        return found


def _error(psnr: float) -> float:
    """Mean squared error, as a share of the largest value's square."""
    return float(10 ** (-psnr / 10))


def _neighbours(candidate: Candidate, sensitivity: Sensitivity) -> Iterator[Candidate]:
    """One thing changed by one step."""
    place = SPARSITIES.index(candidate.sparsity)
    for number in (place - 1, place + 1):
        if 0 <= number < len(SPARSITIES):
            yield replace(candidate, sparsity=SPARSITIES[number])
    room = sensitivity.num_steps - candidate.first_steps - candidate.last_steps
    for change in (-1, 1):
        if candidate.first_steps + change >= 0 and change < room:
            yield replace(candidate, first_steps=candidate.first_steps + change)
        if candidate.last_steps + change >= 0 and change < room:
            yield replace(candidate, last_steps=candidate.last_steps + change)
    order, dense = sensitivity.layer_order, len(candidate.layers)
    for count in (dense - 1, dense + 1):
        if 0 <= count < len(order):
            yield replace(candidate, layers=tuple(sorted(order[:count])))


def disagreements(sensitivity: Sensitivity, outcomes: dict[Candidate, Outcome]) -> tuple[list[tuple[Candidate, Candidate]], int]:
    """Pairs in which the probe expected less damage of the first, and the pixels say the opposite by 0.5 dB or more; and how many pairs
    there are."""
    rated = [(sensitivity.damage(one), one, outcome.psnr) for one, outcome in outcomes.items() if one.whole_first_frame]
    pairs = [(a, b) if a[0] < b[0] else (b, a) for a, b in combinations(rated, 2) if a[0] != b[0]]
    return [(a[1], b[1]) for a, b in pairs if a[2] < b[2] - CONTRADICTION_DB], len(pairs)
