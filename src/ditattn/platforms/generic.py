"""Any other torch device: what pure torch can do."""

from __future__ import annotations

import torch

from ditattn.attention.interface import AttentionBackendEnum
from ditattn.platforms.interface import Platform

__all__ = ["GenericPlatform"]


class GenericPlatform(Platform):
    """A device type without a file of its own (xpu, mps, ...)."""

    def __init__(self, device_type: str) -> None:
        self._device_type = device_type

    @property
    def device_type(self) -> str:  # type: ignore[override]
        return self._device_type

    def why_unavailable(self) -> str | None:
        module = getattr(torch, self._device_type, None) or getattr(torch.backends, self._device_type, None)
        if module is None or not getattr(module, "is_available", lambda: False)():
            return f"torch sees no device of type '{self._device_type}'"
        return None

    def why_not(self, backend: AttentionBackendEnum, head_size: int | None = None, dtype: torch.dtype | None = None) -> str | None:
        if backend is AttentionBackendEnum.FA:
            return f"no FlashAttention kernel is known for '{self._device_type}'; torch_sdpa and laser_attn are dense and exact there"
        return super().why_not(backend, head_size, dtype)
