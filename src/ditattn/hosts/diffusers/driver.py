"""Which pipeline runs a denoiser's forward: several may share one transformer, each with a scheduler of its own."""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any

from torch import nn

__all__ = ["driving_scheduler"]


def driving_scheduler(module: nn.Module) -> Any:
    """The scheduler of the innermost diffusers pipeline on the call stack that owns `module`; None if there is none.

    diffusers tells a model nothing about the pipeline that calls it, so the stack is the only source that is right for pipelines made from
    each other's components and needs no look at the device.
    """
    pipelines = sys.modules.get("diffusers.pipelines.pipeline_utils")
    if pipelines is None:
        # whoever runs one has imported it; a bare transformer needs none
        return None
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "__call__":
            owner = frame.f_locals.get("self")
            if isinstance(owner, pipelines.DiffusionPipeline) and any(
                getattr(part, "_orig_mod", part) is module for part in vars(owner).values()
            ):
                return getattr(owner, "scheduler", None)
        frame = frame.f_back
    return None
