"""Optional packages: what each gives and how it is installed. Looked for, never imported, until something of theirs is taken."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

__all__ = ["ATTENTIONS", "DIFFUSERS", "IMAGEIO", "MINDIESD", "SGL_KERNEL_NPU", "TORCHMETRICS", "TORCH_NPU", "TRITON", "Package"]


@dataclass(frozen=True)
class Package:
    """Something to install: its import name, what it gives and the command that installs it."""

    module: str
    gives: str
    install: str

    def missing(self) -> bool:
        """Look for the module without importing it (a parent package is imported if the name is dotted)."""
        try:
            return importlib.util.find_spec(self.module) is None
        except (ImportError, ValueError):
            return True

    def sentence(self) -> str:
        """One clause that says what is missing, what it is for and what installs it."""
        return f"package '{self.module}' is missing ({self.gives}): {self.install}"


DIFFUSERS = Package("diffusers", "models, schedulers and pipelines", "pip install 'ditattn[diffusers]'")
IMAGEIO = Package("imageio_ffmpeg", "h264 video files", "pip install 'ditattn[video]'")
TORCHMETRICS = Package("torchmetrics", "SSIM and MS-SSIM", "pip install 'ditattn[metrics]'")
TRITON = Package("triton", "kernels for NVIDIA GPUs", "pip install triton (on Linux; the version that torch names, where it names one)")
TORCH_NPU = Package("torch_npu", "PyTorch on Ascend NPUs", "pip install torch-npu (the version that matches torch; needs CANN)")
_SGL_KERNEL_NPU = "build sgl-kernel-npu from source (github.com/sgl-project/sgl-kernel-npu)"
SGL_KERNEL_NPU = Package("sgl_kernel_npu", "Laser and block-sparse kernels for Ascend 910", _SGL_KERNEL_NPU)
ATTENTIONS = Package("attentions", "the same kernels from older versions of sgl-kernel-npu", _SGL_KERNEL_NPU)
MINDIESD = Package(
    "mindiesd", "Laser kernels for Ascend 910, block-sparse kernels for Ascend 910 and 950", "pip install mindiesd (needs CANN)"
)
