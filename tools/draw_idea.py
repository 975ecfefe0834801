"""Draw docs/images/idea.svg with the package's own code: what a block is in each token order, and a real plan.

    python tools/draw_idea.py

The clip is synthetic: every token has a smooth position code and the mark of a disc that moves to the right, so that its attention is
local and follows the disc, as a video model's is.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

from ditattn.backends.selection import mean_pool
from ditattn.plan.block_plan import BLOCK_SIZE, BlockPlan
from ditattn.plan.token_order import TokenOrder, token_order

TARGET = Path(__file__).resolve().parent.parent / "docs" / "images" / "idea.svg"
FRAMES, ROWS, COLUMNS = GRID = (8, 24, 32)
SPARSITY = 0.75
CELL, SQUARE = 7, 5.6
LEFT, TOP, GAP = 24, 58, 44
PALETTE = ("#4c78a8", "#f58518", "#54a24b", "#b79a20", "#b279a2", "#439894")
KEPT, PROTECTED, DROPPED, INK = "#4c78a8", "#f2b447", "#eef0f3", "#5b6472"


def features() -> Tensor:
    """`[1, S, 1, 32]`: position codes and the disc."""
    frame, row, column = torch.meshgrid(*(torch.arange(n, dtype=torch.float32) for n in GRID), indexing="ij")
    waves = [f(x * math.pi / n * k) for x, n in ((row, 24), (column, 32), (frame, 16)) for k in (1, 2, 3) for f in (torch.sin, torch.cos)]
    disc = (((row - 12) ** 2 + (column - 6 - 3 * frame) ** 2) < 30).float() * 3
    codes = torch.stack([*waves, *[disc] * 4], dim=-1)
    return torch.nn.functional.pad(codes, (0, 32 - codes.shape[-1])).view(1, -1, 1, 32)


def block_of_token(order: TokenOrder, frame: int) -> Tensor:
    """`[Y, X]`: number of the block that each token of a frame stands in."""
    position = torch.arange(order.length) if order.inverse is None else order.inverse
    return (position // BLOCK_SIZE).view(GRID)[frame]


def rectangle(x: float, y: float, width: float, height: float, fill: str) -> str:
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" fill="{fill}"/>'


def text(x: float, y: float, words: str, size: int = 13, weight: int = 400, fill: str = INK) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" font-weight="{weight}" fill="{fill}">{words}</text>'


def frame_panel(x: float, name: str, title: str, note: str) -> list[str]:
    blocks = block_of_token(token_order(name, GRID), 1)
    first = int(blocks.min())
    cells = [
        rectangle(x + column * CELL, TOP + row * CELL, CELL - 0.8, CELL - 0.8, PALETTE[(int(blocks[row, column]) - first) % len(PALETTE)])
        for row in range(ROWS)
        for column in range(COLUMNS)
    ]
    return [text(x, TOP - 28, title, 14, 600, "#1d2530"), text(x, TOP - 11, note, 12), *cells]


def plan_panel(x: float, plan: BlockPlan, protected: Tensor) -> list[str]:
    mask = plan.to_mask()[0, 0]
    size = mask.shape[0]

    def colour(row: int, column: int) -> str:
        if not mask[row, column]:
            return DROPPED
        return PROTECTED if protected[row] or protected[column] else KEPT

    cells = [
        rectangle(x + column * SQUARE, TOP + row * SQUARE, SQUARE - 0.8, SQUARE - 0.8, colour(row, column))
        for row in range(size)
        for column in range(size)
    ]
    note = f"asked sparsity {SPARSITY}, kept {plan.density():.0%} of all pairs"
    return [text(x, TOP - 28, "3. block means pick the key blocks", 14, 600, "#1d2530"), text(x, TOP - 11, note, 12), *cells]


def legend(x: float, y: float) -> list[str]:
    entries = ((KEPT, "kept: best pooled score"), (PROTECTED, "first frame, always kept"), (DROPPED, "dropped, never computed"))
    return [
        part
        for number, (fill, words) in enumerate(entries)
        for part in (rectangle(x, y + 20 * number, 12, 12, fill), text(x + 19, y + 10 + 20 * number, words, 12))
    ]


def main() -> None:
    order = token_order("tile", GRID)
    query = key = order.apply(features())
    # position codes tie to the left and to the right; a slope, steeper than rounding, decides alike on every machine
    slope = torch.linspace(0, 0.02, order.length).view(1, -1, 1)
    query, key = query.clone(), key.clone()
    query[..., -1], key[..., -1] = 1.0, slope
    protected = order.protected_blocks(BLOCK_SIZE, True, "cpu")
    plan = mean_pool.select(query, key, scale=1.0, sparsity=SPARSITY, protected=protected)
    second = LEFT + COLUMNS * CELL + GAP
    third = second + COLUMNS * CELL + GAP
    width, height = third + plan.num_key_blocks * SQUARE + 2 * LEFT, TOP + plan.num_query_blocks * SQUARE + 24
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" font-family="system-ui, sans-serif">',
        rectangle(0, 0, width, height, "#ffffff"),
        *frame_panel(LEFT, "raster", "1. a frame in raster order", "a block of 128 tokens is a thin strip"),
        *frame_panel(second, "tile", "2. the same frame in tile order", "a block is two 8x8 tiles: neighbours"),
        *plan_panel(third, plan, protected),
        *legend(LEFT, TOP + ROWS * CELL + 14),
        "</svg>\n",
    ]
    TARGET.write_text("\n".join(parts), encoding="utf-8")


if __name__ == "__main__":
    main()
