"""What the Ascend block-sparse operators take and give: pure functions between them and a BlockPlan, tested on the CPU.

A row of the plan without any block must give zeros. What the operators do with such a row is documented for some of them only, so it gets
block 0 and its output is cleared afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from ditattn.ops.ascend import padded_head_dim
from ditattn.ops.block_sparse_attention.ascend_layout import BNSD, TND, arranged, restored
from ditattn.ops.calls import SparseCall
from ditattn.plan.block_plan import BlockPlan

# the mask of the operator with counts: one row must fill whole 32-byte units
COUNTED_MASK_COLUMNS = 32


def empty_rows(plan: BlockPlan, batch: int, heads: int) -> Tensor:
    """bool `[B, H, M]`: rows that keep no block."""
    return (plan.counts == 0).expand(batch, heads, -1)


def cleared(out: Tensor, layout: str, empty: Tensor, length: int, block_size: int) -> Tensor:
    """An operator's output in `layout`, with zeros in the tokens of empty rows, in place."""
    rows = _of_tokens(empty, length, block_size)
    return out.masked_fill_((rows.transpose(1, 2).flatten(0, 1) if layout == TND else rows).unsqueeze(-1), 0)


def output(out: Tensor, layout: str, call: SparseCall, empty: Tensor) -> Tensor:
    """An operator's output in `layout` -> `[B, S, H, D]` in the order of the query, with zeros in the tokens of empty rows."""
    out = cleared(out, layout, empty, call.query.shape[1], call.plan.block_size)
    return restored(out, layout, call.query, call.inverse)


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


def mask_inputs(call: SparseCall) -> MaskInputs:
    """The call's operands. Waits for the device only to read `key_lengths`."""
    batch, length, heads, _ = call.query.shape
    keep = call.plan.to_mask().expand(batch, heads, -1, -1)
    lengths = [call.key.shape[1]] * batch
    if call.key_lengths is not None:
        start = torch.arange(keep.shape[-1], device=keep.device) * call.plan.block_size
        keep = keep & (start < call.key_lengths.view(-1, 1, 1, 1))
        lengths = [min(max(int(n), 1), call.key.shape[1]) for n in call.key_lengths.tolist()]
    empty = ~keep.any(-1)
    mask = _with_first(keep, empty).to(torch.int8)
    layout = TND if call.key_lengths is None else BNSD
    q, k, v = _operands((call.query, call.key, call.value), layout, call.order)
    return MaskInputs(q, k, v, mask, layout, [length] * batch, lengths, empty)


def _operands(tensors: tuple[Tensor, ...], layout: str, order: Tensor | None) -> Iterator[Tensor]:
    """Query, key and value in `layout` and order, with a head size that the operators take."""
    return (arranged(x, layout, padded_head_dim(x.shape[3]), order) for x in tensors)


def _with_first(keep: Tensor, empty: Tensor) -> Tensor:
    """bool `[B, H, M, N]`: block 0 added to the rows that keep none."""
    return keep | (empty.unsqueeze(-1) & (torch.arange(keep.shape[-1], device=keep.device) == 0))


def mask_lse(lse: Tensor, call: SparseCall, inputs: MaskInputs) -> Tensor:
    """The operator's log-sum-exp -> fp32 `[B, H, S]` in the order of the query, -inf in the tokens of empty rows."""
    batch, length, heads, _ = call.query.shape
    lse = lse.view(batch, length, heads).transpose(1, 2) if inputs.layout == TND else lse.view(batch, heads, length)
    lse = lse.float().masked_fill(_of_tokens(inputs.empty, length, call.plan.block_size), -torch.inf)
    return lse if call.inverse is None else lse.index_select(2, call.inverse)


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


def index_inputs(call: SparseCall) -> IndexInputs:
    """The call's operands, without waiting for the device. The rows of every batch element are listed, one element after another."""
    plan = call.plan
    batch, length, heads, _ = call.query.shape
    indices = pad(plan.indices.long(), (0, plan.num_key_blocks - plan.indices.shape[-1]), value=-1).expand(batch, heads, -1, -1)
    empty = empty_rows(plan, batch, heads)
    first = torch.arange(plan.num_key_blocks, device=indices.device) == 0
    indices = torch.where(empty.unsqueeze(-1) & first, 0, indices)
    counts = plan.counts.long().expand(batch, heads, -1).clamp(min=1)
    q, k, v = _operands((call.query, call.key, call.value), TND, call.order)
    return IndexInputs(
        q,
        k,
        v,
        indices.transpose(1, 2).flatten(0, 1).contiguous(),
        counts.transpose(1, 2).flatten(0, 1).contiguous(),
        [length] * batch,
        [call.key.shape[1]] * batch,
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


def counted_inputs(call: SparseCall) -> CountedInputs:
    """The call's operands, without waiting for the device."""
    batch, _, heads, _ = call.query.shape
    empty = empty_rows(call.plan, batch, heads)
    mask = _with_first(call.plan.to_mask().expand(batch, heads, -1, -1), empty).to(torch.int8)
    mask = pad(mask, (0, -mask.shape[-1] % COUNTED_MASK_COLUMNS))
    q, k, v = _operands((call.query, call.key, call.value), BNSD, call.order)
    return CountedInputs(q, k, v, mask, mask.sum(-1, dtype=torch.int32), empty)
