"""CogVideoX: text tokens, then video tokens, in one joint attention that calls torch's SDPA directly."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ditattn.models.base import ModelFamily, SplitAxis, SplitPlan, TokenLayout, patch_triple, prefix_and_rest, text_length

__all__ = ["COGVIDEOX", "frame_rate", "layout"]


def layout(config: Any, arguments: Mapping[str, Any]) -> TokenLayout:
    """`hidden_states` is `(B, T, C, H, W)`."""
    batch, frames, channels, rows, columns = arguments["hidden_states"].shape
    return TokenLayout((batch, channels, frames, rows, columns), patch_triple(config), num_prefix_tokens=text_length(arguments))


def split_plan(config: Any) -> SplitPlan:
    """Text and video where the blocks begin; rotary positions come with the forward, others are in the embedding."""
    tokens, positions = SplitAxis(1, 3), SplitAxis(0, 2)
    rotary: SplitPlan = {"": {"image_rotary_emb": (positions, positions)}} if config.use_rotary_positional_embeddings else {}
    blocks: SplitPlan = {"transformer_blocks.0": {"hidden_states": tokens, "encoder_hidden_states": tokens}, "proj_out": tokens}
    return {**rotary, **blocks}


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
    split_plan=split_plan,
    notes="text before video, protected; bypasses diffusers' dispatcher, so SDPA calls inside its attention modules are redirected",
)
