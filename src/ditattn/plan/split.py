"""Sequences that several ranks share: where the tokens stand after the ranks' parts were gathered.

Context parallelism splits every stream of a denoiser's tokens (text, image) apart. Each rank lays its parts behind each other, so that a
gathered sequence is `[text of rank 0, image of rank 0, text of rank 1, ...]`: not the model's order where there are several streams.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor

from ditattn.plan.block_plan import BLOCK_SIZE
from ditattn.plan.token_order import OrderedGrid, Span, TokenOrder

__all__ = ["GatheredRows", "GatheredTokens", "HeadShare", "RowOrder"]


@dataclass(frozen=True)
class GatheredTokens:
    """The order of a gathered sequence.

    Attributes:
        streams: lengths of the streams in the model's order; empty ones count for nothing.
        ranks: how many have a part of each stream. Parts are as equal as possible, longer ones first, as `torch.tensor_split` makes them.
    """

    streams: tuple[int, ...]
    ranks: int

    @property
    def interleaves(self) -> bool:
        """False if the gathered sequence is in the model's order."""
        return self.ranks > 1 and sum(length > 0 for length in self.streams) > 1

    def tokens(self, device: torch.device | str = "cpu") -> Tensor:
        """int64 `[S]`: the gathered sequence holds at position j the model's token `tokens[j]`."""
        return _tokens(self, torch.device(device))

    def places(self, device: torch.device | str = "cpu") -> Tensor:
        """int64 `[S]`: the model's token i stands at position `places[i]` of the gathered sequence."""
        return _places(self, torch.device(device))

    def ordered(self, order: TokenOrder, device: torch.device | str = "cpu") -> TokenOrder:
        """An order of the model's tokens, on `device`, as one that reads the gathered sequence."""
        places, tokens = self.places(device), self.tokens(device)
        forward = places if order.forward is None else places[order.forward]
        inverse = tokens if order.inverse is None else order.inverse[..., tokens]
        return replace(order, forward=forward, inverse=inverse)


