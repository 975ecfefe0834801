"""All-pairs testing: few combinations of several parameters in which every two values that may meet do meet."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from itertools import combinations
from typing import Any

import pytest

Combination = tuple[Hashable, ...]


def covering(possible: Sequence[Combination]) -> list[Combination]:
    """Some of the possible combinations: two values that meet in any of all meet in one of these. Greedy, and always the same."""
    chosen: list[Combination] = []
    missing = set().union(*map(_pairs, possible))
    while missing:
        best = max(possible, key=lambda combination: len(missing & _pairs(combination)))
        chosen.append(best)
        missing -= _pairs(best)
    return chosen


def marks_beyond(chosen: Sequence[Combination], combination: Combination) -> list[Any]:
    """The marker `long` for a combination that was not chosen: what goes wrong with three values alone, `make test-all` looks for."""
    return [] if combination in chosen else [pytest.mark.long]


def each_with_one(
    names: Iterable[str], others: Sequence[str], *further: Any, start: int = 0, marks: Callable[[str], list[Any]] = lambda _: []
) -> list[Any]:
    """All pairs, with the further values, for two rules that know nothing of each other: those beyond one other for each name, in turn, are
    `long`. `marks`: of a name.
    """
    return [
        pytest.param(
            *(name, other, *further),
            marks=[*marks(name), *([] if (number + start) % len(others) == turn else [pytest.mark.long])],
            id="-".join(map(str, (other, *further, name))),
        )
        for number, name in enumerate(names)
        for turn, other in enumerate(others)
    ]


def _pairs(combination: Combination) -> set[Any]:
    return set(combinations(enumerate(combination), 2))
