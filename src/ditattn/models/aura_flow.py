"""AuraFlow: register and text tokens, then image tokens, in one joint attention that calls torch's SDPA directly."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ditattn.models.base import ModelFamily, TokenLayout, image_layout, text_length

__all__ = ["AURA_FLOW"]

# learned tokens that stand before the text
REGISTERS = 8


def layout(config: Any, arguments: Mapping[str, Any]) -> TokenLayout:
    """`hidden_states` is `(B, C, H, W)`."""
    return image_layout(config.patch_size, arguments, prefix=REGISTERS + text_length(arguments))


AURA_FLOW = ModelFamily(
    name="AuraFlow",
    transformer_classes=("AuraFlowTransformer2DModel",),
    layout=layout,
    self_attention=r"(joint_transformer_blocks|single_transformer_blocks)\.\d+\.attn",
    size_multiple=16,
    dispatches=False,
    notes="text before the image, protected; SDPA calls are redirected; heads of 256 run sparse by plain torch",
)
