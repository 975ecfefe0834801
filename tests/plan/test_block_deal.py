"""Query blocks that ranks of a ring deal out: each is computed whole by one rank, all ranks have as much to do, and results come back."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ditattn.plan.block_deal import NOBODY, BlockDeal, block_takers, deal_blocks
from ditattn.plan.bricks import brick_order
from ditattn.plan.split import GatheredRows, GatheredTokens
from ditattn.plan.token_grids import TokenGrid
from ditattn.plan.token_order import TokenOrder
from thread_ring import in_threads

HEADS = 4
GRIDS = st.tuples(st.integers(1, 6), st.integers(8, 20), st.integers(8, 20))


def two_orders(grid: tuple[int, int, int], prefix: int, further: tuple[TokenGrid, ...], suffix: int) -> TokenOrder:
    """Of two groups of heads, each in bricks of its own."""
    orders = [brick_order(brick, grid, prefix, suffix, "cpu", further) for brick in ((4, 2, 16), (1, 8, 16))]
    return replace(orders[0], **{name: torch.stack([getattr(one, name) for one in orders]) for name in ("forward", "inverse")})


@given(grid=GRIDS, further=st.lists(GRIDS, max_size=2), prefix=st.integers(0, 300), ring=st.integers(2, 4), parts=st.integers(1, 2))
def test_every_block_is_computed_whole_by_one_rank_and_comes_back(
    grid: tuple[int, int, int], further: list[tuple[int, int, int]], prefix: int, ring: int, parts: int
) -> None:
    grids = [TokenGrid(prefix, grid)]
    for size in further:
        grids.append(TokenGrid(grids[-1].stop, size))
    length = grids[-1].stop
    order = two_orders(grid, prefix, tuple(grids[1:]), length - grids[0].stop)
    takers = block_takers(order, ring, 0.75)
    if takers is None:
        assert -(-length // 128) < ring
        return
    x = torch.arange(length * HEADS).view(1, length, HEADS, 1)

    def take_part(rows: GatheredRows) -> tuple[BlockDeal, Tensor]:
        deal = deal_blocks(rows, order, HEADS, takers, torch.device("cpu"))
        own = x[:, rows.tokens()]
        came = deal.apply(own)
        assert torch.equal(deal.undo(came), own)
        return deal, came

    in_order = order.apply(x)
    for place, (deal, came) in enumerate(in_threads(ring, GatheredTokens((prefix, length - prefix), ring * parts), take_part)):
        mine = (takers == place).nonzero().flatten()
        assert len(mine)
        places = torch.cat([torch.arange(block * 128, min(block * 128 + 128, length)) for block in mine.tolist()])
        assert torch.equal(came, in_order[:, places])
        check_spans(order, deal.order, places, mine)


def check_spans(whole: TokenOrder, dealt: TokenOrder, places: Tensor, mine: Tensor) -> None:
    """Blocks that keep everything and those of each grid are the same as in the order of all tokens."""
    assert dealt.length == len(places)
    for first_frame in (False, True):
        assert torch.equal(dealt.protected_blocks(128, first_frame, "cpu"), whole.protected_blocks(128, first_frame, "cpu")[mine])
    for before, after in zip(whole.all_grids, dealt.all_grids, strict=True):
        for (start, stop), found in zip(before.tokens, after.tokens, strict=True):
            assert found[1] - found[0] == int(((places >= start) & (places < stop)).sum())


@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("text", [0, 512])
def test_ranks_have_as_much_to_do_of_every_kind(ranks: int, text: int) -> None:
    order = brick_order((4, 2, 16), (21, 30, 52), text)
    takers = block_takers(order, ranks, 0.75)
    assert takers is not None
    work = torch.where(order.protected_blocks(128, False, "cpu"), 1, 0.25)
    of_each = torch.zeros(ranks, dtype=work.dtype).index_add(0, takers, work)
    assert float(of_each.max() / of_each.mean()) < 1.05
    # from everywhere: no half of the sequence is one rank's alone
    halves = takers.tensor_split(2)
    counts = torch.stack([half.bincount(minlength=ranks) for half in halves])
    assert int(counts.max() - counts.min()) <= 6


def test_a_ring_of_more_ranks_than_blocks_deals_nothing() -> None:
    assert block_takers(brick_order((1, 8, 16), (1, 16, 16)), 4, 0.75) is None


def test_blocks_of_nobody_stay() -> None:
    order = brick_order((1, 8, 16), (4, 16, 16))
    takers = torch.full((8,), NOBODY)
    takers[5] = 1
    x = torch.arange(1024).view(1, 1024, 1, 1)

    def take_part(rows: GatheredRows) -> Tensor:
        return deal_blocks(rows, order, 1, takers, torch.device("cpu")).apply(x[:, rows.tokens()])

    first, second = in_threads(2, GatheredTokens((1024,), 2), take_part)
    assert first.shape == (1, 0, 1, 1)
    assert torch.equal(second, order.apply(x)[:, 640:768])
