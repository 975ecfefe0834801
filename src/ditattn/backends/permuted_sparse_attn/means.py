"""The means of one call in one order: what choice of orders, plan and tail are made from."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ditattn.backends.permuted_sparse_attn.head_orders import HeadOrders
from ditattn.backends.selection import tail_error
from ditattn.backends.selection.tail_error import QueryGroups, query_groups
from ditattn.backends.sparse import SparseAttentionMetadata
from ditattn.ops.tail_estimate import KeySummary, key_summary, tail_cost
from ditattn.plan.block_plan import BlockPlan

__all__ = ["LEAST_BLOCKS", "Means"]

# of the best blocks of every row, kept whatever other rows need
LEAST_BLOCKS = 2


@dataclass(frozen=True)
class Means:
    """Of query groups, and of key and value blocks."""

    query: QueryGroups
    keys: KeySummary
    scale: float

    @classmethod
    def of(cls, query: Tensor, key: Tensor, value: Tensor, metadata: SparseAttentionMetadata, orders: HeadOrders, scale: float) -> Means:
        queries = query_groups(query, orders.queries)
        return cls(queries, key_summary(queries.of_all(key.shape[2]), key, value, orders.keys, metadata.key_lengths, scale), scale)

    def cost(self, groups: Tensor) -> Tensor:
        """Of some query groups `[B, H, R * 2, D]`: `[B, H, R, N]`."""
        return tail_cost(groups, self.keys, self.scale)

    @property
    def valid(self) -> Tensor:
        """bool `[B or 1, N]`: blocks with a real token."""
        return self.keys.tail.counts > 0

    def plan(self, sparsity: float, orders: HeadOrders) -> BlockPlan:
        """The blocks whose means would make the largest errors."""
        costs, valid = self.cost(self.query.means), self.valid
        # the rows of every grid share a budget of their own
        parts = zip(orders.queries.blocks_of_grids(), orders.forced, strict=True)
        picked = [tail_error.pick(costs[:, :, slice(*span)], sparsity, forced, valid, LEAST_BLOCKS) for span, forced in parts]
        mask = torch.cat(picked, dim=2)
        return BlockPlan.from_mask(mask, orders.queries.length, orders.keys.length)
