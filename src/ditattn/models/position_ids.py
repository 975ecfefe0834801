"""Image grids read from the position of every token, as packed models get them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from ditattn.models.base import TokenLayout, text_length
from ditattn.plan.token_grids import TokenGrid

__all__ = ["grids_of_positions", "packed_layout"]

# a pipeline passes the same positions in every step: reading them costs a device synchronisation, once per run
_images: WeakIdKeyDictionary = WeakIdKeyDictionary()


def packed_layout(arguments: Mapping[str, Any], image: int = 0) -> TokenLayout:
    """The layout of a model that takes packed `hidden_states` `(B, S, C)` and `img_ids`, text before the image and further images behind.

    Args:
        arguments: of the forward, by name.
        image: the number under which `img_ids` hold the image itself.

    Raises:
        ValueError: see `grids_of_positions`.
    """
    text = text_length(arguments)
    batch, length, channels = arguments["hidden_states"].shape
    grids = grids_of_positions(arguments["img_ids"], image, text)
    return TokenLayout.of_grids(batch, channels, grids, text + length)


def grids_of_positions(ids: Tensor, image: int = 0, start: int = 0) -> list[TokenGrid]:
    """The image that stands first in `ids`, then every further image whose tokens stand row by row; others are in no grid.

    Args:
        ids: `(S, 3)` or `(B, S, 3)`, also with further columns: the number of an image, row, column.
        image: the number of the image itself.
        start: place of the first of these tokens in the sequence.

    Raises:
        ValueError: the image's tokens are not a full grid at the front, row by row.
    """
    if ids not in _images:
        _images[ids] = _read((ids[0] if ids.ndim == 3 else ids).cpu(), image)
    return [TokenGrid(start + first, (1, rows, columns)) for first, rows, columns in _images[ids]]


def _read(ids: Tensor, image: int) -> list[tuple[int, int, int]]:
    """(first token, rows, columns) of the image and of every further one that is a grid."""
    own = int((ids[:, 0] == image).sum())
    if not own:
        raise ValueError("img_ids hold no token of the image itself")
    rows, columns = _extent(ids[ids[:, 0] == image])
    if bool((ids[:own, 0] != image).any()) or not _is_grid(ids[:own], rows, columns):
        raise ValueError(f"img_ids hold {own} tokens of the image, not a grid of {rows} x {columns} at the front, row by row")
    images, start = [(0, rows, columns)], own
    for length in torch.unique_consecutive(ids[own:, 0], return_counts=True)[1].tolist():
        further = ids[start : start + length]
        if _is_grid(further, *_extent(further)):
            images.append((start, *_extent(further)))
        start += length
    return images


def _extent(ids: Tensor) -> tuple[int, int]:
    """(rows, columns) between the first and the last position."""
    rows, columns = ((ids.amax(0) - ids.amin(0))[1:3].long() + 1).tolist()
    return rows, columns


def _is_grid(ids: Tensor, rows: int, columns: int) -> bool:
    """True if the positions are a whole grid's, row by row, from that of the first token on."""
    expected = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
    return len(ids) == rows * columns and torch.equal((ids[:, 1:3] - ids[:1, 1:3]).long(), expected)
