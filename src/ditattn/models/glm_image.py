"""GLM-Image: glyph tokens, then image tokens, in one joint attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ditattn.models.base import ModelFamily, TokenLayout, image_layout, text_length

__all__ = ["GLM_IMAGE"]


def layout(config: Any, arguments: Mapping[str, Any]) -> TokenLayout:
    """`hidden_states` is `(B, C, H, W)`. While editing, keys of the given images come from a cache and stand before those of the glyphs."""
    return image_layout(config.patch_size, arguments, prefix=text_length(arguments))


GLM_IMAGE = ModelFamily(
    name="GLM-Image",
    transformer_classes=("GlmImageTransformer2DModel",),
    layout=layout,
    self_attention=r"transformer_blocks\.\d+\.attn1",
    size_multiple=32,
    notes="glyphs before the image, protected; while an image is edited, calls that read its cached keys run densely",
)
