"""MiniMax H3: text, references and audio, then the video, in one packed sequence with full self-attention."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from ditattn.models.base import ModelFamily, TokenLayout
from ditattn.models.coordinates import frame_steps, grids_beside
from ditattn.plan.token_grids import TokenGrid

__all__ = ["MINIMAX_H3"]

VIDEO = 0
"""The video's number in `token_tags`."""


def layout(config: Any, arguments: Mapping[str, Any]) -> TokenLayout:
    """`position_ids` `(S, 3)` hold time, row and column of every token; the video is all that stands behind the last token that is none.

    Pictures and videos before it (keyframes, references) are grids of their own if their tokens stand row by row; else they are kept whole.

    Raises:
        ValueError: those tokens are not a full grid, row by row.
    """
    positions = arguments["position_ids"]
    if positions not in _grids:
        _grids[positions] = _read(positions.cpu(), arguments["token_tags"].cpu())
    (frames, rows, columns), references = _grids[positions]
    batch, _, channels = arguments["hidden_states"].shape
    prefix = len(positions) - frames * rows * columns
    return TokenLayout((batch, channels, frames, rows, columns), (1, 1, 1), prefix, further_grids=references)


# a pipeline passes the same positions in every step: reading them costs a device synchronisation, once per run
_grids: WeakIdKeyDictionary = WeakIdKeyDictionary()


def _read(positions: Tensor, tags: Tensor) -> tuple[tuple[int, int, int], tuple[TokenGrid, ...]]:
    """The video's grid, and those among the tokens before it."""
    others = (tags != VIDEO).nonzero()
    start = int(others[-1]) + 1 if len(others) else 0
    own = positions[start:]
    size, pace = _grid(own), frame_steps(own)
    lengths = torch.unique_consecutive(tags[:start], return_counts=True)[1].tolist()
    first = 0
    references: list[TokenGrid] = []
    for length in lengths:
        if tags[first] == VIDEO:
            references += grids_beside(positions[first : first + length], first, pace)
        first += length
    return size, tuple(references)


def _grid(own: Tensor) -> tuple[int, int, int]:
    if not len(own):
        raise ValueError("no video at the end of the sequence")
    axes = [values.unique_consecutive() for values in (own[:, 0], own[own[:, 0] == own[0, 0]][:, 1])]
    sizes = [len(values) for values in axes]
    columns = len(own) // math.prod(sizes)
    if not torch.equal(own, torch.cartesian_prod(*axes, own[:columns, 2])):
        raise ValueError(f"the last {len(own)} tokens are no grid of {sizes[0]} frames and {sizes[1]} rows, row by row")
    return sizes[0], sizes[1], columns


MINIMAX_H3 = ModelFamily(
    name="MiniMax H3",
    transformer_classes=("MiniMaxH3Transformer3DModel",),
    layout=layout,
    self_attention=r"transformer_blocks\.\d+\.attn\w*",
    notes="keyframes and references before the video have blocks of their own; text and audio, protected",
)
