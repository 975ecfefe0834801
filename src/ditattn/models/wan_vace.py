"""Wan VACE: Wan with a control branch, whose blocks run before the others on as many tokens and are served too."""

from __future__ import annotations

from ditattn.models.base import ModelFamily, video_only
from ditattn.models.wan import frame_rate, frames_to_ask, untrue_notices

__all__ = ["WAN_VACE"]

WAN_VACE = ModelFamily(
    name="Wan VACE",
    transformer_classes=("WanVACETransformer3DModel",),
    layout=video_only,
    self_attention=r"(vace_)?blocks\.\d+\.attn1",
    runs_first=r"vace_.*",
    frame_rate=frame_rate,
    size_multiple=16,
    frames_to_ask=frames_to_ask,
    full_precision_vaes=frozenset({"AutoencoderKLWan"}),
    untrue_notices=untrue_notices("wan.pipeline_wan_vace"),
    notes="the blocks of the control branch are layers behind the others in number; reference images are the first frames",
)
