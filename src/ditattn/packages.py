"""Optional packages: what each gives and how it is installed. Looked for, never imported, until something of theirs is taken."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

__all__ = ["ATTENTIONS", "DIFFUSERS", "IMAGEIO", "MINDIESD", "SGL_KERNEL_NPU", "TORCHMETRICS", "TORCH_NPU", "TRITON", "Package"]


@dataclass(frozen=True)
class Package:
    """Something to install.

    Attributes:
        module: its import name.
        gives: what it is for.
        install: the command that installs it.
        oldest: the oldest version that serves, and a file of its folder that older ones lack. By a file, since one module comes from
            several distributions (triton, pytorch-triton, triton-windows) whose versions would have to be found first.
    """

    module: str
    gives: str
    install: str
    oldest: tuple[str, str] | None = None

    def missing(self) -> bool:
        """True where it is not installed, or too old. Looks without importing it (a parent package is imported if the name is dotted)."""
        return not self._folders() or self._too_old()

    def sentence(self) -> str:
        """One clause that says what is missing, what it is for and what installs it."""
        state = f"is older than {self.oldest[0]}" if self.oldest and self._too_old() else "is missing"
        return f"package '{self.module}' {state} ({self.gives}): {self.install}"

    def _folders(self) -> list[Path]:
        """Where the module was found; a module of one file has the folder that it lies in."""
        try:
            spec = importlib.util.find_spec(self.module)
        except (ImportError, ValueError):
            return []
        if spec is None:
            return []
        places = spec.submodule_search_locations or [str(Path(spec.origin or ".").parent)]
        return [Path(place) for place in places]

    def _too_old(self) -> bool:
        if self.oldest is None:
            return False
        folders = self._folders()
        return bool(folders) and not any((folder / self.oldest[1]).exists() for folder in folders)


DIFFUSERS = Package("diffusers", "models, schedulers and pipelines", "pip install 'ditattn[diffusers]'")
IMAGEIO = Package("imageio_ffmpeg", "h264 video files", "pip install 'ditattn[video]'")
TORCHMETRICS = Package("torchmetrics", "SSIM and MS-SSIM", "pip install 'ditattn[metrics]'")
TRITON = Package(
    "triton",
    "kernels for NVIDIA GPUs",
    "pip install 'triton>=3.4' (on Linux; the version that torch names, where it names one)",
    oldest=("3.4", "tools/tensor_descriptor.py"),
)
TORCH_NPU = Package("torch_npu", "PyTorch on Ascend NPUs", "pip install torch-npu (the version that matches torch; needs CANN)")
_SGL_KERNEL_NPU = "build sgl-kernel-npu from source (github.com/sgl-project/sgl-kernel-npu)"
SGL_KERNEL_NPU = Package("sgl_kernel_npu", "Laser and block-sparse kernels for Ascend 910", _SGL_KERNEL_NPU)
ATTENTIONS = Package("attentions", "the same kernels from older versions of sgl-kernel-npu", _SGL_KERNEL_NPU)
MINDIESD = Package(
    "mindiesd", "Laser kernels for Ascend 910, block-sparse kernels for Ascend 910 and 950", "pip install mindiesd (needs CANN)"
)
