"""Ascend NPUs, through torch_npu."""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from ditattn.attention.interface import AttentionBackendEnum
from ditattn.packages import ATTENTIONS, MINDIESD, SGL_KERNEL_NPU, TORCH_NPU, Package
from ditattn.platforms.interface import Platform

__all__ = ["GENERATIONS", "NpuPlatform", "cann_version", "generation_of", "soc_generation", "soc_name"]

_HALF = (torch.bfloat16, torch.float16)

GENERATIONS = ("A2", "A3", "A5")
# What a device's name begins with. The longer beginning decides: A3 is called Ascend910_93xx.
_NAMES = {"Ascend910B": "A2", "Ascend910_93": "A3", "Ascend950": "A5"}
VISIBLE_DEVICES = "ASCEND_RT_VISIBLE_DEVICES"


class NpuPlatform(Platform):
    """Laser needs one of three packages. The sparse backends run through plain torch where no package brings a block-sparse operator."""

    device_type = "npu"
    packages = dict.fromkeys(AttentionBackendEnum, (TORCH_NPU,))
    any_of: ClassVar[Mapping[AttentionBackendEnum, tuple[Package, ...]]] = {
        AttentionBackendEnum.LASER_ATTN: (SGL_KERNEL_NPU, ATTENTIONS, MINDIESD),
    }
    """One of these is needed beside `packages`."""
    dtypes = {AttentionBackendEnum.FA: _HALF, AttentionBackendEnum.LASER_ATTN: _HALF}  # noqa: RUF012

    def why_unavailable(self) -> str | None:
        if TORCH_NPU.missing():
            # the backends' own needs say the rest
            return None
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
        return int(_npu().mem_get_info()[1])

    def why_not(self, backend: AttentionBackendEnum, head_size: int | None = None, dtype: torch.dtype | None = None) -> str | None:
        reason = super().why_not(backend, head_size, dtype)
        if backend not in self.any_of:
            return reason
        providers = self.any_of[backend]
        if TORCH_NPU.missing() and all(package.missing() for package in providers):
            return f"{reason}; {'; or '.join(package.sentence() for package in providers)}"
        return reason or _why_no_laser(head_size, dtype)


_ENVIRONMENT = "Load CANN's environment first (source set_env.sh)"


def _why_no_laser(head_size: int | None, dtype: torch.dtype | None) -> str | None:
    """The reasons of every Laser provider; None if one can run."""
    from ditattn.ops.dense_attention import LASER_NAMES, TABLE
    from ditattn.ops.table import CallFacts

    facts = CallFacts("npu", dtype or torch.bfloat16, head_size or 128)
    reasons = [row.refusal(facts) for row in TABLE if row.name in LASER_NAMES]
    return None if None in reasons else "; ".join(dict.fromkeys(str(reason) for reason in reasons))


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
