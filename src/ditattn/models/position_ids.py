"""Image grids read from the position of every token, as packed models get them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from ditattn.models.base import TokenLayout, text_length

__all__ = ["grid_at_front", "packed_layout"]

# a pipeline passes the same positions in every step: reading them costs a device synchronisation, once per run
_grids: WeakIdKeyDictionary = WeakIdKeyDictionary()


def packed_layout(arguments: Mapping[str, Any], image: int = 0) -> TokenLayout:
    """The layout of a model that takes packed `hidden_states` `(B, S, C)` and `img_ids`, text before the image and further images behind.

    Args:
        arguments: of the forward, by name.
        image: the number under which `img_ids` hold the image itself.

    Raises:
        ValueError: see `grid_at_front`.
    """
    rows, columns = grid_at_front(arguments["img_ids"], image)
    batch, length, channels = arguments["hidden_states"].shape
    return TokenLayout((batch, channels, 1, rows, columns), (1, 1, 1), text_length(arguments), length - rows * columns)


def grid_at_front(ids: Tensor, image: int = 0) -> tuple[int, int]:
    """(rows, columns) of the image that stands first in `ids`.

    Args:
        ids: `(S, 3)` or `(B, S, 3)`, also with further columns: the number of an image, row, column.
        image: the number of the image itself.

    Raises:
        ValueError: the image's tokens are not a full grid at the front, row by row.
    """
    if ids not in _grids:
        _grids[ids] = _read(ids[0] if ids.ndim == 3 else ids, image)
    found: tuple[int, int] = _grids[ids]
    return found


def _read(ids: Tensor, image: int) -> tuple[int, int]:
    own = ids[ids[:, 0] == image].long()
    if not len(own):
        raise ValueError("img_ids hold no token of the image itself")
    origin = own[:, 1:3].amin(0)
    rows, columns = (int(size) + 1 for size in own[:, 1:3].amax(0) - origin)
    expected = torch.cartesian_prod(torch.arange(rows, device=ids.device), torch.arange(columns, device=ids.device)) + origin
    is_at_front = bool((ids[: len(own), 0] == image).all())
    if len(own) != rows * columns or not torch.equal(ids[: len(own), 1:3].long(), expected) or not is_at_front:
        raise ValueError(f"img_ids hold {len(own)} tokens of the image, not a grid of {rows} x {columns} at the front, row by row")
    return rows, columns
