"""HunyuanVideo: video tokens, then text tokens, in one joint attention; the text is padded at its end and masked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ditattn.models.base import (
    SINGLE_STREAM_LINEAR_LAYERS,
    ModelFamily,
    SplitAxis,
    SplitPlan,
    TokenLayout,
    patch_triple,
    text_length,
    video_and_suffix,
)

__all__ = ["HUNYUAN_VIDEO"]


def layout(config: Any, arguments: Mapping[str, Any]) -> TokenLayout:
    """`hidden_states` is `(B, C, T, H, W)`."""
    return TokenLayout(tuple(arguments["hidden_states"].shape), patch_triple(config), num_suffix_tokens=text_length(arguments))


def split_plan(config: Any) -> SplitPlan:
    """Text and video where the blocks begin, the positions where they are made. The text's refinement before runs whole."""
    tokens, positions = SplitAxis(1, 3), SplitAxis(0, 2)
    return {
        "rope": {0: positions, 1: positions},
        "transformer_blocks.0": {"hidden_states": tokens, "encoder_hidden_states": tokens},
        "proj_out": tokens,
    }


def never_split(config: Any) -> str | None:
    """Blocks that replace tokens count those of the first frame from the beginning of what they get."""
    replaces = getattr(config, "image_condition_type", None) == "token_replace"
    return "image_condition_type='token_replace': its blocks find the first frame at the beginning of the tokens" if replaces else None


HUNYUAN_VIDEO = ModelFamily(
    name="HunyuanVideo",
    transformer_classes=("HunyuanVideoTransformer3DModel",),
    layout=layout,
    self_attention=r"(transformer_blocks|single_transformer_blocks)\.\d+\.attn",
    linear_layers=SINGLE_STREAM_LINEAR_LAYERS,
    size_multiple=16,
    streams=video_and_suffix,
    split_plan=split_plan,
    never_split=never_split,
    masks_stay_whole=True,
    notes="text after video, protected; its key-padding mask is honoured by every kernel but `fa`'s",
)
