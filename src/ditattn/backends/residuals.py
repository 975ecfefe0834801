"""What dense steps know that sparse ones do not: a residual for each layer, renewed in a few dense steps and added in those between.

The error of a sparse call changes little from one step to the next: where blocks are dropped by a rule, the next step drops nearly the same
ones. So the difference between the dense and the sparse output of a step, its residual, is most of what the next sparse output lacks.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ditattn.plan.reuse import ForwardId

__all__ = ["LEAST_SPARSE_STEPS", "Refreshes", "Residuals", "refreshes", "without_residual"]

# shorter runs take steps too large for a residual to outlast one
LEAST_SPARSE_STEPS = 8
# and than these a dense step among the sparse ones is too large a part of the budget
LEAST_STEPS_FOR_REFRESH = 16
# with less to drop, computing sparse outputs beside dense ones costs more than it brings
LEAST_SPARSITY = 1 / 3
# of what the steps after the first dense ones may compute, the part that goes into dense ones among them
SHARE = 0.45
# so much the sparse steps compute at the least: with less, rows have no choice beside the blocks that everybody keeps
LEAST_DENSITY = 0.1
# dense steps stand closer together at the beginning, where more changes: the exponent of their places
CROWDING = 1.75
# how much of a residual is left after the whole schedule, as a logarithm; until a refresh has measured it
DECAY = -2.5
LEAST_KEPT = 0.05
LEVELS = 127
TINY = torch.finfo(torch.float32).tiny
# elements of an output that are widened at a time: what a core's caches hold (14x faster than all at once), and what an accelerator wants
CHUNK, CHUNK_OF_ACCELERATORS = 2**18, 2**25


class Refreshes(NamedTuple):
    """How a run spends its budget.

    Attributes:
        steps: dense steps after the first dense ones.
        before_sparse: dense steps, among them the last of the first ones, that a sparse step follows: they compute the sparse output too.
        sparsity: dropped share of the sparse steps.
    """

    steps: frozenset[int]
    before_sparse: frozenset[int]
    sparsity: float


def without_residual(sparsity: float) -> Refreshes:
    """All steps after the first dense ones alike."""
    return Refreshes(frozenset(), frozenset(), sparsity)


@lru_cache
def refreshes(sparsity: float, first: int, stop: int, *, is_video: bool = True) -> Refreshes:
    """Which of the steps `first` .. `stop` - 1 run densely, and how sparse the others are, so that `sparsity` is dropped over all of them.

    Args:
        sparsity: dropped share of all query-key pairs of these steps, the sparse outputs of dense steps included.
        first: the steps before it run densely.
        stop: number of the first step behind them. Of fewer than eight steps, and where little is dropped, all are sparse alike.
        is_video: images, whose sparse steps come near to dense ones without them, have none, and neither have runs of few steps.
    """
    length = stop - first
    if length < LEAST_SPARSE_STEPS or sparsity < LEAST_SPARSITY:
        return without_residual(sparsity)
    budget = (1 - sparsity) * length
    number = max(min(round(SHARE * budget), math.floor(budget - LEAST_DENSITY * (length + 1))), 0)
    if not is_video or length < LEAST_STEPS_FOR_REFRESH:
        number = 0
    steps = frozenset(first + round(length * ((place + 1) / (number + 1)) ** CROWDING) for place in range(number))
    dense = steps | ({first - 1} if first else set())
    before_sparse = frozenset(step for step in dense if step + 1 < stop and step + 1 not in steps)
    density = max(budget - len(steps), 0.0) / (length - len(steps) + len(before_sparse))
    return Refreshes(steps, before_sparse, 1 - density)


@dataclass
class _Kept:
    """One residual in eight bits, `[B, S, H, D]`, with a scale for each token and head.

    Attributes:
        decay: what remains of each head's residual after one step, fp32 `[H, 1]`.
    """

    levels: Tensor
    scale: Tensor
    step: int
    run: int
    facts: Hashable
    decay: Tensor

    def measured_decay(self, now: Tensor, step: int) -> Tensor:
        """By which factor a step this residual became what it explains of the one of a later step, `[H, 1]`."""
        shared, square = (torch.zeros(now.shape[2], device=now.device) for _ in range(2))
        for part, levels, scale in _parts(now, self.levels, self.scale):
            before = levels * scale
            shared += (before * part).sum((0, 1, 3))
            square += before.square_().sum((0, 1, 3))
        return (shared / square.clamp(min=TINY)).clamp(LEAST_KEPT, 1).pow(1 / (step - self.step)).unsqueeze(-1)


class Residuals:
    """Those of one layer, one for each branch of guidance."""

    def __init__(self) -> None:
        self._kept: dict[Hashable, _Kept] = {}

    def keep(self, residual: Tensor, step: int, num_steps: int, forward_id: ForwardId, facts: Hashable) -> None:
        """Remember the residual `[B, S, H, D]` of a step; one that was there tells how fast this layer's residuals fade."""
        # parts are written in place, which autograd does not follow
        residual = residual.detach()
        known = self._find(residual.shape, step, forward_id, facts)
        levels = torch.empty(residual.shape, dtype=torch.int8, device=residual.device)
        scale = torch.empty(*residual.shape[:3], 1, dtype=torch.float32, device=residual.device)
        for part, some_levels, some_scale in _parts(residual, levels, scale):
            wide = part.float()
            some_scale.copy_(wide.abs().amax(-1, keepdim=True).clamp(min=TINY) / LEVELS)
            some_levels.copy_((wide / some_scale).round_())
        if known is None:
            decay = scale.new_full((residual.shape[2], 1), DECAY / num_steps).exp()
        else:
            decay = known.measured_decay(residual, step)
        self._kept[_place(forward_id)] = _Kept(levels, scale, step, forward_id.run, facts, decay)

    def added(self, out: Tensor, step: int, forward_id: ForwardId, facts: Hashable) -> Tensor:
        """A sparse output with what is left of the residual, in its place; as it is where there is none for it."""
        known = self._find(out.shape, step, forward_id, facts)
        if known is None:
            return out
        left = known.decay ** (step - known.step)
        for part, levels, scale in _parts(out.detach(), known.levels, known.scale):
            part.copy_(torch.addcmul(part.float(), levels, scale * left))
        return out

    def forget(self) -> None:
        """Release them."""
        self._kept.clear()

    def _find(self, shape: torch.Size, step: int, forward_id: ForwardId, facts: Hashable) -> _Kept | None:
        known = self._kept.get(_place(forward_id))
        if known is None or known.run != forward_id.run or known.facts != facts or known.step >= step:
            return None
        # a batch may lose its second half within a run: guidance that ends, a cache that leaves a branch out
        return known if known.levels.shape == shape else None


def _place(forward_id: ForwardId) -> Hashable:
    return forward_id.branch, forward_id.number


def _parts(first: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same tokens of each `[B, S, H, ...]`, some at a time: a whole output in fp32 would be the largest tensor of a call."""
    chunk = CHUNK if first.device.type == "cpu" else CHUNK_OF_ACCELERATORS
    tokens = max(1, chunk * first.shape[1] // first.numel())
    return zip(*(x.split(tokens, dim=1) for x in (first, *others)), strict=True)
