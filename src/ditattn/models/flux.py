"""Flux: text tokens, then image tokens, in one joint attention; reference images stand behind the image."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from ditattn.models.base import ModelFamily, TokenLayout, text_length
from ditattn.plan.token_grids import TokenGrid

__all__ = ["FLUX"]


def layout(config: Any, arguments: Mapping[str, Any]) -> TokenLayout:
    """`hidden_states` is packed `(B, S, C)`; `img_ids` `(S, 3)` tells the rows and columns, and its first column is 0 for the image itself.

    A reference has a number of its own in the first column and is a grid of its own if its tokens stand row by row; else it is kept whole.

    Raises:
        ValueError: the image's tokens are not a full grid at the front, row by row, or there are fewer tokens than positions.
    """
    ids, text = arguments["img_ids"], text_length(arguments)
    if ids not in _images:
        _images[ids] = _read((ids[0] if ids.ndim == 3 else ids).cpu())
    grids = [TokenGrid(text + start, (1, rows, columns)) for start, rows, columns in _images[ids]]
    batch, length, channels = arguments["hidden_states"].shape
    return TokenLayout.of_grids(batch, channels, grids, text + length)


# a pipeline passes the same img_ids in every step: reading them costs a device synchronisation, once per run
_images: WeakIdKeyDictionary = WeakIdKeyDictionary()


def _read(ids: Tensor) -> list[tuple[int, int, int]]:
    """(first token, rows, columns) of the image and of every reference that is a grid."""
    own = int((ids[:, 0] == 0).sum())
    if not own:
        raise ValueError("img_ids hold no token of the image itself")
    rows, columns = (int(size) + 1 for size in ids[ids[:, 0] == 0, 1:3].long().amax(0))
    if own != rows * columns or not _row_by_row(ids[:own], rows, columns) or bool(ids[:own, 0].any()):
        raise ValueError(f"img_ids hold {own} tokens of the image, not a grid of {rows} x {columns} at the front, row by row")
    images, start = [(0, rows, columns)], own
    for length in torch.unique_consecutive(ids[own:, 0], return_counts=True)[1].tolist():
        reference = ids[start : start + length]
        rows, columns = ((reference.amax(0) - reference.amin(0))[1:3].long() + 1).tolist()
        if length == rows * columns and _row_by_row(reference, rows, columns):
            images.append((start, rows, columns))
        start += length
    return images


def _row_by_row(ids: Tensor, rows: int, columns: int) -> bool:
    """True if the positions are a grid's, from that of the first token on."""
    expected = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
    return torch.equal((ids[:, 1:3] - ids[:1, 1:3]).long(), expected)


FLUX = ModelFamily(
    name="Flux.1",
    transformer_classes=("FluxTransformer2DModel",),
    layout=layout,
    self_attention=r"(transformer_blocks|single_transformer_blocks)\.\d+\.attn",
    notes="text before the image, protected; every reference image has blocks of its own; an image is one frame: no first-frame rule",
)
