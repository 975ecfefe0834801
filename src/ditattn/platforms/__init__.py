"""Facts about this machine, one file per torch device type."""

from __future__ import annotations

import importlib

import torch

from ditattn.platforms.interface import Platform

__all__ = ["PLATFORMS", "Platform", "get_platform"]

PLATFORMS: dict[str, str] = {
    "cpu": "ditattn.platforms.cpu:CpuPlatform",
    "cuda": "ditattn.platforms.cuda:CudaPlatform",
    "npu": "ditattn.platforms.npu:NpuPlatform",
}


def get_platform(device: torch.device | str = "cpu") -> Platform:
    """The platform of a torch device, or of a device type by name; types without a file get a generic one."""
    device_type = device.type if isinstance(device, torch.device) else str(device).partition(":")[0]
    if device_type not in PLATFORMS:
        from ditattn.platforms.generic import GenericPlatform

        return GenericPlatform(device_type)
    module, _, name = PLATFORMS[device_type].partition(":")
    platform: Platform = getattr(importlib.import_module(module), name)()
    return platform
