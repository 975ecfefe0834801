"""What `make test` leaves to `make test-all` of a product: no two values that meet nowhere else."""

from __future__ import annotations

from itertools import combinations, product

import pytest

from pairwise import covering, marks_beyond


@pytest.mark.parametrize("sizes", [(3, 7, 4), (3, 7, 2), (5, 1), (2, 2, 2, 2)], ids=str)
def test_every_two_values_meet(sizes: tuple[int, ...]) -> None:
    # not everything goes with everything
    possible = [one for one in product(*map(range, sizes)) if one[:2] != (0, 0) or len(sizes) == 2]
    chosen = covering(possible)
    assert set(chosen) <= set(possible)
    assert len(chosen) == len(set(chosen))
    for a, b in combinations(range(len(sizes)), 2):
        assert {(one[a], one[b]) for one in chosen} == {(one[a], one[b]) for one in possible}
    if len(sizes) > 2:
        assert len(chosen) < 0.7 * len(possible)


def test_what_is_left_out_is_long() -> None:
    possible = list(product("ab", "cd", "ef"))
    chosen = covering(possible)
    left = {one for one in possible if [mark.name for mark in marks_beyond(chosen, one)] == ["long"]}
    assert left == set(possible) - set(chosen)
    assert left
