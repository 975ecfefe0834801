"""LTX-Video: video tokens only in self-attention (`attn1`); text is separate cross-attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ditattn.models.interface import ModelFamily, TokenLayout

__all__ = ["LTX_VIDEO"]


def layout(config: Any, arguments: Mapping[str, Any]) -> TokenLayout:
    """`hidden_states` is packed `(B, S, C)`; `num_frames`, `height` and `width` are in tokens. Appended condition tokens are a suffix."""
    batch, length, channels = arguments["hidden_states"].shape
    frames, rows, columns = (int(arguments[name]) for name in ("num_frames", "height", "width"))
    return TokenLayout((batch, channels, frames, rows, columns), (1, 1, 1), num_suffix_tokens=length - frames * rows * columns)


LTX_VIDEO = ModelFamily(
    name="LTX-Video",
    transformer_classes=("LTXVideoTransformer3DModel",),
    layout=layout,
    self_attention=r"transformer_blocks\.\d+\.attn1",
)
