"""Flux: text tokens, then image tokens, in one joint attention; reference images stand behind the image."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from ditattn.models.interface import ModelFamily, TokenLayout, text_length

__all__ = ["FLUX"]


def layout(config: Any, arguments: Mapping[str, Any]) -> TokenLayout:
    """`hidden_states` is packed `(B, S, C)`; `img_ids` `(S, 3)` tells the rows and columns, and its first column is 0 for the image itself.

    Raises:
        ValueError: the image's tokens are not a full grid at the front.
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
    own = ids[:, 0] == 0
    num_image = int(own.sum())
    rows, columns = int(ids[own, 1].max()) + 1, int(ids[own, 2].max()) + 1
    if rows * columns != num_image or not bool(own[:num_image].all()):
        raise ValueError(f"img_ids hold {num_image} tokens of the image, not a grid of {rows} x {columns} at the front")
    return rows, columns


FLUX = ModelFamily(
    name="Flux.1",
    transformer_classes=("FluxTransformer2DModel",),
    layout=layout,
    self_attention=r"(transformer_blocks|single_transformer_blocks)\.\d+\.attn",
    notes="text before the image, reference images after it, both protected; an image is one frame, so there is no first-frame rule",
)
