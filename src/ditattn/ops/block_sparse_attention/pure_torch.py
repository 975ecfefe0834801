"""Block-sparse attention in plain torch: kept blocks gathered in bounded chunks into SDPA. Runs on every torch device.

Rows of a plan that keep the same number of keys go through SDPA together, so that no mask is needed: indices ascend, hence only the last
kept block of a row can be cut short (by the end of the sequence, by a key length, or by the diagonal of a causal call).
Working memory is one head's keys, values and queries plus `CHUNK_BYTES`; nothing grows with S x T.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ditattn.ops.calls import SparseCall
from ditattn.ops.dense_attention.pure_torch import positively_scaled

# 32 MiB of gathered keys and values: large enough to amortise the calls, small enough to stay near the caches
CHUNK_BYTES = 32 * 2**20


class Shape(NamedTuple):
    """What rows must share to go through one SDPA call."""

    num_blocks: int
    last_tokens: int
    diagonal: bool


def run(call: SparseCall) -> tuple[Tensor, Tensor | None]:
    query, key, value, plan, return_lse = call.query, call.key, call.value, call.plan, call.return_lse
    batch, length, heads, _ = query.shape
    group = heads // key.shape[2]
    shapes = _row_shapes(call)
    out = query.new_empty(query.shape)
    lse = query.new_empty(batch, heads, length, dtype=torch.float32) if return_lse else None
    for b in range(batch):
        for g in range(key.shape[2]):
            keys, values = _blocks(key[b, :, g], plan.block_size), _blocks(value[b, :, g], plan.block_size)
            for h in range(g * group, (g + 1) * group):
                plan_b, plan_h = min(b, plan.indices.shape[0] - 1), min(h, plan.indices.shape[1] - 1)
                head_out, head_lse = _head(
                    _blocks(query[b, :, h], plan.block_size),
                    keys,
                    values,
                    plan.indices[plan_b, plan_h],
                    shapes[b][plan_h],
                    call.scale,
                    return_lse,
                )
                out[b, :, h] = head_out.flatten(0, 1)[:length]
                if lse is not None and head_lse is not None:
                    lse[b, h] = head_lse.flatten()[:length]
    return out, lse


def _blocks(x: Tensor, block_size: int) -> Tensor:
    """`[S, D]` -> `[M, block, D]`, contiguous, the tail padded with zeros."""
    length, dim = x.shape
    rows = -(-length // block_size)
    padded = x.new_zeros(rows * block_size, dim) if length % block_size else x.new_empty(length, dim)
    padded[:length] = x
    return padded.view(rows, block_size, dim)


def _row_shapes(call: SparseCall) -> list[list[dict[Shape, list[int]]]]:
    """Rows grouped by shape, for each batch element and each head of the plan. One transfer to the host."""
    plan, batch = call.plan, call.query.shape[0]
    if call.key_lengths is None:
        limit = torch.full((batch,), plan.key_length, device=plan.indices.device)
    else:
        limit = call.key_lengths.clamp(max=plan.key_length)
    starts = plan.indices.long() * plan.block_size
    row = torch.arange(plan.num_query_blocks, device=starts.device).view(-1, 1)
    usable = (plan.indices >= 0) & (starts < limit.view(-1, 1, 1, 1))
    if call.causal:
        usable &= plan.indices <= row
    counts = usable.sum(-1)
    last_start = starts.expand(batch, -1, -1, -1).gather(-1, (counts - 1).clamp(min=0).unsqueeze(-1)).squeeze(-1)
    last_tokens = (limit.view(-1, 1, 1) - last_start).clamp(max=plan.block_size)
    diagonal = (last_start == row.squeeze(-1) * plan.block_size) & call.causal
    table = torch.stack([counts, last_tokens, diagonal.long()], dim=-1).tolist()
    return [[_grouped(head) for head in element] for element in table]


def _grouped(rows: list[list[int]]) -> dict[Shape, list[int]]:
    groups: dict[Shape, list[int]] = defaultdict(list)
    for number, (count, last_tokens, diagonal) in enumerate(rows):
        groups[Shape(count, last_tokens if count else 0, bool(diagonal and count))].append(number)
    return groups


def _head(
    queries: Tensor, keys: Tensor, values: Tensor, indices: Tensor, groups: dict[Shape, list[int]], scale: float, return_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """One head: `queries` `[M, block, D]`, `keys` and `values` `[N, block, D]`, `indices` `[M, K]` -> `[M, block, D]`, `[M, block]`."""
    out = torch.zeros_like(queries)
    lse = queries.new_full(queries.shape[:2], -torch.inf, dtype=torch.float32) if return_lse else None
    for shape, rows in groups.items():
        if shape.num_blocks == 0:
            continue
        for chunk in _chunks(rows, shape, queries, return_lse):
            picked = torch.tensor(chunk, device=queries.device)
            wanted = indices[picked, : shape.num_blocks].flatten().long()
            num_keys = wanted.numel() // len(chunk) * keys.shape[1] - keys.shape[1] + shape.last_tokens
            k, v = (x.index_select(0, wanted).view(len(chunk), -1, x.shape[2])[:, :num_keys] for x in (keys, values))
            mask = _diagonal_mask(keys.shape[1], num_keys, shape, queries.device) if shape.diagonal else None
            result, result_lse = _attend(queries[picked], k, v, mask, scale, return_lse)
            out[picked] = result
            if lse is not None and result_lse is not None:
                lse[picked] = result_lse
    return out, lse


def _chunks(rows: list[int], shape: Shape, queries: Tensor, return_lse: bool) -> Iterator[list[int]]:
    block, dim = queries.shape[1:]
    row_bytes = 2 * shape.num_blocks * block * dim * queries.element_size()
    if return_lse:
        row_bytes += 2 * shape.num_blocks * block * block * 4
    size = max(1, CHUNK_BYTES // row_bytes)
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


def _diagonal_mask(block: int, num_keys: int, shape: Shape, device: torch.device) -> Tensor:
    """bool `[block, num_keys]`: everything but the upper triangle of the last block."""
    before = (shape.num_blocks - 1) * block
    return torch.ones(block, num_keys, dtype=torch.bool, device=device).tril(before)


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, return_lse: bool) -> tuple[Tensor, Tensor | None]:
    """`[R, block, D]` against `[R, L, D]`. SDPA does not return the log-sum-exp, so asking for it costs explicit scores."""
    if not return_lse:
        # rows of the chunk stand on the head axis, over which every SDPA kernel works in parallel
        q, scale = positively_scaled(q, scale)
        return scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=mask, scale=scale)[0], None
    dtype = torch.promote_types(q.dtype, torch.float32)
    scores = scale * (q.to(dtype) @ k.to(dtype).transpose(-1, -2))
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    lse = scores.logsumexp(-1)
    return ((scores - lse.unsqueeze(-1)).exp() @ v.to(dtype)).to(q.dtype), lse.float()
