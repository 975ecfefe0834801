"""LTX-Video: video tokens only in self-attention (`attn1`); text is separate cross-attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ditattn.models.base import ModelFamily, TokenLayout, prefix_and_rest

__all__ = ["LTX_VIDEO"]


def layout(config: Any, arguments: Mapping[str, Any]) -> TokenLayout:
    """`hidden_states` is packed `(B, S, C)`; `num_frames`, `height` and `width` are in tokens.

    Raises:
        ValueError: the sequence is not the grid. Pipelines with condition tokens pass coordinates instead of the three sizes (TypeError,
            KeyError): where such tokens stand is not known here.
    """
    batch, length, channels = arguments["hidden_states"].shape
    frames, rows, columns = (int(arguments[name]) for name in ("num_frames", "height", "width"))
    if length != frames * rows * columns:
        raise ValueError(f"{length} tokens are not a grid of {frames} x {rows} x {columns}")
    return TokenLayout((batch, channels, frames, rows, columns), (1, 1, 1))


LTX_VIDEO = ModelFamily(
    name="LTX-Video",
    transformer_classes=("LTXVideoTransformer3DModel",),
    layout=layout,
    self_attention=r"transformer_blocks\.\d+\.attn1",
    streams=prefix_and_rest,
)
