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
from ditattn.plan.split import GatheredRows, GatheredTokens
from ditattn.plan.token_order import TokenOrder, token_order

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
    """The deal of a video without further grids; None if every row stays where it is. Cached.

    Args:
        gathered: the whole sequence.
        parts: neighbouring parts of it that a place in the ring has.
        order_facts: arguments of `token_order`.
        sparsity: asked for rows that keep some keys.
    """
    with torch.inference_mode(False):
        return _cached(gathered, parts, order_facts, sparsity)


@lru_cache(maxsize=16)
def _cached(gathered: GatheredTokens, parts: int, order_facts: tuple[Any, ...], sparsity: float) -> Deal | None:
    order, places = token_order(*order_facts), range(gathered.ranks // parts)
    own = [GatheredRows(gathered, place * parts, parts).tokens() for place in places]
    standing = [tokens if order.inverse is None else order.inverse[tokens] for tokens in own]
    receiver = _receivers(order, standing, sparsity)
    goes_to = [receiver[stands] for stands in standing]
    at_home = [(to < 0) | (to == place) for place, to in enumerate(goes_to)]
    if all(bool(home.all()) for home in at_home):
        return None
    stay = [home.nonzero().flatten() for home in at_home]
    sends = [[(~home & (to == other)).nonzero().flatten() for other in places] for home, to in zip(at_home, goes_to, strict=True)]
    tokens = [torch.cat([own[place][stay[place]], *(own[other][sends[other][place]] for other in places)]) for place in places]
    return Deal(tokens, stay, sends)


def _receivers(order: TokenOrder, standing: list[Tensor], sparsity: float) -> Tensor:
    """int64 `[S]`: the place in the ring that computes the row at each place of the order; -1 where it is its owner."""
    start, stop = order.first_frame
    whole = (stop - start) // BLOCK_SIZE
    counts = _shares(order, standing, sparsity, whole)
    receiver = torch.full((order.length,), -1)
    # the first place's own rows go on where the first frame ends, so its blocks come last
    places = torch.cat([torch.full((counts[place] * BLOCK_SIZE,), place) for place in [*range(1, len(counts)), 0]])
    receiver[start : start + whole * BLOCK_SIZE] = places
    return receiver


def _shares(order: TokenOrder, standing: list[Tensor], sparsity: float, whole: int) -> list[int]:
    """How many whole blocks of the first frame each place gets: every next one goes to who has least to do."""
    (start, stop), (first, last) = order.first_frame, order.video
    always = (stop - start + order.length - (last - first)) / order.length
    density = 1 - sparsity + sparsity * always
    dealt = start + whole * BLOCK_SIZE
    work = []
    for stands in standing:
        text = int(((stands < first) | (stands >= last)).sum())
        rest = int(((stands >= dealt) & (stands < stop)).sum())
        others = len(stands) - text - int(((stands >= start) & (stands < stop)).sum())
        # the block in which the first frame ends is computed whole
        straddling = BLOCK_SIZE if rest else 0
        work.append(text + straddling + density * (others - max(straddling - rest, 0)))
    counts = [0] * len(work)
    for _ in range(whole):
        least = work.index(min(work))
        counts[least] += 1
        work[least] += BLOCK_SIZE
    return counts
