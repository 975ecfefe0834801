"""Query blocks dealt out whole to the ranks of a ring, where every head has an order of its own.

A ring splits the sequence into neighbouring pieces, and those of a video are pieces of its time. Blocks that reach over more frames than a
rank has are torn: what it has of several of them would make blocks of queries that want other keys each. So every rank gets whole blocks,
spread over the sequence, and sends their results back.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ditattn.plan.block_plan import BLOCK_SIZE, num_blocks
from ditattn.plan.split import ExchangeRows, GatheredRows
from ditattn.plan.token_order import OrderedGrid, Span, TokenOrder

__all__ = ["NOBODY", "BlockDeal", "block_takers", "deal_blocks"]

# the taker of a block that nobody computes
NOBODY = -1


@dataclass(frozen=True, eq=False)
class BlockDeal:
    """How a rank gets the queries of its blocks. Queries move as pairs of token and head, token * H + head, since blocks differ by head.

    Attributes:
        order: of the queries that came, which stand in it already.
        heads: H.
        num_tokens: own queries of a head.
        sent: int64, the pairs that go, those for the first place in the ring first.
        placed: int64, where those stand that come, those of the first place first.
        to_each, from_each: how many for each place, from each place.
        exchange: rows between the ranks of the ring.
    """

    order: TokenOrder
    heads: int
    num_tokens: int
    sent: Tensor
    placed: Tensor
    to_each: list[int]
    from_each: list[int]
    exchange: ExchangeRows

    def apply(self, x: Tensor) -> Tensor:
        """`[B, R, H, D]` of a rank's own queries -> `[B, N, H, D]` of its blocks. Every rank of the ring must come here."""
        return self._moved(x, self.sent, self.to_each, self.from_each, self.placed, self.order.length)

    def undo(self, x: Tensor) -> Tensor:
        """The way back."""
        return self._moved(x, self.placed, self.from_each, self.to_each, self.sent, self.num_tokens)

    def _moved(self, x: Tensor, going: Tensor, to_each: list[int], from_each: list[int], coming: Tensor, length: int) -> Tensor:
        pairs = x.flatten(1, 2).index_select(1, going).unsqueeze(2)
        came = self.exchange(pairs, to_each, from_each).squeeze(2)
        return x.new_empty(x.shape[0], length * self.heads, x.shape[3]).index_copy_(1, coming, came).unflatten(1, (length, self.heads))


def block_takers(order: TokenOrder, places: int, sparsity: float) -> Tensor | None:
    """int64 `[M]`: which place of a ring computes each block of an order; None if some would have none.

    Every next block goes to who has least to do, those that keep every key first: so each place has others from everywhere.
    """
    whole = order.protected_blocks(BLOCK_SIZE, False, "cpu").tolist()
    if len(whole) < places:
        return None
    work, takers = [0.0] * places, torch.empty(len(whole), dtype=torch.int64)
    for block in sorted(range(len(whole)), key=lambda number: not whole[number]):
        place = work.index(min(work))
        takers[block] = place
        work[place] += min(BLOCK_SIZE, order.length - block * BLOCK_SIZE) * (1 if whole[block] else 1 - sparsity)
    return takers


def deal_blocks(rows: GatheredRows, order: TokenOrder, heads: int, takers: Tensor, device: torch.device) -> BlockDeal:
    """The deal of a rank's queries. Reads the order from its device.

    Args:
        rows: the rank's own, of a host that can exchange them.
        order: of the model's tokens, for all heads or for each group of them.
        heads: of queries.
        takers: int64 `[M]`, which place in the ring computes each block, or `NOBODY`.
        device: where queries lie.
    """
    assert rows.exchange is not None
    own = _pairs(rows, order, heads)
    pairs = torch.arange(rows.num_tokens * heads).view(-1, heads).T
    goes_to = takers[own // heads // BLOCK_SIZE]
    sent = [pairs[goes_to == place][own[goes_to == place].argsort()] for place in range(rows.places)]
    mine = (takers == rows.place).nonzero().flatten()
    starts = torch.zeros(num_blocks(order.length), dtype=torch.int64)
    starts[mine] = torch.arange(len(mine)) * BLOCK_SIZE
    placed = [_placed(_pairs(rows.at(place), order, heads), takers, rows.place, starts, heads) for place in range(rows.places)]
    return BlockDeal(
        _spans_of(order, mine),
        heads,
        rows.num_tokens,
        torch.cat(sent).to(device),
        torch.cat(placed).to(device),
        [len(some) for some in sent],
        [len(some) for some in placed],
        rows.exchange,
    )


def _pairs(rows: GatheredRows, order: TokenOrder, heads: int) -> Tensor:
    """int64 `[H, R]`: where each head of each query of a rank stands in the order, as pairs."""
    tokens = rows.tokens()
    places = tokens.unsqueeze(0) if order.inverse is None else order.inverse.cpu()[..., tokens].view(-1, len(tokens))
    return places.repeat_interleave(heads // len(places), dim=0) * heads + torch.arange(heads).unsqueeze(1)


def _placed(pairs: Tensor, takers: Tensor, place: int, starts: Tensor, heads: int) -> Tensor:
    """Where the pairs stand that this place takes of those of another."""
    token = pairs // heads
    came = pairs[takers[token // BLOCK_SIZE] == place].sort().values
    token = came // heads
    return (starts[token // BLOCK_SIZE] + token % BLOCK_SIZE) * heads + came % heads


def _spans_of(order: TokenOrder, blocks: Tensor) -> TokenOrder:
    """The order of some blocks, which stand in it already; the short last block can be the last of them only."""
    starts = blocks * BLOCK_SIZE
    rows = (order.length - starts).clamp(max=BLOCK_SIZE)

    def span(of: Span) -> Span:
        start, stop = (int((place - starts).clamp(min=0).minimum(rows).sum()) for place in of)
        return start, stop

    grids = tuple(OrderedGrid(tuple(map(span, grid.tokens)), tuple(map(span, grid.first_frame))) for grid in order.grids)
    first_frame, video, length = span(order.first_frame), span(order.video), int(rows.sum())
    return replace(order, forward=None, inverse=None, first_frame=first_frame, video=video, length=length, grids=grids)
