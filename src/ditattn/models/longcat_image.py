"""LongCat-Image: text tokens, then image tokens, in one joint attention; the image to edit stands behind the image."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ditattn.models.base import SINGLE_STREAM_LINEAR_LAYERS, ModelFamily, TokenLayout
from ditattn.models.position_ids import packed_layout

__all__ = ["LONGCAT_IMAGE"]

# the number under which `img_ids` hold the image; 0 is the text, 2 the image to edit
IMAGE = 1


def layout(config: Any, arguments: Mapping[str, Any]) -> TokenLayout:
    """`hidden_states` is packed `(B, S, C)`; `img_ids` `(S, 3)` are modality, row, column, the last two counted from the text's length.

    Raises:
        ValueError: the image's tokens are not a full grid at the front, row by row.
    """
    return packed_layout(arguments, IMAGE)


LONGCAT_IMAGE = ModelFamily(
    name="LongCat-Image",
    transformer_classes=("LongCatImageTransformer2DModel",),
    layout=layout,
    self_attention=r"(transformer_blocks|single_transformer_blocks)\.\d+\.attn",
    linear_layers=SINGLE_STREAM_LINEAR_LAYERS,
    notes="text before the image, protected; the image to edit, after it, has blocks of its own",
)
