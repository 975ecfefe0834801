"""Ideogram 4: text tokens, padded in front, then image tokens, in one attention; a pass without text sees the image alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from ditattn.models.base import ModelFamily, TokenLayout, rising
from ditattn.models.position_ids import grids_of_positions

__all__ = ["IDEOGRAM4"]

IMAGE, PADDING = 2, -1
"""What `indicator` calls a token of the image, and `segment_ids` one that is padding."""


def layout(config: Any, arguments: Mapping[str, Any]) -> TokenLayout:
    """`hidden_states` is packed `(B, S, C)`; `position_ids` `(B, S, 3)` are those of text and image, `indicator` `(B, S)` tells them apart.

    Raises:
        ValueError: samples of one batch differ, or the image's tokens are not a full grid behind the text, row by row.
    """
    indicator, ids = arguments["indicator"], arguments["position_ids"]
    if ids not in _image_ids:
        _image_ids[ids] = _read(indicator, ids)
    text, positions = _image_ids[ids]
    batch, length, channels = arguments["hidden_states"].shape
    grids = grids_of_positions(positions, image=int(positions[0, 0]), start=text)
    return TokenLayout.of_grids(batch, channels, grids, length)


# a pipeline passes the same positions in every step: reading them costs a device synchronisation, once per run
_image_ids: WeakIdKeyDictionary = WeakIdKeyDictionary()


def _read(indicator: Tensor, ids: Tensor) -> tuple[int, Tensor]:
    """How many tokens stand before the image, and the positions of the image's."""
    is_image = (indicator == IMAGE).cpu()
    if not bool((is_image == is_image[:1]).all()) or not bool(is_image.any()):
        raise ValueError("samples of one batch differ in where their image stands, or there is none")
    text = int(is_image[0].long().argmax())
    if not bool(is_image[0, text:].all()):
        raise ValueError("tokens of another kind stand behind the image's")
    return text, ids[0, text:].cpu()


def key_mask(config: Any, arguments: Mapping[str, Any]) -> Tensor | None:
    """The model makes a square mask of `segment_ids` `(B, S)`; None where a sequence holds more than one segment and padding."""
    segments = arguments["segment_ids"]
    if segments not in _masks:
        last = segments[:, -1:]
        real = segments == last
        _masks[segments] = real if bool((real | (segments == PADDING)).all()) and bool((last != PADDING).all()) else None
    mask: Tensor | None = _masks[segments]
    return mask


_masks: WeakIdKeyDictionary = WeakIdKeyDictionary()


IDEOGRAM4 = ModelFamily(
    name="Ideogram 4",
    transformer_classes=("Ideogram4Transformer2DModel",),
    layout=layout,
    time=rising("timestep"),
    self_attention=r"layers\.\d+\.attention",
    key_mask=key_mask,
    notes="text before the image, protected; the `unconditional_transformer` sees the image alone and is served too",
)
