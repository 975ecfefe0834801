"""LTX 2: video tokens only in the video's self-attention (`attn1`); audio has attention of its own, text is cross-attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from ditattn.models.base import ModelFamily, TokenLayout
from ditattn.models.coordinates import frame_steps, grids_beside
from ditattn.plan.token_grids import TokenGrid

__all__ = ["LTX2"]


def layout(config: Any, arguments: Mapping[str, Any]) -> TokenLayout:
    """`hidden_states` is packed `(B, S, C)`; `num_frames`, `height` and `width` are in tokens; keyframes and references stand behind.

    They are grids of their own where `video_coords` `(B, 3, S, 2)`, time, row and column where each token begins and ends, show them; else
    they are kept whole.
    """
    batch, length, channels = arguments["hidden_states"].shape
    frames, rows, columns = (int(arguments[name]) for name in ("num_frames", "height", "width"))
    own, coordinates = frames * rows * columns, arguments.get("video_coords")
    beside: tuple[TokenGrid, ...] = ()
    if coordinates is not None and own < length:
        if coordinates not in _beside:
            _beside[coordinates] = _read(coordinates.cpu(), own)
        beside = _beside[coordinates]
    return TokenLayout((batch, channels, frames, rows, columns), (1, 1, 1), num_suffix_tokens=length - own, further_grids=beside)


# a pipeline passes the same coordinates in every step: reading them costs a device synchronisation, once per run
_beside: WeakIdKeyDictionary = WeakIdKeyDictionary()


def _read(coordinates: Tensor, own: int) -> tuple[TokenGrid, ...]:
    """The grids behind the first `own` tokens; none where samples of one batch differ."""
    if not torch.equal(coordinates, coordinates[:1].expand_as(coordinates)):
        return ()
    places = coordinates[0, :, :, 0].T
    return grids_beside(places[own:], own, frame_steps(places[:own]))


LTX2 = ModelFamily(
    name="LTX 2",
    transformer_classes=("LTX2VideoTransformer3DModel",),
    layout=layout,
    self_attention=r"transformer_blocks\.\d+\.attn1",
    notes="keyframes and references behind the video have blocks of their own; audio stays dense",
)
