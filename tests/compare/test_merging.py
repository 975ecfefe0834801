"""What several ranks saw of one run, put together."""

from __future__ import annotations

from ditattn.compare.merging import mean_densities, merged_orders, merged_readings
from ditattn.compare.rank_group import ALONE, RankGroup
from ditattn.runtime.probe import CellReading


def test_one_process_has_everything_itself() -> None:
    assert ALONE.is_first
    assert ALONE.broadcast(lambda: 3) == 3
    assert ALONE.all_gather(3) == [3]
    assert not RankGroup(1, 2).is_first


def test_densities_are_means() -> None:
    ranks = [{"transformer": [(0, 0, 1.0), (1, 0, first)]} for first in (0.25, 0.75)]
    assert mean_densities(ranks) == {"transformer": [(0, 0, 1.0), (1, 0, 0.5)]}


def test_heads_of_neighbours_stand_side_by_side_and_groups_that_have_all_of_them_vote() -> None:
    def rank(*orders: str) -> dict[str, dict[int, list[str]]]:
        return {"transformer": {3: list(orders)}}

    assert merged_orders([rank("a", "b"), rank("c")], 2) == rank("a", "b", "c")
    votes = [rank("a", "b"), rank("c", "d"), rank("c", "d")]
    assert merged_orders(votes, 1) == rank("c", "d")
    assert merged_orders(votes[:2], 1) == rank("a", "b"), "of equals the first"
    assert merged_orders([rank("a"), rank("b"), rank("c"), rank("b")], 2) == rank("a", "b")
    assert merged_orders([{}, {}], 2) == {}


def test_readings_are_means_and_wait_for_the_slowest() -> None:
    ranks = [[CellReading("transformer", 1, 2, error, 0.5, 0.25, sparse, 8.0)] for error, sparse in ((0.1, 3.0), (0.3, 5.0))]
    (found,) = merged_readings(ranks)
    assert (found.step, found.layer, found.dropped_mass, found.density, found.dense_ms) == (1, 2, 0.5, 0.25, 8.0)
    assert abs(found.error - 0.2) < 1e-12
    assert found.sparse_ms == 5.0
