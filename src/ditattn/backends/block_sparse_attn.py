"""block_sparse_attn: antidiagonal estimate of every block's softmax mass, then attention over the best 128 x 128 blocks."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ditattn.backends.config import BlockSparseAttentionConfig
from ditattn.backends.selection import antidiagonal
from ditattn.backends.sparse import SparseAttentionBackend, SparseAttentionImpl, SparseAttentionMetadata, SparseAttentionMetadataBuilder
from ditattn.plan.block_plan import BlockPlan
from ditattn.plan.token_order import TokenOrder

__all__ = ["BlockSparseAttentionBackend", "BlockSparseAttentionImpl", "BlockSparseAttentionMetadata", "BlockSparseAttentionMetadataBuilder"]


@dataclass(frozen=True, kw_only=True)
class BlockSparseAttentionMetadata(SparseAttentionMetadata):
    """With the estimator's keys in its configuration."""

    config: BlockSparseAttentionConfig


class BlockSparseAttentionMetadataBuilder(SparseAttentionMetadataBuilder):
    metadata_cls = BlockSparseAttentionMetadata
    config_cls = BlockSparseAttentionConfig


class BlockSparseAttentionImpl(SparseAttentionImpl):
    """Causal attention is possible in raster order."""

    def plan(self, query: Tensor, key: Tensor, attn_metadata: SparseAttentionMetadata, order: TokenOrder, protected: Tensor) -> BlockPlan:
        assert isinstance(attn_metadata, BlockSparseAttentionMetadata)
        return antidiagonal.select(
            order.apply(query),
            order.apply(key),
            scale=self.softmax_scale,
            sparsity=attn_metadata.sparsity,
            protected=protected,
            threshold=attn_metadata.threshold,
            causal=self.causal,
            keep_sink=attn_metadata.keep_sink,
            keep_recent=attn_metadata.keep_recent,
            key_lengths=attn_metadata.key_lengths,
            parts=order.blocks_of_grids(),
        )

    def keeps_everything(self, metadata: SparseAttentionMetadata) -> bool:
        assert isinstance(metadata, BlockSparseAttentionMetadata)
        return metadata.sparsity == 0 and metadata.threshold == 1


class BlockSparseAttentionBackend(SparseAttentionBackend):
    name = "block_sparse_attn"
    impl_cls = BlockSparseAttentionImpl
    metadata_cls = BlockSparseAttentionMetadata
    builder_cls = BlockSparseAttentionMetadataBuilder
    config_cls = BlockSparseAttentionConfig
    ops = ("block_sparse_attention", "block_estimate", "dense_attention")
