"""The base of the sparse backends."""

from __future__ import annotations

from typing import ClassVar

from ditattn.backends.base import AttentionBackend, AttentionMetadata, AttentionMetadataBuilder
from ditattn.backends.config import AttentionConfig, SparseAttentionConfig
from ditattn.backends.sparse.metadata import SparseAttentionMetadata, SparseAttentionMetadataBuilder

__all__ = ["SparseAttentionBackend"]


class SparseAttentionBackend(AttentionBackend):
    """Base of the sparse methods: a subclass sets `name`, `impl_cls`, and what it does not share.

    Examples:
        >>> import ditattn, torch
        >>> class EverythingImpl(ditattn.SparseAttentionImpl):
        ...     def plan(self, query, key, attn_metadata, order, protected):
        ...         return ditattn.BlockPlan.full(query.shape[1], key.shape[1], device=query.device)
        >>> class EverythingBackend(ditattn.SparseAttentionBackend):
        ...     name = "everything_attn"
        ...     impl_cls = EverythingImpl
        >>> EverythingBackend.is_sparse, EverythingBackend.get_supported_head_sizes()
        (True, [])
    """

    metadata_cls: ClassVar[type[AttentionMetadata]] = SparseAttentionMetadata
    builder_cls: ClassVar[type[AttentionMetadataBuilder]] = SparseAttentionMetadataBuilder
    config_cls: ClassVar[type[AttentionConfig]] = SparseAttentionConfig
    ops: ClassVar[tuple[str, ...]] = ("block_sparse_attention", "dense_attention")
