"""Bria 3.2 and Fibo: text tokens, then image tokens, in one joint attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ditattn.models.base import SINGLE_STREAM_LINEAR_LAYERS, ModelFamily, TokenLayout
from ditattn.models.position_ids import packed_layout

__all__ = ["BRIA"]


def layout(config: Any, arguments: Mapping[str, Any]) -> TokenLayout:
    """`hidden_states` is packed `(B, S, C)`; `img_ids` `(S, 3)` or `(B, S, 3)` as in Flux, references of Fibo's editing behind.

    Raises:
        ValueError: the image's tokens are not a full grid at the front, row by row.
    """
    return packed_layout(arguments)


BRIA = ModelFamily(
    name="Bria 3.2, Fibo",
    transformer_classes=("BriaTransformer2DModel", "BriaFiboTransformer2DModel"),
    layout=layout,
    self_attention=r"(transformer_blocks|single_transformer_blocks)\.\d+\.attn",
    linear_layers=SINGLE_STREAM_LINEAR_LAYERS,
    # Fibo's pipeline counts a packing that it does not do
    pixels_per_token=16,
    notes="text before the image, protected",
)
