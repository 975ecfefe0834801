"""Flux: text tokens, then image tokens, in one joint attention; reference images stand behind the image."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from ditattn.models.base import ModelFamily, TokenLayout, prefix_and_rest, text_length

__all__ = ["FLUX"]


def layout(config: Any, arguments: Mapping[str, Any]) -> TokenLayout:
    """`hidden_states` is packed `(B, S, C)`; `img_ids` `(S, 3)` tells the rows and columns, and its first column is 0 for the image itself.

    Raises:
        ValueError: the image's tokens are not a full grid at the front, row by row.
    """
    ids = arguments["img_ids"]
    if ids not in _grids:
        _grids[ids] = _grid(ids[0] if ids.ndim == 3 else ids)
    rows, columns = _grids[ids]
    batch, length, channels = arguments["hidden_states"].shape
    return TokenLayout((batch, channels, 1, rows, columns), (1, 1, 1), text_length(arguments), length - rows * columns)


# a pipeline passes the same img_ids in every step: reading them costs a device synchronisation, once per run
_grids: WeakIdKeyDictionary = WeakIdKeyDictionary()


def _grid(ids: Tensor) -> tuple[int, int]:
    own = ids[ids[:, 0] == 0].long()
    if not len(own):
        raise ValueError("img_ids hold no token of the image itself")
    rows, columns = (int(size) + 1 for size in own[:, 1:3].amax(0))
    expected = torch.cartesian_prod(torch.arange(rows, device=ids.device), torch.arange(columns, device=ids.device))
    if len(own) != rows * columns or not torch.equal(ids[: len(own), 1:3].long(), expected) or bool(ids[: len(own), 0].any()):
        raise ValueError(f"img_ids hold {len(own)} tokens of the image, not a grid of {rows} x {columns} at the front, row by row")
    return rows, columns


FLUX = ModelFamily(
    name="Flux.1",
    transformer_classes=("FluxTransformer2DModel",),
    layout=layout,
    self_attention=r"(transformer_blocks|single_transformer_blocks)\.\d+\.attn",
    streams=prefix_and_rest,
    notes="text before the image, reference images after it, both protected; an image is one frame, so there is no first-frame rule",
)
