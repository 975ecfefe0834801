"""Where this package's Triton kernels can run. Asks torch and the environment; triton itself is not imported."""

from __future__ import annotations

import os

import torch

__all__ = ["MIN_CAPABILITY", "why_not_cuda", "why_not_interpreted"]

# Ampere: asynchronous copies and bf16 in the matrix units
MIN_CAPABILITY = (8, 0)


def why_not_cuda() -> str | None:
    """Why the kernels cannot run on this machine's GPU, or None."""
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    if torch.version.cuda is None:
        # AMD: compute capabilities mean something else there
        return None
    capability = torch.cuda.get_device_capability()
    if capability < MIN_CAPABILITY:
        return f"needs compute capability {MIN_CAPABILITY[0]}.{MIN_CAPABILITY[1]} or newer, this GPU has {capability[0]}.{capability[1]}"
    return None


def why_not_interpreted() -> str | None:
    """Why the kernels cannot run on CPU tensors, or None. The variable must be set before triton is first imported."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        return None
    return "runs on cpu only in triton's interpreter, for checking: set TRITON_INTERPRET=1 before Python starts"
