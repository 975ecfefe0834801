"""Grids of tokens beside a video, read from the time, row and column of every token."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ditattn.plan.token_grids import TokenGrid

__all__ = ["frame_steps", "grids_beside"]


def frame_steps(coordinates: Tensor) -> list[float]:
    """Distances between the frames of a video, from the coordinates `(S, 3)` of its tokens."""
    steps: list[float] = coordinates[:, 0].unique().diff().tolist()
    return steps


def grids_beside(coordinates: Tensor, start: int, pace: Sequence[float]) -> tuple[TokenGrid, ...]:
    """The images and videos among some tokens; what is in no grid is in none of them.

    Tokens of one time that stand row by row are a frame. Frames that follow each other are one video if their rows and columns are the same
    and their distances those of the generated video.

    Args:
        coordinates: `(S, 3)`, time, row and column of each.
        start: place of the first of them in the sequence.
        pace: distances between the frames of the generated video.
    """
    grids: list[TokenGrid] = []
    before: Tensor | None = None
    for first, last in _frames(coordinates):
        frame = coordinates[first:last]
        size = _frame_size(frame)
        if size is None:
            before = None
            continue
        if before is not None and _goes_on(before, frame, grids[-1].size[0], pace):
            grids[-1] = TokenGrid(grids[-1].start, (grids[-1].size[0] + 1, *size))
        else:
            grids.append(TokenGrid(start + first, (1, *size)))
        before = frame
    return tuple(grid for grid in grids if grid.num_tokens > 1)


def _frames(coordinates: Tensor) -> Iterator[tuple[int, int]]:
    """(first, last + 1) of tokens of one time whose rows and columns rise."""
    before, after = coordinates[:-1], coordinates[1:]
    rises = (after[:, 1] > before[:, 1]) | ((after[:, 1] == before[:, 1]) & (after[:, 2] > before[:, 2]))
    edges = ((after[:, 0] != before[:, 0]) | ~rises).nonzero().flatten() + 1
    places = [0, *edges.tolist(), len(coordinates)]
    return itertools.pairwise(places)


def _frame_size(frame: Tensor) -> tuple[int, int] | None:
    """(Y, X) of tokens that are a whole grid, row by row; None if they are not."""
    rows, columns = frame[:, 1].unique(), frame[:, 2].unique()
    return (len(rows), len(columns)) if torch.equal(frame[:, 1:], torch.cartesian_prod(rows, columns)) else None


def _goes_on(before: Tensor, frame: Tensor, num_frames: int, pace: Sequence[float]) -> bool:
    """True if `frame` is the next one of a video whose last one, the `num_frames`-th, is `before`."""
    if num_frames > len(pace) or not torch.equal(before[:, 1:], frame[:, 1:]):
        return False
    return math.isclose(float(frame[0, 0] - before[0, 0]), pace[num_frames - 1], rel_tol=1e-3)
