"""Mean-pool selection: a block's mean stands for its tokens (the rule of Rain Fusion)."""

from __future__ import annotations

import torch
from torch import Tensor

from ditattn.ops.block_mean import block_mean
from ditattn.ops.contract import without_autocast
from ditattn.plan.block_plan import BLOCK_SIZE, BlockPlan, num_blocks, num_kept
from ditattn.plan.token_order import Span, TokenOrder

__all__ = ["select"]


def select(
    query: Tensor,
    key: Tensor,
    *,
    scale: float,
    sparsity: float,
    protected: Tensor,
    key_lengths: Tensor | None = None,
    order: TokenOrder | None = None,
    block_size: int = BLOCK_SIZE,
) -> BlockPlan:
    """Keep, for each query block of each batch element and head, the key blocks with the highest pooled score.

    The score of a pair is `scale * mean(q) . mean(k)` in fp32. The method ranks by its softmax over the key blocks, which is strictly
    increasing, so the scores are ranked themselves: equal order, and no ties from underflow. Ties are broken by index. A NaN score is kept,
    so that NaN inputs reach the output as they do in dense attention.

    Args:
        query: `[B, S, H, D]`, in the model's order.
        key: `[B, T, G, D]`, H a multiple of G.
        scale: factor on the scores.
        sparsity: asked share of key blocks to drop; every row keeps exactly `num_kept(N, sparsity)` blocks, and the protected ones. Where
            `order` has several grids: `num_kept` of the blocks of each, so that no grid is crowded out by another.
        protected: bool `[N]`, N = number of key blocks; kept as columns and, where S = T, as whole rows.
        key_lengths: integer `[B]`, real keys of each batch element. Blocks that hold padding leave the ranking; the one that also holds
            real keys is kept.
        order: the order in which tokens make blocks; everything that speaks of blocks or of leading keys means this order.

    Returns:
        BlockPlan over `[B, H]`.

    Source: RainFusion2.0, arXiv 2512.24086 (steps 2 to 5).
    """
    parts = order.blocks_of_grids(block_size) if order is not None else ((0, num_blocks(key.shape[1], block_size)),)
    if order is not None and order.forward is None:
        # the order of tokens as they stand: of a rank's queries and everybody's keys alike
        order = None
    q, k = block_mean(query, block_size, order=order), block_mean(key, block_size, order=order)
    k = k.repeat_interleave(query.shape[2] // key.shape[2], dim=2)
    with without_autocast(query.device):
        scores = torch.einsum("bmhd,bnhd->bhmn", q, k) * scale
    scores = scores.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)
    if key_lengths is None:
        mask = _top_of_each(scores, parts, sparsity)
    else:
        start = torch.arange(scores.shape[-1], device=key.device) * block_size
        real = key_lengths.view(-1, 1, 1, 1)
        padded = (start + block_size).clamp(max=key.shape[1]) > real
        mask = _top_of_each(scores.masked_fill(padded, -torch.inf), parts, sparsity) | (padded & (start < real))
    mask = mask | protected
    if query.shape[1] == key.shape[1]:
        mask = mask | protected.unsqueeze(-1)
    return BlockPlan.from_mask(mask, query.shape[1], key.shape[1], block_size)


def _top_of_each(scores: Tensor, parts: tuple[Span, ...], sparsity: float) -> Tensor:
    """bool mask of the largest of the last axis: of each of its parts the share that the sparsity leaves."""
    return torch.cat([_top(scores[..., start:stop], num_kept(stop - start, sparsity)) for start, stop in parts], dim=-1)


def _top(scores: Tensor, keep: int) -> Tensor:
    """bool mask of the `keep` largest of the last axis, exactly, the lowest index first among equals."""
    smallest = scores.topk(keep, dim=-1, sorted=False).values.amin(-1, keepdim=True)
    above, equal = scores > smallest, scores == smallest
    room = keep - above.sum(-1, keepdim=True)
    return above | (equal & (equal.cumsum(-1) <= room))
