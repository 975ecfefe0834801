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
    # exp(score - lse) is softmax; a row without keys has lse -inf and must give zeros, not NaN
    weights = torch.where(lse.isneginf().unsqueeze(-1), 0.0, (scores - lse.unsqueeze(-1)).exp())
    return (weights @ v).transpose(1, 2).to(query.dtype), lse.float()


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
