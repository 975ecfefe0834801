"""Orders by bricks: permutations for every grid, whole bricks at block boundaries, the first frame apart."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ditattn.errors import ConfigError
from ditattn.plan.block_plan import BLOCK_SIZE
from ditattn.plan.bricks import FLAT, SHAPES, brick_name, brick_order, brick_shapes, bricks, parse_bricks

GRIDS = st.tuples(st.integers(1, 40), st.integers(1, 100), st.integers(1, 100)).filter(lambda grid: grid[0] * grid[1] * grid[2] <= 40_000)
EVERY_SHAPE = sorted({brick for shapes in SHAPES.values() for brick in shapes})


@given(GRIDS, st.sampled_from(EVERY_SHAPE), st.integers(0, 130), st.integers(0, 130))
def test_every_grid_is_permuted(grid: tuple[int, int, int], brick: tuple[int, int, int], prefix: int, suffix: int) -> None:
    order = brick_order(brick, grid, prefix, suffix)
    video = grid[0] * grid[1] * grid[2]
    assert order.length == prefix + video + suffix
    assert torch.equal(order.forward.sort().values, torch.arange(order.length))
    assert torch.equal(order.forward[order.inverse], torch.arange(order.length))
    # the video first, the first frame at its beginning
    assert order.video == (0, video)
    assert set(order.forward[: grid[1] * grid[2]].tolist()) == set(range(prefix, prefix + grid[1] * grid[2]))


@given(GRIDS)
def test_offered_shapes_fit_the_grid(grid: tuple[int, int, int]) -> None:
    shapes = brick_shapes(grid)
    assert shapes[0] == FLAT
    for frames, rows, columns in shapes:
        assert frames * rows * columns == BLOCK_SIZE
        assert frames <= max(grid[0] - 1, 1)
        assert (frames, rows, columns) == FLAT or (rows <= grid[1] and columns <= grid[2])


@pytest.mark.parametrize("brick", EVERY_SHAPE)
def test_a_whole_brick_is_one_block(brick: tuple[int, int, int]) -> None:
    """Seventeen frames of 32 x 64: behind the flat first frame every block is one brick, and no two are the same."""
    if 16 % brick[0] or 32 % brick[1] or 64 % brick[2]:
        pytest.skip("this shape does not divide the grid")
    order = bricks((17, 32, 64), brick)[32 * 64 :].view(-1, BLOCK_SIZE)
    frame, place = order // (32 * 64), order % (32 * 64)
    for axis, size in ((frame - 1, brick[0]), (place // 64, brick[1]), (place % 64, brick[2])):
        assert torch.equal(axis.amin(1) // size, axis.amax(1) // size)
        assert torch.equal(axis.amin(1) % size, torch.zeros(len(order), dtype=torch.long))


def test_cut_bricks_stand_behind_whole_ones() -> None:
    """21 frames of 30 x 52: bricks of 4 x 2 x 16 leave four columns over."""
    order = bricks((21, 30, 52), (4, 2, 16))[30 * 52 :]
    columns = order % 52
    whole = 20 * 30 * 48
    assert int(columns[:whole].max()) == 47
    assert int(columns[whole:].min()) == 48


def test_shapes_are_read_as_they_are_written() -> None:
    assert parse_bricks("4x2x16, 1X8x16,4x2x16") == ((4, 2, 16), (1, 8, 16))
    assert brick_name((4, 2, 16)) == "4x2x16"
    for text, message in (
        ("4x2", "not of the form"),
        ("4x2x8", "64 tokens, not 128"),
        ("0x8x16", "not of the form"),
        ("axbxc", "not of the form"),
    ):
        with pytest.raises(ConfigError, match=message):
            parse_bricks(text)
