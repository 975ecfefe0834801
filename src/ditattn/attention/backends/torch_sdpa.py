"""torch_sdpa: torch's scaled_dot_product_attention, the exact dense backend that runs everywhere."""

from __future__ import annotations

from ditattn.attention.dense import DenseAttentionImpl
from ditattn.attention.interface import AttentionBackend, AttentionBackendEnum

__all__ = ["TorchSDPABackend", "TorchSDPAImpl"]


class TorchSDPAImpl(DenseAttentionImpl):
    """Any head size, any lengths."""

    implementation = "torch"


class TorchSDPABackend(AttentionBackend):
    enum = AttentionBackendEnum.TORCH_SDPA
    impl_cls = TorchSDPAImpl
    implementation = TorchSDPAImpl.implementation
