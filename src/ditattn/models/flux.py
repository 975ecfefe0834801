"""Flux: text tokens, then image tokens, in one joint attention; reference images stand behind the image."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ditattn.models.base import SINGLE_STREAM_LINEAR_LAYERS, ModelFamily, TokenLayout, prefix_and_rest
from ditattn.models.position_ids import packed_layout

__all__ = ["FLUX"]


def layout(config: Any, arguments: Mapping[str, Any]) -> TokenLayout:
    """`hidden_states` is packed `(B, S, C)`; `img_ids` `(S, 3)` tells the rows and columns, and its first column is 0 for the image itself.

    A reference has a number of its own in the first column and is a grid of its own if its tokens stand row by row; else it is kept whole.

    Raises:
        ValueError: the image's tokens are not a full grid at the front, row by row, or there are fewer tokens than positions.
    """
    return packed_layout(arguments)


FLUX = ModelFamily(
    name="Flux.1",
    transformer_classes=("FluxTransformer2DModel",),
    layout=layout,
    self_attention=r"(transformer_blocks|single_transformer_blocks)\.\d+\.attn",
    linear_layers=SINGLE_STREAM_LINEAR_LAYERS,
    streams=prefix_and_rest,
    notes="text before the image, protected; every reference image has blocks of its own; an image is one frame: no first-frame rule",
)
