"""Wan Animate: Wan with a reference image as the first frame; the face adapter's attention is cross-attention within each frame."""

from __future__ import annotations

from ditattn.models.base import ModelFamily, video_only
from ditattn.models.wan import frame_rate, frames_to_ask

__all__ = ["WAN_ANIMATE"]

WAN_ANIMATE = ModelFamily(
    name="Wan Animate",
    transformer_classes=("WanAnimateTransformer3DModel",),
    layout=video_only,
    self_attention=r"blocks\.\d+\.attn1",
    frame_rate=frame_rate,
    size_multiple=16,
    frames_to_ask=frames_to_ask,
    full_precision_vaes=frozenset({"AutoencoderKLWan"}),
    notes="the reference image is the first frame; steps begin anew with every segment of a long video",
)
