"""LTX-Video: video tokens, and perhaps conditions before them, in self-attention (`attn1`); text is separate cross-attention."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from ditattn.models.base import ModelFamily, SplitAxis, SplitPlan, TokenLayout, one_stream
from ditattn.plan.token_grids import TokenGrid

__all__ = ["LTX_VIDEO"]


def layout(config: Any, arguments: Mapping[str, Any]) -> TokenLayout:
    """`hidden_states` is packed `(B, S, C)`; `num_frames`, `height` and `width` are in tokens.

    Pipelines with conditions pass `video_coords` `(B, 3, S)` instead, the time, row and column of every token: the largest grid is the
    video, conditions that are not part of it are grids of their own.

    Raises:
        ValueError: the sequence is not the grid, or the coordinates are not those of grids in raster order.
    """
    batch, length, channels = arguments["hidden_states"].shape
    coordinates = arguments.get("video_coords")
    if coordinates is not None:
        if coordinates not in _grids:
            _grids[coordinates] = _read(coordinates.cpu())
        grids = _grids[coordinates]
        video = max(grids, key=lambda grid: (grid.num_tokens, grid.start))
        return TokenLayout.of_grids(batch, channels, grids, length, target=grids.index(video))
    frames, rows, columns = (int(arguments[name]) for name in ("num_frames", "height", "width"))
    if length != frames * rows * columns:
        raise ValueError(f"{length} tokens are not a grid of {frames} x {rows} x {columns}")
    return TokenLayout((batch, channels, frames, rows, columns), (1, 1, 1))


# a pipeline passes the same coordinates in every step: reading them costs a device synchronisation, once per run
_grids: WeakIdKeyDictionary = WeakIdKeyDictionary()


def _read(coordinates: Tensor) -> list[TokenGrid]:
    """The grids of a sequence from the coordinates `(B, 3, S)` of its tokens."""
    if not torch.equal(coordinates, coordinates[:1].expand_as(coordinates)):
        raise ValueError("samples of one batch differ in video_coords")
    (time, row, column), later = coordinates[0, :, :-1], coordinates[0, :, 1:]
    # in raster order every token comes after the one before it: by time, by row, by column
    rising = (later[0] > time) | ((later[0] == time) & ((later[1] > row) | ((later[1] == row) & (later[2] > column))))
    edges = [0, *((~rising).nonzero().flatten() + 1).tolist(), coordinates.shape[2]]
    runs = [TokenGrid(start, _grid(coordinates[0, :, start:stop])) for start, stop in itertools.pairwise(edges)]
    video = max(runs, key=lambda run: (run.num_tokens, run.start))
    pace = _frame_steps(coordinates, video)
    return [grid for run in runs for grid in ([run] if run is video else _videos(run, _frame_steps(coordinates, run), pace))]


def _grid(coordinates: Tensor) -> tuple[int, int, int]:
    """(F, Y, X) of tokens `(3, S)` in raster order: equal frames, each of rising rows of rising columns."""
    axes = [axis.unique() for axis in coordinates]
    frames, rows, columns = map(len, axes)
    expected = torch.cartesian_prod(*axes)
    if not torch.equal(expected.T, coordinates):
        raise ValueError(f"video_coords of {coordinates.shape[1]} tokens are not a grid of {frames} x {rows} x {columns} in raster order")
    return frames, rows, columns


def _frame_steps(coordinates: Tensor, grid: TokenGrid) -> list[float]:
    steps: list[float] = coordinates[0, 0, grid.start : grid.stop].unique().diff().tolist()
    return steps


def _videos(run: TokenGrid, steps: list[float], pace: list[float]) -> list[TokenGrid]:
    """Conditions that follow each other in time, apart: the frames of each have the same distances as those of the video, `pace`."""
    frames, rows, columns = run.size
    grids, first = [], 0
    for frame in range(1, frames + 1):
        place = frame - 1 - first
        goes_on = frame < frames and place < len(pace) and math.isclose(steps[frame - 1], pace[place], rel_tol=1e-3)
        if not goes_on:
            grids.append(TokenGrid(run.start + first * rows * columns, (frame - first, rows, columns)))
            first = frame
    return grids


def split_plan(config: Any) -> SplitPlan:
    """The video and the timesteps of its tokens, the text whole: between heads its mask cannot be split."""
    tokens, positions = SplitAxis(1, 3), SplitAxis(1, 3)
    return {
        "": {"hidden_states": tokens, "timestep": SplitAxis(1, 2)},
        "rope": {0: positions, 1: positions},
        "proj_out": tokens,
    }


LTX_VIDEO = ModelFamily(
    name="LTX-Video",
    transformer_classes=("LTXVideoTransformer3DModel",),
    layout=layout,
    self_attention=r"transformer_blocks\.\d+\.attn1",
    streams=one_stream,
    split_plan=split_plan,
    whole_keys=r"transformer_blocks\.\d+\.attn2",
    notes="conditions outside the video (`LTXConditionPipeline`) have blocks of their own",
)
