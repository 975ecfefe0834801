"""Means of key blocks that stand for their tokens as the head's mean query weighs them.

A plain mean of a block is right where its tokens weigh about the same. Some heads have keys that weigh very unevenly whatever the query:
there a few tokens make up a block's part of the output, and the plain mean of its values is the mean of the others.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from ditattn.backends.selection.tail_error import chunk
from ditattn.ops.block_mean import block_mean
from ditattn.ops.pooled_tail import PooledTail
from ditattn.plan.block_plan import BLOCK_SIZE, num_blocks
from ditattn.plan.token_order import TokenOrder

__all__ = ["weighted_tail"]

# below this squared length the mean query says nothing, and dividing by it would magnify rounding errors
LEAST_SQUARE = 1e-6


def weighted_tail(
    mean_query: Tensor, key: Tensor, value: Tensor, order: TokenOrder, key_lengths: Tensor | None, scale: float
) -> PooledTail:
    """A tail whose terms are exact for the mean query in weight and in value, and nearly so for queries around it.

    For a block of n tokens with keys k_i and values v_i, and the mean query m: p_i is the softmax of scale m.k_i over the block, key and
    value are the sums of p_i k_i and p_i v_i. Then exp(scale m.key + log n) is not yet the block's weight, the sum of exp(scale m.k_i); the
    difference of the logarithms is added to the key along m, so that the tail needs no term of its own for it.

    Args:
        mean_query: fp32 `[B, G, D]`, for each key head.
        key, value: `[B, T, G, D]`.
        order: the plan's order of the tokens.
        key_lengths: `[B]`; tokens from there on, in that order, count for nothing.
        scale: factor on the scores.
    """
    length = key.shape[1]
    starts = torch.arange(num_blocks(length), device=key.device) * BLOCK_SIZE
    lengths = torch.full((1,), length, device=key.device) if key_lengths is None else key_lengths.long().clamp(0, length)
    counts = (lengths.unsqueeze(1) - starts).clamp(0, BLOCK_SIZE).float()
    scores = order.apply(scale * _scores(mean_query, key))
    padded = (torch.arange(length, device=key.device) >= lengths.unsqueeze(1)).unsqueeze(-1)
    scores = scores.masked_fill(padded, -torch.inf)
    by_block = pad(scores, (0, 0, 0, len(starts) * BLOCK_SIZE - length), value=-torch.inf).unflatten(1, (-1, BLOCK_SIZE))
    log_weight = by_block.logsumexp(2)
    # a block of padding alone has no weights: none of its tokens, and no NaN
    shares = (by_block - log_weight.unsqueeze(2)).exp().nan_to_num(nan=0.0).flatten(1, 2)[:, :length]
    shares = order.undo(shares)
    hidden = None if key_lengths is None else order.undo(padded.expand_as(scores))
    stored = (length - starts).clamp(max=BLOCK_SIZE).view(1, -1, 1, 1)
    key_means, value_means = (_weighted_sums(x, shares, hidden, order, stored) for x in (key, value))
    missing = log_weight - scale * (key_means * mean_query.unsqueeze(1)).sum(-1) - counts.log().unsqueeze(-1)
    missing = missing.masked_fill((counts == 0).unsqueeze(-1), 0)
    along = missing / (scale * mean_query.square().sum(-1).clamp(min=LEAST_SQUARE)).unsqueeze(1)
    return PooledTail(key_means + along.unsqueeze(-1) * mean_query.unsqueeze(1), value_means, counts)


def _scores(mean_query: Tensor, key: Tensor) -> Tensor:
    """fp32 `[B, T, G]`."""
    return torch.einsum("btgd,bgd->btg", key.float(), mean_query)


def _weighted_sums(x: Tensor, shares: Tensor, hidden: Tensor | None, order: TokenOrder, stored: Tensor) -> Tensor:
    """`[B, N, G, D]`: sums over every block of the tokens times their `shares` `[B, T, G]`, a few heads at a time.

    Tokens that are `hidden` `[B, T, G]` are selected away, since they may be NaN.
    """
    step = max(1, chunk(x.device) // (x.shape[0] * x.shape[1] * x.shape[3]))
    found = []
    for start in range(0, x.shape[2], step):
        heads = slice(start, start + step)
        part = x[:, :, heads].float() * shares[:, :, heads, None]
        if hidden is not None:
            part = part.masked_fill_(hidden[:, :, heads, None], 0)
        found.append(block_mean(part, BLOCK_SIZE, order=order.of_heads(heads)) * stored)
    return torch.cat(found, 2)
