"""Device and dtype as users name them, checked before anything is loaded."""

from __future__ import annotations

import logging

import torch

from ditattn.devices import DEVICES, find_device
from ditattn.devices.cpu import multiplies_bfloat16, slow_dtype
from ditattn.errors import BackendUnavailable, ConfigError

__all__ = ["choose_device", "choose_dtype", "why_no_device"]

logger = logging.getLogger("ditattn")

DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
}


def why_no_device(device_type: str) -> str | None:
    """Why this machine has no device of that type, or None."""
    return find_device(device_type).why_unavailable()


def choose_device(name: str | None) -> torch.device:
    """The named device, or the best one of this machine.

    Raises:
        ConfigError: no such device type or number.
        BackendUnavailable: this machine has none.
    """
    if name is None:
        accelerators = [device_type for device_type in DEVICES if device_type != "cpu"]
        return torch.device(next((device_type for device_type in accelerators if why_no_device(device_type) is None), "cpu"))
    device_type, _, number = name.partition(":")
    if device_type in DEVICES and (reason := why_no_device(device_type)):
        raise BackendUnavailable(f"--device {name}: {reason}")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"--device {name} is no torch device; there is {', '.join(DEVICES)}") from None
    if reason := why_no_device(device_type):
        raise BackendUnavailable(f"--device {name}: {reason}")
    count = 1 if device_type == "cpu" else getattr(torch, device_type).device_count()
    if number and int(number) >= count:
        raise ConfigError(f"--device {name}: this machine has {device_type}:0" + (f" to {device_type}:{count - 1}" if count > 1 else ""))
    return device


def choose_dtype(name: str | None, device: torch.device) -> torch.dtype:
    """The named dtype; without a name bfloat16, or float32 on a CPU without instructions for it. Warns where the named one is slow.

    Raises:
        ConfigError: no such dtype.
    """
    if name is None:
        return torch.float32 if device.type == "cpu" and not multiplies_bfloat16() else torch.bfloat16
    if name not in DTYPES:
        raise ConfigError(f"--dtype {name} is none of float32, bfloat16, float16")
    dtype = DTYPES[name]
    if device.type == "cpu" and dtype is not torch.float32 and (reason := slow_dtype(dtype)):
        logger.warning("--dtype %s: %s", name, reason)
    return dtype
