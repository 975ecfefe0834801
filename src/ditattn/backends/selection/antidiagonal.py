"""Antidiagonal selection: estimate the softmax mass of every block from the antidiagonals of its tiles (the rule of Block Sparse).

Groups of `stride` tokens are folded into one long vector, the query's group reversed, so that the product of two folded vectors is the sum
of the scores on one antidiagonal of a stride x stride tile of tokens. Their softmax, summed over a block, estimates the block's mass.

Source: XAttention, arXiv 2503.16428, as the operator `sparse_block_estimate` of sgl-kernel-npu specifies it. Differences, all listed in
docs/originals.md: fp32 throughout, the tail of the keys is scored, at least one block is kept, a causal denominator is triangular, the
flags for the forced columns are honoured, exactly the asked number of blocks is kept (the operator also keeps near-ties within 1e-5).
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from ditattn.ops.block_estimate import STRIDE, block_estimate
from ditattn.ops.block_estimate.pure_torch import estimate
from ditattn.plan.block_plan import BLOCK_SIZE, BlockPlan
from ditattn.plan.token_order import Span

__all__ = ["STRIDE", "select"]

# the operator never caps rows with fewer valid blocks than this
MIN_CAPPED_BLOCKS = 10
# a sparsity is taken as the nearest fraction of this precision
MAX_DENOMINATOR = 10**6


def select(
    query: Tensor,
    key: Tensor,
    *,
    scale: float,
    sparsity: float,
    protected: Tensor,
    threshold: float = 1.0,
    causal: bool = False,
    keep_sink: bool = True,
    keep_recent: bool = True,
    key_lengths: Tensor | None = None,
    parts: tuple[Span, ...] = (),
    stride: int = STRIDE,
    block_size: int = BLOCK_SIZE,
) -> BlockPlan:
    """Keep the key blocks with the largest estimated mass.

    On an NPU an operator of the installed packages estimates and picks, where one takes the call and there is one part.

    Args:
        query: `[B, S, H, D]`.
        key: `[B, T, G, D]`, H a multiple of G.
        scale: factor on the scores.
        sparsity: a row with K valid blocks keeps the best floor(K * (1 - sparsity)), at least 1, and the forced ones.
        protected: bool `[N]`, kept as columns and, where S = T, as whole rows.
        threshold: below 1, keep only the shortest run of best blocks that holds this share of the mass, capped by `sparsity`.
        causal: only blocks up to the diagonal are valid.
        keep_sink, keep_recent: force the first and the last valid block of every row.
        key_lengths: integer `[B]`, real keys of each batch element.
        parts: (start, stop) of the key blocks that have a budget each, one after the other: a row with K valid blocks in a part keeps the
            best floor(K * (1 - sparsity)) of it, at least 1. Empty: all blocks are one part.
        stride: tokens folded together; divides `block_size`.

    Returns:
        BlockPlan over `[B, H]`.

    Raises:
        UnsupportedCall: the stride does not divide the block size.
    """
    facts: dict[str, Any] = {"scale": scale, "causal": causal, "key_lengths": key_lengths, "stride": stride, "block_size": block_size}
    mask = None
    if len(parts) < 2:
        forced_columns = keep_sink and keep_recent
        mask = block_estimate(query, key, sparsity=sparsity, threshold=threshold, forced_columns=forced_columns, **facts)
    if mask is None:
        mask = _pick(estimate(query, key, **facts), sparsity, threshold, causal, keep_sink, keep_recent, parts)
    mask = mask | protected
    if query.shape[1] == key.shape[1]:
        mask = mask | protected.unsqueeze(-1)
    if causal:
        mask = mask.tril()
    return BlockPlan.from_mask(mask, query.shape[1], key.shape[1], block_size)


def _pick(
    mass: Tensor, sparsity: float, threshold: float, causal: bool, keep_sink: bool, keep_recent: bool, parts: tuple[Span, ...] = ()
) -> Tensor:
    """bool `[B, H, M, N]`: the best blocks of every row in every part, and the forced ones."""
    rows, columns = mass.shape[-2:]
    column = torch.arange(columns, device=mass.device)
    row = torch.arange(rows, device=mass.device).unsqueeze(-1)
    num_valid = (row + 1).clamp(max=columns) if causal else torch.full_like(row, columns)
    valid = column < num_valid
    forced = ((column == 0) & keep_sink) | ((column == num_valid - 1) & keep_recent)
    # forced blocks leave the ranking; invalid ones stand behind everything; NaN is kept, so that it reaches the output
    scores = mass.nan_to_num(nan=torch.inf).masked_fill(forced, 0.0).masked_fill(~valid, -1.0)
    capped = num_valid >= MIN_CAPPED_BLOCKS
    best = [
        _best(scores[..., start:stop], (num_valid - start).clamp(0, stop - start), capped, sparsity, threshold)
        for start, stop in parts or ((0, columns),)
    ]
    mask = torch.cat(best, dim=-1)
    if causal:
        mask = mask | (num_valid <= 2)
    return (mask | forced) & valid


def _best(scores: Tensor, num_valid: Tensor, capped: Tensor, sparsity: float, threshold: float) -> Tensor:
    """bool like `scores`: the kept prefix of every ranked row."""
    ranked, order = scores.sort(dim=-1, descending=True, stable=True)
    chosen = torch.arange(scores.shape[-1], device=scores.device) < _num_chosen(ranked, num_valid, capped, sparsity, threshold)
    return torch.zeros_like(order, dtype=torch.bool).scatter(-1, order, chosen.expand_as(order))


def _num_chosen(ranked: Tensor, num_valid: Tensor, capped: Tensor, sparsity: float, threshold: float) -> Tensor:
    """int64 `[B, H, M, 1]` or `[M, 1]`: length of the kept prefix of every ranked row; rows that are not `capped` ignore the sparsity."""
    wanted = num_valid
    if threshold < 1:
        cumulative = ranked.clamp(min=0).cumsum(-1)
        wanted = ((cumulative < threshold * cumulative[..., -1:]).sum(-1, keepdim=True) + 1).minimum(num_valid)
    # in integers: 10 * (1 - 0.7) is 3, whatever floating point says, and no table of numbers has to travel to the device
    kept = Fraction(1 - sparsity).limit_denominator(MAX_DENOMINATOR)
    share = (num_valid * kept.numerator).div(kept.denominator, rounding_mode="floor").clamp(min=1)
    return torch.where(capped, wanted.minimum(share), wanted)
