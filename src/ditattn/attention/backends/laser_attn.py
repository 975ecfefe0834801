"""laser_attn: the fastest exact dense attention of the device.

On Ascend 910 that is the Laser operator, for sequences it takes; elsewhere the first possible implementation of `dense_attention`.
"""

from __future__ import annotations

from torch import Tensor

from ditattn.attention.interface import KERNEL_HEAD_SIZES, AttentionBackend, AttentionBackendEnum, AttentionImpl, AttentionMetadata
from ditattn.ops.dense_attention import LASER_NAMES, dense_attention

__all__ = ["MIN_LASER_TOKENS", "LaserAttentionBackend", "LaserAttentionImpl"]

# below this length the Ascend operator is unreliable (sglang's wrapper draws the same line)
MIN_LASER_TOKENS = 2048


class LaserAttentionImpl(AttentionImpl):
    """Dense; nothing is dropped."""

    supported_head_sizes = KERNEL_HEAD_SIZES

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attn_metadata: AttentionMetadata) -> Tensor:
        implementation, reason = self._choose(query, key, attn_metadata)
        self._note(reason)
        return dense_attention(
            query,
            key,
            value,
            scale=self.softmax_scale,
            causal=self.causal,
            key_lengths=attn_metadata.key_lengths,
            implementation=implementation,
        )

    def _choose(self, query: Tensor, key: Tensor, metadata: AttentionMetadata) -> tuple[str | None, str]:
        """Implementations for this call, and what the report says about it."""
        if query.device.type != "npu":
            return None, "dense backend"
        if query.shape[1] < MIN_LASER_TOKENS:
            return "torch", f"SDPA: fewer than {MIN_LASER_TOKENS} tokens"
        if query.shape[1] != key.shape[1]:
            return "torch", "SDPA: query and key lengths differ"
        if self.causal or metadata.key_lengths is not None:
            return "torch", "SDPA: the operator takes no mask"
        return ",".join(LASER_NAMES), "dense backend"


class LaserAttentionBackend(AttentionBackend):
    enum = AttentionBackendEnum.LASER_ATTN
    impl_cls = LaserAttentionImpl

    @classmethod
    def implementations_on(cls, device_type: str) -> tuple[str, ...]:
        return LASER_NAMES if device_type == "npu" else ()
