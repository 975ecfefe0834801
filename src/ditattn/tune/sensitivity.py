"""What a probe of single attention calls says about whole settings: expected damage and expected time."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

from ditattn.errors import ConfigError
from ditattn.runtime.probe import CellReading
from ditattn.tune.candidate import Candidate

__all__ = ["PROBED_SPARSITIES", "SPARSITIES", "Sensitivity"]

PROBED_SPARSITIES = (0.3, 0.6, 0.8, 0.95)

SPARSITIES = tuple(round(0.05 * n, 2) for n in range(2, 20))
"""What the search tries: 0.1, 0.15 ... 0.95."""

# dense steps at the end and dense layers beyond these shares have never paid in what others report
LAST_STEPS_SHARE, FIRST_STEPS_SHARE, LAYERS_SHARE = 0.1, 0.5, 0.5


Cells = np.ndarray[tuple[int, int], np.dtype[np.float64]]


@dataclass(frozen=True)
class Sensitivity:
    """Errors of single calls, and the times of a sparse call.

    Attributes:
        errors: `[sparsity, step, layer]`, squared error of the sparse output relative to the dense one, summed over the components, at 0
            and at every probed sparsity.
        calls: bool `[step, layer]`: where attention was called. A step cache leaves some calls out, whatever is asked of them.
        sparsities: of the first axis.
        call_time_shares: of a sparse call over a dense one, (at sparsity 0, per unit of sparsity), fitted.
        attention_share: of the time with dense attention that is self-attention.
        cached_time_share: time with dense attention and the step cache over the time without the cache; 1 without one.
    """

    errors: np.ndarray[tuple[int, int, int], np.dtype[np.float64]]
    calls: np.ndarray[tuple[int, int], np.dtype[np.bool_]]
    sparsities: tuple[float, ...]
    call_time_shares: tuple[float, float]
    attention_share: float
    cached_time_share: float = 1.0

    @classmethod
    def from_readings(
        cls,
        readings: Mapping[float, Sequence[CellReading]],
        attention_share: float,
        cached_time_share: float = 1.0,
        num_steps: int | None = None,
    ) -> Sensitivity:
        """From a probe's readings by sparsity.

        Args:
            readings: of the calls that ran.
            attention_share, cached_time_share: see the class.
            num_steps: of the run, whose last ones a step cache may have left out; None if every step has readings.

        Raises:
            ConfigError: nothing ran sparse.
        """
        cells = [one for some in readings.values() for one in some]
        if not any(one.density < 1 for one in cells):
            raise ConfigError(
                "nothing ran sparse, so there is nothing to tune: the sequence is shorter than min_tokens, or the model is unknown"
            )
        steps, layers = (1 + max(getattr(one, axis) for one in cells) for axis in ("step", "layer"))
        errors = np.zeros((1 + len(readings), max(steps, num_steps or 0), layers))
        calls = np.zeros(errors.shape[1:], dtype=bool)
        calls[[one.step for one in cells], [one.layer for one in cells]] = True
        for number, some in enumerate(readings.values(), 1):
            for one in some:
                errors[number, one.step, one.layer] += one.error
        # more sparsity cannot help; where it seems to, that is chance
        errors = np.maximum.accumulate(errors, axis=0)
        ratios = [float(np.median([one.sparse_ms / one.dense_ms for one in some])) for some in readings.values()]
        slope, start = np.polyfit(list(readings), ratios, 1)
        return cls(errors, calls, (0.0, *readings), (float(start), float(slope)), attention_share, cached_time_share)

    @property
    def num_steps(self) -> int:
        return self.errors.shape[1]

    @property
    def layer_order(self) -> list[int]:
        """Layers, the most sensitive first, by their error at the middle sparsity."""
        by_layer = self.errors[len(self.sparsities) // 2].sum(0)
        return sorted(range(len(by_layer)), key=lambda layer: (-by_layer[layer], layer))

    def damage(self, candidate: Candidate) -> float:
        """Sum of the errors of the cells that run sparse. Only its order means anything."""
        return float(self._errors_at(candidate.sparsity)[self._runs_sparse(candidate)].sum())

    def _errors_at(self, sparsity: float) -> Cells:
        """Linear between the probed sparsities."""
        above = min(int(np.searchsorted(self.sparsities, sparsity)), len(self.sparsities) - 1)
        low, high = self.sparsities[above - 1], self.sparsities[above]
        weight = (sparsity - low) / (high - low)
        found: Cells = (1 - weight) * self.errors[above - 1] + weight * self.errors[above]
        return found

    def time_share(self, candidate: Candidate) -> float:
        """Expected time over that of dense attention without a step cache."""
        start, slope = self.call_time_shares
        sparse_calls = float(self._runs_sparse(candidate)[self.calls].mean())
        return self.cached_time_share * (1 - self.attention_share * sparse_calls * (1 - max(start + slope * candidate.sparsity, 0.0)))

    @property
    def time_share_to_beat(self) -> float:
        """That of dense attention, or of the step cache alone where that is faster."""
        return min(1.0, self.cached_time_share)

    def _runs_sparse(self, candidate: Candidate) -> np.ndarray[tuple[int, int], np.dtype[np.bool_]]:
        runs = np.ones(self.errors.shape[1:], dtype=bool)
        runs[: candidate.first_steps] = False
        runs[self.num_steps - candidate.last_steps :] = False
        runs[:, list(candidate.layers)] = False
        return runs

    def candidates(self) -> list[Candidate]:
        """Everything that the search may try: layers become dense in the order of their sensitivity."""
        layers = self.layer_order
        return [
            Candidate(sparsity, first, last, tuple(sorted(layers[:dense])))
            for sparsity, first, last, dense in product(
                SPARSITIES,
                range(math.floor(FIRST_STEPS_SHARE * self.num_steps) + 1),
                range(math.ceil(LAST_STEPS_SHARE * self.num_steps) + 1),
                range(math.floor(LAYERS_SHARE * len(layers)) + 1),
            )
        ]

    def front(self) -> list[Candidate]:
        """Candidates that are expected to be faster than dense (than the step cache alone) and that no other one beats in time and damage,
        the fastest first."""
        rated = sorted((self.time_share(one), self.damage(one), one) for one in self.candidates())
        front: list[Candidate] = []
        least = math.inf
        for time_share, damage, candidate in rated:
            if time_share < self.time_share_to_beat and damage < least:
                front.append(candidate)
                least = damage
        return front

    def boldest(self) -> Candidate:
        """The candidate with the least expected time."""
        return min(self.candidates(), key=lambda one: (self.time_share(one), one))
