"""Facts about this machine, one file per torch device type."""

from __future__ import annotations

import importlib

import torch

from ditattn.devices.base import Device

__all__ = ["DEVICES", "Device", "find_device"]

DEVICES: dict[str, str] = {
    "cpu": "ditattn.devices.cpu:Cpu",
    "cuda": "ditattn.devices.cuda:Cuda",
    "npu": "ditattn.devices.npu:Npu",
}


def find_device(device: torch.device | str = "cpu") -> Device:
    """The facts about a torch device, or about a device type by name; types without a file get the generic ones."""
    device_type = device.type if isinstance(device, torch.device) else str(device).partition(":")[0]
    if device_type not in DEVICES:
        from ditattn.devices.generic import GenericDevice

        return GenericDevice(device_type)
    module, _, name = DEVICES[device_type].partition(":")
    found: Device = getattr(importlib.import_module(module), name)()
    return found
