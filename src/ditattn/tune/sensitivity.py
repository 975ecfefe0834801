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
        sparsities: of the first axis.
        call_time_shares: of a sparse call over a dense one, (at sparsity 0, per unit of sparsity), fitted.
        attention_share: of the dense time that is self-attention.
    """

    errors: np.ndarray[tuple[int, int, int], np.dtype[np.float64]]
    sparsities: tuple[float, ...]
    call_time_shares: tuple[float, float]
    attention_share: float

    @classmethod
    def from_readings(cls, readings: Mapping[float, Sequence[CellReading]], attention_share: float) -> Sensitivity:
        """From a probe's readings by sparsity.

        Raises:
            ConfigError: nothing ran sparse.
        """
        cells = [one for some in readings.values() for one in some]
        if not any(one.density < 1 for one in cells):
            raise ConfigError(
                "nothing ran sparse, so there is nothing to tune: the sequence is shorter than min_tokens, or the model is unknown"
            )
        steps, layers = (1 + max(getattr(one, axis) for one in cells) for axis in ("step", "layer"))
        errors = np.zeros((1 + len(readings), steps, layers))
        for number, some in enumerate(readings.values(), 1):
            for one in some:
                errors[number, one.step, one.layer] += one.error
        # more sparsity cannot help; where it seems to, that is chance
        errors = np.maximum.accumulate(errors, axis=0)
        ratios = [float(np.median([one.sparse_ms / one.dense_ms for one in some])) for some in readings.values()]
        slope, start = np.polyfit(list(readings), ratios, 1)
        return cls(errors, (0.0, *readings), (float(start), float(slope)), attention_share)

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
        """Expected time over the dense time."""
        start, slope = self.call_time_shares
        sparse_cells = float(self._runs_sparse(candidate).mean())
        return 1 - self.attention_share * sparse_cells * (1 - max(start + slope * candidate.sparsity, 0.0))

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
        """Candidates that are expected to be faster than dense and that no other one beats in time and damage, the fastest first."""
        rated = sorted((self.time_share(one), self.damage(one), one) for one in self.candidates())
        front: list[Candidate] = []
        least = math.inf
        for time_share, damage, candidate in rated:
            if time_share < 1 and damage < least:
                front.append(candidate)
                least = damage
        return front

    def boldest(self) -> Candidate:
        """The candidate with the least expected time."""
        return min(self.candidates(), key=lambda one: (self.time_share(one), one))
