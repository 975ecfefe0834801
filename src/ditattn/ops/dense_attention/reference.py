"""Dense attention spelled out, in fp32, or float64 where the tensors are. Memory grows with S x T: for checking, not for running."""

from __future__ import annotations

import torch
from torch import Tensor

from ditattn.ops.calls import DenseCall


def run(call: DenseCall) -> Tensor:
    query, key, attn_mask = call.query, call.key, call.attn_mask
    group = query.shape[2] // key.shape[2]
    dtype = torch.promote_types(query.dtype, torch.float32)
    q = query.to(dtype).transpose(1, 2)
    k, v = (x.to(dtype).transpose(1, 2).repeat_interleave(group, dim=1) for x in (key, call.value))
    scores = call.scale * (q @ k.transpose(-1, -2))
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else scores + attn_mask.to(dtype)
    if call.causal:
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf)
    if call.key_lengths is not None:
        beyond = torch.arange(key.shape[1], device=key.device) >= call.key_lengths.view(-1, 1, 1, 1)
        scores = scores.masked_fill(beyond, -torch.inf)
    seen = (scores > -torch.inf) | scores.isnan()
    weights = torch.where(seen.any(-1, keepdim=True), scores.softmax(-1), 0.0)
    return (weights @ v).transpose(1, 2).to(query.dtype)
