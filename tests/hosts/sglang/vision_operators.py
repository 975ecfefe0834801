"""torchvision beside a torch without CUDA: its published wheel is made for CUDA, so its compiled operators do not load, and it registers
what torch knows of two of them all the same. sglang imports torchvision for models that nothing here runs."""

from __future__ import annotations

from functools import cache

import torch

_library = torch.library.Library("torchvision", "DEF")


@cache
def declare() -> None:
    """Once, before torchvision is imported."""
    for name in ("nms", "qnms"):
        _library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
