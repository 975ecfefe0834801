"""fa: FlashAttention. Torch's own kernel on CPU and CUDA, the fused attention operator on Ascend."""

from __future__ import annotations

from ditattn.attention.dense import DenseAttentionImpl
from ditattn.attention.interface import AttentionBackend, AttentionBackendEnum

__all__ = ["FABackend", "FAImpl"]


class FAImpl(DenseAttentionImpl):
    """Raises where FlashAttention cannot serve a call (key-padding lengths, for one) instead of taking another kernel in silence."""

    implementation = "flash"


class FABackend(AttentionBackend):
    enum = AttentionBackendEnum.FA
    impl_cls = FAImpl
    implementation = FAImpl.implementation
