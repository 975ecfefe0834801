"""fa: FlashAttention. Torch's own kernel on CPU and CUDA, the fused attention operator on Ascend."""

from __future__ import annotations

from torch import Tensor

from ditattn.attention.interface import AttentionBackend, AttentionBackendEnum, AttentionImpl, AttentionMetadata
from ditattn.ops.dense_attention import dense_attention

__all__ = ["FABackend", "FAImpl"]


class FAImpl(AttentionImpl):
    """Raises where FlashAttention cannot serve a call (key-padding lengths, for one) instead of taking another kernel in silence."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attn_metadata: AttentionMetadata) -> Tensor:
        self._note("dense backend")
        return dense_attention(
            query,
            key,
            value,
            scale=self.softmax_scale,
            causal=self.causal,
            key_lengths=attn_metadata.key_lengths,
            implementation=FABackend.implementation,
        )


class FABackend(AttentionBackend):
    enum = AttentionBackendEnum.FA
    impl_cls = FAImpl
    implementation = "flash"
