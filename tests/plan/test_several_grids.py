"""Several grids in one sequence: each has its own order, its own blocks and its own first frame, and what is in no grid is kept whole."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ditattn.errors import ConfigError
from ditattn.plan.block_plan import num_blocks
from ditattn.plan.bricks import brick_beside, brick_names, brick_order, bricks
from ditattn.plan.token_grids import TokenGrid, grids_of_sequence
from ditattn.plan.token_order import TokenOrder, tile_order, token_order

BLOCK = 128
GRID = st.tuples(st.integers(1, 4), st.integers(1, 24), st.integers(1, 24))
# grids with the text before each, the text behind all, and which of the grids is the target
SEQUENCES = st.tuples(st.lists(st.tuples(st.integers(0, 150), GRID), min_size=1, max_size=4), st.integers(0, 150), st.integers(0, 3)).map(
    lambda drawn: (drawn[0], drawn[1], drawn[2] % len(drawn[0]))
)
ORDERS: dict[str, Callable[..., TokenOrder]] = {
    "tile": lambda *tokens: token_order("tile", *tokens),
    "raster": lambda *tokens: token_order("raster", *tokens),
    "bricks": lambda *tokens: brick_order((4, 2, 16), *tokens),
}
Sequence = tuple[list[tuple[int, tuple[int, int, int]]], int, int]


def placed(sequence: Sequence) -> tuple[list[TokenGrid], int]:
    """The grids, the target first, and the length of the sequence."""
    parts, behind, target = sequence
    grids, start = [], 0
    for text, size in parts:
        grids.append(TokenGrid(start + text, size))
        start = grids[-1].stop
    return [grids.pop(target), *grids], start + behind


def ordered(name: str, sequence: Sequence) -> tuple[TokenOrder, list[TokenGrid]]:
    (target, *further), length = placed(sequence)
    return ORDERS[name](target.size, target.start, length - target.stop, "cpu", tuple(further)), [target, *further]


def tokens_of(order: TokenOrder) -> list[int]:
    return list(range(order.length)) if order.forward is None else order.forward.tolist()


@given(SEQUENCES, st.sampled_from(list(ORDERS)))
def test_every_sequence_is_permuted(sequence: Sequence, name: str) -> None:
    order, _ = ordered(name, sequence)
    x = torch.arange(order.length * 2).view(1, order.length, 2)
    assert order.length == placed(sequence)[1]
    assert sorted(tokens_of(order)) == list(range(order.length))
    assert torch.equal(order.undo(order.apply(x)), x)


@given(SEQUENCES, st.sampled_from(list(ORDERS)), st.booleans())
def test_protected_blocks(sequence: Sequence, name: str, first_frames: bool) -> None:
    """Whole is every block that is not of one grid alone and, if asked, every block with a token of a video's first frame."""
    order, grids = ordered(name, sequence)
    if len(grids) == 1 and grids[0].size[0] == 1:
        first_frames = False
    owner = torch.full((order.length,), -1)
    first = torch.zeros(order.length, dtype=torch.bool)
    for number, grid in enumerate(grids):
        owner[grid.start : grid.stop] = number
        first[grid.start : grid.start + grid.size[1] * grid.size[2]] = grid.size[0] > 1
    tokens = torch.tensor(tokens_of(order))
    expected = []
    for start in range(0, order.length, BLOCK):
        inside = tokens[start : start + BLOCK]
        alone = bool((owner[inside] == owner[inside[0]]).all()) and int(owner[inside[0]]) >= 0
        expected.append(not alone or (first_frames and bool(first[inside].any())))
    assert order.protected_blocks(BLOCK, first_frames, "cpu").tolist() == expected


@given(SEQUENCES, st.sampled_from(["tile", "bricks"]))
def test_whole_blocks_begin_at_block_boundaries_in_the_order_of_their_grid(sequence: Sequence, name: str) -> None:
    order, grids = ordered(name, sequence)
    tokens, place, rest = tokens_of(order), 0, []
    for number, grid in enumerate(grids):
        brick = (4, 2, 16) if number == 0 else brick_beside((4, 2, 16), grid.size)
        own = tile_order(grid.size) if name == "tile" else bricks(grid.size, brick)
        expected = (grid.start + own).tolist()
        whole = len(expected) // BLOCK * BLOCK if len(grids) > 1 else len(expected)
        assert tokens[place : place + whole] == expected[:whole]
        place += whole
        rest += expected[whole:]
    assert order.num_whole_blocks == place // BLOCK or place // BLOCK == 0
    text = [token for token in range(order.length) if not any(grid.start <= token < grid.stop for grid in grids)]
    assert tokens[place:] == rest + text


