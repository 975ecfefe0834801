"""torch_sdpa: torch's scaled_dot_product_attention, the exact dense backend that runs everywhere."""

from __future__ import annotations

from torch import Tensor

from ditattn.attention.interface import AttentionBackend, AttentionBackendEnum, AttentionImpl, AttentionMetadata
from ditattn.ops.dense_attention import dense_attention

__all__ = ["TorchSDPABackend", "TorchSDPAImpl"]


class TorchSDPAImpl(AttentionImpl):
    """Any head size, any lengths."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attn_metadata: AttentionMetadata) -> Tensor:
        self._note("dense backend")
        return dense_attention(
            query,
            key,
            value,
            scale=self.softmax_scale,
            causal=self.causal,
            key_lengths=attn_metadata.key_lengths,
            implementation=TorchSDPABackend.implementation,
        )


class TorchSDPABackend(AttentionBackend):
    enum = AttentionBackendEnum.TORCH_SDPA
    impl_cls = TorchSDPAImpl
    implementation = "torch"
