"""A denoiser that no library has, with its tokens in whatever arrangement a test wants: plain modules, torch's own SDPA, no processors."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

__all__ = ["ARRANGEMENTS", "GRID", "LATENTS", "TEXT", "WIDTH", "HomeMadeTransformer"]

HEADS, HEAD_SIZE = 2, 32
WIDTH = HEADS * HEAD_SIZE
GRID = (4, 16, 16)
LATENTS = (1, 3, 4, 32, 32)
TEXT = 7

# (tokens of the grid [B, F, Y, X, C], text [B, L, C]) -> the sequence [B, S, C]
Arrange = Callable[[Tensor, Tensor], Tensor]


def raster(grid: Tensor, text: Tensor) -> Tensor:
    return grid.flatten(1, 3)


ARRANGEMENTS: dict[str, Arrange] = {
    "raster": raster,
    "text before": lambda grid, text: torch.cat([text, raster(grid, text)], 1),
    "text behind": lambda grid, text: torch.cat([raster(grid, text), text], 1),
    "text on both sides": lambda grid, text: torch.cat([text[:, :3], raster(grid, text), text[:, 3:]], 1),
    "class token": lambda grid, text: torch.cat([torch.ones_like(text[:, :1]), raster(grid, text)], 1),
    "padding behind": lambda grid, text: torch.cat([raster(grid, text), text.new_zeros(1, 32, WIDTH)], 1),
    "rows before frames": lambda grid, text: grid.transpose(1, 2).flatten(1, 3),
    "columns before rows": lambda grid, text: grid.transpose(2, 3).flatten(1, 3),
    "backwards": lambda grid, text: grid.flatten(1, 3).flip(1),
    "moved on by one": lambda grid, text: grid.flatten(1, 3).roll(1, 1),
    "two tokens exchanged": lambda grid, text: grid.flatten(1, 3)[:, [1, 0, *range(2, 1024)]],
    "windows of 8 x 8": lambda grid, text: grid.unflatten(2, (2, 8)).unflatten(4, (2, 8)).transpose(3, 4).flatten(1, 5),
    "even frames first": lambda grid, text: torch.cat([grid[:, ::2], grid[:, 1::2]], 1).flatten(1, 3),
    "2 x 2 packed": lambda grid, text: grid.unflatten(2, (8, 2)).unflatten(4, (8, 2)).transpose(3, 4).mean((4, 5)).flatten(1, 3),
    "text between the frames": lambda grid, text: torch.cat([grid[:, :2].flatten(1, 3), text, grid[:, 2:].flatten(1, 3)], 1),
    "a token behind every row": lambda grid, text: torch.cat([grid, torch.ones_like(grid[:, :, :, :1])], 3).flatten(1, 3),
    "neighbours averaged": lambda grid, text: (grid + grid.roll(1, 3)).flatten(1, 3),
    "mean of all added": lambda grid, text: (grid + grid.mean((1, 2, 3), keepdim=True)).flatten(1, 3),
}


class Attention(nn.Module):
    """Of `x`, or of `x` to `context`."""

    def __init__(self, parts: str = "") -> None:
        super().__init__()
        self.num_heads, self.parts = HEADS, parts
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        cut, together = PARTS[self.parts]
        x = cut(x)
        context = x if context is None else context
        q, k, v = (y.unflatten(-1, (HEADS, HEAD_SIZE)).transpose(1, 2) for y in (self.q(x), self.k(context), self.v(context)))
        return together(self.out(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)))


FRAMES, TOKENS = GRID[0], GRID[1] * GRID[2]
# how a sequence is cut into those that attend by themselves, and put together again
PARTS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "": (lambda x: x, lambda x: x),
    "frames": (lambda x: x.unflatten(1, (FRAMES, TOKENS)).flatten(0, 1), lambda x: x.flatten(0, 1).unsqueeze(0)),
    "places": (lambda x: x.unflatten(1, (FRAMES, TOKENS))[0].transpose(0, 1), lambda x: x.transpose(0, 1).flatten(0, 1).unsqueeze(0)),
    "windows": (lambda x: x.unflatten(1, (8, -1)).flatten(0, 1), lambda x: x.flatten(0, 1).unsqueeze(0)),
    "other way round": (lambda x: x.flip(1), lambda x: x.flip(1)),
}


class Block(nn.Module):
    def __init__(self, parts: str) -> None:
        super().__init__()
        self.norm, self.attention, self.cross = nn.LayerNorm(WIDTH), Attention(parts), Attention()

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        x = x + self.attention(self.norm(x))
        return x + self.cross(x, text)


class HomeMadeTransformer(nn.Module):
    """Latents `(B, C, T, H, W)` in, a sequence of tokens out.

    Args:
        arrangement: one of `ARRANGEMENTS`.
        parts: for each layer, within which parts of the sequence it attends.
    """

    def __init__(self, arrangement: str = "raster", parts: tuple[str, ...] = ("", "")) -> None:
        super().__init__()
        self.config = SimpleNamespace(in_channels=3)
        self.arrangement = arrangement
        self.embed = nn.Conv3d(3, WIDTH, (1, 2, 2), (1, 2, 2))
        self.layers = nn.ModuleList(Block(one) for one in parts)
        self.eval().requires_grad_(False)

    def forward(self, latents: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        grid = self.embed(latents).permute(0, 2, 3, 4, 1)
        x = ARRANGEMENTS[self.arrangement](grid, encoder_hidden_states)
        for layer in self.layers:
            x = layer(x, encoder_hidden_states)
        return x
