"""Where a denoiser's forward will run: offloaded models keep their weights elsewhere, or nowhere (on meta) until a part of them runs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

__all__ = ["execution_device"]


def execution_device(module: nn.Module) -> torch.device:
    """The device that the offloading hooks bring the weights to, the root's before those of its parts; else where the weights are."""
    told = next((device for part in module.modules() for device in _told_by_hooks(part)), None)
    return next(module.parameters()).device if told is None else torch.device(told)


def _told_by_hooks(part: nn.Module) -> Iterator[Any]:
    """Devices that accelerate's hooks (one, or several in one) and diffusers' group offloading name."""
    hook: Any = getattr(part, "_hf_hook", None)
    for one in getattr(hook, "hooks", (hook,)):
        if getattr(one, "execution_device", None) is not None:
            yield one.execution_device
    for one in getattr(getattr(part, "_diffusers_hook", None), "hooks", {}).values():
        device = getattr(getattr(one, "config", None), "onload_device", None)
        if device is not None:
            yield device
