"""Krea 2: text tokens, then image tokens, in one attention; the text is padded and masked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.utils.weak import WeakIdKeyDictionary

from ditattn.models.base import LINEAR_LAYERS, ModelFamily, TokenLayout, text_length
from ditattn.models.position_ids import grids_of_positions

__all__ = ["KREA2"]


def layout(config: Any, arguments: Mapping[str, Any]) -> TokenLayout:
    """`hidden_states` is the packed image `(B, S, C)`; `position_ids` `(T + S, 3)` are those of the text and the image.

    Raises:
        ValueError: the image's tokens are not a full grid behind the text, row by row.
    """
    text, ids = text_length(arguments), arguments["position_ids"]
    if ids not in _image_ids:
        _image_ids[ids] = ids[text:]
    batch, length, channels = arguments["hidden_states"].shape
    return TokenLayout.of_grids(batch, channels, grids_of_positions(_image_ids[ids], start=text), text + length)


# of the same positions the same tensor, so that they are read once
_image_ids: WeakIdKeyDictionary = WeakIdKeyDictionary()


KREA2 = ModelFamily(
    name="Krea 2",
    transformer_classes=("Krea2Transformer2DModel",),
    layout=layout,
    self_attention=r"transformer_blocks\.\d+\.attn",
    # of a gated feed-forward, not of experts
    linear_layers=LINEAR_LAYERS + r"|ff\.gate",
    notes="text before the image, protected",
)
