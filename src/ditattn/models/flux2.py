"""Flux 2: text tokens, then image tokens, in one joint attention; reference images stand behind the image."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ditattn.models.base import ModelFamily, TokenLayout, prefix_and_rest
from ditattn.models.position_ids import packed_layout

__all__ = ["FLUX2"]


def layout(config: Any, arguments: Mapping[str, Any]) -> TokenLayout:
    """`hidden_states` is packed `(B, S, C)`; `img_ids` `(B, S, 4)` are image number (0 for the image itself), row, column, 0.

    Raises:
        ValueError: the image's tokens are not a full grid at the front, row by row. So it is where the Klein pipeline with a key-value
            cache stores its reference images, in its first step.
    """
    return packed_layout(arguments)


FLUX2 = ModelFamily(
    name="Flux.2",
    transformer_classes=("Flux2Transformer2DModel",),
    layout=layout,
    self_attention=r"(transformer_blocks|single_transformer_blocks)\.\d+\.attn",
    streams=prefix_and_rest,
    notes="as Flux.1; with the key-value cache of Klein's KV pipeline, calls that read or write the cache run densely",
)
