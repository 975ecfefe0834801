"""Chroma: a Flux whose padded text is masked; text tokens, then image tokens, in one joint attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ditattn.models.base import SINGLE_STREAM_LINEAR_LAYERS, ModelFamily, TokenLayout
from ditattn.models.position_ids import packed_layout

__all__ = ["CHROMA"]


def layout(config: Any, arguments: Mapping[str, Any]) -> TokenLayout:
    """`hidden_states` is packed `(B, S, C)`; `img_ids` as in Flux.

    Raises:
        ValueError: the image's tokens are not a full grid at the front, row by row.
    """
    return packed_layout(arguments)


def key_mask(config: Any, arguments: Mapping[str, Any]) -> Any:
    """The blocks make a square mask of `attention_mask` `(B, S)`: which tokens are real."""
    return arguments.get("attention_mask")


CHROMA = ModelFamily(
    name="Chroma",
    transformer_classes=("ChromaTransformer2DModel",),
    layout=layout,
    self_attention=r"(transformer_blocks|single_transformer_blocks)\.\d+\.attn",
    linear_layers=SINGLE_STREAM_LINEAR_LAYERS,
    key_mask=key_mask,
    notes="text before the image, protected",
)
