"""HunyuanDiT: image tokens only in self-attention (`attn1`), which calls torch's SDPA directly; text is separate cross-attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ditattn.models.base import ModelFamily, TokenLayout, image_layout

__all__ = ["HUNYUAN_DIT"]


def layout(config: Any, arguments: Mapping[str, Any]) -> TokenLayout:
    """`hidden_states` is `(B, C, H, W)`."""
    return image_layout(config.patch_size, arguments)


HUNYUAN_DIT = ModelFamily(
    name="HunyuanDiT",
    transformer_classes=("HunyuanDiT2DModel",),
    layout=layout,
    self_attention=r"blocks\.\d+\.attn1",
    size_multiple=16,
    dispatches=False,
    notes="SDPA calls are redirected; heads of 88 are padded by kernels",
)
