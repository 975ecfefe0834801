"""Selection by the error that a mean would make: blocks are computed where their mean is a bad stand-in (the rule of permuted_sparse_attn).

Dropped blocks are not left out: each is replaced by its mean key and mean value (`ops.pooled_tail`). What that costs a query is estimated
from the means of sub-blocks of 16 tokens, for the values as well as for the scores, and the blocks with the largest costs of a whole layer
are the ones that are computed.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from ditattn.ops.block_mean import block_mean
from ditattn.ops.contract import without_autocast
from ditattn.ops.pooled_tail import PooledTail
from ditattn.plan.block_plan import BLOCK_SIZE, num_blocks
from ditattn.plan.token_order import TokenOrder

__all__ = ["Forced", "SubBlocks", "chunk", "estimate", "pick", "sub_blocks"]

SUB_TOKENS = 16
PER_BLOCK = BLOCK_SIZE // SUB_TOKENS
# queries of a block are looked at in this many groups
QUERY_GROUPS = 2
# elements of fp32 at a time. More goes through a CPU's main memory at every step (2.4x slower at 64 MiB); accelerators want longer steps
CHUNK = 4 * 2**20
CHUNK_OF_ACCELERATORS = 32 * 2**20


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


class SubBlocks(NamedTuple):
    """Means of 16 consecutive tokens of an order.

    Attributes:
        means: fp32 `[B, H, N * 8, D]`; zero where there is no token.
        counts: fp32 `[B or 1, N * 8]`, real tokens behind each mean.
        variances: of every element over those tokens, like `means`; None where nobody needs them.
    """

    means: Tensor
    counts: Tensor
    variances: Tensor | None = None

    def at(self, blocks: Tensor) -> SubBlocks:
        """Those of some blocks, int64 `[R]`."""
        means = self.means.unflatten(2, (-1, PER_BLOCK))[:, :, blocks].flatten(2, 3)
        return SubBlocks(means, self.counts.unflatten(-1, (-1, PER_BLOCK))[:, blocks].flatten(1, 2))

    def of_blocks(self) -> tuple[Tensor, Tensor]:
        """Means of the blocks, fp32 `[B, H, N, D]`, and their counts `[B or 1, N]`."""
        counts = self.counts.unflatten(-1, (-1, PER_BLOCK))
        total = counts.sum(-1)
        shares = counts / total.clamp(min=1).unsqueeze(-1)
        return (self.means.unflatten(2, (-1, PER_BLOCK)) * shares[:, None, :, :, None]).sum(3), total

    def of_all(self, groups: int) -> Tensor:
        """Mean of all tokens of each of G groups of heads, fp32 `[B, G, D]`; sub-blocks that are not finite are no part of it."""
        finite = self.means.isfinite().all(-1)
        counts = self.counts.unsqueeze(1) * finite
        means = self.means.masked_fill(~finite.unsqueeze(-1), 0)
        mean = (means * counts.unsqueeze(-1)).sum(2) / counts.sum(-1).clamp(min=1).unsqueeze(-1)
        return mean.unflatten(1, (groups, -1)).mean(2)


def chunk(device: torch.device) -> int:
    """Elements of fp32 that selection works on at a time."""
    return CHUNK if device.type == "cpu" else CHUNK_OF_ACCELERATORS


def sub_blocks(x: Tensor, order: TokenOrder, key_lengths: Tensor | None = None, *, variances: bool = False) -> SubBlocks:
    """Sub-block means of `[B, S, H, D]` in `order`; tokens from `key_lengths` `[B]` on, in that order, count for nothing."""
    found = _sub_means(x, order, key_lengths)
    if not variances:
        return found
    return found._replace(variances=(_mean_squares(x, order, key_lengths) - found.means.square()).clamp(min=0))


def _mean_squares(x: Tensor, order: TokenOrder, key_lengths: Tensor | None) -> Tensor:
    """Sub-block means of every element's square, a few heads at a time: fresh memory for all of them costs more than the means do."""
    step = max(1, chunk(x.device) // (x.shape[0] * x.shape[1] * x.shape[3]))
    room = torch.empty_like(x[:, :, :step], dtype=torch.float32, memory_format=torch.contiguous_format)
    found = []
    for start in range(0, x.shape[2], step):
        part = x[:, :, start : start + step]
        squares = room[:, :, : part.shape[2]].copy_(part).square_()
        found.append(_sub_means(squares, order.of_heads(slice(start, start + step)), key_lengths).means)
    return torch.cat(found, 1)


def _sub_means(x: Tensor, order: TokenOrder, key_lengths: Tensor | None) -> SubBlocks:
    length = x.shape[1]
    total = num_blocks(length) * PER_BLOCK
    starts = torch.arange(total, device=x.device) * SUB_TOKENS
    stored = (length - starts).clamp(0, SUB_TOKENS).float()
    if key_lengths is None:
        means, counts = block_mean(x, SUB_TOKENS, order=order), stored.unsqueeze(0)
    else:
        counts = (key_lengths.unsqueeze(1) - starts).clamp(0, SUB_TOKENS).float()
        place = torch.arange(length, device=x.device)
        if order.inverse is not None:
            place = order.inverse
        real = (place < key_lengths.view(-1, *[1] * place.ndim)).view(x.shape[0], -1, length).transpose(1, 2)
        # a mean over what is stored, put right to one over what is real
        means = block_mean(x.masked_fill(~real.unsqueeze(-1), 0), SUB_TOKENS, order=order)
        means = means * (stored / counts.clamp(min=1))[:, : means.shape[1], None, None]
    return SubBlocks(pad(means, (0, 0, 0, 0, 0, total - means.shape[1])).transpose(1, 2), counts)


def estimate(query: SubBlocks, key: SubBlocks, value: SubBlocks, tail: PooledTail, scale: float) -> Tensor:
    """What it costs each query block to have a key block replaced by its mean: squared error of the output, fp32 `[B, H, M, N]`.

    For query q, a block with sub-block means k_b, v_b of n_b tokens, the tail's key k and value v for its n tokens, the sum Z of all
    weights, and the output o: || sum_b w_b (v_b - o) - w (v - o) ||^2 / Z^2, where w = n exp(scale q.k) and
    w_b = n_b exp(scale q.k_b + scale^2 q^2.var_b / 2), which is what n_b tokens weigh on average whose keys have the sub-block's
    variances var_b.

    Args:
        query: of H heads, their means pooled to `QUERY_GROUPS` groups a block.
        key: of G heads, H a multiple of G, with its variances.
        value: of G heads.
        tail: what stands for the blocks.
        scale: factor on the scores.
    """
    assert key.variances is not None
    batch, heads = query.means.shape[:2]
    queries = _grouped(query)
    group = heads // key.means.shape[1]
    key_means, value_means = tail.key.transpose(1, 2), tail.value.transpose(1, 2)
    costs = []
    with without_autocast(queries.device):
        for b in range(batch):
            row = min(b, key.counts.shape[0] - 1)
            logs = key.counts[row].log(), tail.counts[row].log()
            step = max(1, chunk(queries.device) // (queries.shape[2] * key.means.shape[2]))
            for start in range(0, heads, step):
                chosen = torch.arange(start, min(start + step, heads), device=queries.device)
                theirs = chosen // group
                parts = (
                    key.means[b, theirs],
                    key.variances[b, theirs],
                    value.means[b, theirs],
                    key_means[b, theirs],
                    value_means[b, theirs],
                )
                costs.append(_costs(queries[b, chosen], *parts, *logs, scale))
    return torch.cat(costs).unflatten(0, (batch, heads))


def _grouped(query: SubBlocks) -> Tensor:
    """`[B, H, M * QUERY_GROUPS, D]`; groups of a short last block that hold no token repeat the block's mean."""
    size = PER_BLOCK // QUERY_GROUPS
    means, counts = query.means.unflatten(2, (-1, size)), query.counts.unflatten(-1, (-1, size))
    total = counts.sum(-1)
    groups = (means * (counts / total.clamp(min=1).unsqueeze(-1))[:, None, :, :, None]).sum(3)
    blocks = query.of_blocks()[0].repeat_interleave(QUERY_GROUPS, dim=2)
    return torch.where((total > 0)[:, None, :, None], groups, blocks)


def _costs(
    q: Tensor, k: Tensor, k_var: Tensor, v: Tensor, k_mean: Tensor, v_mean: Tensor, log_sub: Tensor, log_block: Tensor, scale: float
) -> Tensor:
    """Heads side by side: q `[H, A, D]`, k, k_var and v `[H, N * 8, D]`, block means `[H, N, D]` -> `[H, M, N]`.

    Keys are the rows here and queries the columns, so that the eight weights of a block stand in consecutive rows: sums over them run over
    whole vectors, and products within a block need no copy.
    """
    heads, queries, _ = q.shape
    # one product for both terms of the exponent
    scaled = torch.cat([scale * q, scale * scale / 2 * q.square()], -1)
    fine = torch.baddbmm(log_sub[None, :, None].expand(heads, -1, queries), torch.cat([k, k_var], -1), scaled.mT)
    coarse = torch.baddbmm(log_block[None, :, None].expand(heads, -1, queries), k_mean, scale * q.mT)
    top = torch.maximum(fine.amax(1, keepdim=True), coarse.amax(1, keepdim=True))
    fine, coarse = fine.sub_(top).exp_(), coarse.sub_(top).exp_()
    total = fine.sum(1, keepdim=True)
    out = (v.mT @ fine) / total
    # the values of a block around its mean: the error is sum_b w_b (v_b - v) + (sum_b w_b - w) (v - o)
    around = v.unflatten(1, (-1, PER_BLOCK)) - v_mean.unsqueeze(2)
    weights = fine.unflatten(1, (-1, PER_BLOCK))
    excess = weights.sum(2) - coarse
    to_out = (around * v_mean.unsqueeze(2)).sum(-1, keepdim=True) - (around.flatten(1, 2) @ out).unflatten(1, (-1, PER_BLOCK))
    spread = (weights * ((around @ around.mT) @ weights + 2 * excess.unsqueeze(2) * to_out)).sum(2)
    distance = (v_mean.square().sum(-1, keepdim=True) - 2 * (v_mean @ out) + out.square().sum(1, keepdim=True)).clamp(min=0)
    cost = ((spread + excess.square() * distance) / total.square()).clamp(min=0)
    return cost.unflatten(2, (-1, QUERY_GROUPS)).mean(3).mT


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
