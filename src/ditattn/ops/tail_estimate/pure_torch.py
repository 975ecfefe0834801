"""The summary of keys and values and the cost of their means, in plain torch, a few heads at a time.

Letters: B batch, N key blocks, G key heads, H query heads, M query blocks, A = 2 M groups of queries.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from ditattn.ops.block_mean import block_mean
from ditattn.ops.contract import without_autocast
from ditattn.ops.tail_estimate.summary import LEAST_SQUARE, PER_BLOCK, QUERY_GROUPS, SUB_TOKENS, Estimator, KeySummary, Summarized
from ditattn.plan.block_plan import BLOCK_SIZE, num_blocks
from ditattn.plan.token_order import TokenOrder

__all__ = ["cost", "estimator", "summary"]

# elements of fp32 at a time. More goes through a CPU's main memory at every step (2.4x slower at 64 MiB); accelerators want longer steps
CHUNK = 4 * 2**20
CHUNK_OF_ACCELERATORS = 32 * 2**20


def chunk(device: torch.device) -> int:
    """Elements of fp32 to work on at a time."""
    return CHUNK if device.type == "cpu" else CHUNK_OF_ACCELERATORS


def summary(mean_query: Tensor, key: Tensor, value: Tensor, order: TokenOrder, key_lengths: Tensor | None, scale: float) -> Summarized:
    """As `ops.tail_estimate.key_summary`."""
    with without_autocast(key.device):
        means = _sub_means(key, order, key_lengths)
        variances = (_mean_squares(key, order, key_lengths) - means.square()).clamp(min=0)
        value_means = _sub_means(value, order, key_lengths)
        return Summarized(means, variances, value_means, *_weighted_tail(mean_query, key, value, order, key_lengths, scale))


def _mean_squares(x: Tensor, order: TokenOrder, key_lengths: Tensor | None) -> Tensor:
    """Sub-block means of every element's square, a few heads at a time: fresh memory for all of them costs more than the means do."""
    step = max(1, chunk(x.device) // (x.shape[0] * x.shape[1] * x.shape[3]))
    room = torch.empty_like(x[:, :, :step], dtype=torch.float32, memory_format=torch.contiguous_format)
    found = []
    for start in range(0, x.shape[2], step):
        part = x[:, :, start : start + step]
        squares = room[:, :, : part.shape[2]].copy_(part).square_()
        found.append(_sub_means(squares, order.of_heads(slice(start, start + step)), key_lengths))
    return torch.cat(found, 1)


def _sub_means(x: Tensor, order: TokenOrder, key_lengths: Tensor | None) -> Tensor:
    """fp32 `[B, H, N * 8, D]`."""
    length = x.shape[1]
    total = num_blocks(length) * PER_BLOCK
    if key_lengths is None:
        means = block_mean(x, SUB_TOKENS, order=order)
    else:
        starts = torch.arange(total, device=x.device) * SUB_TOKENS
        stored = (length - starts).clamp(0, SUB_TOKENS).float()
        counts = (key_lengths.clamp(max=length).unsqueeze(1) - starts).clamp(0, SUB_TOKENS).float()
        place = torch.arange(length, device=x.device)
        if order.inverse is not None:
            place = order.inverse
        real = (place < key_lengths.view(-1, *[1] * place.ndim)).view(x.shape[0], -1, length).transpose(1, 2)
        # a mean over what is stored, put right to one over what is real
        means = block_mean(x.masked_fill(~real.unsqueeze(-1), 0), SUB_TOKENS, order=order)
        means = means * (stored / counts.clamp(min=1))[:, : means.shape[1], None, None]
    return pad(means, (0, 0, 0, 0, 0, total - means.shape[1])).transpose(1, 2)


def _weighted_tail(
    mean_query: Tensor, key: Tensor, value: Tensor, order: TokenOrder, key_lengths: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Keys and values of the tail, fp32 `[B, N, G, D]`, as `ops.tail_estimate.key_summary` describes them."""
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
    return key_means + along.unsqueeze(-1) * mean_query.unsqueeze(1), value_means


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


def cost(groups: Tensor, found: KeySummary, scale: float) -> Tensor:
    """As `ops.tail_estimate.tail_cost`."""
    batch, heads = groups.shape[:2]
    group = heads // found.means.shape[1]
    key_means, value_means = found.tail.key.transpose(1, 2), found.tail.value.transpose(1, 2)
    costs = []
    with without_autocast(groups.device):
        for b in range(batch):
            row = min(b, found.counts.shape[0] - 1)
            logs = found.counts[row].log(), found.tail.counts[row].log()
            step = max(1, chunk(groups.device) // (groups.shape[2] * found.means.shape[2]))
            for start in range(0, heads, step):
                chosen = torch.arange(start, min(start + step, heads), device=groups.device)
                theirs = chosen // group
                parts = (
                    found.means[b, theirs],
                    found.variances[b, theirs],
                    found.value_means[b, theirs],
                    key_means[b, theirs],
                    value_means[b, theirs],
                )
                costs.append(_costs(groups[b, chosen], *parts, *logs, scale))
    return torch.cat(costs).unflatten(0, (batch, heads))


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


def estimator() -> Estimator:
    """The row of the table."""
    return Estimator(summary, cost)
