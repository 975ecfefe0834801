"""LTX 2: video tokens only in the video's self-attention (`attn1`); audio has attention of its own, text is cross-attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ditattn.models.base import ModelFamily, TokenLayout

__all__ = ["LTX2"]


def layout(config: Any, arguments: Mapping[str, Any]) -> TokenLayout:
    """`hidden_states` is packed `(B, S, C)`; `num_frames`, `height` and `width` are in tokens; keyframes and references stand behind."""
    batch, length, channels = arguments["hidden_states"].shape
    frames, rows, columns = (int(arguments[name]) for name in ("num_frames", "height", "width"))
    return TokenLayout((batch, channels, frames, rows, columns), (1, 1, 1), num_suffix_tokens=length - frames * rows * columns)


LTX2 = ModelFamily(
    name="LTX 2",
    transformer_classes=("LTX2VideoTransformer3DModel",),
    layout=layout,
    self_attention=r"transformer_blocks\.\d+\.attn1",
    notes="keyframes and references behind the video, protected; audio stays dense",
)