@given(SEQUENCES, st.sampled_from(list(ORDERS)))
def test_budgets_are_parts_of_all_blocks_and_each_has_blocks_of_one_grid(sequence: Sequence, name: str) -> None:
    order, grids = ordered(name, sequence)
    parts = order.blocks_of_grids()
    assert [start for start, _ in parts] == [0, *(stop for _, stop in parts[:-1])]
    assert parts[-1][1] == num_blocks(order.length)
    if len(grids) == 1:
        assert len(parts) == 1
        return
    tokens, protected = torch.tensor(tokens_of(order)), order.protected_blocks(BLOCK, False, "cpu")
    for start, stop in parts:
        free = [block for block in range(start, stop) if not protected[block]]
        owners = {next(n for n, grid in enumerate(grids) if grid.start <= int(tokens[block * BLOCK]) < grid.stop) for block in free}
        # the end may hold what is left of a grid beside the whole blocks of the last one
        assert len(owners) <= 1 or stop == num_blocks(order.length)
        assert free or len(parts) == 1


@given(SEQUENCES, st.sampled_from(list(ORDERS)))
def test_of_one_grid_nothing_changes(sequence: Sequence, name: str) -> None:
    """A single grid stands as it always did: the video, the text before it, the text behind it."""
    parts, behind, _ = sequence
    order, (grid,) = ordered(name, (parts[:1], behind, 0))
    own = {"tile": tile_order, "bricks": lambda size: bricks(size, (4, 2, 16)), "raster": lambda size: None}[name](grid.size)
    if own is None:
        assert order.forward is None
        assert order.video == (grid.start, grid.stop)
        return
    expected = [*(grid.start + own).tolist(), *range(grid.start), *range(grid.stop, order.length)]
    assert tokens_of(order) == expected
    assert (order.video, order.grids) == ((0, grid.num_tokens), ())


def test_a_reference_of_other_frames_has_the_nearest_brick() -> None:
    video, image, low = (17, 32, 32), (1, 32, 32), (17, 3, 64)
    assert brick_beside((16, 4, 2), video) == (16, 4, 2)
    assert brick_beside((16, 4, 2), image)[0] == 1
    assert brick_beside((2, 16, 4), low) == (1, 8, 16)
    assert brick_names((1, 8, 16), (TokenGrid(0, image),)) == "1x8x16"
    assert (
        brick_names((16, 4, 2), (TokenGrid(0, image), TokenGrid(9000, video)))
        == f"16x4x2 + {'x'.join(map(str, brick_beside((16, 4, 2), image)))}"
    )


@pytest.mark.parametrize(
    "further",
    [(TokenGrid(5, (1, 2, 3)),), (TokenGrid(30, (1, 2, 3)),), (TokenGrid(0, (1, 0, 3)),), (TokenGrid(-1, (1, 1, 2)),)],
    ids=["overlaps the target", "beyond the sequence", "empty", "before the sequence"],
)
def test_grids_that_cannot_be_are_refused(further: tuple[TokenGrid, ...]) -> None:
    with pytest.raises(ConfigError, match=r"a grid of 1x\dx\d tokens cannot begin at token -?\d+ of 32"):
        grids_of_sequence((1, 4, 5), 7, 5, further)
    with pytest.raises(ConfigError):
        token_order("tile", (1, 4, 5), 7, 5, further_grids=further)


def test_neighbouring_grids_need_no_text_between_them() -> None:
    grids = grids_of_sequence((1, 4, 5), 7, 25, (TokenGrid(27, (1, 4, 5)), TokenGrid(1, (1, 2, 3))))
    assert [grid.start for grid in grids] == [7, 1, 27]
    assert all(one.stop <= other.start for one, other in itertools.pairwise(sorted(grids, key=lambda grid: grid.start)))
