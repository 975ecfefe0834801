"""Ascend NPUs, through torch_npu."""

from __future__ import annotations

import importlib
import os
from typing import Any

import torch

from ditattn.devices.base import Device
from ditattn.packages import TORCH_NPU

__all__ = ["GENERATIONS", "Npu", "cann_version", "generation_of", "soc_generation", "soc_name"]

GENERATIONS = ("A2", "A3", "A5")
# What a device's name begins with. The longer beginning decides: A3 is called Ascend910_93xx.
_NAMES = {"Ascend910B": "A2", "Ascend910_93": "A3", "Ascend950": "A5"}
VISIBLE_DEVICES = "ASCEND_RT_VISIBLE_DEVICES"


class Npu(Device):
    device_type = "npu"
    packages = (TORCH_NPU,)

    def why_unavailable(self) -> str | None:
        if TORCH_NPU.missing():
            return super().why_unavailable()
        try:
            npu = _npu()
        except (ImportError, OSError, RuntimeError) as error:
            return f"torch_npu is installed but does not load: {_first_line(error)}. {_ENVIRONMENT}"
        if not npu.is_available():
            visible = os.environ.get(VISIBLE_DEVICES)
            state = f"{VISIBLE_DEVICES} is '{visible}'" if visible is not None else f"{VISIBLE_DEVICES} is not set"
            return f"torch_npu sees no NPU: check the driver (npu-smi info) and CANN; {state}"
        return None

    def device_name(self) -> str:
        name, generation = soc_name(), soc_generation()
        return f"{name} ({generation})" if generation else str(name)

    def memory_bytes(self) -> int | None:
        _, total = _npu().mem_get_info()
        return int(total)


_ENVIRONMENT = "Load CANN's environment first (source set_env.sh)"


def generation_of(name: str) -> str | None:
    """SoC generation of a device by its name: Ascend910B2 is A2, Ascend910_9382 A3, Ascend950PR_9579 A5; None for any other."""
    return next((generation for beginning, generation in _NAMES.items() if name.startswith(beginning)), None)


def soc_name() -> str | None:
    """Name of the current NPU; None if there is none."""
    if TORCH_NPU.missing():
        return None
    try:
        npu = _npu()
        return str(npu.get_device_name(npu.current_device())) if npu.is_available() else None
    except (ImportError, OSError, RuntimeError):
        return None


def soc_generation() -> str | None:
    """A2, A3 or A5; None if there is no NPU or its name is not known."""
    return generation_of(soc_name() or "")


def cann_version() -> tuple[int, ...] | None:
    """CANN's version, such as (9, 0, 0); None if it cannot be asked."""
    try:
        text = str(importlib.import_module("torch_npu.npu.utils").get_cann_version())
    except (ImportError, OSError, RuntimeError, AttributeError):
        return None
    parts = text.split(".")
    return tuple(map(int, parts[:2])) if len(parts) > 1 and all(part.isdigit() for part in parts[:2]) else None


def _npu() -> Any:
    importlib.import_module("torch_npu")
    # torch knows the attribute only after that import
    return getattr(torch, "npu")  # noqa: B009


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
