"""BlockPlan: which key blocks each query block attends to.

The one value in which *what to attend* and *how to compute it* meet. Everything that makes a plan is pure torch; everything that
consumes one is a kernel judged by the same reference.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ditattn.arguments import check_count, check_tensors
from ditattn.errors import UnsupportedCall

__all__ = ["BLOCK_SIZE", "BlockPlan", "num_blocks", "num_kept"]

BLOCK_SIZE = 128


def num_blocks(num_tokens: int, block_size: int = BLOCK_SIZE) -> int:
    """Number of blocks that cover `num_tokens`; there is never an empty tail block."""
    return -(-num_tokens // block_size)


def num_kept(num_key_blocks: int, sparsity: float) -> int:
    """How many key blocks a row keeps at an asked sparsity: ceil(N * (1 - sparsity)), at least 1."""
    # 10 * (1 - 0.7) is 3, although floating point says 3.0000000000000004
    return max(1, math.ceil(round(num_key_blocks * (1 - sparsity), 6)))


@dataclass(frozen=True, eq=False)
class BlockPlan:
    """Kept key blocks per batch element, head and query block.

    Letters: B batch, H query heads, M query blocks, N key blocks, K most kept blocks of any row, S query tokens, T key tokens.

    Attributes:
        indices: int32 `[B or 1, H or 1, M, K]`, ascending key block numbers; entries past the row's count are -1.
        counts: int32 `[B or 1, H or 1, M]`, kept blocks per row. A row with count 0 yields zeros.
        query_length: S, true number of query tokens (the last block may be short).
        key_length: T, true number of key tokens.
        block_size: tokens per block, for queries and keys alike.

    Examples:
        >>> import torch
        >>> from ditattn import BlockPlan
        >>> mask = torch.tensor([[True, False, False], [True, True, False], [False, True, True]])
        >>> plan = BlockPlan.from_mask(mask[None, None], query_length=384, key_length=384)
        >>> plan.counts.tolist()
        [[[1, 2, 2]]]
        >>> round(plan.density(), 3)
        0.556
    """

    indices: Tensor
    counts: Tensor
    query_length: int
    key_length: int
    block_size: int = BLOCK_SIZE

    @property
    def num_query_blocks(self) -> int:
        return num_blocks(self.query_length, self.block_size)

    @property
    def num_key_blocks(self) -> int:
        return num_blocks(self.key_length, self.block_size)

    @classmethod
    def from_mask(cls, mask: Tensor, query_length: int, key_length: int, block_size: int = BLOCK_SIZE) -> BlockPlan:
        """Plan of a boolean block mask `[B or 1, H or 1, M, N]`, True where the block is kept.

        K is N, so no value of the mask has to travel to the host; `trimmed()` narrows the indices where that is worth a sync.

        Raises:
            UnsupportedCall: no bool tensor, last two axes that are not (M, N), or a size that is not positive.
        """
        check_tensors(mask=mask)
        for name, count in (("query_length", query_length), ("key_length", key_length), ("block_size", block_size)):
            check_count(name, count)
        expected = (num_blocks(query_length, block_size), num_blocks(key_length, block_size))
        if mask.ndim != 4 or tuple(mask.shape[2:]) != expected:
            raise UnsupportedCall(
                f"a block mask for {query_length} x {key_length} tokens is [B, H, {expected[0]}, {expected[1]}], not {list(mask.shape)}"
            )
        if mask.dtype != torch.bool:
            raise UnsupportedCall(f"a block mask must be bool, True where the block is kept, not {mask.dtype}")
        place = mask.cumsum(-1)
        counts = place[..., -1].to(torch.int32)
        # every kept block goes to its place in the row, every dropped one to a spare column that is cut off
        columns = torch.arange(mask.shape[-1], device=mask.device, dtype=torch.int32).expand(mask.shape)
        indices = torch.full((*mask.shape[:3], mask.shape[-1] + 1), -1, device=mask.device, dtype=torch.int32)
        indices.scatter_(-1, torch.where(mask, place - 1, mask.shape[-1]), columns)
        indices = indices[..., :-1]
        return cls(indices.contiguous(), counts.contiguous(), query_length, key_length, block_size)

    @classmethod
    def full(cls, query_length: int, key_length: int, block_size: int = BLOCK_SIZE, device: torch.device | str = "cpu") -> BlockPlan:
        """The plan that keeps everything: dense attention.

        Raises:
            UnsupportedCall: a size that is not positive.
        """
        for name, count in (("query_length", query_length), ("key_length", key_length), ("block_size", block_size)):
            check_count(name, count)
        rows, columns = num_blocks(query_length, block_size), num_blocks(key_length, block_size)
        indices = torch.arange(columns, dtype=torch.int32, device=device).expand(1, 1, rows, columns).contiguous()
        return cls(indices, torch.full((1, 1, rows), columns, dtype=torch.int32, device=device), query_length, key_length, block_size)

    def trimmed(self) -> BlockPlan:
        """The same plan with K cut to the longest row. Reads one number from the device."""
        longest = max(int(self.counts.max()), 1) if self.counts.numel() else 1
        return BlockPlan(self.indices[..., :longest].contiguous(), self.counts, self.query_length, self.key_length, self.block_size)

    def check(self, batch: int, heads: int) -> None:
        """Verify every invariant against B `batch` and H `heads`. Reads the plan from the device: meant for borders and tests.

        Raises:
            UnsupportedCall: names the first invariant that does not hold.
        """
        for problem in self._problems(batch, heads):
            raise UnsupportedCall(f"bad BlockPlan: {problem}")

    def check_form(self, batch: int, heads: int) -> None:
        """As `check`, without reading the plan from the device: types, shapes and devices."""
        for problem in self._problems_of_form(batch, heads):
            raise UnsupportedCall(f"bad BlockPlan: {problem}")

    def _problems(self, batch: int, heads: int) -> Iterator[str]:
        form = list(self._problems_of_form(batch, heads))
        return iter(form) if form else self._problems_of_values()

    def _problems_of_form(self, batch: int, heads: int) -> Iterator[str]:
        check_tensors(**{"bad BlockPlan: indices": self.indices, "bad BlockPlan: counts": self.counts})
        if self.indices.dtype != torch.int32 or self.counts.dtype != torch.int32:
            yield f"indices and counts must be int32, not {self.indices.dtype} and {self.counts.dtype}"
        if self.indices.device != self.counts.device:
            yield f"indices and counts must be on one device, not on {self.indices.device} and {self.counts.device}"
        sizes = (self.query_length, self.key_length, self.block_size)
        if not all(isinstance(size, (int, torch.SymInt)) and size >= 1 for size in sizes):
            yield f"lengths and block size must be positive whole numbers, not {', '.join(map(str, sizes))}"
            return
        if self.indices.ndim != 4 or self.counts.shape != self.indices.shape[:3]:
            yield f"indices {list(self.indices.shape)} and counts {list(self.counts.shape)} must be [B, H, M, K] and [B, H, M]"
            return
        if self.indices.shape[0] not in (1, batch) or self.indices.shape[1] not in (1, heads):
            yield f"indices are for B, H = {list(self.indices.shape[:2])}, the call has {[batch, heads]}"
        if self.indices.shape[2] != self.num_query_blocks:
            yield f"{self.indices.shape[2]} rows for {self.num_query_blocks} query blocks"
        if self.indices.shape[3] == 0:
            yield "indices need at least one column"

    def _problems_of_values(self) -> Iterator[str]:
        if bool(((self.counts < 0) | (self.counts > self.indices.shape[3])).any()):
            yield f"counts must lie in 0..{self.indices.shape[3]}"
        used = self._used
        if bool((self.indices[~used] != -1).any()):
            yield "entries past a row's count must be -1"
        if bool(((self.indices < 0) | (self.indices >= self.num_key_blocks))[used].any()):
            yield f"used indices must lie in 0..{self.num_key_blocks - 1}"
        if bool(((self.indices[..., 1:] <= self.indices[..., :-1]) & used[..., 1:]).any()):
            yield "indices of a row must ascend without repeats"

    @cached_property
    def _used(self) -> Tensor:
        """bool `[B, H, M, K]`: entries before the row's count."""
        return torch.arange(self.indices.shape[-1], device=self.indices.device) < self.counts.unsqueeze(-1)

    def to_mask(self) -> Tensor:
        """bool `[B or 1, H or 1, M, N]`, True where the block is kept."""
        mask = torch.zeros(*self.indices.shape[:3], self.num_key_blocks + 1, dtype=torch.bool, device=self.indices.device)
        # unused entries (-1) land in a spare column that is cut off
        target = torch.where(self._used, self.indices, self.num_key_blocks).long()
        return mask.scatter_(-1, target, True)[..., :-1]

    def density(self) -> float:
        """Kept share of the real query-key pairs, 0..1. Tokens of short tail blocks are counted as they are, padding never."""
        return float(self.density_tensor())

    def density_tensor(self) -> Tensor:
        """`density()` as a scalar float64 tensor on the plan's device, without a host synchronisation."""
        # whole numbers, which float64 adds exactly: keys of full blocks, less what the short last blocks of keys and of queries lack
        missing_keys = self.num_key_blocks * self.block_size - self.key_length
        missing_queries = self.num_query_blocks * self.block_size - self.query_length
        if not missing_keys and not missing_queries:
            return self.counts.sum(dtype=torch.float64) / (self.counts.numel() * self.num_key_blocks)
        kept_keys = self.counts.double() * self.block_size
        if missing_keys:
            kept_keys = kept_keys - (self.indices == self.num_key_blocks - 1).any(-1) * float(missing_keys)
        pairs = kept_keys.sum() * self.block_size
        if missing_queries:
            pairs = pairs - kept_keys[..., -1].sum() * missing_queries
        return pairs / (math.prod(self.counts.shape[:2]) * self.query_length * self.key_length)
