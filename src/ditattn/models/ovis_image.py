"""Ovis-Image: text tokens, then image tokens, in one joint attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ditattn.models.base import SINGLE_STREAM_LINEAR_LAYERS, ModelFamily, TokenLayout
from ditattn.models.position_ids import packed_layout

__all__ = ["OVIS_IMAGE"]


def layout(config: Any, arguments: Mapping[str, Any]) -> TokenLayout:
    """`hidden_states` is packed `(B, S, C)`; `img_ids` `(S, 3)` as in Flux.

    Raises:
        ValueError: the image's tokens are not a full grid at the front, row by row.
    """
    return packed_layout(arguments)


OVIS_IMAGE = ModelFamily(
    name="Ovis-Image",
    transformer_classes=("OvisImageTransformer2DModel",),
    layout=layout,
    self_attention=r"(transformer_blocks|single_transformer_blocks)\.\d+\.attn",
    linear_layers=SINGLE_STREAM_LINEAR_LAYERS,
    notes="text before the image, protected",
)
