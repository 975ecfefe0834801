"""CogView 3 Plus and 4: text tokens, then image tokens, in one joint attention that calls torch's SDPA directly."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ditattn.models.base import ModelFamily, TokenLayout, image_layout, text_length

__all__ = ["COGVIEW4"]


def layout(config: Any, arguments: Mapping[str, Any]) -> TokenLayout:
    """`hidden_states` is `(B, C, H, W)`."""
    return image_layout(config.patch_size, arguments, prefix=text_length(arguments))


COGVIEW4 = ModelFamily(
    name="CogView 3 Plus, 4",
    transformer_classes=("CogView3PlusTransformer2DModel", "CogView4Transformer2DModel"),
    layout=layout,
    self_attention=r"transformer_blocks\.\d+\.attn1",
    size_multiple=16,
    dispatches=False,
    notes="text before the image, protected; SDPA calls are redirected",
)
