"""laser_attn: the fastest exact dense attention of the device.

On Ascend 910 that is the Laser operator, for sequences it takes; elsewhere the first possible implementation of `dense_attention`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from ditattn.backends.base import AttentionBackend, AttentionMetadata
from ditattn.backends.dense import DENSE_BACKEND, DenseAttentionImpl
from ditattn.devices import Device
from ditattn.ops.dense_attention import LASER_NAMES, TABLE
from ditattn.ops.table import PADDED_HEAD_DIMS, CallFacts
from ditattn.packages import ATTENTIONS, MINDIESD, SGL_KERNEL_NPU, Package

__all__ = ["MIN_LASER_TOKENS", "LaserAttentionBackend", "LaserAttentionImpl"]

# below this length the Ascend operator is unreliable (sglang's wrapper draws the same line)
MIN_LASER_TOKENS = 2048


class LaserAttentionImpl(DenseAttentionImpl):
    """Dense; nothing is dropped."""

    supported_head_sizes = PADDED_HEAD_DIMS

    def choose(self, query: Tensor, key: Tensor, metadata: AttentionMetadata) -> tuple[tuple[str, ...], str]:
        """Implementations for this call, and what the report says about it."""
        if query.device.type != "npu":
            return (), DENSE_BACKEND
        if query.shape[1] < MIN_LASER_TOKENS:
            return ("torch",), f"SDPA: fewer than {MIN_LASER_TOKENS} tokens"
        if query.shape[1] != key.shape[1]:
            return ("torch",), "SDPA: query and key lengths differ"
        if self.causal or metadata.key_lengths is not None:
            return ("torch",), "SDPA: the operator takes no mask"
        return LASER_NAMES, DENSE_BACKEND


class LaserAttentionBackend(AttentionBackend):
    name = "laser_attn"
    impl_cls = LaserAttentionImpl
    dtypes: ClassVar[Mapping[str, tuple[torch.dtype, ...]]] = {"npu": (torch.bfloat16, torch.float16)}
    any_of: ClassVar[Mapping[str, tuple[Package, ...]]] = {"npu": (SGL_KERNEL_NPU, ATTENTIONS, MINDIESD)}

    @classmethod
    def why_not(cls, device: Device, head_size: int | None = None, dtype: torch.dtype | None = None) -> str | None:
        reason = super().why_not(device, head_size, dtype)
        providers = cls.any_of.get(device.device_type, ())
        if not providers:
            return reason
        if any(package.missing() for package in device.packages) and all(package.missing() for package in providers):
            return f"{reason}; {'; or '.join(package.sentence() for package in providers)}"
        return reason or _why_no_operator(device.device_type, head_size, dtype)

    @classmethod
    def implementations_on(cls, device_type: str) -> tuple[str, ...]:
        return LASER_NAMES if device_type == "npu" else ()


def _why_no_operator(device_type: str, head_size: int | None, dtype: torch.dtype | None) -> str | None:
    """The reasons of every package that brings the operator; None if one can run."""
    facts = CallFacts(device_type, dtype or torch.bfloat16, head_size or 128)
    reasons = [row.refusal(facts) for row in TABLE if row.name in LASER_NAMES]
    return None if None in reasons else "; ".join(dict.fromkeys(str(reason) for reason in reasons))
