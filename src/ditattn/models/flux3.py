"""Flux 3: first layers of image, text and references each alone, then text, image and references in one joint attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ditattn.models.base import ModelFamily, TokenLayout, text_length
from ditattn.models.position_ids import grids_of_positions

__all__ = ["FLUX3"]


def layout(config: Any, arguments: Mapping[str, Any]) -> TokenLayout:
    """`hidden_states` is the packed image `(B, S, C)` with `img_ids` `(S, 4)`; references come in a tensor of their own.

    Raises:
        ValueError: `img_ids` are not a full grid, row by row.
    """
    text = text_length(arguments)
    batch, length, channels = arguments["hidden_states"].shape
    references = arguments.get("image_cond_hidden_states")
    behind = 0 if references is None else int(references.shape[1])
    return TokenLayout.of_grids(batch, channels, grids_of_positions(arguments["img_ids"], start=text), text + length + behind)


FLUX3 = ModelFamily(
    name="Flux.3",
    transformer_classes=("Flux3Transformer2DModel",),
    layout=layout,
    self_attention=r"(mode_blocks\.image|single_transformer_blocks)\.\d+\.attn",
    image_only=r"mode_blocks\.image\.\d+\.attn",
    notes="text before the image, reference images after it, both protected; the first layers see the image alone",
)
