"""torch_sdpa: torch's scaled_dot_product_attention, the exact dense backend that runs everywhere."""

from __future__ import annotations

from ditattn.backends.base import AttentionBackend
from ditattn.backends.dense import DenseAttentionImpl

__all__ = ["TorchSDPABackend", "TorchSDPAImpl"]


class TorchSDPAImpl(DenseAttentionImpl):
    """Any head size, any lengths."""

    implementation = "torch"


class TorchSDPABackend(AttentionBackend):
    name = "torch_sdpa"
    impl_cls = TorchSDPAImpl
    implementation = TorchSDPAImpl.implementation
