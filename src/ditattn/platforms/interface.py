"""What the package asks of a machine. One file per torch device type; facts only, no computation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch

from ditattn.attention.interface import KERNEL_HEAD_SIZES, AttentionBackendEnum, check_head_size
from ditattn.errors import BackendUnavailable
from ditattn.packages import Package

__all__ = ["BACKEND_PATHS", "Platform"]

_BACKENDS = "ditattn.attention.backends"

# Literal, so that naming a backend imports none.
BACKEND_PATHS: Mapping[AttentionBackendEnum, str] = {
    AttentionBackendEnum.TORCH_SDPA: f"{_BACKENDS}.torch_sdpa.TorchSDPABackend",
    AttentionBackendEnum.FA: f"{_BACKENDS}.fa.FABackend",
    AttentionBackendEnum.LASER_ATTN: f"{_BACKENDS}.laser_attn.LaserAttentionBackend",
    AttentionBackendEnum.BLOCK_SPARSE_ATTN: f"{_BACKENDS}.block_sparse_attn.BlockSparseAttentionBackend",
    AttentionBackendEnum.RAIN_FUSION_ATTN: f"{_BACKENDS}.rain_fusion_attn.RainFusionAttentionBackend",
}

# The backends with kernels of their own; the other two take any head size.
_WITH_KERNELS = (AttentionBackendEnum.LASER_ATTN, AttentionBackendEnum.BLOCK_SPARSE_ATTN, AttentionBackendEnum.RAIN_FUSION_ATTN)


class Platform:
    """A torch device type and what can run on it.

    Subclasses set the class attributes and override the probes.
    """

    device_type: ClassVar[str]
    best_dense: ClassVar[AttentionBackendEnum] = AttentionBackendEnum.TORCH_SDPA
    packages: ClassVar[Mapping[AttentionBackendEnum, tuple[Package, ...]]] = {}
    """What each backend needs beyond torch."""
    dtypes: ClassVar[Mapping[AttentionBackendEnum, tuple[torch.dtype, ...]]] = {}
    """Dtypes of backends that do not take fp32, bf16 and fp16 alike."""

    def why_unavailable(self) -> str | None:
        """Why this machine has no such device, or None."""
        return None

    def device_name(self) -> str:
        """Name of the device for people."""
        return self.device_type

    def memory_bytes(self) -> int | None:
        """Memory of the device; None if unknown."""
        return None

    def why_not(self, backend: AttentionBackendEnum, head_size: int | None = None, dtype: torch.dtype | None = None) -> str | None:
        """Why `backend` cannot run here (for this head size and dtype, where given), or None."""
        reason = self.why_unavailable()
        if reason is not None:
            return reason
        missing = [package.sentence() for package in self.packages.get(backend, ()) if package.missing()]
        if missing:
            return "; ".join(missing)
        if head_size is not None and backend in _WITH_KERNELS and head_size not in KERNEL_HEAD_SIZES:
            return f"supports head sizes {', '.join(map(str, KERNEL_HEAD_SIZES))}, not {head_size}"
        possible = self.dtypes.get(backend, (torch.float32, torch.bfloat16, torch.float16))
        if dtype is not None and dtype not in possible:
            return f"takes {', '.join(str(d).removeprefix('torch.') for d in possible)}, not {str(dtype).removeprefix('torch.')}"
        return None

    def get_attn_backend_cls_str(self, selected_backend: AttentionBackendEnum | str | None, head_size: int, dtype: torch.dtype) -> str:
        """Dotted path of the backend class that serves a request.

        Args:
            selected_backend: a backend or its name; None takes the platform's best dense backend.
            head_size: D.
            dtype: of query, key and value.

        Raises:
            UnknownBackend: no backend of that name.
            UnsupportedHeadSize: the backend does not support `head_size`; says which it does.
            BackendUnavailable: something is missing on this machine; says what, what it gives and what installs it.
        """
        if selected_backend is None:
            return BACKEND_PATHS[self.best_dense]
        backend = AttentionBackendEnum.parse(selected_backend)
        if backend in _WITH_KERNELS:
            check_head_size(str(backend), head_size, KERNEL_HEAD_SIZES)
        reason = self.why_not(backend, head_size, dtype)
        if reason is not None:
            possible = ", ".join(str(other) for other in AttentionBackendEnum if self.why_not(other, head_size, dtype) is None)
            asked = f"attention backend '{backend}' was asked for on {self.device_type}"
            raise BackendUnavailable(f"{asked}: {reason}. Possible there: {possible or 'none'}")
        return BACKEND_PATHS[backend]
