"""Gathered sequences: an order of the model's tokens reads them as it would read the model's own sequence."""

from __future__ import annotations

from dataclasses import replace

import torch
from hypothesis import given
from hypothesis import strategies as st

from ditattn.plan.bricks import brick_order
from ditattn.plan.split import GatheredRows, GatheredTokens, HeadShare, RowOrder
from ditattn.plan.token_grids import TokenGrid
from ditattn.plan.token_order import TokenOrder, token_order


def gathered(x: torch.Tensor, streams: tuple[int, ...], ranks: int) -> torch.Tensor:
    """What ranks hold behind each other, each a part of every stream."""
    parts = [stream.tensor_split(ranks, dim=1) for stream in x.split(streams, dim=1)]
    return torch.cat([part[rank] for rank in range(ranks) for part in parts], dim=1)


@given(
    streams=st.lists(st.integers(0, 40), min_size=1, max_size=4).map(tuple).filter(any),
    ranks=st.integers(1, 8),
)
def test_places_put_a_gathered_sequence_in_the_models_order(streams: tuple[int, ...], ranks: int) -> None:
    split = GatheredTokens(streams, ranks)
    x = torch.arange(sum(streams)).view(1, -1)
    stored = gathered(x, streams, ranks)
    assert torch.equal(stored[:, split.places()], x)
    assert torch.equal(x[:, split.tokens()], stored)
    if not split.interleaves:
        assert torch.equal(stored, x)


@given(grid=st.tuples(st.integers(1, 3), st.integers(1, 20), st.integers(1, 20)), prefix=st.integers(0, 30), ranks=st.integers(2, 5))
def test_an_order_reads_the_gathered_sequence_as_the_models(grid: tuple[int, int, int], prefix: int, ranks: int) -> None:
    video = grid[0] * grid[1] * grid[2]
    split, x = GatheredTokens((prefix, video), ranks), torch.randn(2, prefix + video, 3)
    stored = gathered(x, split.streams, ranks)
    for order in (token_order("raster", grid, prefix), token_order("tile", grid, prefix), brick_order((4, 2, 16), grid, prefix)):
        reading = split.ordered(order)
        assert torch.equal(reading.apply(stored), order.apply(x))
        assert torch.equal(reading.undo(reading.apply(stored)), stored)
        assert (reading.video, reading.first_frame, reading.length) == (order.video, order.first_frame, order.length)


def test_orders_per_head_read_the_gathered_sequence_too() -> None:
    split, x = GatheredTokens((5, 8), 3), torch.randn(1, 13, 4, 2)
    forward = torch.stack([torch.randperm(13), torch.randperm(13)])
    order = TokenOrder(forward, forward.argsort(-1), (0, 4), (0, 13), 13)
    stored = gathered(x, split.streams, 3)
    assert torch.equal(split.ordered(order).apply(stored), order.apply(x))
    assert torch.equal(split.ordered(order).undo(order.apply(x)), stored)


@given(
    grid=st.tuples(st.integers(1, 3), st.integers(1, 20), st.integers(1, 20)),
    prefix=st.integers(0, 30),
    ranks=st.integers(2, 4),
    data=st.data(),
)
def test_whole_blocks_of_a_ranks_queries_come_first(grid: tuple[int, int, int], prefix: int, ranks: int, data: st.DataObject) -> None:
    split = GatheredTokens((prefix, grid[0] * grid[1] * grid[2]), ranks)
    first = data.draw(st.integers(0, ranks - 1))
    rows = GatheredRows(split, first, data.draw(st.integers(1, ranks - first)))
    x = torch.arange(sum(split.streams)).view(1, -1)
    parts = [stream.tensor_split(ranks, dim=1) for stream in x.split(split.streams, dim=1)]
    own = torch.cat([part[rank] for rank in range(first, first + rows.parts) for part in parts], dim=1)
    assert torch.equal(rows.tokens(), own[0])
    assert rows.num_tokens == own.shape[1]
    bricks = [brick_order(brick, grid, prefix) for brick in ((4, 2, 16), (1, 8, 16))]
    per_head = replace(bricks[0], **{name: torch.stack([getattr(one, name) for one in bricks]) for name in ("forward", "inverse")})
    for order in (token_order("raster", grid, prefix), token_order("tile", grid, prefix), bricks[0], per_head):
        found = rows.ordered(order)
        heads = own.unsqueeze(-1).expand(-1, -1, 2)
        assert torch.equal(found.order.undo(found.order.apply(heads)), heads)
        of_heads = list(
            zip(order.apply(x.unsqueeze(-1).expand(-1, -1, 2))[0].T.tolist(), found.order.apply(heads)[0].T.tolist(), strict=True)
        )
        for all_in_order, stands in of_heads:
            check_standing(order, found, all_in_order, stands, set(range(prefix, x.shape[1])), count_whole=order is not per_head)
        blocks = [[set(some[at : at + 128]) for at in range(0, len(some), 128)] for some in of_heads[0]]
        assert found.own_blocks or all(block in blocks[0] for block in blocks[1])


