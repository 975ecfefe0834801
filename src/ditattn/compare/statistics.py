"""Paired statistics: every setting against the reference of the same prompt and seed, never the mean of unlike clips."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Spread", "spread"]


@dataclass(frozen=True)
class Spread:
    """Values of one metric over the clips.

    Attributes:
        median, worst, best: as named; which end is worst depends on the metric.
        quartiles: a quarter and three quarters of the values lie below.
        count: number of clips.
    """

    median: float
    worst: float
    best: float
    quartiles: tuple[float, float]
    count: int


def spread(values: Sequence[float | None], *, more_is_better: bool = True) -> Spread | None:
    """The spread of the values that were measured; None if none was. Infinite values (identical clips) are allowed."""
    known = sorted(value for value in values if value is not None)
    if not known:
        return None
    worst, best = (known[0], known[-1]) if more_is_better else (known[-1], known[0])
    return Spread(_quantile(known, 0.5), worst, best, (_quantile(known, 0.25), _quantile(known, 0.75)), len(known))


def _quantile(ordered: Sequence[float], share: float) -> float:
    """Linear between neighbours, as numpy has it, and without inf - inf."""
    position = share * (len(ordered) - 1)
    low = math.floor(position)
    weight = position - low
    if weight == 0 or ordered[low] == ordered[low + 1]:
        return ordered[low]
    return ordered[low] + (ordered[low + 1] - ordered[low]) * weight
