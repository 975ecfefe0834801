"""Orders of the video tokens and their exact inverses.

A model's tokens are `[prefix][F x Y x X video tokens in raster order][suffix]`; prefix and suffix are text or condition tokens. An order
puts tokens that attend to each other into the same block of 128. Every order is one index vector; its inverse is the argsort, so going
there and back is the identity for every grid. Heads may have an order of their own each: then the index is one vector per key head.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from ditattn.errors import ConfigError, UnsupportedCall
from ditattn.plan.block_plan import num_blocks

__all__ = ["TILE", "TokenOrder", "reordered", "token_order"]

TILE = 8


@dataclass(frozen=True, eq=False)
class TokenOrder:
    """One order of S tokens, or one for each of G key heads, which the query heads of its group share.

    Attributes:
        forward: int64 `[S]` or `[G, S]`, position i of the new order holds token `forward[..., i]`; None is the identity.
        inverse: of the same shape, undoes `forward`; None is the identity.
        first_frame: `(start, stop)` of the first frame's tokens in the new order, of every head's where there are several.
        video: `(start, stop)` of all video tokens in the new order, likewise.
        length: S.
    """

    forward: Tensor | None
    inverse: Tensor | None
    first_frame: tuple[int, int]
    video: tuple[int, int]
    length: int

    def check_length(self, length: int) -> None:
        """Raise UnsupportedCall unless the order is one of `length` tokens."""
        if length != self.length:
            raise UnsupportedCall(f"the token order is for {self.length} tokens, the call has {length}")

    def check_device(self, device: torch.device) -> None:
        """Raise UnsupportedCall unless the index vectors lie on `device`: a kernel reads an address of another device as one of its own."""
        for index in (self.forward, self.inverse):
            if index is not None and index.device != device:
                raise UnsupportedCall(f"the token order is on {index.device}, the tensors on {device}")

    def check_key_heads(self, key_heads: int) -> None:
        """Raise UnsupportedCall unless the order is one for all heads, or has one for each of `key_heads`."""
        if self.forward is not None and self.forward.ndim == 2 and self.forward.shape[0] != key_heads:
            raise UnsupportedCall(f"there are token orders for {self.forward.shape[0]} key heads, the call has {key_heads}")

    def check_heads(self, heads: int) -> None:
        """Raise UnsupportedCall unless the order is one for all heads, or has one for each of equal groups of them."""
        if self.forward is not None and self.forward.ndim == 2 and heads % self.forward.shape[0]:
            raise UnsupportedCall(f"{heads} heads are not a multiple of the {self.forward.shape[0]} that have a token order of their own")

    def of_heads(self, heads: slice) -> TokenOrder:
        """The order of some key heads; itself where all heads share one."""
        if self.forward is None or self.inverse is None or self.forward.ndim == 1:
            return self
        return replace(self, forward=self.forward[heads], inverse=self.inverse[heads])

    def apply(self, x: Tensor) -> Tensor:
        """`[B, S, ...]` in the model's order -> the new order; `[B, S, H, ...]` with H a multiple of G where every key head has its own."""
        return x if self.forward is None else reordered(x, self.forward)

    def undo(self, x: Tensor) -> Tensor:
        """The same from the new order to the model's."""
        return x if self.inverse is None else reordered(x, self.inverse)

    def protected_blocks(self, block_size: int, first_frame: bool, device: torch.device | str) -> Tensor:
        """bool `[blocks]`: blocks that hold a prefix or suffix token, and with `first_frame` those that hold a first-frame token."""
        start = torch.arange(num_blocks(self.length, block_size), device=device) * block_size
        stop = (start + block_size).clamp(max=self.length)
        protected = (start < self.video[0]) | (stop > self.video[1])
        if first_frame:
            protected = protected | ((start < self.first_frame[1]) & (stop > self.first_frame[0]))
        return protected


