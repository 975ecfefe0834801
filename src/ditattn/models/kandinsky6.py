"""Kandinsky 6: video tokens only in the video's self-attention; audio has attention of its own, text is cross-attention."""

from __future__ import annotations

from ditattn.models.base import ModelFamily
from ditattn.models.kandinsky5 import layout
from ditattn.models.wan import frames_to_ask, untrue_notices

__all__ = ["KANDINSKY6"]

KANDINSKY6 = ModelFamily(
    name="Kandinsky 6",
    transformer_classes=("Kandinsky6Transformer3DModel",),
    layout=layout,
    self_attention=r"visual_transformer_blocks\.\d+\.video_dec_block\.self_attention",
    head_size=lambda config: sum(config.axes_dims),
    size_multiple=16,
    frames_to_ask=frames_to_ask,
    untrue_notices=untrue_notices("kandinsky6.pipeline_kandinsky6_ti2va"),
    notes="text and image to video with audio, which stays dense; a reference is a further frame",
)
