"""ERNIE-Image: image tokens, then text tokens, in one attention; the text is padded at its end and masked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ditattn.models.base import ModelFamily, TokenLayout, image_layout

__all__ = ["ERNIE_IMAGE"]


def layout(config: Any, arguments: Mapping[str, Any]) -> TokenLayout:
    """`hidden_states` is `(B, C, H, W)`, `text_bth` `(B, S, D)`."""
    return image_layout(config.patch_size, arguments, suffix=int(arguments["text_bth"].shape[1]))


def head_size(config: Any) -> int:
    return int(config.hidden_size) // int(config.num_attention_heads)


ERNIE_IMAGE = ModelFamily(
    name="ERNIE-Image",
    transformer_classes=("ErnieImageTransformer2DModel",),
    layout=layout,
    self_attention=r"layers\.\d+\.self_attention",
    head_size=head_size,
    notes="text after the image, protected; its key-padding mask is honoured by every kernel but `fa`'s",
)
