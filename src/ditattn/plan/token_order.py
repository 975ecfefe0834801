"""Orders of the video tokens and their exact inverses.

A model's tokens are `[prefix][F x Y x X video tokens in raster order][suffix]`; prefix and suffix are text or condition tokens, and may
hold further grids. An order puts tokens that attend to each other into the same block of 128. Every order is one index vector; its inverse
is the argsort, so going there and back is the identity for every grid. Heads may have an order of their own each: then the index is one
vector per key head.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from ditattn.errors import ConfigError, UnsupportedCall
from ditattn.plan.block_plan import BLOCK_SIZE, num_blocks
from ditattn.plan.token_grids import TokenGrid, grids_of_sequence

__all__ = ["TILE", "OrderedGrid", "Span", "TokenOrder", "grids_first", "reordered", "token_order", "within"]

TILE = 8

Span = tuple[int, int]


@dataclass(frozen=True)
class OrderedGrid:
    """Where one of several grids stands in an order.

    Attributes:
        tokens: (start, stop) of its parts.
        first_frame: likewise, of its first frame; empty for an image, which has no first-frame rule.
    """

    tokens: tuple[Span, ...]
    first_frame: tuple[Span, ...] = ()


@dataclass(frozen=True, eq=False)
class TokenOrder:
    """One order of S tokens, or one for each of G key heads, which the query heads of its group share.

    Attributes:
        forward: int64 `[S]` or `[G, S]`, position i of the new order holds token `forward[..., i]`; None is the identity.
        inverse: of the same shape, undoes `forward`; None is the identity.
        first_frame: `(start, stop)` of the first frame's tokens in the new order, of every head's where there are several.
        video: `(start, stop)` of all video tokens in the new order, likewise; of several grids, from the first token to the last.
        length: S.
        grids: where there are several grids, the place of each: the target, then the others as they stand in the sequence; else empty.
    """

    forward: Tensor | None
    inverse: Tensor | None
    first_frame: Span
    video: Span
    length: int
    grids: tuple[OrderedGrid, ...] = ()

    @property
    def all_grids(self) -> tuple[OrderedGrid, ...]:
        """Where every grid stands, also where there is one alone."""
        return self.grids or (OrderedGrid((self.video,), (self.first_frame,)),)

    def check_length(self, length: int) -> None:
        """Raise UnsupportedCall unless the order is one of `length` tokens: what its index vectors hold is not read."""
        if length != self.length:
            raise UnsupportedCall(f"the token order is for {self.length} tokens, the call has {length}")
        if self.forward is None and self.inverse is None:
            return
        if self.forward is None or self.inverse is None:
            lacks = "forward" if self.forward is None else "inverse"
            raise UnsupportedCall(f"the token order has no {lacks}: forward and inverse are both None, or undo each other")
        for name, index in (("forward", self.forward), ("inverse", self.inverse)):
            if index.dtype != torch.int64 or index.ndim not in (1, 2) or index.shape[-1] != length or index.shape != self.forward.shape:
                wanted = f"int64 [{length}] or [G, {length}] as its other half is"
                raise UnsupportedCall(f"the token order's {name} must be {wanted}, not {index.dtype} {list(index.shape)}")

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
        """bool `[blocks]`: blocks that hold a prefix or suffix token, and with `first_frame` those that hold a first-frame token.

        Of several grids: blocks whose tokens are not all of one grid, and with `first_frame` those with a token of a video's first frame.
        """
        start = torch.arange(num_blocks(self.length, block_size), device=device) * block_size
        stop = (start + block_size).clamp(max=self.length)
        protected = torch.ones_like(start, dtype=torch.bool)
        for grid in self.all_grids:
            protected = protected & (_overlap(start, stop, grid.tokens) < stop - start)
        for grid in self.all_grids if first_frame else ():
            protected = protected | (_overlap(start, stop, grid.first_frame) > 0)
        return protected

    def blocks_of_grids(self, block_size: int = BLOCK_SIZE) -> tuple[Span, ...]:
        """(start, stop) in blocks for each grid with a block of its own, as they stand in the order; together they are all blocks.

        A block that no grid has to itself belongs to the grid before it.
        """
        spans = [(-(-start // block_size), stop // block_size) for start, stop in (grid.tokens[0] for grid in self.grids)]
        starts = sorted(start for start, stop in spans if start < stop)
        return tuple(itertools.pairwise([0, *starts[1:], num_blocks(self.length, block_size)]))

    @property
    def num_whole_blocks(self) -> int:
        """In an order that puts grids first: how many whole blocks begin it, each of one grid."""
        own = sum((stop - start) // BLOCK_SIZE for start, stop in (grid.tokens[0] for grid in self.grids))
        return own or self.video[1] // BLOCK_SIZE


def _overlap(start: Tensor, stop: Tensor, spans: tuple[Span, ...]) -> Tensor:
    """int64 like `start`: how many tokens of each block lie in the spans."""
    shared = torch.zeros_like(start)
    for first, last in spans:
        shared = shared + (stop.clamp(max=last) - start.clamp(min=first)).clamp(min=0)
    return shared


def within(places: Tensor, spans: Sequence[Span]) -> Tensor:
    """bool like `places`: in one of the spans."""
    inside = torch.zeros_like(places, dtype=torch.bool)
    for start, stop in spans:
        inside |= (places >= start) & (places < stop)
    return inside


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
    name: str,
    grid: tuple[int, int, int],
    num_prefix_tokens: int = 0,
    num_suffix_tokens: int = 0,
    device: torch.device | str = "cpu",
    further_grids: tuple[TokenGrid, ...] = (),
) -> TokenOrder:
    """The order `name` for a video of `grid` = (F, Y, X) tokens between prefix and suffix tokens. Cached.

    `raster` leaves the sequence alone. `tile` puts the video first, so that its tiles start at a block boundary, then prefix and suffix.
    Each frame becomes its full 8x8 tiles (raster among tiles and within each), then its remainder rows at full width, then its remainder
    columns. In a grid that is not a multiple of 8 the first of several frames keeps its raster order.

    Further grids, which stand among the prefix or suffix tokens, are ordered in the same way: `grids_first`.

    Raises:
        ConfigError: no such order, a size that is not positive, or grids that overlap.
    """
    if name not in ("raster", "tile"):
        raise ConfigError(f"token_order must be 'tile' or 'raster', not '{name}'")
    grids = grids_of_sequence(grid, num_prefix_tokens, num_suffix_tokens, further_grids)
    # tensors made in inference mode could not be used later where gradients are recorded
    with torch.inference_mode(False):
        return _cached(name, grids, grids[0].stop + num_suffix_tokens, torch.device(device))


@lru_cache(maxsize=32)
def _cached(name: str, grids: tuple[TokenGrid, ...], length: int, device: torch.device) -> TokenOrder:
    if name == "tile":
        order = grids_first(grids, [tile_order(grid.size) for grid in grids], length, device)
        is_identity = torch.equal(order.forward, torch.arange(length, device=device))  # type: ignore[arg-type]
        return replace(order, forward=None, inverse=None) if is_identity else order
    places = [OrderedGrid(((grid.start, grid.stop),), _first_frame(grid, grid.start)) for grid in grids] if len(grids) > 1 else []
    video = min(grid.start for grid in grids), max(grid.stop for grid in grids)
    first_frame = grids[0].start, grids[0].start + grids[0].size[1] * grids[0].size[2]
    return TokenOrder(None, None, first_frame, video, length, tuple(places))


def grids_first(grids: tuple[TokenGrid, ...], orders: list[Tensor], length: int, device: torch.device) -> TokenOrder:
    """The order of a sequence whose grids come first, each in its own order, and then all other tokens as they stood.

    Where there are several grids, each has its whole blocks of 128 to itself: what is left of each stands behind the last of them, before
    the other tokens.

    Args:
        grids: of the sequence, the target first.
        orders: int64 `[F * Y * X]` for each grid, of its own tokens.
        length: of the sequence.
        device: where the index vectors lie.
    """
    ordered = [grid.start + order for grid, order in zip(grids, orders, strict=True)]
    other = torch.ones(length, dtype=torch.bool)
    for grid in grids:
        other[grid.start : grid.stop] = False
    whole = [len(tokens) // BLOCK_SIZE * BLOCK_SIZE if len(grids) > 1 else len(tokens) for tokens in ordered]
    heads = [tokens[:count] for tokens, count in zip(ordered, whole, strict=True)]
    tails = [tokens[count:] for tokens, count in zip(ordered, whole, strict=True)]
    forward = torch.cat([*heads, *tails, other.nonzero().flatten()])
    num_video = length - int(other.sum())
    first_frame, video = (0, grids[0].size[1] * grids[0].size[2]), (0, num_video)
    places = _places(grids, whole) if len(grids) > 1 else ()
    return TokenOrder(forward.to(device), torch.argsort(forward).to(device), first_frame, video, length, places)


def _places(grids: tuple[TokenGrid, ...], whole: list[int]) -> tuple[OrderedGrid, ...]:
    """Where grids stand whose first tokens, `whole` of each, come one after the other, and then the rest of each."""
    places = []
    head, tail = 0, sum(whole)
    for grid, count in zip(grids, whole, strict=True):
        rest = grid.num_tokens - count
        frame = grid.size[1] * grid.size[2] if grid.size[0] > 1 else 0
        spans = ((head, head + min(frame, count)), (tail, tail + max(frame - count, 0)))
        places.append(OrderedGrid(((head, head + count), (tail, tail + rest)), spans))
        head, tail = head + count, tail + rest
    return tuple(places)


def _first_frame(grid: TokenGrid, start: int) -> tuple[Span, ...]:
    return ((start, start + grid.size[1] * grid.size[2]),) if grid.size[0] > 1 else ()


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
