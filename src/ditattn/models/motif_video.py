"""Motif Video: video tokens, then image and text tokens, in one joint attention; the last layers have another video behind."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ditattn.models.base import SINGLE_STREAM_LINEAR_LAYERS, ModelFamily, TokenLayout, patch_triple, text_length

__all__ = ["MOTIF_VIDEO"]


def layout(config: Any, arguments: Mapping[str, Any]) -> TokenLayout:
    """`hidden_states` is `(B, C, T, H, W)`; image tokens, if any, stand between video and text."""
    image = arguments.get("image_embeds")
    behind = text_length(arguments) + (0 if image is None else int(image.shape[1]))
    return TokenLayout(tuple(arguments["hidden_states"].shape), patch_triple(config), num_suffix_tokens=behind)


MOTIF_VIDEO = ModelFamily(
    name="Motif Video",
    transformer_classes=("MotifVideoTransformer3DModel",),
    layout=layout,
    self_attention=r"(transformer_blocks|single_transformer_blocks)\.\d+\.attn",
    linear_layers=SINGLE_STREAM_LINEAR_LAYERS,
    size_multiple=16,
    suffix_varies=True,
    notes="image and text after the video, in the decoder's layers the encoder's video, protected; padded text is masked",
)
