"""The call path: orders that last for a run, a plan and the means of what it drops, and the residual of the last dense step."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from ditattn.backends.base import CallRecord
from ditattn.backends.permuted_sparse_attn.brick_choice import best_bricks, given_bricks
from ditattn.backends.permuted_sparse_attn.head_orders import HeadOrders, order_facts
from ditattn.backends.permuted_sparse_attn.means import Means
from ditattn.backends.permuted_sparse_attn.refresh_steps import num_free_steps, refreshes_of
from ditattn.backends.residuals import LEAST_SPARSE_STEPS, Residuals
from ditattn.backends.sparse import Reason, SparseAttentionImpl, SparseAttentionMetadata
from ditattn.ops.contract import checked_scale
from ditattn.ops.pooled_tail import PooledTail
from ditattn.plan.block_plan import BlockPlan
from ditattn.plan.bricks import brick_names
from ditattn.plan.split import HeadShare

__all__ = ["PermutedSparseAttentionImpl"]


class PermutedSparseAttentionImpl(SparseAttentionImpl):
    """Not causal.

    Raises:
        UnsupportedCall: causal=True.
    """

    not_causal = "permuted_sparse_attn"
    keeps_first_frame_rows = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._residuals = Residuals()
        self._chosen: tuple[object, HeadOrders] | None = None
        self._not_reported: tuple[str, ...] | None = None

    def end_run(self) -> None:
        super().end_run()
        self._chosen = None
        self._residuals.forget()

    def why_dense(self, query: Tensor, key: Tensor, metadata: SparseAttentionMetadata) -> str | None:
        reason = super().why_dense(query, key, metadata)
        if reason is None and metadata.current_timestep in refreshes_of(query, metadata).steps:
            return Reason.REFRESH
        return reason

    def learns(self, query: Tensor, key: Tensor, metadata: SparseAttentionMetadata, reason: str) -> bool:
        """The result is exact, the next step runs sparse, and enough sparse steps follow to make it worth its time."""
        if reason not in (Reason.FIRST_STEPS, Reason.REFRESH) or self._why_never(query, key, metadata) is not None:
            return False
        step, first, num_steps = metadata.current_timestep, metadata.skip_first_steps, metadata.num_steps
        if step in refreshes_of(query, metadata).before_sparse:
            return True
        few = num_steps is not None and num_free_steps(metadata) < LEAST_SPARSE_STEPS
        return first is not None and step == first - 1 and not few

    def learn(self, query: Tensor, key: Tensor, value: Tensor, metadata: SparseAttentionMetadata, reason: str, out: Tensor) -> CallRecord:
        """The orders of the heads, by what each would make of this call, and the residual."""
        if not self.learns(query, key, metadata, reason):
            return CallRecord(reason)
        if self._known_order(query, key, metadata) is None:
            self._choose(query, key, value, metadata, out)
        step, num_steps, forward_id = metadata.current_timestep, metadata.num_steps, metadata.forward_id
        if step not in refreshes_of(query, metadata).before_sparse:
            return CallRecord(reason)
        assert step is not None
        assert num_steps is not None
        assert forward_id is not None
        sparse, made = self._sparse_output(query, key, value, metadata)
        self._residuals.keep(out - sparse, step, num_steps, forward_id, order_facts(query, key, metadata))
        return CallRecord(reason, beside=made.plan, token_orders=made.token_orders)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, metadata: SparseAttentionMetadata) -> tuple[Tensor, CallRecord]:
        out, record = self._sparse_output(query, key, value, metadata)
        step, forward_id = metadata.current_timestep, metadata.forward_id
        if step is not None and forward_id is not None:
            out = self._residuals.added(out, step, forward_id, order_facts(query, key, metadata))
        return out, record

    def _sparse_output(self, query: Tensor, key: Tensor, value: Tensor, metadata: SparseAttentionMetadata) -> tuple[Tensor, CallRecord]:
        orders = self._known_order(query, key, metadata) or self._choose(query, key, value, metadata, None)
        sparsity, deal = refreshes_of(query, metadata).sparsity, orders.deal
        query = query if deal is None else deal.apply(query)
        means = Means.of(query, key, value, metadata, orders, self._scale)
        record = self._plans.of_call(query, key, metadata, lambda: means.plan(sparsity, orders))
        assert record.plan is not None
        tail = means.keys.tail if metadata.tail else None
        out = self._attend_ordered(query, key, value, record.plan, metadata.key_lengths, orders, tail)
        out = out if deal is None else deal.undo(out)
        chosen, self._not_reported = self._not_reported, None
        queries = None if orders.together else deal or orders.queries
        return out, replace(record, order=orders.keys, query_order=queries, own_blocks=orders.own_blocks, token_orders=chosen)

    def _attend_ordered(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        plan: BlockPlan,
        key_lengths: Tensor | None,
        orders: HeadOrders,
        tail: PooledTail | None,
    ) -> Tensor:
        if orders.together:
            return self._sparse(query, key, value, plan, key_lengths, orders.keys, tail)
        q, k, v = orders.queries.apply(query), orders.keys.apply(key), orders.keys.apply(value)
        as_they_stand = replace(orders.keys, forward=None, inverse=None)
        return orders.queries.undo(self._sparse(q, k, v, plan, key_lengths, as_they_stand, tail))

    @property
    def _scale(self) -> float:
        return checked_scale(self.softmax_scale, self.head_size)

    def more_needs(self, metadata: SparseAttentionMetadata) -> frozenset[str]:
        return frozenset({"tail"}) if metadata.tail else frozenset()

    def _known_order(self, query: Tensor, key: Tensor, metadata: SparseAttentionMetadata) -> HeadOrders | None:
        """The orders that were chosen for these tokens in this run."""
        facts = order_facts(query, key, metadata)
        return self._chosen[1] if self._chosen is not None and self._chosen[0] == facts else None

    def _choose(self, query: Tensor, key: Tensor, value: Tensor, metadata: SparseAttentionMetadata, dense: Tensor | None) -> HeadOrders:
        """An order for each key head: the given one, or the one whose error on some query blocks is least."""
        heads = key.shape[2]
        given = given_bricks(metadata, self.layer_index, heads, self._head_share(heads, metadata))
        bricks = given or best_bricks(query, key, value, metadata, self._scale, dense)
        orders = HeadOrders.in_bricks(bricks, metadata, query.shape[2], query.device)
        self._chosen = (order_facts(query, key, metadata), orders)
        self._not_reported = tuple(brick_names(brick, metadata.further_grids) for brick in bricks)
        return orders

    def _head_share(self, heads: int, metadata: SparseAttentionMetadata) -> HeadShare | None:
        """Which key heads of the layer these are; None where they are all, as in layers whose weights are whole."""
        if metadata.heads is None:
            return None
        num_heads = metadata.heads.num_heads * self.num_kv_heads // self.num_heads
        return None if heads == num_heads else replace(metadata.heads, num_heads=num_heads)
