"""Mochi: video tokens, then the real text tokens, in one joint attention that calls torch's SDPA for each sample of a batch."""

from __future__ import annotations

from typing import Any

from ditattn.models.base import ModelFamily, video_only

__all__ = ["MOCHI"]


def frame_rate(pipeline_config: Any) -> int:
    """What the model was trained on."""
    return 30


MOCHI = ModelFamily(
    name="Mochi",
    transformer_classes=("MochiTransformer3DModel",),
    # how much text stands behind the video differs from sample to sample
    layout=video_only,
    self_attention=r"transformer_blocks\.\d+\.attn1",
    frame_rate=frame_rate,
    size_multiple=16,
    dispatches=False,
    suffix_varies=True,
    call_per_sample=True,
    notes="text after video, protected; bypasses diffusers' dispatcher as CogVideoX does, with a call for each sample of a batch",
)
