"""NVIDIA GPUs (and AMD GPUs, which torch calls cuda too)."""

from __future__ import annotations

import torch

from ditattn.devices.base import Device

__all__ = ["Cuda"]


class Cuda(Device):
    device_type = "cuda"

    def why_unavailable(self) -> str | None:
        if torch.version.cuda is None and torch.version.hip is None:
            return "this torch was built without CUDA: install a CUDA build from pytorch.org"
        if not torch.cuda.is_available():
            return "torch sees no CUDA device: check the driver and CUDA_VISIBLE_DEVICES"
        return None

    def device_name(self) -> str:
        return torch.cuda.get_device_name()

    def memory_bytes(self) -> int | None:
        return torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
