"""Sequences that several ranks share: where the tokens stand after the ranks' parts were gathered.

Context parallelism splits every stream of a denoiser's tokens (text, image) apart. Each rank lays its parts behind each other, so that a
gathered sequence is `[text of rank 0, image of rank 0, text of rank 1, ...]`: not the model's order where there are several streams.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor

from ditattn.plan.block_plan import BLOCK_SIZE
from ditattn.plan.token_order import OrderedGrid, Span, TokenOrder, within

__all__ = ["ExchangeRows", "GatheredRows", "GatheredTokens", "HeadShare", "RowOrder", "row_order"]

ExchangeRows = Callable[[Tensor, list[int], list[int]], Tensor]


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
        exchange: where the host can: `[B, R, H, D]` and how many rows go to each place of the ring and how many come from each -> those
            that came.
    """

    gathered: GatheredTokens
    first: int
    parts: int
    dealt: DealtTokens | None = None
    exchange: ExchangeRows | None = field(default=None, compare=False, repr=False)

    @property
    def place(self) -> int:
        """In the ring."""
        return self.first // self.parts

    @property
    def places(self) -> int:
        """Of the ring."""
        return self.gathered.ranks // self.parts

    def at(self, place: int) -> GatheredRows:
        """Those of another place in the ring."""
        return replace(self, first=place * self.parts)

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
        """The queries as they stand in an order of the model's tokens: `row_order`."""
        return row_order(self.tokens(), order, device)


def row_order(tokens: Tensor, order: TokenOrder, device: torch.device | str = "cpu") -> RowOrder:
    """Queries that are the model's tokens `tokens` as they stand in an order of all of them, on `device`. Reads the order from its device.

    Blocks of 128 that are here as a whole come first, so that what is here of others shifts none of them.
    """
    places = tokens if order.inverse is None else order.inverse.cpu()[..., tokens]
    forward, spans = _whole_blocks_first(places, order)
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

    Grid after grid the whole blocks of its first frame and those of its other frames; then, again grid after grid, what is left of both;
    then all other tokens. Where heads have an order each, all have as many of each: which tokens are a grid's or a first frame's is the
    same in every head.
    """
    grids = order.all_grids
    block, other = places // BLOCK_SIZE, 4 * len(grids)
    kind, counts = torch.full_like(places, other), [0] * other
    for number, grid in enumerate(grids):
        in_frame = within(places, grid.first_frame)
        for offset, inside in enumerate((in_frame, within(places, grid.tokens) & ~in_frame)):
            first, left = 2 * number + offset, 2 * (len(grids) + number) + offset
            # blocks of one kind alone; what counts as whole has all its tokens here, and of heads with more of them only the first ones
            whole = inside & _has_all(block, inside, order.length)
            counts[first] = int(whole.sum(-1).min())
            counts[left] = int(inside.sum(-1).max()) - counts[first]
            earlier = torch.where(whole, places, order.length).argsort(-1).argsort(-1)
            kind[inside] = left
            kind[whole & (earlier < counts[first])] = first
    ends = list(itertools.accumulate(counts, initial=0))
    placed = tuple(_placed(ends, number, len(grids)) for number in range(len(grids)))
    forward = (kind * order.length + places).argsort(-1)
    spans = replace(order, first_frame=placed[0].first_frame[0], video=(0, ends[-1]), grids=placed)
    is_plain = not order.grids and len(placed[0].first_frame) == 1
    return forward, replace(spans, grids=()) if is_plain else spans


def _placed(ends: list[int], number: int, grids: int) -> OrderedGrid:
    """Where one of several grids stands: its whole blocks, and what is left of it, the longer part first."""
    first, left = 2 * number, 2 * (grids + number)
    tokens = _joined((ends[first], ends[first + 2]), (ends[left], ends[left + 2]))
    frame = _joined((ends[first], ends[first + 1]), (ends[left], ends[left + 1]))
    return OrderedGrid(tuple(sorted(tokens, key=lambda span: span[0] - span[1])), frame)


def _joined(first: Span, second: Span) -> tuple[Span, ...]:
    """Two spans as they stand, without empty ones, and as one where the second begins as the first ends."""
    if second[0] == second[1] or first[0] == first[1]:
        return (first,) if second[0] == second[1] else (second,)
    return ((first[0], second[1]),) if first[1] == second[0] else (first, second)


def _has_all(block: Tensor, inside: Tensor, length: int) -> Tensor:
    """bool like `block`: all tokens of a place's block are among those inside."""
    counts = torch.zeros(*block.shape[:-1], length // BLOCK_SIZE + 1, dtype=torch.long).scatter_add_(-1, block, inside.long())
    return counts.gather(-1, block) == BLOCK_SIZE


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
