"""Means of key blocks that stand in for the tokens of the blocks that a plan drops.

Letters: B batch, N key blocks, G key heads, D head size, M query blocks, H query heads.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ditattn.arguments import check_tensors
from ditattn.errors import UnsupportedCall
from ditattn.ops.block_mean import block_mean
from ditattn.ops.contract import check_like
from ditattn.plan.block_plan import BLOCK_SIZE, BlockPlan, num_blocks
from ditattn.plan.token_order import TokenOrder

__all__ = ["PooledTail"]


@dataclass(frozen=True, eq=False)
class PooledTail:
    """One mean key and one mean value for every key block, in the plan's order of the tokens.

    For each row and each key block that the row's plan drops and that has n > 0 real tokens, the softmax gets one more term with weight
    exp(scale * query . key + log n) and value `value`.

    Attributes:
        key, value: fp32 `[B, N, G, D]`, means over the real tokens.
        counts: `[B or 1, N]`, floating or integer, how many real tokens the block has; 0 where it is padding only.
    """

    key: Tensor
    value: Tensor
    counts: Tensor

    @classmethod
    def of(
        cls,
        key: Tensor,
        value: Tensor,
        order: TokenOrder | None = None,
        key_lengths: Tensor | None = None,
        block_size: int = BLOCK_SIZE,
    ) -> PooledTail:
        """The tail of key and value `[B, T, G, D]`, for the call that gets the same `order` and `key_lengths`."""
        keys, values = (block_mean(x, block_size, order=order) for x in (key, value))
        starts = torch.arange(keys.shape[1], device=key.device) * block_size
        if key_lengths is None:
            return cls(keys, values, (key.shape[1] - starts).clamp(max=block_size).float().unsqueeze(0))
        lengths = key_lengths.long().clamp(0, key.shape[1])
        counts = (lengths.unsqueeze(1) - starts).clamp(0, block_size)
        forward = None if order is None else order.forward
        keys, values = (_without_padding(x, mean, lengths, counts, forward, block_size) for x, mean in ((key, keys), (value, values)))
        return cls(keys, values, counts.float())

    def check(self, key: Tensor, plan: BlockPlan) -> None:
        """Raise UnsupportedCall unless the tail is one for the call's key `[B, T, G, D]` and plan. Its values are not read."""
        batch, _, heads, dim = key.shape
        expected = (batch, num_blocks(plan.key_length, plan.block_size), heads, dim)
        counts = self.counts
        check_tensors(**{"the tail's key": self.key, "the tail's value": self.value, "the tail's counts": counts})
        check_like("the tail's key", self.key, expected, key.device)
        check_like("the tail's value", self.value, expected, key.device)
        if counts.ndim != 2 or counts.shape[0] not in (1, batch) or counts.shape[1] != expected[1] or counts.device != key.device:
            wanted = f"[{batch} or 1, {expected[1]}] on {key.device}"
            raise UnsupportedCall(f"the tail's counts must be {wanted}, not {list(counts.shape)} on {counts.device}")

    def log_counts(self) -> Tensor:
        """fp32 `[B or 1, N]`, -inf for blocks without a real token."""
        return self.counts.float().log()

    def real_value(self) -> Tensor:
        """`value` with zeros for blocks without a real token, whose weight of zero would not hide a NaN."""
        return self.value.masked_fill((self.counts == 0)[..., None, None], 0)

    def bias(self, plan: BlockPlan) -> Tensor:
        """fp32 `[B or 1, H or 1, M, N]`: what is added to a row's scores of the means, -inf where the block is kept or empty."""
        return self.log_counts()[:, None, None].masked_fill(plan.to_mask(), -torch.inf)


def _without_padding(x: Tensor, means: Tensor, lengths: Tensor, counts: Tensor, order: Tensor | None, block_size: int) -> Tensor:
    """Means `[B, N, G, D]` over the first `lengths` tokens of x in `order`: one block of each element is cut, those after it are zero."""
    batch, total, heads, _ = x.shape
    last = (lengths - 1).clamp(min=0) // block_size
    places = last.unsqueeze(1) * block_size + torch.arange(block_size, device=x.device)
    real = places < lengths.unsqueeze(1)
    places = places.clamp(max=total - 1)
    every = torch.arange(batch, device=x.device)
    if order is None or order.ndim == 1:
        tokens = (places if order is None else order[places]).unsqueeze(2)
    else:
        tokens = order.repeat_interleave(heads // order.shape[0], dim=0)[:, places].permute(1, 2, 0)
    block = x[every.view(-1, 1, 1), tokens, torch.arange(heads, device=x.device)].float()
    # selected, not multiplied: padding may be NaN
    total_of_block = block.masked_fill(~real[..., None, None], 0).sum(1)
    means = means.masked_fill((counts == 0)[..., None, None], 0)
    means[every, last] = total_of_block / real.sum(1).clamp(min=1).view(-1, 1, 1)
    return means
