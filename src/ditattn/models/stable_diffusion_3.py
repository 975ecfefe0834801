"""Stable Diffusion 3 and 3.5: image tokens, then text tokens, in one joint attention; layers of 3.5 have one of the image alone too."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ditattn.models.base import ModelFamily, TokenLayout, image_layout, text_length

__all__ = ["STABLE_DIFFUSION_3"]


def layout(config: Any, arguments: Mapping[str, Any]) -> TokenLayout:
    """`hidden_states` is `(B, C, H, W)`."""
    return image_layout(config.patch_size, arguments, suffix=text_length(arguments))


STABLE_DIFFUSION_3 = ModelFamily(
    name="Stable Diffusion 3, 3.5",
    transformer_classes=("SD3Transformer2DModel",),
    layout=layout,
    self_attention=r"transformer_blocks\.\d+\.attn2?",
    image_only=r"transformer_blocks\.\d+\.attn2",
    size_multiple=16,
    dispatches=False,
    notes="text after the image, protected; the second attention of 3.5 (`attn2`) sees the image alone; SDPA calls are redirected",
)