def reordered(x: Tensor, order: Tensor) -> Tensor:
    """A copy of x whose token i is x's token `order[i]`, or for head h `order[h // (H / G)][i]`.

    Args:
        x: `[B, S, ...]`, for an order per head `[B, S, H, ...]`.
        order: int64 `[S]` or `[G, S]`.

    Raises:
        UnsupportedCall: x has no head axis that the G orders divide.
    """
    if order.ndim == 1:
        return x.index_select(1, order)
    if x.ndim < 3 or x.shape[2] % order.shape[0]:
        raise UnsupportedCall(f"token orders for {order.shape[0]} key heads need [B, S, H, ...] with H a multiple, not {list(x.shape)}")
    places = order.repeat_interleave(x.shape[2] // order.shape[0], dim=0).T
    return x[:, places, torch.arange(x.shape[2], device=x.device)]


def token_order(
    name: str, grid: tuple[int, int, int], num_prefix_tokens: int = 0, num_suffix_tokens: int = 0, device: torch.device | str = "cpu"
) -> TokenOrder:
    """The order `name` for a video of `grid` = (F, Y, X) tokens between prefix and suffix tokens. Cached.

    `raster` leaves the sequence alone. `tile` puts the video first, so that its tiles start at a block boundary, then prefix and suffix.
    Each frame becomes its full 8x8 tiles (raster among tiles and within each), then its remainder rows at full width, then its remainder
    columns. In a grid that is not a multiple of 8 the first of several frames keeps its raster order.

    Raises:
        ConfigError: no such order, or a size that is not positive.
    """
    if name not in ("raster", "tile"):
        raise ConfigError(f"token_order must be 'tile' or 'raster', not '{name}'")
    if min(grid) < 1 or num_prefix_tokens < 0 or num_suffix_tokens < 0:
        raise ConfigError(
            f"a token grid needs positive sizes, not {grid} with {num_prefix_tokens} prefix and {num_suffix_tokens} suffix tokens"
        )
    # tensors made in inference mode could not be used later where gradients are recorded
    with torch.inference_mode(False):
        return _cached(name, tuple(grid), num_prefix_tokens, num_suffix_tokens, torch.device(device))


@lru_cache(maxsize=32)
def _cached(name: str, grid: tuple[int, int, int], prefix: int, suffix: int, device: torch.device) -> TokenOrder:
    frames, rows, columns = grid
    num_video = frames * rows * columns
    length = prefix + num_video + suffix
    if name == "raster":
        return TokenOrder(None, None, (prefix, prefix + rows * columns), (prefix, prefix + num_video), length)
    video = prefix + tile_order(grid)
    before, after = torch.arange(prefix), torch.arange(prefix + num_video, length)
    forward = torch.cat([video, before, after])
    first_frame, span = (0, rows * columns), (0, num_video)
    if torch.equal(forward, torch.arange(length)):
        return TokenOrder(None, None, first_frame, span, length)
    return TokenOrder(forward.to(device), torch.argsort(forward).to(device), first_frame, span, length)


def tile_order(grid: tuple[int, int, int]) -> Tensor:
    """int64 `[F * Y * X]`: the video tokens in tile order."""
    frames, rows, columns = grid
    frame = _tiled_frame(rows, columns)
    offsets = torch.arange(frames).unsqueeze(1) * (rows * columns)
    order = frame + offsets
    if frames > 1 and (rows % TILE or columns % TILE):
        order[0] = torch.arange(rows * columns)
    return order.flatten()


def _tiled_frame(rows: int, columns: int) -> Tensor:
    index = torch.arange(rows * columns).view(rows, columns)
    full_rows, full_columns = rows - rows % TILE, columns - columns % TILE
    tiles = index[:full_rows, :full_columns].unflatten(0, (-1, TILE)).unflatten(2, (-1, TILE)) if full_rows and full_columns else None
    parts = [] if tiles is None else [tiles.transpose(1, 2).flatten()]
    parts += [index[full_rows:].flatten(), index[:full_rows, full_columns:].flatten()]
    return torch.cat(parts)
