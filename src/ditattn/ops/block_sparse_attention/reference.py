"""Block-sparse attention spelled out, in fp32 (float64 where the tensors are), through a token mask.

Memory grows with S x T: for checking, not for running.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ditattn.ops.calls import SparseCall


def run(call: SparseCall) -> tuple[Tensor, Tensor | None]:
    query, key = call.query, call.key
    group = query.shape[2] // key.shape[2]
    dtype = torch.promote_types(query.dtype, torch.float32)
    q = query.to(dtype).transpose(1, 2)
    k, v = (x.to(dtype).transpose(1, 2).repeat_interleave(group, dim=1) for x in (key, call.value))
    scores = (call.scale * (q @ k.transpose(-1, -2))).masked_fill(~_token_mask(call), -torch.inf)
    lse = scores.logsumexp(-1)
    if call.tail is None:
        return (_softmax(scores, lse) @ v).transpose(1, 2).to(query.dtype), lse.float()
    means, values = (x.to(dtype).transpose(1, 2).repeat_interleave(group, dim=1) for x in (call.tail.key, call.tail.real_value()))
    bias = call.tail.bias(call.plan).repeat_interleave(call.plan.block_size, -2)[:, :, : query.shape[1]]
    tail_scores = torch.where(bias.isneginf(), bias, call.scale * (q @ means.transpose(-1, -2)) + bias)
    lse = torch.logaddexp(lse, tail_scores.logsumexp(-1))
    out = _softmax(scores, lse) @ v + _softmax(tail_scores, lse) @ values
    return out.transpose(1, 2).to(query.dtype), lse.float()


def _softmax(scores: Tensor, lse: Tensor) -> Tensor:
    """exp(score - lse); a row without keys has lse -inf and must give zeros, not NaN."""
    return torch.where(lse.isneginf().unsqueeze(-1), 0.0, (scores - lse.unsqueeze(-1)).exp())


def _token_mask(call: SparseCall) -> Tensor:
    """bool `[B or 1, H or 1, S, T]`."""
    plan = call.plan
    blocks = plan.to_mask().repeat_interleave(plan.block_size, -2).repeat_interleave(plan.block_size, -1)
    mask = blocks[..., : plan.query_length, : plan.key_length]
    if call.causal:
        mask = mask.tril()
    if call.key_lengths is not None:
        mask = mask & (torch.arange(plan.key_length, device=mask.device) < call.key_lengths.view(-1, 1, 1, 1))
    return mask
