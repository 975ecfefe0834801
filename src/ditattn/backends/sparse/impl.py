"""The call path that the sparse methods share: dense where the schedule says so, else order, plan, kernel."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, ClassVar

from torch import Tensor

from ditattn.backends.base import AttentionImpl, AttentionMetadata, CallRecord
from ditattn.backends.sparse.dense_reasons import Reason, why_not_these_tokens, why_not_this_step
from ditattn.backends.sparse.metadata import SparseAttentionMetadata
from ditattn.backends.sparse.plans import LayerPlans
from ditattn.backends.sparse.token_orders import LayerOrders
from ditattn.errors import ConfigError, UnsupportedCall
from ditattn.ops import block_sparse_attention as sparse_op
from ditattn.ops.calls import Chosen, SparseCall
from ditattn.ops.contract import checked_scale
from ditattn.ops.pooled_tail import PooledTail
from ditattn.ops.table import Implementation, choose, choose_to_run
from ditattn.plan.block_plan import BLOCK_SIZE, BlockPlan
from ditattn.plan.token_order import TokenOrder

__all__ = ["SparseAttentionImpl"]


class SparseAttentionImpl(AttentionImpl):
    """schedule says dense -> dense attention; otherwise order -> plan, made or kept -> block-sparse attention in that order.

    Examples:
        A method writes `plan`. Here every block keeps the first half of the blocks, and those that are `protected`:

        >>> import ditattn, torch
        >>> class FirstHalfImpl(ditattn.SparseAttentionImpl):
        ...     def plan(self, query, key, attn_metadata, order, protected):
        ...         first = torch.arange(len(protected)) < len(protected) // 2
        ...         mask = first | protected | protected.unsqueeze(1)
        ...         return ditattn.BlockPlan.from_mask(mask[None, None], query.shape[1], key.shape[1])
        >>> layer = FirstHalfImpl(num_heads=2, head_size=64)
        >>> metadata = ditattn.SparseAttentionMetadataBuilder().build(
        ...     current_timestep=1, raw_latent_shape=(1, 16, 4, 32, 32), patch_size=(1, 2, 2), sparsity=0.5, skip_first_steps=1
        ... )
        >>> query, key, value = torch.randn(3, 1, 4 * 16 * 16, 2, 64)
        >>> layer.forward(query, key, value, metadata).shape
        torch.Size([1, 1024, 2, 64])
    """

    is_sparse = True

    # False where the rows of a first frame are chosen like others
    keeps_first_frame_rows: ClassVar[bool] = True
    # the backend's name, for the error
    not_causal: ClassVar[str | None] = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.causal and self.not_causal is not None:
            raise UnsupportedCall(f"{self.not_causal} does not support causal attention; block_sparse_attn does")
        self._plans, self._orders = LayerPlans(), LayerOrders()
        self._sparse_rows = Chosen(sparse_op.TABLE, choose_to_run)
        self._host_dense: Callable[[], Tensor] | None = None

    def end_run(self) -> None:
        self._plans.forget()

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attn_metadata: AttentionMetadata) -> Tensor:
        assert isinstance(attn_metadata, SparseAttentionMetadata)
        reason = self.why_dense(query, key, attn_metadata)
        if reason is None:
            out, record = self._attend(query, key, value, attn_metadata)
        else:
            out = self._dense(query, key, value, attn_metadata.key_lengths) if self._host_dense is None else self._host_dense()
            record = self.learn(query, key, value, attn_metadata, reason, out)
        self._note(record)
        return out

    @contextmanager
    def dense_by_host(self, dense: Callable[[], Tensor]) -> Iterator[None]:
        """Calls of the block are computed by the host's own `dense` where they run densely. It holds their tensors, and is not kept."""
        self._host_dense = dense
        try:
            yield
        finally:
            self._host_dense = None

    def learns(self, query: Tensor, key: Tensor, metadata: SparseAttentionMetadata, reason: str) -> bool:
        """True if `learn` looks at the tensors of this call, which runs densely for `reason`."""
        return False

    def learn(self, query: Tensor, key: Tensor, value: Tensor, metadata: SparseAttentionMetadata, reason: str, out: Tensor) -> CallRecord:
        """What a dense call with the output `out` tells the sparse calls after it; returns the record of the call."""
        return CallRecord(reason)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, metadata: SparseAttentionMetadata) -> tuple[Tensor, CallRecord]:
        """A call that runs sparse: order, plan, kernel."""
        order, protected = self._orders.of_tokens(metadata, query.device)
        self._check_order(metadata)
        if metadata.rows is not None:
            return self._attend_rows(query, key, value, metadata, order, protected)
        record = self._plans.of_call(query, key, metadata, lambda: self.plan(query, key, metadata, order, protected))
        assert record.plan is not None
        return self._sparse(query, key, value, record.plan, metadata.key_lengths, order), replace(record, order=order)

    def _attend_rows(
        self, query: Tensor, key: Tensor, value: Tensor, metadata: SparseAttentionMetadata, order: TokenOrder, protected: Tensor
    ) -> tuple[Tensor, CallRecord]:
        """A rank's queries and everybody's keys: each stands in an order of its own, by copying."""
        rows = self._orders.of_rows(metadata, query.device)
        q, k, v = rows.order.apply(query), order.apply(key), order.apply(value)
        as_they_stand = replace(order, forward=None, inverse=None)
        whole = rows.order.protected_blocks(BLOCK_SIZE, metadata.whole_first_frames, query.device)

        def plan() -> BlockPlan:
            made = self.plan(q, k, metadata, as_they_stand, protected)
            # methods keep whole rows where there are as many queries as keys
            return BlockPlan.from_mask(made.to_mask() | whole.unsqueeze(-1), made.query_length, made.key_length)

        record = self._plans.of_call(q, k, metadata, plan)
        assert record.plan is not None
        out = rows.order.undo(self._sparse(q, k, v, record.plan, metadata.key_lengths, as_they_stand))
        return out, replace(record, order=order, query_order=rows.order, own_blocks=rows.own_blocks)

    def rows(self, query: Tensor, key: Tensor, value: Tensor, attn_metadata: AttentionMetadata) -> dict[str, Implementation]:
        call = self._dense_call(query, key, value, attn_metadata.key_lengths)
        assert isinstance(attn_metadata, SparseAttentionMetadata)
        # the facts of a sparse call that returns no log-sum-exp; whether the choice deserves a warning shows when one runs
        facts = replace(call.facts(), needs=call.facts().needs | self.more_needs(attn_metadata))
        return {"block_sparse_attention": choose(sparse_op.TABLE, facts), "dense_attention": self._dense_rows.row(call)}

    def more_needs(self, metadata: SparseAttentionMetadata) -> frozenset[str]:
        """What the method's sparse calls ask of an implementation beside what the tensors tell (`CallFacts.needs`)."""
        return frozenset()

    def _sparse(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        plan: BlockPlan,
        key_lengths: Tensor | None,
        order: TokenOrder,
        tail: PooledTail | None = None,
    ) -> Tensor:
        if not self.inside_op:
            return sparse_op.block_sparse_attention(
                query, key, value, plan, scale=self.softmax_scale, causal=self.causal, key_lengths=key_lengths, order=order, tail=tail
            )
        scale = checked_scale(self.softmax_scale, self.head_size)
        call = SparseCall(query, key, value, plan, scale, self.causal, key_lengths, False, order.forward, order.inverse, tail)
        row = self._sparse_rows.row(call)
        sparse_op.check_plan(query, key, plan)
        if tail is not None:
            sparse_op.check_tail(key, plan, tail, self.causal)
        return sparse_op.compute(call, row)[0]

    def plan(self, query: Tensor, key: Tensor, attn_metadata: SparseAttentionMetadata, order: TokenOrder, protected: Tensor) -> BlockPlan:
        """Which blocks of `order` to keep; query and key are in the model's order. `protected` is bool `[N]`.

        Every method writes this one, or `_attend` where it needs more than queries and keys in one order.
        """
        raise NotImplementedError(f"{type(self).__name__} does not say which blocks to keep")

    def why_dense(self, query: Tensor, key: Tensor, metadata: SparseAttentionMetadata) -> str | None:
        """The reason why this call runs densely, one of `Reason`; None if it runs sparse."""
        if self.keeps_everything(metadata):
            return Reason.SPARSITY_ZERO
        return why_not_this_step(metadata) or self._why_never(query, key, metadata)

    def _why_never(self, query: Tensor, key: Tensor, metadata: SparseAttentionMetadata) -> str | None:
        """The reason why this call would run densely in every step."""
        if metadata.skip_layers and self.layer_index is None:
            return Reason.LAYER_UNKNOWN
        if self.layer_index in metadata.skip_layers:
            return Reason.SKIPPED_LAYER
        return why_not_these_tokens(query.shape[1], key.shape[1], metadata, query.device.type)

    def keeps_everything(self, metadata: SparseAttentionMetadata) -> bool:
        """True if the settings can drop no block at all."""
        return metadata.sparsity == 0

    def _check_order(self, metadata: SparseAttentionMetadata) -> None:
        if self.causal and metadata.token_order != "raster":
            raise ConfigError("causal attention needs token_order='raster': in tile order the tokens before a token are not its past")
