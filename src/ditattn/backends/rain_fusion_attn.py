"""rain_fusion_attn: tokens in 8x8 tiles, block means pick the blocks, the first frame stays dense.

Source: RainFusion2.0, arXiv 2512.24086. What differs from the Ascend original is listed in docs/originals.md.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ditattn.backends.config import RainFusionAttentionConfig
from ditattn.backends.selection import mean_pool
from ditattn.backends.sparse import SparseAttentionBackend, SparseAttentionImpl, SparseAttentionMetadata, SparseAttentionMetadataBuilder
from ditattn.plan.block_plan import BlockPlan
from ditattn.plan.token_order import TokenOrder

__all__ = ["RainFusionAttentionBackend", "RainFusionAttentionImpl", "RainFusionAttentionMetadata", "RainFusionAttentionMetadataBuilder"]


@dataclass(frozen=True, kw_only=True)
class RainFusionAttentionMetadata(SparseAttentionMetadata):
    """In tile order by default."""

    config: RainFusionAttentionConfig


class RainFusionAttentionMetadataBuilder(SparseAttentionMetadataBuilder):
    metadata_cls = RainFusionAttentionMetadata
    config_cls = RainFusionAttentionConfig


class RainFusionAttentionImpl(SparseAttentionImpl):
    """Not causal.

    Raises:
        UnsupportedCall: causal=True.
    """

    not_causal = "rain_fusion_attn"

    def plan(self, query: Tensor, key: Tensor, attn_metadata: SparseAttentionMetadata, order: TokenOrder, protected: Tensor) -> BlockPlan:
        return mean_pool.select(
            query,
            key,
            scale=self.softmax_scale,
            sparsity=attn_metadata.sparsity,
            protected=protected,
            key_lengths=attn_metadata.key_lengths,
            order=order,
        )


class RainFusionAttentionBackend(SparseAttentionBackend):
    name = "rain_fusion_attn"
    impl_cls = RainFusionAttentionImpl
    metadata_cls = RainFusionAttentionMetadata
    builder_cls = RainFusionAttentionMetadataBuilder
    config_cls = RainFusionAttentionConfig
    ops = ("block_sparse_attention", "block_mean", "dense_attention")