@dataclass(frozen=True)
class HeadShare:
    """The heads of a layer that a rank has: neighbours, as many for each rank but the last, which may have fewer.

    Attributes:
        place: of the rank.
        ranks: how many share the heads.
        num_heads: of the layer, all ranks together.
    """

    place: int
    ranks: int
    num_heads: int

    @property
    def own(self) -> slice:
        """Which of all heads of the layer."""
        each = -(-self.num_heads // self.ranks)
        return slice(min(self.place * each, self.num_heads), min((self.place + 1) * each, self.num_heads))


@dataclass(frozen=True, eq=False)
class RowOrder:
    """How a rank's queries stand in an order of all tokens.

    Attributes:
        order: of the rank's own queries, its spans counted in them.
        own_blocks: blocks of 128 of them are not blocks of all tokens, so that a plan is not the one of one process.
    """

    order: TokenOrder
    own_blocks: bool


class DealtTokens(Protocol):
    """What is known of a deal (`plan/deal.py`) here."""

    @property
    def tokens(self) -> Sequence[Tensor]:
        """By place in the ring, the model's tokens of a rank's queries."""


@dataclass(frozen=True)
class GatheredRows:
    """The queries of a rank that has everybody's keys: some neighbouring parts of the gathered sequence.

    Attributes:
        gathered: the whole sequence.
        first, parts: the parts are `first`, ..., `first + parts - 1` of its ranks.
        dealt: the model's tokens of the queries, where some were dealt out among the ranks; None where each has its own.
    """

    gathered: GatheredTokens
    first: int
    parts: int
    dealt: DealtTokens | None = None

    @property
    def place(self) -> int:
        """In the ring."""
        return self.first // self.parts

    def tokens(self) -> Tensor:
        """int64 `[R]`: query i is the model's token `tokens[i]`."""
        if self.dealt is not None:
            return self.dealt.tokens[self.place]
        lengths = [
            sum(_share(length, rank, self.gathered.ranks) for length in self.gathered.streams) for rank in range(self.gathered.ranks)
        ]
        start = sum(lengths[: self.first])
        return self.gathered.tokens()[start : start + self.num_tokens]

    @property
    def num_tokens(self) -> int:
        if self.dealt is not None:
            return len(self.dealt.tokens[self.place])
        ranks = range(self.first, self.first + self.parts)
        return sum(_share(length, rank, self.gathered.ranks) for rank in ranks for length in self.gathered.streams)

    def ordered(self, order: TokenOrder, device: torch.device | str = "cpu") -> RowOrder:
        """The queries as they stand in an order of the model's tokens, on `device`. Reads the order from its device.

        Of one grid, blocks of 128 that are a rank's own as a whole come first, so that what it has of others shifts none of them.
        """
        tokens = self.tokens()
        places = tokens if order.inverse is None else order.inverse.cpu()[..., tokens]
        forward, spans = _grid_by_grid(places, order) if order.grids else _whole_blocks_first(places, order)
        places = places.gather(-1, forward)
        index = torch.arange(len(tokens))
        start = places[..., index // BLOCK_SIZE * BLOCK_SIZE]
        together = (places - start == index % BLOCK_SIZE) & (start % BLOCK_SIZE == 0)
        complete = len(tokens) % BLOCK_SIZE == 0 or bool((places[..., -1] == order.length - 1).all())
        forward = forward.to(device)
        own_blocks = not (complete and bool(together.all()))
        return RowOrder(replace(spans, forward=forward, inverse=forward.argsort(-1), length=len(tokens)), own_blocks)


def _share(length: int, rank: int, ranks: int) -> int:
    return length // ranks + (rank < length % ranks)


def _whole_blocks_first(places: Tensor, order: TokenOrder) -> tuple[Tensor, TokenOrder]:
    """Which of the places comes next, int64 like `places`, and the spans.

    Whole blocks of the first frame, whole blocks of the other frames, what is left of both, all other tokens; where heads have an order
    each, all have as many of each.
    """
    (start, stop), (first, last) = order.first_frame, order.video
    in_frame, in_video = (places >= start) & (places < stop), (places >= first) & (places < last)
    block = places // BLOCK_SIZE
    # blocks of one kind alone; what counts as whole has all its tokens here
    whole_frame = in_frame & _has_all(block, in_frame, order.length)
    whole_video = in_video & ~in_frame & _has_all(block, in_video & ~in_frame, order.length)
    num_frame, num_video = (int(whole.sum(-1).min()) for whole in (whole_frame, whole_video))
    kind = torch.full_like(places, 4)
    kind[in_video], kind[in_frame] = 3, 2
    for whole, number, count in ((whole_video, 1, num_video), (whole_frame, 0, num_frame)):
        # of heads with more of them only the first ones
        earlier = torch.where(whole, places, order.length).argsort(-1).argsort(-1)
        kind[whole & (earlier < count)] = number
    forward = (kind * order.length + places).argsort(-1)
    # in every head of as many tokens
    of_frame, of_video = (int(inside.sum(-1).max()) for inside in (in_frame, in_video))
    left = num_frame + num_video
    parts = ((0, num_frame), (left, left + of_frame - num_frame))
    apart = num_video > 0 and num_frame < of_frame
    grids = (OrderedGrid(((0, of_video),), parts),) if apart else ()
    return forward, replace(order, first_frame=(0, num_frame if apart else of_frame), video=(0, of_video), grids=grids)


def _has_all(block: Tensor, inside: Tensor, length: int) -> Tensor:
    """bool like `block`: all tokens of a place's block are among those inside."""
    counts = torch.zeros(*block.shape[:-1], length // BLOCK_SIZE + 1, dtype=torch.long).scatter_add_(-1, block, inside.long())
    return counts.gather(-1, block) == BLOCK_SIZE


def _grid_by_grid(places: Tensor, order: TokenOrder) -> tuple[Tensor, TokenOrder]:
    """Which of the places comes next, and the spans, of a sequence of several grids.

    Where heads have an order each, what is left of a grid behind its whole blocks are other tokens in each head, and a rank has more of
    them in one head than in another. There tokens stand as in an order that has all of a grid together.
    """
    standing, spans = _together(places, order) if places.ndim == 2 else (places, order)
    forward = standing.argsort(-1)
    standing = standing.gather(-1, forward)
    spans = replace(
        spans,
        first_frame=_span(standing, spans.first_frame),
        video=_span(standing, spans.video),
        grids=tuple(_grid(standing, grid) for grid in spans.grids),
    )
    return forward, spans


def _together(places: Tensor, order: TokenOrder) -> tuple[Tensor, TokenOrder]:
    """Places in an order that has all of a grid together, and the spans of that order."""
    spans = [span for grid in order.grids for span in grid.tokens]
    index = torch.cat([torch.arange(*span) for span in spans] + [torch.arange(order.video[1], order.length)])
    moved = index.argsort()

    def together(parts: tuple[Span, ...]) -> tuple[Span, ...]:
        return tuple((int(moved[start]), int(moved[start]) + stop - start) for start, stop in parts if start < stop)

    grids = tuple(OrderedGrid(_joined(together(grid.tokens)), _joined(together(grid.first_frame))) for grid in order.grids)
    return moved[places], replace(order, grids=grids)


def _joined(spans: tuple[Span, ...]) -> tuple[Span, ...]:
    """Spans one behind the other as one."""
    return ((spans[0][0], spans[-1][1]),) if spans else ()


def _grid(places: Tensor, grid: OrderedGrid) -> OrderedGrid:
    return OrderedGrid(tuple(_span(places, span) for span in grid.tokens), tuple(_span(places, span) for span in grid.first_frame))


def _span(places: Tensor, span: Span) -> Span:
    """How many places lie before each end; every head of `[G, R]` has as many."""
    start, stop = (int((places < end).sum()) // (places.shape[0] if places.ndim == 2 else 1) for end in span)
    return start, stop


@lru_cache(maxsize=32)
def _tokens(split: GatheredTokens, device: torch.device) -> Tensor:
    # tensors made in inference mode could not be used later where gradients are recorded
    with torch.inference_mode(False):
        parts = [stream.tensor_split(split.ranks) for stream in torch.arange(sum(split.streams)).split(split.streams)]
        return torch.cat([part for rank in zip(*parts, strict=True) for part in rank]).to(device)


@lru_cache(maxsize=32)
def _places(split: GatheredTokens, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return _tokens(split, torch.device("cpu")).argsort().to(device)
