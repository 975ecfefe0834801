"""ditattn: dense and block-sparse attention backends for diffusion transformers.

Importing it does nothing else: every name below is loaded when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ditattn._version import __version__

if TYPE_CHECKING:
    from ditattn.backends.base import (
        AttentionBackend,
        AttentionImpl,
        AttentionMetadata,
        AttentionMetadataBuilder,
    )
    from ditattn.backends.config import SparseAttentionConfig
    from ditattn.backends.registry import AttentionBackendEnum
    from ditattn.backends.selector import force_attn_backend, get_attn_backend
    from ditattn.backends.sparse import (
        SparseAttentionBackend,
        SparseAttentionImpl,
        SparseAttentionMetadata,
        SparseAttentionMetadataBuilder,
    )
    from ditattn.errors import BackendUnavailable, DitattnError
    from ditattn.hosts.diffusers.install import install
    from ditattn.hosts.diffusers.quantize import quantize
    from ditattn.hosts.diffusers.register import register
    from ditattn.ops.block_mean import block_mean
    from ditattn.ops.block_sparse_attention import block_sparse_attention
    from ditattn.ops.dense_attention import dense_attention
    from ditattn.plan.block_plan import BlockPlan
    from ditattn.runtime.step import step

_WHERE = {
    "AttentionBackend": "ditattn.backends.base",
    "AttentionBackendEnum": "ditattn.backends.registry",
    "AttentionImpl": "ditattn.backends.base",
    "AttentionMetadata": "ditattn.backends.base",
    "AttentionMetadataBuilder": "ditattn.backends.base",
    "BackendUnavailable": "ditattn.errors",
    "BlockPlan": "ditattn.plan.block_plan",
    "DitattnError": "ditattn.errors",
    "SparseAttentionBackend": "ditattn.backends.sparse",
    "SparseAttentionConfig": "ditattn.backends.config",
    "SparseAttentionImpl": "ditattn.backends.sparse",
    "SparseAttentionMetadata": "ditattn.backends.sparse",
    "SparseAttentionMetadataBuilder": "ditattn.backends.sparse",
    "block_mean": "ditattn.ops.block_mean",
    "block_sparse_attention": "ditattn.ops.block_sparse_attention",
    "dense_attention": "ditattn.ops.dense_attention",
    "force_attn_backend": "ditattn.backends.selector",
    "get_attn_backend": "ditattn.backends.selector",
    "install": "ditattn.hosts.diffusers.install",
    "quantize": "ditattn.hosts.diffusers.quantize",
    "register": "ditattn.hosts.diffusers.register",
    "step": "ditattn.runtime.step",
}

__all__ = [
    "AttentionBackend",
    "AttentionBackendEnum",
    "AttentionImpl",
    "AttentionMetadata",
    "AttentionMetadataBuilder",
    "BackendUnavailable",
    "BlockPlan",
    "DitattnError",
    "SparseAttentionBackend",
    "SparseAttentionConfig",
    "SparseAttentionImpl",
    "SparseAttentionMetadata",
    "SparseAttentionMetadataBuilder",
    "__version__",
    "block_mean",
    "block_sparse_attention",
    "dense_attention",
    "force_attn_backend",
    "get_attn_backend",
    "install",
    "quantize",
    "register",
    "step",
]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'ditattn' has no attribute '{name}'")
    value = getattr(importlib.import_module(_WHERE[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
