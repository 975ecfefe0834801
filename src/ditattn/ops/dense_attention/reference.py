"""Dense attention spelled out, in fp32. Memory grows with S x T: for checking, not for running."""

from __future__ import annotations

import torch
from torch import Tensor


def run(
    query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool, key_lengths: Tensor | None, attn_mask: Tensor | None
) -> Tensor:
    group = query.shape[2] // key.shape[2]
    q = query.float().transpose(1, 2)
    k, v = (x.float().transpose(1, 2).repeat_interleave(group, dim=1) for x in (key, value))
    scores = scale * (q @ k.transpose(-1, -2))
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else scores + attn_mask.float()
    if causal:
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf)
    if key_lengths is not None:
        beyond = torch.arange(key.shape[1], device=key.device) >= key_lengths.view(-1, 1, 1, 1)
        scores = scores.masked_fill(beyond, -torch.inf)
    seen = (scores > -torch.inf) | scores.isnan()
    weights = torch.where(seen.any(-1, keepdim=True), scores.softmax(-1), 0.0)
    return (weights @ v).transpose(1, 2).to(query.dtype)