def check_standing(
    order: TokenOrder, found: RowOrder, all_in_order: list[int], stands: list[int], video: set[int], *, count_whole: bool
) -> None:
    frame, own = set(all_in_order[slice(*order.first_frame)]), set(stands)
    if count_whole:
        whole = [set(all_in_order[at : at + 128]) for at in range(0, len(all_in_order) // 128 * 128, 128)]
        alike = [block for block in whole if block <= own and (block <= frame or block <= video - frame)]
        assert [set(stands[at : at + 128]) for at in range(0, len(alike) * 128, 128)] == alike
    start, stop = found.order.video
    assert all((token in video) == (start <= place < stop) for place, token in enumerate(stands))
    spans = found.order.grids[0].first_frame if found.order.grids else (found.order.first_frame,)
    assert all((token in frame) == any(start <= place < stop for start, stop in spans) for place, token in enumerate(stands))


GRIDS = st.lists(st.tuples(st.integers(1, 3), st.integers(1, 20), st.integers(1, 20)), min_size=2, max_size=3)


def orders_of(grids: list[tuple[int, int, int]], prefix: int) -> list[TokenOrder]:
    """Of a text and several grids behind it; the last one has heads that differ."""
    further, start = [], prefix + TokenGrid(0, grids[0]).num_tokens
    for size in grids[1:]:
        further.append(TokenGrid(start, size))
        start = further[-1].stop
    sequence = (grids[0], prefix, start - prefix - TokenGrid(0, grids[0]).num_tokens, "cpu", tuple(further))
    first, second = brick_order((1, 8, 16), *sequence), brick_order((4, 2, 16), *sequence)
    per_head = [torch.stack([getattr(first, name), getattr(second, name)]) for name in ("forward", "inverse")]
    return [
        token_order("raster", *sequence),
        token_order("tile", *sequence),
        second,
        replace(first, forward=per_head[0], inverse=per_head[1]),
    ]


@given(grids=GRIDS, prefix=st.integers(0, 30), ranks=st.integers(2, 4))
def test_orders_of_several_grids_read_the_gathered_sequence_too(grids: list[tuple[int, int, int]], prefix: int, ranks: int) -> None:
    for order in orders_of(grids, prefix):
        split, x = GatheredTokens((prefix, order.length - prefix), ranks), torch.randn(1, order.length, 2, 3)
        stored, reading = gathered(x, split.streams, ranks), split.ordered(order)
        assert torch.equal(reading.apply(stored), order.apply(x))
        assert torch.equal(reading.undo(reading.apply(stored)), stored)
        assert reading.grids == order.grids


@given(grids=GRIDS, prefix=st.integers(0, 30), ranks=st.integers(2, 4), data=st.data())
def test_a_ranks_queries_stand_in_the_spans_of_their_grids(
    grids: list[tuple[int, int, int]], prefix: int, ranks: int, data: st.DataObject
) -> None:
    owner = torch.cat([torch.full((prefix,), -1), *(torch.full((TokenGrid(0, size).num_tokens,), n) for n, size in enumerate(grids))])
    frames = [torch.arange(TokenGrid(0, size).num_tokens) < size[1] * size[2] * (size[0] > 1) for size in grids]
    first_frame = torch.cat([torch.zeros(prefix, dtype=torch.bool), *frames])
    for order in orders_of(grids, prefix):
        rows = GatheredRows(GatheredTokens((prefix, order.length - prefix), ranks), data.draw(st.integers(0, ranks - 1)), 1)
        found = rows.ordered(order).order
        standing = found.apply(rows.tokens().view(1, -1, 1).expand(-1, -1, 2))[0].T
        for number, grid in enumerate(found.grids):
            inside, frame = (torch.zeros(found.length, dtype=torch.bool) for _ in range(2))
            for mask, spans in ((inside, grid.tokens), (frame, grid.first_frame)):
                for start, stop in spans:
                    mask[start:stop] = True
            for head in standing:
                assert torch.equal(owner[head] == number, inside)
                assert torch.equal((owner[head] == number) & first_frame[head], frame)
        if order.forward is None or order.forward.ndim == 1:
            kind, own = 2 * owner + first_frame, set(rows.tokens().tolist())
            blocks = [block for block in order.apply(torch.arange(order.length).view(1, -1))[0].split(128) if len(block) == 128]
            pure = [set(block.tolist()) for block in blocks if len(kind[block].unique()) == 1 and owner[block[0]] >= 0]
            whole = {frozenset(block) for block in pure if block <= own}
            assert {frozenset(block.tolist()) for block in standing[0].split(128)[: len(whole)]} == whole
        parts = found.blocks_of_grids()
        assert (parts[0][0], parts[-1][1]) == (0, -(-found.length // 128))


@given(heads=st.integers(1, 40), ranks=st.integers(1, 8))
def test_ranks_share_all_heads(heads: int, ranks: int) -> None:
    shares = [range(heads)[HeadShare(place, ranks, heads).own] for place in range(ranks)]
    assert [head for share in shares for head in share] == list(range(heads))
    assert all(len(share) == len(shares[0]) for share in shares if share and share[-1] < heads - 1)
