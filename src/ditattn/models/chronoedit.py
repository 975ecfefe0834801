"""ChronoEdit: an edited image as the last frame of a video; video tokens only in self-attention (`attn1`), as in Wan."""

from __future__ import annotations

from ditattn.models.base import ModelFamily, one_stream, video_only
from ditattn.models.wan import frame_rate, frames_to_ask, untrue_notices

__all__ = ["CHRONOEDIT"]

CHRONOEDIT = ModelFamily(
    name="ChronoEdit",
    transformer_classes=("ChronoEditTransformer3DModel",),
    layout=video_only,
    self_attention=r"blocks\.\d+\.attn1",
    frame_rate=frame_rate,
    size_multiple=16,
    frames_to_ask=frames_to_ask,
    full_precision_vaes=frozenset({"AutoencoderKLWan"}),
    untrue_notices=untrue_notices("chronoedit.pipeline_chronoedit"),
    streams=one_stream,
    notes="without temporal reasoning, and in the steps after it, there are two latent frames: short sequences",
)
