"""Token orders by bricks: 128 tokens that stand together in space and time make one block.

A head that looks at the same place in other frames wants bricks that are long in time; one that looks around in a frame wants flat ones.
Each head may have the shape that suits it, since attention does not care about the order of its tokens.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from ditattn.errors import ConfigError
from ditattn.plan.block_plan import BLOCK_SIZE
from ditattn.plan.token_grids import TokenGrid, grids_of_sequence
from ditattn.plan.token_order import TokenOrder, grids_first

__all__ = ["FLAT", "Brick", "brick_beside", "brick_name", "brick_names", "brick_order", "brick_shapes", "parse_bricks"]

Brick = tuple[int, int, int]

FLAT: Brick = (1, 8, 16)

# By the longest brick that fits, in frames: from flat ones to long ones, tall and wide. docs/backends/permuted_sparse_attn.md says what was
# measured.
SHAPES: dict[int, tuple[Brick, ...]] = {
    16: (FLAT, (2, 16, 4), (4, 2, 16), (16, 4, 2), (16, 1, 8)),
    8: (FLAT, (2, 16, 4), (4, 2, 16), (8, 8, 2), (8, 1, 16)),
    4: (FLAT, (2, 16, 4), (4, 2, 16), (4, 16, 2), (4, 4, 8)),
    2: (FLAT, (1, 16, 8), (2, 16, 4), (2, 4, 16), (2, 8, 8)),
    1: (FLAT, (1, 16, 8), (1, 4, 32), (1, 32, 4), (1, 2, 64)),
}


def brick_shapes(grid: tuple[int, int, int]) -> tuple[Brick, ...]:
    """The shapes (frames, rows, columns) that heads choose from on a token grid (F, Y, X). The first frame has flat bricks of its own."""
    frames, rows, columns = grid
    longest = max(length for length in SHAPES if length <= max(frames - 1, 1))
    return tuple(brick for brick in SHAPES[longest] if brick == FLAT or (brick[1] <= rows and brick[2] <= columns))


def parse_bricks(text: str) -> tuple[Brick, ...]:
    """Shapes from a list such as "4x2x16,1x8x16".

    Raises:
        ConfigError: a part that is not three positive numbers, or whose product is not 128.
    """
    bricks = []
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        sizes = part.lower().split("x")
        if len(sizes) != 3 or not all(size.isdigit() and int(size) for size in sizes):
            raise ConfigError(f"bricks: '{part}' is not of the form frames x rows x columns, such as 4x2x16")
        frames, rows, columns = map(int, sizes)
        if frames * rows * columns != BLOCK_SIZE:
            raise ConfigError(f"bricks: {part} holds {frames * rows * columns} tokens, not {BLOCK_SIZE}")
        bricks.append((frames, rows, columns))
    return tuple(dict.fromkeys(bricks))


def brick_name(brick: Brick) -> str:
    """As `parse_bricks` reads it: "4x2x16"."""
    return "x".join(map(str, brick))


def brick_beside(brick: Brick, grid: tuple[int, int, int]) -> Brick:
    """The shape that a further grid has where the target has `brick`: the same where it fits, else the nearest that is offered for it."""
    frames, rows, columns = grid
    if brick[0] <= max(frames - 1, 1) and brick[1] <= rows and brick[2] <= columns:
        return brick
    return min(brick_shapes(grid), key=lambda one: sum(abs(math.log2(a / b)) for a, b in zip(one, brick, strict=True)))


def brick_names(brick: Brick, further_grids: tuple[TokenGrid, ...]) -> str:
    """For reports: "4x2x16", or "4x2x16 + 1x8x16" where further grids have another shape."""
    return " + ".join(dict.fromkeys(map(brick_name, [brick, *(brick_beside(brick, grid.size) for grid in further_grids)])))


def brick_order(
    brick: Brick,
    grid: tuple[int, int, int],
    num_prefix_tokens: int = 0,
    num_suffix_tokens: int = 0,
    device: torch.device | str = "cpu",
    further_grids: tuple[TokenGrid, ...] = (),
) -> TokenOrder:
    """The order of a video of `grid` = (F, Y, X) tokens in bricks of one shape, the video first, then prefix and suffix. Cached.

    Of several frames the first one comes first, in flat bricks: it is denser than the others in models whose VAE compresses time. Bricks
    that are cut by the edge of the grid stand behind the whole ones, so that these start at block boundaries. Further grids have bricks of
    their own, of this shape where it fits.
    """
    grids = grids_of_sequence(grid, num_prefix_tokens, num_suffix_tokens, further_grids)
    # tensors made in inference mode could not be used later where gradients are recorded
    with torch.inference_mode(False):
        return _cached(brick, grids, grids[0].stop + num_suffix_tokens, torch.device(device))


@lru_cache(maxsize=64)
def _cached(brick: Brick, grids: tuple[TokenGrid, ...], length: int, device: torch.device) -> TokenOrder:
    target, *further = grids
    orders = [bricks(target.size, brick), *(bricks(one.size, brick_beside(brick, one.size)) for one in further)]
    return grids_first(grids, orders, length, device)


def bricks(grid: tuple[int, int, int], brick: Brick) -> Tensor:
    """int64 `[F * Y * X]`: the video tokens in brick order."""
    frames, rows, columns = grid
    index = torch.arange(frames * rows * columns).view(grid)
    if frames == 1:
        return _laid(index, brick)
    return torch.cat([_laid(index[:1], FLAT), _laid(index[1:], brick)])


def _laid(index: Tensor, brick: Brick) -> Tensor:
    """The entries of `[F, Y, X]`: whole bricks one after the other, then those that the edge cuts."""
    number, within, whole = torch.zeros(()), torch.zeros(()), torch.ones((), dtype=torch.bool)
    number, within = number.long(), within.long()
    for axis, (size, part) in enumerate(zip(index.shape, brick, strict=True)):
        place = torch.arange(size).view([-1 if axis == other else 1 for other in range(3)])
        number = number * -(-size // part) + place // part
        within = within * part + place % part
        whole = whole & (place < size - size % part)
    rank = (~whole).long() * (int(number.max()) + 1) + number
    return index.flatten()[(rank * BLOCK_SIZE + within).flatten().argsort()]
