"""PRX: queries are the image's alone, keys those of the text and the image, in one attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ditattn.models.base import LINEAR_LAYERS, ModelFamily, TokenLayout, image_layout, text_length

__all__ = ["PRX"]


def layout(config: Any, arguments: Mapping[str, Any]) -> TokenLayout:
    """`hidden_states` is `(B, C, H, W)`."""
    return image_layout(config.patch_size, arguments, prefix=text_length(arguments))


def head_size(config: Any) -> int:
    return int(config.hidden_size) // int(config.num_heads)


PRX = ModelFamily(
    name="PRX",
    transformer_classes=("PRXTransformer2DModel",),
    layout=layout,
    self_attention=r"blocks\.\d+\.attention",
    linear_layers=LINEAR_LAYERS + "|gate_proj|up_proj|down_proj",
    text_is_keys_only=True,
    head_size=head_size,
    notes="keys of the text before those of the image, protected",
)
