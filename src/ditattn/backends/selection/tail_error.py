"""Selection by the error that a mean would make: blocks are computed where their mean is a bad stand-in (the rule of permuted_sparse_attn).

Dropped blocks are not left out: each is replaced by its mean key and mean value (`ops.pooled_tail`). What that costs a query is estimated
from the means of sub-blocks of 16 tokens, for the values as well as for the scores, and the blocks with the largest costs of a whole layer
are the ones that are computed.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ditattn.ops.block_mean import block_mean
from ditattn.ops.tail_estimate import QUERY_GROUPS
from ditattn.plan.block_plan import BLOCK_SIZE
from ditattn.plan.token_order import TokenOrder

__all__ = ["Forced", "QueryGroups", "pick", "query_groups"]

GROUP_TOKENS = BLOCK_SIZE // QUERY_GROUPS


class Forced(NamedTuple):
    """Blocks that are kept whatever they cost. Their numbers are known to the host, so that nobody has to ask the device.

    Attributes:
        columns: bool `[N]`, key blocks that every row keeps.
        num_columns: how many.
        rows: bool `[M]`, query blocks that keep everything.
        open_rows: int64, the other query blocks.
    """

    columns: Tensor
    num_columns: int
    rows: Tensor
    open_rows: Tensor

    @classmethod
    def of(cls, columns: Tensor, rows: Tensor, device: torch.device | str) -> Forced:
        """From bool `[N]` and `[M]` on the CPU, for costs on `device`."""
        return cls(columns.to(device), int(columns.sum()), rows.to(device), (~rows).nonzero().flatten().to(device))

    def in_one_row(self) -> Forced:
        """The columns for a query block of its own, which may drop the others."""
        first = torch.zeros(1, dtype=torch.int64, device=self.rows.device)
        return self._replace(rows=first.bool(), open_rows=first)


class QueryGroups(NamedTuple):
    """Means of the two halves of every query block.

    Attributes:
        means: fp32 `[B, H, M * 2, D]`; a half without a token repeats the other one.
        counts: fp32 `[M * 2]`, tokens behind each mean; 0 for a repeated one.
    """

    means: Tensor
    counts: Tensor

    def at(self, blocks: Tensor) -> Tensor:
        """The means of some blocks, int64 `[R]`: `[B, H, R * 2, D]`."""
        return self.means.unflatten(2, (-1, QUERY_GROUPS))[:, :, blocks].flatten(2, 3)

    def of_all(self, heads: int) -> Tensor:
        """Mean of all tokens of each of G groups of heads, fp32 `[B, G, D]`; means that are not finite are no part of it."""
        finite = self.means.isfinite().all(-1)
        weights = self.counts * finite
        means = torch.where(finite.unsqueeze(-1), self.means, 0)
        mean = (weights.unsqueeze(2) @ means).squeeze(2) / weights.sum(-1).clamp(min=1).unsqueeze(-1)
        return mean.unflatten(1, (heads, -1)).mean(2)


def query_groups(query: Tensor, order: TokenOrder) -> QueryGroups:
    """Of query `[B, S, H, D]` in `order`."""
    length = query.shape[1]
    means = block_mean(query, GROUP_TOKENS, order=order).transpose(1, 2)
    if means.shape[2] % QUERY_GROUPS:
        means = torch.cat([means, means[:, :, -1:]], dim=2)
    starts = torch.arange(means.shape[2], device=query.device) * GROUP_TOKENS
    return QueryGroups(means, (length - starts).clamp(0, GROUP_TOKENS).float())


def pick(costs: Tensor, sparsity: float, forced: Forced, valid: Tensor, least: int) -> Tensor:
    """bool `[B, H, M, N]`: the blocks with the largest costs of all heads and rows together.

    Args:
        costs: `[B, H, M, N]`. NaN is kept, so that it reaches the output as in dense attention.
        sparsity: dropped share of each batch element's H * M' * N blocks, M' rows being those that are not whole. Forced ones count.
        forced: blocks that are kept in any case.
        valid: bool `[B or 1, N]`: key blocks that hold a real token.
        least: so many of the best blocks of every row are kept, whatever other rows need.
    """
    heads, _, num_columns = costs.shape[1:]
    real = valid[:, None, None, :]
    ranked = costs.nan_to_num(nan=torch.inf).masked_fill(~real, -1.0)
    must = (forced.columns | forced.rows.unsqueeze(-1)).expand_as(ranked)
    best = ranked.masked_fill(must, torch.inf).topk(min(least + forced.num_columns, num_columns), dim=-1).indices
    must = (must | torch.zeros_like(must).scatter(-1, best, True)) & real
    open_rows = forced.open_rows
    budget = round(heads * len(open_rows) * num_columns * (1 - sparsity))
    must_of_open = must.index_select(2, open_rows)
    open_costs = ranked.index_select(2, open_rows).masked_fill(must_of_open, torch.inf)
    kept = _largest(open_costs.flatten(1), budget, must_of_open.flatten(1)).view_as(open_costs)
    return must.index_copy(2, open_rows, kept) & real


def _largest(costs: Tensor, budget: int, must: Tensor) -> Tensor:
    """bool `[B, L]`: the `budget` largest, the first ones among equals, and all that must be kept even if they are more."""
    if not costs.shape[1]:
        # every row keeps everything
        return must
    keep = min(max(budget, 1), costs.shape[1])
    smallest = costs.topk(keep, dim=-1, sorted=False).values.amin(-1, keepdim=True)
    above, equal = costs > smallest, costs == smallest
    room = keep - above.sum(-1, keepdim=True)
    return above | (equal & (equal.cumsum(-1) <= room)) | must
