"""permuted_sparse_attn: an order of tokens for each head, blocks by the error that their mean would make, and the means of the others.

The three seed methods keep one order for all heads, rank blocks by their estimated mass, and leave dropped blocks out. What each change
brings is measured in docs/backends/permuted_sparse_attn.md, which also names the sources.
"""

from __future__ import annotations

from ditattn.backends.permuted_sparse_attn.config import PermutedSparseAttentionConfig
from ditattn.backends.permuted_sparse_attn.impl import PermutedSparseAttentionImpl
from ditattn.backends.sparse import SparseAttentionBackend, SparseAttentionMetadataBuilder

__all__ = ["PermutedSparseAttentionBackend", "PermutedSparseAttentionConfig", "PermutedSparseAttentionImpl"]


class PermutedSparseAttentionMetadataBuilder(SparseAttentionMetadataBuilder):
    config_cls = PermutedSparseAttentionConfig


class PermutedSparseAttentionBackend(SparseAttentionBackend):
    name = "permuted_sparse_attn"
    impl_cls = PermutedSparseAttentionImpl
    builder_cls = PermutedSparseAttentionMetadataBuilder
    config_cls = PermutedSparseAttentionConfig
    ops = ("block_sparse_attention", "block_mean", "tail_estimate", "dense_attention")
