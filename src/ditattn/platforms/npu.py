"""Ascend NPUs, through torch_npu."""

from __future__ import annotations

import importlib

import torch

from ditattn.attention.interface import AttentionBackendEnum
from ditattn.packages import SGL_KERNEL_NPU, TORCH_NPU
from ditattn.platforms.interface import Platform

__all__ = ["NpuPlatform"]

_HALF = (torch.bfloat16, torch.float16)


class NpuPlatform(Platform):
    """The sparse backends run their plans through plain torch operations here until the Ascend block-sparse operators are added."""

    device_type = "npu"
    packages = {  # noqa: RUF012
        AttentionBackendEnum.TORCH_SDPA: (TORCH_NPU,),
        AttentionBackendEnum.FA: (TORCH_NPU,),
        AttentionBackendEnum.LASER_ATTN: (TORCH_NPU, SGL_KERNEL_NPU),
        AttentionBackendEnum.BLOCK_SPARSE_ATTN: (TORCH_NPU,),
        AttentionBackendEnum.RAIN_FUSION_ATTN: (TORCH_NPU,),
    }
    dtypes = {AttentionBackendEnum.FA: _HALF, AttentionBackendEnum.LASER_ATTN: _HALF}  # noqa: RUF012

    def why_unavailable(self) -> str | None:
        if TORCH_NPU.missing():
            # the backends' own needs say the rest
            return None
        importlib.import_module("torch_npu")
        npu = getattr(torch, "npu", None)
        if npu is None or not npu.is_available():
            return "torch_npu sees no NPU: check the driver, CANN and ASCEND_RT_VISIBLE_DEVICES"
        return None

    def device_name(self) -> str:
        importlib.import_module("torch_npu")
        return str(getattr(torch, "npu").get_device_name())  # noqa: B009
