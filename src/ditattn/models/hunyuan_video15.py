"""HunyuanVideo 1.5: video tokens, then image and text tokens in one joint attention, the padded ones last and masked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ditattn.models.base import ModelFamily, TokenLayout, patch_triple

__all__ = ["HUNYUAN_VIDEO_15"]

BEHIND = ("image_embeds", "encoder_hidden_states_2", "encoder_hidden_states")


def layout(config: Any, arguments: Mapping[str, Any]) -> TokenLayout:
    """`hidden_states` is `(B, C, T, H, W)`; image, glyph and text tokens, real ones in front of padded ones, stand behind."""
    return TokenLayout(
        tuple(arguments["hidden_states"].shape),
        patch_triple(config),
        num_suffix_tokens=sum(int(arguments[name].shape[1]) for name in BEHIND),
    )


HUNYUAN_VIDEO_15 = ModelFamily(
    name="HunyuanVideo 1.5",
    transformer_classes=("HunyuanVideo15Transformer3DModel",),
    layout=layout,
    self_attention=r"transformer_blocks\.\d+\.attn",
    masks_of_pairs=True,
    notes="image and text behind the video, protected; its masks of token pairs are read as key padding, once per forward",
)
