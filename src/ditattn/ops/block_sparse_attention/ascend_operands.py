"""What the Ascend block-sparse operators take and give: pure functions between them and a BlockPlan, tested on the CPU.

A row of the plan without any block must give zeros. What the operators do with such a row is documented for some of them only, so it gets
block 0 and its output is cleared afterwards.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from ditattn.attention.plan import BlockPlan
from ditattn.ops.ascend import padded_head_dim, to_heads_first

# the mask of the operator with counts: one row must fill whole 32-byte units
COUNTED_MASK_COLUMNS = 32


def empty_rows(plan: BlockPlan, batch: int, heads: int) -> Tensor:
    """bool `[B, H, M]`: rows that keep no block."""
    return (plan.counts == 0).expand(batch, heads, -1)


def cleared(out: Tensor, empty: Tensor, block_size: int) -> Tensor:
    """`[B, S, H, D]` with zeros in the tokens of empty rows, in place."""
    return out.masked_fill_(_of_tokens(empty, out.shape[1], block_size).transpose(1, 2).unsqueeze(-1), 0)


def _of_tokens(rows: Tensor, length: int, block_size: int) -> Tensor:
    """`[B, H, M]` of query blocks -> `[B, H, S]` of their tokens."""
    return rows.repeat_interleave(block_size, -1)[..., :length]


class MaskInputs(NamedTuple):
    """Operands of the operator that takes a mask.

    Tensors are `[B * S, H, D']` (layout TND), or `[B, H, S, D']` (BNSD) where batch elements differ in length; mask int8 `[B, H, M, N]`;
    lengths per batch element; `empty` bool `[B, H, M]`, rows that must give zeros.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor
    layout: str
    query_lengths: list[int]
    key_lengths: list[int]
    empty: Tensor


def mask_inputs(query: Tensor, key: Tensor, value: Tensor, plan: BlockPlan, key_lengths: Tensor | None = None) -> MaskInputs:
    """`[B, S, H, D]` -> operands. Waits for the device only to read `key_lengths`."""
    batch, length, heads, dim = query.shape
    keep = plan.to_mask().expand(batch, heads, -1, -1)
    lengths = [key.shape[1]] * batch
    if key_lengths is not None:
        start = torch.arange(keep.shape[-1], device=keep.device) * plan.block_size
        keep = keep & (start < key_lengths.view(-1, 1, 1, 1))
        lengths = [min(max(int(n), 1), key.shape[1]) for n in key_lengths.tolist()]
    empty = ~keep.any(-1)
    mask = _with_first(keep, empty).to(torch.int8)
    if key_lengths is None:
        q, k, v = (_packed(x, padded_head_dim(dim)) for x in (query, key, value))
    else:
        q, k, v = (to_heads_first(x, padded_head_dim(dim)) for x in (query, key, value))
    return MaskInputs(q, k, v, mask, "TND" if key_lengths is None else "BNSD", [length] * batch, lengths, empty)


def _with_first(keep: Tensor, empty: Tensor) -> Tensor:
    """bool `[B, H, M, N]`: block 0 added to the rows that keep none."""
    return keep | (empty.unsqueeze(-1) & (torch.arange(keep.shape[-1], device=keep.device) == 0))


def _packed(x: Tensor, head_dim: int) -> Tensor:
    """`[B, S, H, D]` -> contiguous `[B * S, H, head_dim]`; a view where nothing is missing."""
    return (x if x.shape[3] == head_dim else pad(x, (0, head_dim - x.shape[3]))).contiguous().flatten(0, 1)


def mask_outputs(out: Tensor, lse: Tensor | None, query: Tensor, inputs: MaskInputs, block_size: int) -> tuple[Tensor, Tensor | None]:
    """The operator's output and log-sum-exp (None if not asked for) -> `[B, S, H, D]` and fp32 `[B, H, S]`."""
    batch, length, heads, dim = query.shape
    packed = inputs.layout == "TND"
    out = out.view(batch, length, heads, -1) if packed else out.transpose(1, 2)
    out = cleared(out[..., :dim], inputs.empty, block_size)
    if lse is None:
        return out, None
    lse = lse.view(batch, length, heads).transpose(1, 2) if packed else lse.view(batch, heads, length)
    return out, lse.float().masked_fill(_of_tokens(inputs.empty, length, block_size), -torch.inf)


class IndexInputs(NamedTuple):
    """Operands of the operator that takes indices.

    Tensors `[B * S, H, D']`; indices int64 `[B * M, H, N]`, ascending, then -1; counts int64 `[B * M, H]`; lengths per batch element;
    `empty` bool `[B, H, M]`, rows that must give zeros.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    indices: Tensor
    counts: Tensor
    query_lengths: list[int]
    key_lengths: list[int]
    empty: Tensor


def index_inputs(query: Tensor, key: Tensor, value: Tensor, plan: BlockPlan) -> IndexInputs:
    """`[B, S, H, D]` -> operands, without waiting for the device. The rows of every batch element are listed, one element after another."""
    batch, length, heads, dim = query.shape
    indices = pad(plan.indices.long(), (0, plan.num_key_blocks - plan.indices.shape[-1]), value=-1).expand(batch, heads, -1, -1)
    empty = empty_rows(plan, batch, heads)
    first = torch.arange(plan.num_key_blocks, device=indices.device) == 0
    indices = torch.where(empty.unsqueeze(-1) & first, 0, indices)
    counts = plan.counts.long().expand(batch, heads, -1).clamp(min=1)
    q, k, v = (_packed(x, padded_head_dim(dim)) for x in (query, key, value))
    return IndexInputs(
        q,
        k,
        v,
        indices.transpose(1, 2).flatten(0, 1).contiguous(),
        counts.transpose(1, 2).flatten(0, 1).contiguous(),
        [length] * batch,
        [key.shape[1]] * batch,
        empty,
    )


class CountedInputs(NamedTuple):
    """Operands of the operator that takes a mask and its row sums.

    Tensors `[B, H, S, D']`; mask int8 `[B, H, M, N']`, N' a multiple of 32 and its further columns 0; counts int32 `[B, H, M]`; `empty`
    bool `[B, H, M]`, rows that must give zeros.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor
    counts: Tensor
    empty: Tensor


def counted_inputs(query: Tensor, key: Tensor, value: Tensor, plan: BlockPlan) -> CountedInputs:
    """`[B, S, H, D]` -> operands, without waiting for the device."""
    batch, _, heads, dim = query.shape
    empty = empty_rows(plan, batch, heads)
    mask = _with_first(plan.to_mask().expand(batch, heads, -1, -1), empty).to(torch.int8)
    mask = pad(mask, (0, -mask.shape[-1] % COUNTED_MASK_COLUMNS))
    q, k, v = (to_heads_first(x, padded_head_dim(dim)) for x in (query, key, value))
    return CountedInputs(q, k, v, mask, mask.sum(-1, dtype=torch.int32), empty)
