"""Any other torch device: what pure torch can do."""

from __future__ import annotations

import torch

from ditattn.devices.base import Device

__all__ = ["GenericDevice"]


class GenericDevice(Device):
    """A device type without a file of its own (xpu, mps, ...)."""

    has_flash = False

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
