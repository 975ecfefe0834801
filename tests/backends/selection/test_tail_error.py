"""Blocks by the error that their mean would make: means of query groups, and exact budgets."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ditattn.backends.selection.tail_error import Forced, pick, query_groups
from ditattn.plan.token_order import token_order
from sparse_calls import draw


def test_groups_of_queries_are_the_halves_of_their_blocks() -> None:
    x = draw(2, 300, 4, 32)
    groups = query_groups(x, token_order("raster", (1, 1, 300)))
    expected = [x[:, start:stop].mean(1) for start, stop in ((0, 64), (64, 128), (128, 192), (192, 256), (256, 300), (256, 300))]
    torch.testing.assert_close(groups.means, torch.stack(expected, 2))
    assert groups.counts.tolist() == [64, 64, 64, 64, 44, 0]
    torch.testing.assert_close(groups.of_all(2), x.mean(1).unflatten(1, (2, 2)).mean(2), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(groups.at(torch.tensor([2, 0])), groups.means[:, :, [4, 5, 0, 1]])


def test_queries_that_are_not_finite_are_no_part_of_the_mean_of_all() -> None:
    x = draw(1, 256, 1, 32)
    x[0, 70, 0, 5] = torch.nan
    rest = torch.cat([x[:, :64], x[:, 128:]], dim=1)
    torch.testing.assert_close(query_groups(x, token_order("raster", (1, 1, 256))).of_all(1), rest.mean(1), rtol=1e-4, atol=1e-6)


def forced(columns: Tensor, rows: int) -> Forced:
    """Columns that every row keeps; no row keeps everything."""
    return Forced.of(columns, torch.zeros(rows, dtype=torch.bool), "cpu")


@given(st.integers(0, 2**31), st.integers(1, 3), st.integers(1, 9), st.integers(4, 12), st.floats(0, 0.95), st.integers(0, 2))
def test_budgets_keep_their_exact_totals_and_floors(seed: int, heads: int, rows: int, columns: int, sparsity: float, sinks: int) -> None:
    costs = torch.rand(2, heads, rows, columns, generator=torch.Generator().manual_seed(seed)).mul(8).floor()
    kept = torch.arange(columns) < sinks
    mask = pick(costs, sparsity, forced(kept, rows), torch.ones(1, columns, dtype=torch.bool), 2)
    least = min(sinks + 2, columns)
    wanted = max(round(heads * rows * columns * (1 - sparsity)), heads * rows * least)
    assert mask.sum((1, 2, 3)).tolist() == [wanted] * 2
    assert int(mask.sum(-1).min()) >= least
    assert bool(mask[..., kept].all())


def test_rows_with_text_are_whole_and_no_part_of_the_budget() -> None:
    costs = torch.rand(1, 2, 8, 10)
    rows = torch.arange(8) == 7
    mask = pick(costs, 0.75, Forced.of(rows.new_zeros(10), rows, "cpu"), rows.new_ones(1, 10), 2)
    assert bool(mask[:, :, 7].all())
    assert int(mask[:, :, :7].sum()) == round(2 * 7 * 10 * 0.25)


def test_rows_may_all_be_whole() -> None:
    """Text and a grid without a block of its own."""
    rows = torch.ones(3, dtype=torch.bool)
    assert bool(pick(torch.rand(2, 1, 3, 3), 0.75, Forced.of(rows, rows, "cpu"), rows.unsqueeze(0), 2).all())


def test_a_planted_block_is_always_kept_and_empty_ones_never() -> None:
    costs = torch.rand(1, 4, 16, 16)
    costs[0, 1, 3, 9] = 50.0
    valid = torch.arange(16).unsqueeze(0) < 12
    mask = pick(costs, 0.9, forced(valid.new_zeros(16), 16), valid, 1)
    assert bool(mask[0, 1, 3, 9])
    assert not bool(mask[..., 12:].any())


def test_equal_costs_are_broken_by_index() -> None:
    mask = pick(
        torch.ones(1, 1, 2, 6),
        0.5,
        forced(torch.zeros(6, dtype=torch.bool), 2),
        torch.ones(1, 6, dtype=torch.bool),
        0,
    )
    assert mask.flatten().tolist() == [True] * 6 + [False] * 6


def test_nan_is_kept() -> None:
    costs = torch.rand(1, 1, 4, 8)
    costs[0, 0, 2] = torch.nan
    mask = pick(costs, 0.5, forced(torch.zeros(8, dtype=torch.bool), 4), torch.ones(1, 8, dtype=torch.bool), 1)
    assert bool(mask[0, 0, 2].all())
