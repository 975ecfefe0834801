"""permuted_sparse_attn: an order of tokens for each head, blocks by the error that their mean would make, and the means of the others.

The three seed methods keep one order for all heads, rank blocks by their estimated mass, and leave dropped blocks out. What each change
brings is measured in docs/backends/permuted_sparse_attn.md, which also names the sources.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from pydantic import field_validator
from torch import Tensor

from ditattn.backends.base import AttentionMetadata, CallRecord
from ditattn.backends.config import SparseAttentionConfig
from ditattn.backends.selection import tail_error
from ditattn.backends.selection.tail_error import SubBlocks, sub_blocks
from ditattn.backends.sparse import (
    Reason,
    SparseAttentionBackend,
    SparseAttentionImpl,
    SparseAttentionMetadata,
    SparseAttentionMetadataBuilder,
)
from ditattn.errors import UnsupportedCall
from ditattn.ops import block_sparse_attention as sparse_op
from ditattn.ops.pooled_tail import PooledTail
from ditattn.plan.block_plan import BLOCK_SIZE, BlockPlan
from ditattn.plan.bricks import brick_names, brick_order, brick_shapes, parse_bricks
from ditattn.plan.token_order import TokenOrder

__all__ = ["PermutedSparseAttentionBackend", "PermutedSparseAttentionConfig", "PermutedSparseAttentionImpl"]

# query blocks on which the candidates are compared with the dense result
SAMPLE_BLOCKS = 8
# sparse steps from which measuring the candidates pays; shorter runs choose by the estimate
MEASURED_FROM_STEPS = 8
# of the best blocks of every row, kept whatever other rows need
LEAST_BLOCKS = 2


class PermutedSparseAttentionConfig(SparseAttentionConfig):
    """Keys of `permuted_sparse_attn`.

    Attributes:
        token_order: always "bricks": 128 tokens that stand together in space and time, of a shape that each head chooses.
        first_frame_sink: every query keeps the blocks of a video's first frame; its own rows are chosen like others.
        bricks: the shapes to choose from, "frames x rows x columns" with a product of 128, such as "1x8x16,4x2x16"; "auto" takes what fits
            the grid.
        tail: a dropped block still counts through its mean key and mean value; False leaves it out.
    """

    token_order: Literal["bricks"] = "bricks"  # type: ignore[assignment]
    bricks: str = "auto"
    tail: bool = True

    @field_validator("bricks")
    @classmethod
    def _check_bricks(cls, value: str) -> str:
        if value != "auto" and not parse_bricks(value):
            raise ValueError("name at least one shape, such as 4x2x16, or auto")
        return value


class PermutedSparseAttentionMetadataBuilder(SparseAttentionMetadataBuilder):
    config_cls = PermutedSparseAttentionConfig


@dataclass(frozen=True)
class _Means:
    """Of one call in one order: what selection and tail are made from."""

    query: SubBlocks
    key: SubBlocks
    value: SubBlocks

    @classmethod
    def of(cls, query: Tensor, key: Tensor, value: Tensor, order: TokenOrder, key_lengths: Tensor | None) -> _Means:
        keys = sub_blocks(key, order, key_lengths, variances=True)
        return cls(sub_blocks(query, order), keys, sub_blocks(value, order, key_lengths))

    def tail(self) -> PooledTail:
        (key, counts), (value, _) = self.key.of_blocks(), self.value.of_blocks()
        return PooledTail(key.transpose(1, 2).contiguous(), value.transpose(1, 2).contiguous(), counts)


class PermutedSparseAttentionImpl(SparseAttentionImpl):
    """Not causal.

    Raises:
        UnsupportedCall: causal=True.
    """

    def __init__(
        self, num_heads: int, head_size: int, softmax_scale: float | None = None, causal: bool = False, *args: Any, **kwargs: Any
    ) -> None:
        if causal:
            raise UnsupportedCall("permuted_sparse_attn does not support causal attention; block_sparse_attn does")
        super().__init__(num_heads, head_size, softmax_scale, causal, *args, **kwargs)
        self._chosen: tuple[object, TokenOrder] | None = None
        self._not_reported: dict[str, int] | None = None

    def end_run(self) -> None:
        super().end_run()
        self._chosen = None

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attn_metadata: AttentionMetadata) -> Tensor:
        assert isinstance(attn_metadata, SparseAttentionMetadata)
        out = super().forward(query, key, value, attn_metadata)
        if self._last_dense_step(query, key, attn_metadata) and self._known_order(query, key, attn_metadata) is None:
            self._choose(query, key, value, attn_metadata, out)
        return out

    def _last_dense_step(self, query: Tensor, key: Tensor, metadata: SparseAttentionMetadata) -> bool:
        """The result is exact, the next step runs sparse, and enough sparse steps follow to make a measured choice worth its time."""
        step, first, num_steps = metadata.current_timestep, metadata.skip_first_steps, metadata.num_steps
        if step is None or first is None or step != first - 1 or self.why_dense(query, key, metadata) != Reason.FIRST_STEPS:
            return False
        return num_steps is None or num_steps - first - (metadata.skip_last_steps or 0) >= MEASURED_FROM_STEPS

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, metadata: SparseAttentionMetadata) -> tuple[Tensor, CallRecord]:
        order = self._known_order(query, key, metadata) or self._choose(query, key, value, metadata, None)
        means = _Means.of(query, key, value, order, metadata.key_lengths)
        record = self._planned(query, key, metadata, lambda: self._plan(means, metadata, order))
        assert record.plan is not None
        tail = means.tail() if metadata.tail else None
        out = self._sparse(query, key, value, record.plan, metadata.key_lengths, order, tail)
        chosen, self._not_reported = self._not_reported, None
        return out, replace(record, order=order, token_orders=chosen)

    def more_needs(self, metadata: SparseAttentionMetadata) -> frozenset[str]:
        return frozenset({"tail"}) if metadata.tail else frozenset()

    def _plan(self, means: _Means, metadata: SparseAttentionMetadata, order: TokenOrder) -> BlockPlan:
        costs = tail_error.estimate(means.query, means.key, means.value, self.softmax_scale)
        columns, rows = _forced(metadata, order, costs.device)
        valid = means.key.of_blocks()[1] > 0
        # the rows of every grid share a budget of their own
        parts = [slice(*span) for span in order.blocks_of_grids()]
        picked = [tail_error.pick(costs[:, :, part], metadata.sparsity, columns, rows[part], valid, LEAST_BLOCKS) for part in parts]
        mask = torch.cat(picked, dim=2)
        return BlockPlan.from_mask(mask, order.length, order.length)

    def _known_order(self, query: Tensor, key: Tensor, metadata: SparseAttentionMetadata) -> TokenOrder | None:
        """The orders that were chosen for these tokens in this run."""
        facts = _facts(query, key, metadata)
        return self._chosen[1] if self._chosen is not None and self._chosen[0] == facts else None

    def _choose(self, query: Tensor, key: Tensor, value: Tensor, metadata: SparseAttentionMetadata, dense: Tensor | None) -> TokenOrder:
        """Choose a brick for each key head: by the error on some query blocks, measured where the dense result is given, else estimated."""
        assert metadata.latent_shape is not None
        grid = metadata.latent_shape
        bricks = brick_shapes(grid) if metadata.bricks == "auto" else parse_bricks(metadata.bricks)
        tokens = (grid, metadata.num_prefix_tokens, metadata.num_suffix_tokens, query.device, metadata.further_grids)
        candidates = [brick_order(brick, *tokens) for brick in bricks]
        best = torch.zeros(key.shape[2], dtype=torch.long)
        if len(candidates) > 1:
            errors = [self._error(query, key, value, metadata, order, dense) for order in candidates]
            # heads of a group share an order, since they share keys
            best = torch.stack(errors).unflatten(1, (key.shape[2], -1)).sum(2).argmin(0).cpu()
        order = _per_head(candidates, best)
        self._chosen = (_facts(query, key, metadata), order)
        self._not_reported = dict(Counter(brick_names(bricks[number], metadata.further_grids) for number in best.tolist()))
        return order

    def _error(
        self, query: Tensor, key: Tensor, value: Tensor, metadata: SparseAttentionMetadata, order: TokenOrder, dense: Tensor | None
    ) -> Tensor:
        """Squared error of every query head in this order on the sample blocks, `[H]`: measured against `dense`, or estimated."""
        means = _Means.of(query, key, value, order, metadata.key_lengths)
        blocks = _sample(order, query.device)
        columns, _ = _forced(metadata, order, query.device)
        valid = means.key.of_blocks()[1] > 0
        costs = tail_error.estimate(means.query.at(blocks), means.key, means.value, self.softmax_scale)
        # each row with a budget of its own: what a row would get of a common one depends on the orders of all heads
        by_row = costs.flatten(0, 2)[:, None, None]
        valid_by_row = valid.expand(costs.shape[0], -1).repeat_interleave(costs.shape[1] * costs.shape[2], dim=0)
        mask = tail_error.pick(by_row, metadata.sparsity, columns, columns.new_zeros(1), valid_by_row, LEAST_BLOCKS).view_as(costs)
        if dense is None:
            return costs.masked_fill(mask, 0).sum((0, 2, 3))
        places = (blocks.unsqueeze(1) * BLOCK_SIZE + torch.arange(BLOCK_SIZE, device=query.device)).flatten()
        assert order.forward is not None
        tokens = order.forward[places[places < order.length]]
        rows, exact = query[:, tokens], dense[:, tokens]
        plan = BlockPlan.from_mask(mask, len(tokens), key.shape[1])
        out = sparse_op.block_sparse_attention(
            rows,
            order.apply(key),
            order.apply(value),
            plan,
            scale=self.softmax_scale,
            key_lengths=metadata.key_lengths,
            tail=means.tail() if metadata.tail else None,
        )
        return (out.float() - exact.float()).square().sum((0, 1, 3))


def _facts(query: Tensor, key: Tensor, metadata: SparseAttentionMetadata) -> object:
    """What the chosen orders are for."""
    other = (metadata.num_prefix_tokens, metadata.num_suffix_tokens, metadata.further_grids)
    return (metadata.latent_shape, *other, query.shape[2], key.shape[2], query.device)


def _forced(metadata: SparseAttentionMetadata, order: TokenOrder, device: torch.device) -> tuple[Tensor, Tensor]:
    """bool `[N]` twice: key blocks that every query keeps (text, and the first frame), query blocks that keep everything (text)."""
    columns = order.protected_blocks(BLOCK_SIZE, metadata.whole_first_frames, device)
    return columns, order.protected_blocks(BLOCK_SIZE, False, device)


def _sample(order: TokenOrder, device: torch.device) -> Tensor:
    """Evenly spaced whole query blocks of the grids: int64, at most SAMPLE_BLOCKS; the short block where there is no whole one."""
    whole = max(order.num_whole_blocks, 1)
    return torch.linspace(0, whole - 1, min(SAMPLE_BLOCKS, whole), device=device).round().long()


def _per_head(candidates: list[TokenOrder], best: Tensor) -> TokenOrder:
    """Each head's own candidate as one order; all candidates have the grids first, each first frame at its beginning."""
    if bool((best == best[0]).all()):
        return candidates[int(best[0])]
    forward, inverse = ([getattr(candidates[number], name) for number in best.tolist()] for name in ("forward", "inverse"))
    return replace(candidates[0], forward=torch.stack(forward), inverse=torch.stack(inverse))


class PermutedSparseAttentionBackend(SparseAttentionBackend):
    name = "permuted_sparse_attn"
    impl_cls = PermutedSparseAttentionImpl
    builder_cls = PermutedSparseAttentionMetadataBuilder
    config_cls = PermutedSparseAttentionConfig
    ops = ("block_sparse_attention", "block_mean", "dense_attention")
    recommended = True
