"""Rows of a video's first frame, which keep every key, dealt out to the ranks of a ring so that all have as much to do.

A ring splits the sequence into neighbouring pieces, so that the first rank would have all of them: at 8 ranks and sparsity 0.75 it would
work 1.8 times as long as the mean. Whole blocks of these rows go to the other ranks, and their results come back.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ditattn.plan.block_plan import BLOCK_SIZE
from ditattn.plan.split import GatheredRows, GatheredTokens, row_order
from ditattn.plan.token_order import TokenOrder, token_order, within

__all__ = ["Deal", "deal_rows"]


@dataclass(frozen=True, eq=False)
class Deal:
    """Who computes which queries; lists by place in the ring.

    Attributes:
        tokens: int64, the model's tokens of a rank's queries as they stand after the deal: those that stay, then those that came.
        stay: int64, which of a rank's own queries stay.
        sends: for each receiver int64, which of a rank's own queries it gets.
    """

    tokens: list[Tensor]
    stay: list[Tensor]
    sends: list[list[Tensor]]

    def sizes(self, place: int) -> tuple[list[int], list[int]]:
        """How many queries a rank sends to each, and gets from each."""
        return [len(some) for some in self.sends[place]], [len(others[place]) for others in self.sends]


def deal_rows(gathered: GatheredTokens, parts: int, order_facts: tuple[Any, ...], sparsity: float) -> Deal | None:
    """The deal of a sequence with videos; None if every row stays where it is. Cached.

    Args:
        gathered: the whole sequence.
        parts: neighbouring parts of it that a place in the ring has.
        order_facts: arguments of `token_order`, of an order on the host.
        sparsity: asked for rows that keep some keys.
    """
    with torch.inference_mode(False):
        return _cached(gathered, parts, order_facts, sparsity)


@lru_cache(maxsize=16)
def _cached(gathered: GatheredTokens, parts: int, order_facts: tuple[Any, ...], sparsity: float) -> Deal | None:
    order, places = token_order(*order_facts), range(gathered.ranks // parts)
    own = [GatheredRows(gathered, place * parts, parts).tokens() for place in places]
    standing = [tokens if order.inverse is None else order.inverse[tokens] for tokens in own]
    receiver = _receivers(order, own, standing, sparsity)
    goes_to = [receiver[stands] for stands in standing]
    at_home = [(to < 0) | (to == place) for place, to in enumerate(goes_to)]
    if all(bool(home.all()) for home in at_home):
        return None
    stay = [home.nonzero().flatten() for home in at_home]
    sends = [[(~home & (to == other)).nonzero().flatten() for other in places] for home, to in zip(at_home, goes_to, strict=True)]
    tokens = [torch.cat([own[place][stay[place]], *(own[other][sends[other][place]] for other in places)]) for place in places]
    return Deal(tokens, stay, sends)


def _receivers(order: TokenOrder, own: list[Tensor], standing: list[Tensor], sparsity: float) -> Tensor:
    """int64 `[S]`: the place in the ring that computes the row at each place of the order; -1 where it is its owner."""
    starts = [
        block
        for grid in order.all_grids
        for start, stop in grid.first_frame
        for block in range(start, start + (stop - start) // BLOCK_SIZE * BLOCK_SIZE, BLOCK_SIZE)
    ]
    owner, receiver = torch.full((order.length,), -1), torch.full((order.length,), -1)
    for place, stands in enumerate(standing):
        owner[stands] = place
    dealt = within(torch.arange(order.length), [(start, start + BLOCK_SIZE) for start in starts])
    left = [tokens[~dealt[stands]] for tokens, stands in zip(own, standing, strict=True)]
    shares = _shares([_work(order, tokens, sparsity) for tokens in left], len(starts))
    takers = _takers([owner[start : start + BLOCK_SIZE] for start in starts], shares)
    for start, place in zip(starts, takers, strict=True):
        receiver[start : start + BLOCK_SIZE] = place
    return receiver


def _takers(owners: list[Tensor], shares: list[int]) -> list[int]:
    """Who computes each block, of which each place takes its share: who has all its rows, the last blocks first, then others in turn.

    An owner's own rows go on where its first frame ends.
    """
    left, takers = list(shares), [-1] * len(owners)
    for number, rows in reversed(list(enumerate(owners))):
        home = int(rows[0])
        if left[home] and bool((rows == home).all()):
            takers[number], left[home] = home, left[home] - 1
    others = iter([place for place in [*range(1, len(left)), 0] for _ in range(left[place])])
    return [next(others) if taker < 0 else taker for taker in takers]


def _work(order: TokenOrder, tokens: Tensor, sparsity: float) -> float:
    """Of these queries, those in blocks that keep every key, and the part of the others that the sparsity leaves."""
    always = float(order.protected_blocks(BLOCK_SIZE, True, "cpu").float().mean())
    whole = row_order(tokens, order).order.protected_blocks(BLOCK_SIZE, True, "cpu")
    num_whole = int(whole.repeat_interleave(BLOCK_SIZE)[: len(tokens)].sum())
    return num_whole + (1 - sparsity + sparsity * always) * (len(tokens) - num_whole)


def _shares(work: list[float], blocks: int) -> list[int]:
    """How many of so many blocks each place takes beside the work that it has: every next one goes to who has least to do."""
    work, counts = list(work), [0] * len(work)
    for _ in range(blocks):
        least = work.index(min(work))
        counts[least] += 1
        work[least] += BLOCK_SIZE
    return counts
