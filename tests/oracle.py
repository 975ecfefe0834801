"""What the ops must compute, spelled out in float64, one head at a time. Shares no code with the package.

Letters as everywhere: B batch, S query tokens, T key tokens, H heads, G key heads, D head size, M query blocks, K kept blocks per row.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float | None = None,
    causal: bool = False,
    key_lengths: Tensor | None = None,
    attn_mask: Tensor | None = None,
    plan: object | None = None,
    tail: object | None = None,
) -> tuple[Tensor, Tensor]:
    """Float64 output `[B, S, H, D]` and natural log-sum-exp `[B, H, S]`; rows without keys are 0 and -inf.

    Query `[B, S, H, D]`, key and value `[B, T, G, D]`. Causal: query i sees keys 0..i. `plan` has the fields of a BlockPlan, `tail` those
    of a PooledTail: every dropped block is one more key with its mean value, n times as heavy for n tokens.
    """
    batch, length, heads, dim = query.shape
    group = heads // key.shape[2]
    scale = 1 / math.sqrt(dim) if scale is None else scale
    seen = visible(query, key, causal=causal, key_lengths=key_lengths, attn_mask=attn_mask, plan=plan)
    bias = None if attn_mask is None or attn_mask.dtype == torch.bool else attn_mask.double().expand(seen.shape)
    out = torch.zeros(query.shape, dtype=torch.float64, device=query.device)
    lse = torch.full((batch, heads, length), -torch.inf, dtype=torch.float64, device=query.device)
    for b in range(batch):
        for h in range(heads):
            q, k, v = query[b, :, h].double(), key[b, :, h // group].double(), value[b, :, h // group].double()
            scores = scale * (q @ k.T)
            if bias is not None:
                scores = scores + bias[b, h]
            visible_here = seen[b, h]
            if tail is not None:
                number = tail.counts[b if len(tail.counts) > 1 else 0].double()
                dropped = ~token_mask(plan, batch, heads)[b, h, :, :: plan.block_size].to(query.device) & (number > 0)
                means = tail.key[b, :, h // group].double()
                scores = torch.cat([scores, scale * (q @ means.T) + number.log()], dim=-1)
                v = torch.cat([v, tail.value[b, :, h // group].double()])
                visible_here = torch.cat([visible_here, dropped], dim=-1)
            scores = scores.masked_fill(~visible_here, -torch.inf)
            rows = visible_here.any(-1)
            scores = scores[rows]
            peak = scores.amax(-1, keepdim=True)
            weights = (scores - peak).exp()
            total = weights.sum(-1, keepdim=True)
            out[b, rows, h] = weights @ v / total
            lse[b, h, rows] = (total.log() + peak).squeeze(-1)
    return out, lse


def visible(
    query: Tensor,
    key: Tensor,
    *,
    causal: bool = False,
    key_lengths: Tensor | None = None,
    attn_mask: Tensor | None = None,
    plan: object | None = None,
) -> Tensor:
    """bool `[B, H, S, T]`: which keys a query sees."""
    batch, length, heads, _ = query.shape
    num_keys = key.shape[1]
    seen = torch.ones(batch, heads, length, num_keys, dtype=torch.bool, device=query.device)
    if causal:
        seen &= torch.arange(num_keys, device=query.device) <= torch.arange(length, device=query.device).unsqueeze(1)
    if key_lengths is not None:
        for b, number in enumerate(key_lengths.tolist()):
            seen[b, :, :, max(number, 0) :] = False
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        seen &= attn_mask
    if plan is not None:
        seen &= token_mask(plan, batch, heads).to(query.device)
    return seen


def token_mask(plan: object, batch: int, heads: int) -> Tensor:
    """bool `[B, H, S, T]` of a plan, read entry by entry."""
    indices, counts = plan.indices.tolist(), plan.counts.tolist()
    size = plan.block_size
    mask = torch.zeros(batch, heads, plan.query_length, plan.key_length, dtype=torch.bool)
    for b in range(batch):
        for h in range(heads):
            plan_rows = indices[b if len(indices) > 1 else 0]
            plan_counts = counts[b if len(counts) > 1 else 0]
            head = h if len(plan_rows) > 1 else 0
            for m, row in enumerate(plan_rows[head]):
                for block in row[: plan_counts[head][m]]:
                    mask[b, h, m * size : (m + 1) * size, block * size : (block + 1) * size] = True
    return mask


def block_mean(x: Tensor, block_size: int) -> Tensor:
    """Float64 `[B, ceil(S / block_size), H, D]`."""
    return torch.stack([x[:, start : start + block_size].double().mean(1) for start in range(0, x.shape[1], block_size)], dim=1)
