"""Token orders: exact inverses for every grid, the documented layout, protected blocks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ditattn.errors import ConfigError, UnsupportedCall
from ditattn.plan.token_order import TILE, TokenOrder, tile_order, token_order


@pytest.mark.parametrize("frames", range(1, 6))
def test_tile_order_is_a_permutation_of_every_grid(frames: int) -> None:
    for rows in range(1, 41):
        for columns in range(1, 41):
            order = tile_order((frames, rows, columns))
            assert torch.equal(order.sort().values, torch.arange(frames * rows * columns))


@given(
    grid=st.tuples(st.integers(1, 5), st.integers(1, 40), st.integers(1, 40)),
    prefix=st.integers(0, 300),
    suffix=st.integers(0, 300),
    name=st.sampled_from(["tile", "raster"]),
)
def test_there_and_back_is_the_identity(grid: tuple[int, int, int], prefix: int, suffix: int, name: str) -> None:
    order = token_order(name, grid, prefix, suffix)
    x = torch.arange(order.length * 2).view(1, order.length, 2)
    assert order.length == prefix + grid[0] * grid[1] * grid[2] + suffix
    assert torch.equal(order.undo(order.apply(x)), x)
    # and the other way round
    assert torch.equal(order.apply(order.undo(x)), x)


def test_an_order_per_head_reorders_every_group_of_heads_in_its_own() -> None:
    forward = torch.stack([torch.randperm(7), torch.randperm(7)])
    order = TokenOrder(forward, forward.argsort(-1), (0, 1), (0, 7), 7)
    x = torch.randn(2, 7, 6, 3)
    for h in range(6):
        assert torch.equal(order.apply(x)[:, :, h], x[:, forward[h // 3], h])
    assert torch.equal(order.undo(order.apply(x)), x)
    assert torch.equal(order.apply(order.undo(x[..., 0])), x[..., 0])
    with pytest.raises(UnsupportedCall, match=r"2 key heads need \[B, S, H, ...\] with H a multiple, not \[2, 7, 5, 3\]"):
        order.apply(x[:, :, :5])
    with pytest.raises(UnsupportedCall, match=r"not \[2, 7\]"):
        order.apply(x[:, :, 0, 0])
    for heads in (2, 4):
        order.check_heads(heads)
    order.check_key_heads(2)
    with pytest.raises(UnsupportedCall, match="token orders for 2 key heads, the call has 4"):
        order.check_key_heads(4)


def expected_frame(rows: int, columns: int) -> list[int]:
    """The documented order of one frame, token by token: full tiles, remainder rows, remainder columns."""
    full_rows, full_columns = rows // TILE * TILE, columns // TILE * TILE
    order = []
    for tile_row in range(0, full_rows, TILE):
        for tile_column in range(0, full_columns, TILE):
            order += [(tile_row + i) * columns + tile_column + j for i in range(TILE) for j in range(TILE)]
    order += [i * columns + j for i in range(full_rows, rows) for j in range(columns)]
    order += [i * columns + j for i in range(full_rows) for j in range(full_columns, columns)]
    return order


@pytest.mark.parametrize(("rows", "columns"), [(16, 24), (30, 52), (7, 9), (8, 8), (5, 3), (8, 11), (19, 16)])
def test_layout_of_a_frame(rows: int, columns: int) -> None:
    frame = expected_frame(rows, columns)
    multiple = rows % TILE == 0 and columns % TILE == 0
    first = frame if multiple else list(range(rows * columns))
    per_frame = rows * columns
    expected = first + [per_frame + i for i in frame] + [2 * per_frame + i for i in frame]
    assert tile_order((3, rows, columns)).tolist() == expected


def test_a_single_frame_is_tiled_even_if_not_a_multiple() -> None:
    """An image has no first-frame rule, so nothing is gained by leaving it in raster order."""
    assert tile_order((1, 30, 52)).tolist() == expected_frame(30, 52)


def test_video_comes_first_then_prefix_then_suffix() -> None:
    order = token_order("tile", (1, 8, 8), 3, 2)
    assert order.forward is not None
    assert order.forward.tolist() == [*range(3, 67), 0, 1, 2, 67, 68]
    assert order.video == (0, 64)


def brute_force_protected(order: object, prefix: int, grid: tuple[int, int, int], block: int, first_frame: bool) -> list[bool]:
    num_video = grid[0] * grid[1] * grid[2]
    tokens = range(order.length) if order.forward is None else order.forward.tolist()
    special = [t < prefix or t >= prefix + num_video or (first_frame and t - prefix < grid[1] * grid[2]) for t in tokens]
    return [any(special[start : start + block]) for start in range(0, order.length, block)]


@given(
    grid=st.tuples(st.integers(1, 4), st.integers(1, 24), st.integers(1, 24)),
    prefix=st.integers(0, 200),
    suffix=st.integers(0, 200),
    name=st.sampled_from(["tile", "raster"]),
    first_frame=st.booleans(),
)
def test_protected_blocks(grid: tuple[int, int, int], prefix: int, suffix: int, name: str, first_frame: bool) -> None:
    """A block is protected exactly if it holds a text token or, if asked, a first-frame token: seams included."""
    order = token_order(name, grid, prefix, suffix)
    protected = order.protected_blocks(128, first_frame, "cpu")
    assert protected.tolist() == brute_force_protected(order, prefix, grid, 128, first_frame)


def test_orders_are_cached() -> None:
    assert token_order("tile", (2, 9, 9)) is token_order("tile", (2, 9, 9))


@pytest.mark.parametrize(("name", "grid", "prefix"), [("hilbert", (1, 8, 8), 0), ("tile", (0, 8, 8), 0), ("tile", (1, 8, 8), -1)])
def test_bad_requests(name: str, grid: tuple[int, int, int], prefix: int) -> None:
    with pytest.raises(ConfigError):
        token_order(name, grid, prefix)


def test_an_order_made_in_inference_mode_serves_where_gradients_are_recorded() -> None:
    with torch.inference_mode():
        order = token_order("tile", (2, 17, 33))
    x = torch.randn(1, order.length, 1, 4, requires_grad=True)
    order.undo(order.apply(x)).sum().backward()
    assert x.grad is not None
    assert bool((x.grad == 1).all())
