"""A pooled tail for implementations that return the log-sum-exp but know no tail: attention over the means in plain torch, then merged.

Both parts are softmaxes of the same rows over different keys; their log-sum-exps say how much each weighs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ditattn.ops.calls import SparseCall

__all__ = ["merged"]

# four tensors of this size are alive at once: 64 MiB
CHUNK_BYTES = 16 * 2**20


def merged(call: SparseCall, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over the kept blocks and the tail, from that over the kept blocks alone.

    Args:
        call: with a tail, its tokens in the plan's order.
        out, lse: `[B, S, H, D]` and `[B, H, S]` of the same call without the tail.

    Returns:
        As `out` and `lse`. Rows that the tail adds nothing to keep every bit.
    """
    tail, plan, query = call.tail, call.plan, call.query
    assert tail is not None
    batch, length, heads, _ = query.shape
    group = heads // call.key.shape[2]
    bias = tail.bias(plan).expand(batch, heads, -1, -1)
    # heads first and dense: torch multiplies other strides in another order of the sums
    key, value = (x.transpose(1, 2).contiguous() for x in (tail.key, tail.real_value()))
    out, lse = out.clone(), lse.clone()
    row_bytes = group * plan.block_size * plan.num_key_blocks * 4
    step = max(1, CHUNK_BYTES // row_bytes)
    for b in range(batch):
        for g in range(call.key.shape[2]):
            own = slice(g * group, (g + 1) * group)
            for row in range(0, plan.num_query_blocks, step):
                tokens = slice(row * plan.block_size, min((row + step) * plan.block_size, length))
                q = query[b, tokens, own].transpose(0, 1).float()
                added = bias[b, own, row : row + step].repeat_interleave(plan.block_size, dim=1)[:, : q.shape[1]]
                part, part_lse = _attend(q, key[b, g], value[b, g], added, call.scale)
                joint, lse[b, own, tokens] = _joined(out[b, tokens, own].transpose(0, 1).float(), lse[b, own, tokens], part, part_lse)
                out[b, tokens, own] = joint.transpose(0, 1).to(out.dtype)
    return out, lse


def _attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """`[H, S, D]` against `[N, D]` with `bias` `[H, S, N]` -> `[H, S, D]`, `[H, S]`. Rows that see nothing are NaN and -inf."""
    # selected, not added: the score of a block that is kept for its NaN or infinity would stay one
    scores = torch.where(bias.isneginf(), bias, scale * (q @ k.T) + bias)
    lse = scores.logsumexp(-1)
    return (scores - lse.unsqueeze(-1)).exp() @ v, lse


def _joined(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Two softmaxes over different keys as one: `[H, S, D]` and `[H, S]` each."""
    total = torch.logaddexp(lse, part_lse)
    ours, theirs = ((x - total).exp().unsqueeze(-1) for x in (lse, part_lse))
    return torch.where(part_lse.isneginf().unsqueeze(-1), out, ours * out + theirs * part), total
