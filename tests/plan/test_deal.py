"""Rows of a first frame that ranks of a ring deal out: everybody's queries are computed once."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from ditattn.plan.deal import deal_rows
from ditattn.plan.split import GatheredRows, GatheredTokens
from ditattn.plan.token_grids import TokenGrid
from ditattn.plan.token_order import token_order

GRIDS = st.tuples(st.integers(1, 6), st.integers(8, 24), st.integers(8, 24))


@given(
    grid=GRIDS,
    further=st.lists(GRIDS, max_size=2),
    prefix=st.integers(0, 30),
    suffix=st.integers(0, 30),
    ring=st.integers(2, 4),
    parts=st.integers(1, 2),
    order=st.sampled_from(["raster", "tile"]),
    sparsity=st.floats(0.1, 0.95),
)
def test_every_query_is_computed_by_one_rank_and_comes_back(
    grid: tuple[int, int, int],
    further: list[tuple[int, int, int]],
    prefix: int,
    suffix: int,
    ring: int,
    parts: int,
    order: str,
    sparsity: float,
) -> None:
    grids = [TokenGrid(prefix, grid)]
    for size in further:
        grids.append(TokenGrid(grids[-1].stop, size))
    length = grids[-1].stop + suffix
    facts = (order, grid, prefix, length - grids[0].stop, "cpu", tuple(grids[1:]))
    gathered = GatheredTokens((prefix, length - prefix), ring * parts)
    deal = deal_rows(gathered, parts, facts, sparsity)
    own = [GatheredRows(gathered, place * parts, parts) for place in range(ring)]
    if deal is None:
        return
    assert torch.cat(deal.tokens).sort().values.tolist() == list(range(length))
    # an image beside others has no first frame; one alone is taken for it
    videos = [one for one in grids if one.size[0] > 1 or not further]
    first_frames = {token for one in videos for token in range(one.start, one.start + one.size[1] * one.size[2])}
    for place, rows in enumerate(own):
        to_each, from_each = deal.sizes(place)
        assert to_each[place] == from_each[place] == 0
        assert from_each == [deal.sizes(other)[0][place] for other in range(ring)]
        tokens = rows.tokens()
        # only rows of the first frame move, and make whole blocks where they come to
        sent = torch.cat(deal.sends[place])
        assert set(tokens[sent].tolist()) <= first_frames
        whole = token_order(*facts)
        stands = deal.tokens[place] if whole.inverse is None else whole.inverse[deal.tokens[place]]
        for start, stop in (span for placed in whole.all_grids for span in placed.first_frame):
            dealt = stands[(stands >= start) & (stands < start + (stop - start) // 128 * 128)]
            assert all(count == 128 for count in torch.bincount((dealt - start) // 128).tolist() if count)
        assert torch.equal(torch.cat([deal.stay[place], sent]).sort().values, torch.arange(rows.num_tokens))
        came = torch.cat([own[other].tokens()[deal.sends[other][place]] for other in range(ring)])
        assert torch.equal(deal.tokens[place], torch.cat([tokens[deal.stay[place]], came]))
        assert GatheredRows(gathered, place * parts, parts, deal).num_tokens == len(deal.tokens[place])
