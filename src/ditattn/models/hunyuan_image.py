"""HunyuanImage 2.1: image tokens, then text tokens, in one joint attention; the text of two encoders is padded at its end and masked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ditattn.models.base import SINGLE_STREAM_LINEAR_LAYERS, ModelFamily, TokenLayout, text_length

__all__ = ["HUNYUAN_IMAGE"]


def layout(config: Any, arguments: Mapping[str, Any]) -> TokenLayout:
    """`hidden_states` is `(B, C, H, W)`, or `(B, C, T, H, W)` where the patch has three sizes."""
    shape, patch = tuple(arguments["hidden_states"].shape), tuple(map(int, config.patch_size))
    if len(shape) != 2 + len(patch):
        raise ValueError(f"latents {shape} and patch {patch} differ in their axes")
    second = arguments.get("encoder_hidden_states_2")
    text = text_length(arguments) + (0 if second is None else int(second.shape[1]))
    one_frame = (1,) if len(patch) == 2 else ()
    return TokenLayout((*shape[:2], *one_frame, *shape[2:]), (*one_frame, *patch), num_suffix_tokens=text)


HUNYUAN_IMAGE = ModelFamily(
    name="HunyuanImage 2.1",
    transformer_classes=("HunyuanImageTransformer2DModel",),
    layout=layout,
    self_attention=r"(transformer_blocks|single_transformer_blocks)\.\d+\.attn",
    linear_layers=SINGLE_STREAM_LINEAR_LAYERS,
    notes="text after the image, protected; its key-padding mask is honoured by every kernel but `fa`'s",
)
