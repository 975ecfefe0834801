"""HunyuanVideo 1.5: video tokens, then image and text tokens in one joint attention, the padded ones last and masked."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ditattn.models.base import ModelFamily, TokenLayout, patch_triple

__all__ = ["HUNYUAN_VIDEO_15"]

BEHIND = ("image_embeds", "encoder_hidden_states_2", "encoder_hidden_states")


def layout(config: Any, arguments: Mapping[str, Any]) -> TokenLayout:
    """`hidden_states` is `(B, C, T, H, W)`; image, glyph and text tokens, real ones in front of padded ones, stand behind."""
    behind = sum(int(arguments[name].shape[1]) for name in BEHIND)
    return TokenLayout(tuple(arguments["hidden_states"].shape), patch_triple(config), num_suffix_tokens=behind)


def key_mask(config: Any, arguments: Mapping[str, Any]) -> Tensor:
    """All of the video, then as many tokens as are real. Image tokens are, unless all of them are zero: text to video has no image."""
    found = layout(config, arguments)
    image = arguments["image_embeds"]
    real = image.any() * image.shape[1] + sum(
        arguments[name].bool().sum(1) for name in ("encoder_attention_mask", "encoder_attention_mask_2")
    )
    num_video = math.prod(found.grid)
    place = torch.arange(num_video + found.num_suffix_tokens, device=image.device)
    return place < num_video + real[:, None]


HUNYUAN_VIDEO_15 = ModelFamily(
    name="HunyuanVideo 1.5",
    transformer_classes=("HunyuanVideo15Transformer3DModel",),
    layout=layout,
    self_attention=r"transformer_blocks\.\d+\.attn",
    key_mask=key_mask,
    notes="image and text behind the video, protected; its square masks are known by the text's, as key padding",
)
