"""CogVideoX: text tokens, then video tokens, in one joint attention that calls torch's SDPA directly."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ditattn.models.base import ModelFamily, TokenLayout, patch_triple, prefix_and_rest, text_length

__all__ = ["COGVIDEOX", "frame_rate", "layout"]


def layout(config: Any, arguments: Mapping[str, Any]) -> TokenLayout:
    """`hidden_states` is `(B, T, C, H, W)`."""
    batch, frames, channels, rows, columns = arguments["hidden_states"].shape
    return TokenLayout((batch, channels, frames, rows, columns), patch_triple(config), num_prefix_tokens=text_length(arguments))


def frame_rate(pipeline_config: Any) -> int:
    """CogVideoX was trained on slow videos."""
    return 8


COGVIDEOX = ModelFamily(
    name="CogVideoX",
    transformer_classes=("CogVideoXTransformer3DModel",),
    layout=layout,
    self_attention=r"transformer_blocks\.\d+\.attn1",
    frame_rate=frame_rate,
    dispatches=False,
    streams=prefix_and_rest,
    notes="text before video, protected; bypasses diffusers' dispatcher, so SDPA calls inside its attention modules are redirected",
)
