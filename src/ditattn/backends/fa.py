"""fa: FlashAttention. Torch's own kernel on CPU and CUDA, the fused attention operator on Ascend."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch

from ditattn.backends.base import AttentionBackend
from ditattn.backends.dense import DenseAttentionImpl
from ditattn.devices import Device

__all__ = ["FABackend", "FAImpl"]


class FAImpl(DenseAttentionImpl):
    """Raises where FlashAttention cannot serve a call (key-padding lengths, for one) instead of taking another kernel in silence."""

    implementation = "flash"


class FABackend(AttentionBackend):
    name = "fa"
    impl_cls = FAImpl
    implementation = FAImpl.implementation
    dtypes: ClassVar[Mapping[str, tuple[torch.dtype, ...]]] = dict.fromkeys(("cuda", "npu"), (torch.bfloat16, torch.float16))

    @classmethod
    def why_not(cls, device: Device, head_size: int | None = None, dtype: torch.dtype | None = None) -> str | None:
        if not device.has_flash:
            return f"no FlashAttention kernel is known for '{device.device_type}'; torch_sdpa and laser_attn are dense and exact there"
        return super().why_not(device, head_size, dtype)
