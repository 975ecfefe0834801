"""An order of the tokens for each key head, and what every plan in these orders keeps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ditattn.backends.selection.tail_error import Forced
from ditattn.backends.sparse import SparseAttentionMetadata
from ditattn.plan.block_deal import NOBODY, BlockDeal, block_takers, deal_blocks
from ditattn.plan.block_plan import BLOCK_SIZE, num_blocks
from ditattn.plan.bricks import Brick, brick_order
from ditattn.plan.token_order import TokenOrder

__all__ = ["HeadOrders", "order_facts"]

Sample = Callable[[TokenOrder], Tensor]


@dataclass(frozen=True, eq=False)
class HeadOrders:
    """The orders of one layer's tokens.

    Attributes:
        keys: and queries too, where a call has all of them.
        queries: of a rank's own ones, where it keeps some and has everybody's keys.
        forced: key blocks that every query keeps (text, and the first frame), query blocks that keep everything (text); for the queries of
            each grid.
        own_blocks: queries of a rank's own make other blocks than all queries do.
        deal: where the ranks of a ring deal out blocks of queries, what brings those of `queries` here.
    """

    keys: TokenOrder
    queries: TokenOrder
    forced: tuple[Forced, ...]
    own_blocks: bool = False
    deal: BlockDeal | None = None

    @classmethod
    def in_bricks(cls, bricks: Sequence[Brick], metadata: SparseAttentionMetadata, heads: int, device: torch.device) -> HeadOrders:
        """Of bricks of these shapes, one for each key head, or one for all of them; `heads` of queries."""
        order = _per_head([_in_bricks(brick, metadata, device) for brick in bricks])
        stored, rows = metadata.as_stored(order, device), metadata.rows
        if rows is None:
            return cls(stored, stored, _forced(stored, stored, metadata, device))
        takers = None if rows.exchange is None else block_takers(order, rows.places, metadata.sparsity)
        if takers is None:
            own = rows.ordered(order, device)
            return cls(stored, own.order, _forced(stored, own.order, metadata, device), own.own_blocks)
        deal = deal_blocks(rows, order, heads, takers, device)
        return cls(stored, deal.order, _forced(stored, deal.order, metadata, device), deal=deal)

    @classmethod
    def of_dealt_sample(
        cls, brick: Brick, metadata: SparseAttentionMetadata, heads: int, blocks: Sample, device: torch.device
    ) -> HeadOrders:
        """All heads in bricks of one shape; the deal brings this rank's share of the blocks that `blocks` takes of the order, and
        `queries` are its own as they stand.
        """
        order, rows = _in_bricks(brick, metadata, device), metadata.rows
        assert rows is not None
        sample = blocks(order)
        takers = torch.full((num_blocks(order.length),), NOBODY)
        takers[sample] = torch.arange(len(sample)) % rows.places
        stored, length = metadata.as_stored(order, device), rows.num_tokens
        as_they_stand = TokenOrder(None, None, (0, 0), (0, length), length)
        forced = _forced(stored, as_they_stand, metadata, device)
        return cls(stored, as_they_stand, forced, deal=deal_blocks(rows, order, heads, takers, device))

    @property
    def together(self) -> bool:
        return self.queries is self.keys


def _forced(keys: TokenOrder, queries: TokenOrder, metadata: SparseAttentionMetadata, device: torch.device) -> tuple[Forced, ...]:
    # made on the host: a device that is asked how many there are makes the host wait in every call
    columns = keys.protected_blocks(BLOCK_SIZE, metadata.whole_first_frames, "cpu")
    rows = queries.protected_blocks(BLOCK_SIZE, False, "cpu")
    return tuple(Forced.of(columns, rows[start:stop], device) for start, stop in queries.blocks_of_grids())


def order_facts(query: Tensor, key: Tensor, metadata: SparseAttentionMetadata) -> object:
    """What the chosen orders are for."""
    other = (metadata.num_prefix_tokens, metadata.num_suffix_tokens, metadata.further_grids)
    split = (metadata.gathered, metadata.rows, metadata.heads)
    return (metadata.latent_shape, *other, *split, query.shape[2], key.shape[2], query.device)


def _in_bricks(brick: Brick, metadata: SparseAttentionMetadata, device: torch.device) -> TokenOrder:
    assert metadata.latent_shape is not None
    return brick_order(brick, metadata.latent_shape, metadata.num_prefix_tokens, metadata.num_suffix_tokens, device, metadata.further_grids)


def _per_head(orders: Sequence[TokenOrder]) -> TokenOrder:
    """Each head's own order as one; all of them have the grids first, each first frame at its beginning."""
    first = orders[0]
    if all(order is first for order in orders):
        return first
    forward, inverse = ([getattr(order, name) for order in orders] for name in ("forward", "inverse"))
    return replace(first, forward=torch.stack(forward), inverse=torch.stack(inverse))
