"""Wan 2.1 and 2.2: video tokens only in self-attention (`attn1`); text, and in image-to-video the image, are separate cross-attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ditattn.models.interface import ModelFamily, TokenLayout, patch_triple

__all__ = ["WAN"]


def layout(config: Any, arguments: Mapping[str, Any]) -> TokenLayout:
    """`hidden_states` is `(B, C, T, H, W)`."""
    return TokenLayout(tuple(arguments["hidden_states"].shape), patch_triple(config))


WAN = ModelFamily(
    name="Wan 2.1, Wan 2.2",
    transformer_classes=("WanTransformer3DModel",),
    layout=layout,
    self_attention=r"blocks\.\d+\.attn1",
    notes="text and image to video; the two transformers of Wan 2.2 share one step count",
)
