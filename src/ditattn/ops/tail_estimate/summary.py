"""What selection and tail know of keys and values."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ditattn.ops.pooled_tail import PooledTail
from ditattn.plan.block_plan import BLOCK_SIZE, num_blocks

__all__ = ["LEAST_SQUARE", "PER_BLOCK", "QUERY_GROUPS", "SUB_TOKENS", "Estimator", "KeySummary", "Summarized"]

SUB_TOKENS = 16
PER_BLOCK = BLOCK_SIZE // SUB_TOKENS
# queries of a block are looked at in this many groups
QUERY_GROUPS = 2
# below this squared length a mean query says nothing, and dividing by it would magnify rounding errors
LEAST_SQUARE = 1e-6


class Summarized(NamedTuple):
    """What a kernel makes of keys and values, in the plan's order of the tokens.

    Attributes:
        means, variances: of every element over 16 consecutive keys, fp32 `[B, G, N * 8, D]`; zero where there is no token.
        value_means: likewise, of the values.
        tail_key, tail_value: fp32 `[B, N, G, D]`.
    """

    means: Tensor
    variances: Tensor
    value_means: Tensor
    tail_key: Tensor
    tail_value: Tensor

    @classmethod
    def empty(cls, key: Tensor) -> Summarized:
        """Room for the summary of key `[B, T, G, D]`."""
        batch, length, heads, dim = key.shape
        blocks = num_blocks(length)
        fine, coarse = (batch, heads, blocks * PER_BLOCK, dim), (batch, blocks, heads, dim)
        return cls(*(torch.empty(shape, dtype=torch.float32, device=key.device) for shape in (fine, fine, fine, coarse, coarse)))


class KeySummary(NamedTuple):
    """The same with the numbers of tokens.

    Attributes:
        means, variances, value_means: as in `Summarized`.
        counts: fp32 `[B or 1, N * 8]`, real tokens behind each mean.
        tail: what stands for the blocks.
    """

    means: Tensor
    variances: Tensor
    value_means: Tensor
    counts: Tensor
    tail: PooledTail


class Estimator(NamedTuple):
    """The two steps of an implementation, with the arguments of `key_summary` and of `tail_cost`."""

    summary: Callable[..., Summarized]
    cost: Callable[..., Tensor]
