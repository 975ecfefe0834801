"""Block-sparse attention in Triton: one program per query block walks through that block's kept key blocks.

The softmax runs online in fp32 with exp2. Because the indices of a plan ascend, only the last kept block of a row can be cut short (by the
end of the sequence, a key length, or the diagonal), so the loop over the others carries no mask. Programs start longest rows first; among
rows of about equal length the rows of one head stay together, so that they meet their keys in the L2 cache.

In another order of the tokens, queries are read and results written where they lie, once each; keys and values, which rows read again and
again, are first laid down in that order.

This module imports triton; it is loaded when its row of the table is taken.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ditattn.ops.block_sparse_attention.tiles import INTERPRETER, Tiles, tiles_for
from ditattn.ops.calls import SparseCall
from ditattn.ops.table import kernel_head_dim
from ditattn.plan.block_plan import BLOCK_SIZE

__all__ = ["attend_kernel", "gather_kernel", "ordered_keys", "run", "start_order"]

# tokens that one program of the gather copies
GATHERED_TOKENS = 64
LOG2_E = math.log2(math.e)
# the tensor memory accelerator wants addresses and strides in multiples of this
DESCRIPTOR_ALIGNMENT_BYTES = 16


def run(call: SparseCall) -> tuple[Tensor, Tensor | None]:
    assert call.plan.block_size == BLOCK_SIZE
    head_dim = call.query.shape[3]
    call = call.widened(kernel_head_dim(head_dim))
    query, key, value = call.query, call.key, call.value
    dtype = query.dtype
    if query.device.type == "cuda":
        tiles = tiles_for(_capability(query.device), query.shape[3])
    else:
        tiles = INTERPRETER
        if dtype == torch.bfloat16:
            # the interpreter keeps bf16 as integers and would multiply those
            query, key, value = query.float(), key.float(), value.float()
    query, key, value = (x if x.stride(3) == 1 else x.contiguous() for x in (query, key, value))
    if call.order is not None:
        key, value = ordered_keys(key, value, call.order)
    out, lse = launch(replace(call, query=query, key=key, value=value), tiles)
    return out[..., :head_dim].to(dtype), lse


def ordered_keys(key: Tensor, value: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
    """Key and value `[B, S, G, D]` in an order int64 `[S]` or `[G, S]`; in memory one head lies behind the other."""
    batch, length, heads, dim = key.shape
    key_out, value_out = (x.new_empty(batch, heads, length, dim) for x in (key, value))
    with torch.cuda.device_of(key):
        # heads run fastest: they lie side by side in memory
        gather_kernel[(heads, triton.cdiv(length, GATHERED_TOKENS), batch)](
            key,
            value,
            order.contiguous(),
            key_out,
            value_out,
            *key.stride()[:3],
            *value.stride()[:3],
            length if order.ndim == 2 else 0,
            length,
            heads,
            HEAD_DIM=dim,
            PADDED_DIM=triton.next_power_of_2(dim),
            TOKENS=GATHERED_TOKENS,
            num_warps=4,
        )
    return key_out.transpose(1, 2), value_out.transpose(1, 2)


def launch(call: SparseCall, tiles: Tiles) -> tuple[Tensor, Tensor | None]:
    """`run` with given tiles, for tensors whose last axis is contiguous, and keys and values that stand in the call's order."""
    query, key, value, plan = call.query, call.key, call.value, call.plan
    batch, length, heads, dim = query.shape
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    lse = torch.empty(batch, heads, length, dtype=torch.float32, device=query.device) if call.return_lse else None
    descriptors = tiles.descriptors and _aligned(key) and _aligned(value)
    block_shape = [1, tiles.keys, 1, triton.next_power_of_2(dim)]
    rows = plan.num_query_blocks
    with torch.cuda.device_of(query):
        attend_kernel[(batch * heads * rows,)](
            query,
            key,
            value,
            TensorDescriptor.from_tensor(key, block_shape) if descriptors else None,
            TensorDescriptor.from_tensor(value, block_shape) if descriptors else None,
            out,
            lse,
            plan.indices.contiguous(),
            plan.counts.contiguous(),
            start_order(plan.counts, batch, heads, call.causal),
            None if call.order is None else call.order.contiguous(),
            # the kernel counts in elements: expanded lengths and columns of a table have other strides
            None if call.key_lengths is None else call.key_lengths.contiguous(),
            *_tail_arguments(call),
            *query.stride()[:3],
            *key.stride()[:3],
            *value.stride()[:3],
            plan.indices.shape[1] * rows if plan.indices.shape[0] > 1 else 0,
            rows if plan.indices.shape[1] > 1 else 0,
            plan.indices.shape[3],
            1 if call.tail is not None and call.tail.counts.shape[0] > 1 else 0,
            length if call.order is not None and call.order.ndim == 2 else 0,
            length,
            key.shape[1],
            heads,
            heads // key.shape[2],
            abs(call.scale) * LOG2_E,
            HEAD_DIM=dim,
            PADDED_DIM=triton.next_power_of_2(dim),
            BLOCK=plan.block_size,
            STEP=tiles.keys,
            CAUSAL=call.causal,
            DESCRIPTORS=descriptors,
            NEGATIVE=call.scale < 0,
            num_warps=tiles.num_warps,
            num_stages=tiles.num_stages,
        )
    return out, lse


def _tail_arguments(call: SparseCall) -> tuple[Tensor | None, ...]:
    """Means in the query's dtype, which blocks each row drops, and binary logarithms of the counts; all dense."""
    if call.tail is None:
        return (None,) * 4
    dropped = (~call.plan.to_mask()).contiguous().view(torch.uint8)
    key, value = (x.to(call.query.dtype).contiguous() for x in (call.tail.key, call.tail.value))
    return key, value, dropped, (call.tail.log_counts() * LOG2_E).contiguous()


def start_order(counts: Tensor, batch: int, heads: int, causal: bool) -> Tensor:
    """int32 `[B * H * M]`: the order in which the programs of all query blocks start, without a host synchronisation.

    Rows are put into classes by the bit length of their count, the class of the longest first: a long row that started last would keep one
    multiprocessor busy while the others wait. The sort is stable, so inside a class neighbouring rows of one head follow each other.
    """
    lengths = counts.expand(batch, heads, -1)
    if causal:
        lengths = lengths.minimum(torch.arange(1, counts.shape[2] + 1, dtype=counts.dtype, device=counts.device))
    classes = torch.frexp(lengths.float()).exponent.to(torch.uint8)
    return torch.sort(classes.flatten(), descending=True, stable=True).indices.to(torch.int32)


def _capability(device: torch.device) -> tuple[int, int] | None:
    """Compute capability of an NVIDIA device; None for one of AMD, which torch calls cuda too."""
    if torch.version.cuda is None:
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return major, minor


def _aligned(x: Tensor) -> bool:
    """The tensor can be read through a descriptor."""
    size = x.element_size()
    return x.data_ptr() % DESCRIPTOR_ALIGNMENT_BYTES == 0 and all(
        stride * size % DESCRIPTOR_ALIGNMENT_BYTES == 0 and stride > 0 for stride in x.stride()[:3]
    )


@triton.jit
def attend_kernel(
    query,
    key,
    value,
    key_descriptor,
    value_descriptor,
    out,
    lse,
    indices,
    counts,
    starts,
    order,
    key_lengths,
    tail_key,
    tail_value,
    tail_dropped,
    tail_log_counts,
    query_stride_b,
    query_stride_s,
    query_stride_h,
    key_stride_b,
    key_stride_s,
    key_stride_h,
    value_stride_b,
    value_stride_s,
    value_stride_h,
    plan_rows_b,
    plan_rows_h,
    row_width,
    tail_rows_b,
    order_stride,
    num_queries,
    num_keys,
    num_heads,
    group,
    scale_log2,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
    CAUSAL: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    NEGATIVE: tl.constexpr,
):
    """One query block. Strides are in elements; `plan_rows_b` and `plan_rows_h` are 0 where batch or heads share the plan.

    `order` says where the queries of a row, and its results, lie; with a stride of 0 it is that of all heads.

    Of a tail: means `[B, N, G, D]`, bytes `[plan's rows, N]` that are 1 where the block is dropped, log2 of the counts `[B or 1, N]`.
    """
    PARTS: tl.constexpr = BLOCK // STEP
    num_rows = tl.cdiv(num_queries, BLOCK)
    tile = tl.load(starts + tl.program_id(0))
    m = tile % num_rows
    h = (tile // num_rows) % num_heads
    b = tile // (num_rows * num_heads)
    g = h // group

    rows = m * BLOCK + tl.arange(0, BLOCK)
    dims = tl.arange(0, PADDED_DIM)
    row_mask = (rows < num_queries)[:, None]
    if order is not None:
        tokens = tl.load(order + g.to(tl.int64) * order_stride + rows, mask=rows < num_queries, other=0)
    else:
        tokens = rows.to(tl.int64)
    dim_mask = (dims < HEAD_DIM)[None, :]
    query_base = query + b.to(tl.int64) * query_stride_b + h.to(tl.int64) * query_stride_h
    q = tl.load(query_base + tokens[:, None] * query_stride_s + dims[None, :], mask=row_mask & dim_mask, other=0.0)
    key_base = key + b.to(tl.int64) * key_stride_b + g.to(tl.int64) * key_stride_h
    value_base = value + b.to(tl.int64) * value_stride_b + g.to(tl.int64) * value_stride_h

    plan_row = b.to(tl.int64) * plan_rows_b + h * plan_rows_h + m
    kept = indices + plan_row * row_width
    count = tl.load(counts + plan_row)
    limit = num_keys
    if key_lengths is not None:
        limit = tl.minimum(tl.maximum(tl.load(key_lengths + b), 0), num_keys).to(tl.int32)
    if CAUSAL:
        count = _num_below(kept, count, tl.minimum(tl.cdiv(limit, BLOCK), m + 1))
    elif key_lengths is not None:
        count = _num_below(kept, count, tl.cdiv(limit, BLOCK))
    last = tl.load(kept + count - 1, mask=count > 0, other=0)
    cut = (last + 1) * BLOCK > limit
    if CAUSAL:
        cut = cut | (last == m)
    cut = cut & (count > 0)
    num_steps = (count - cut.to(tl.int32)) * PARTS

    acc = tl.zeros([BLOCK, PADDED_DIM], dtype=tl.float32)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    peak = tl.full([BLOCK], -float("inf"), dtype=tl.float32)

    # the number of the next block is loaded one step ahead: the addresses of its keys never wait for it
    block = tl.load(kept, mask=num_steps > 0, other=0)
    for step in tl.range(0, num_steps):
        start = block * BLOCK + (step % PARTS) * STEP
        block = tl.load(kept + (step + 1) // PARTS, mask=step + 1 < num_steps, other=0)
        if DESCRIPTORS:
            k = key_descriptor.load([b, start, g, 0]).reshape(STEP, PADDED_DIM)
            v = value_descriptor.load([b, start, g, 0]).reshape(STEP, PADDED_DIM)
        else:
            k = _rows(key_base, start, key_stride_s, HEAD_DIM, PADDED_DIM, STEP)
            v = _rows(value_base, start, value_stride_s, HEAD_DIM, PADDED_DIM, STEP)
        acc, total, peak = _attend(acc, total, peak, q, k, v, None, scale_log2, NEGATIVE)

    for part in tl.range(0, cut.to(tl.int32) * PARTS, num_stages=1):
        start = last * BLOCK + part * STEP
        columns = start + tl.arange(0, STEP)
        k = _rows_below(key_base, start, limit, key_stride_s, HEAD_DIM, PADDED_DIM, STEP)
        v = _rows_below(value_base, start, limit, value_stride_s, HEAD_DIM, PADDED_DIM, STEP)
        seen = (columns < limit)[None, :]
        if CAUSAL:
            seen = seen & (columns[None, :] <= rows[:, None])
        else:
            seen = seen & (rows >= 0)[:, None]
        acc, total, peak = _attend(acc, total, peak, q, k, v, seen, scale_log2, NEGATIVE)

    blind = count <= 0
    if tail_key is not None:
        # found by compiling: with other numbers some architecture spills registers
        MEANS: tl.constexpr = (16 if HEAD_DIM == 64 else 32) if DESCRIPTORS else (64 if HEAD_DIM <= 32 else 16)
        num_means = tl.cdiv(num_keys, BLOCK)
        num_groups = num_heads // group
        mean_base = (b.to(tl.int64) * num_means * num_groups + g) * HEAD_DIM
        for first in tl.range(0, num_means, MEANS, num_stages=1):
            means = first + tl.arange(0, MEANS)
            log_counts = tl.load(tail_log_counts + b * tail_rows_b * num_means + means, mask=means < num_means, other=-float("inf"))
            dropped = tl.load(tail_dropped + plan_row * num_means + means, mask=means < num_means, other=0)
            heard = (dropped != 0) & (log_counts > -float("inf"))
            places = means[:, None] * (num_groups * HEAD_DIM) + dims[None, :]
            mask = heard[:, None] & dim_mask
            k = tl.load(tail_key + mean_base + places, mask=mask, other=0.0)
            v = tl.load(tail_value + mean_base + places, mask=mask, other=0.0)
            acc, total, peak = _attend(acc, total, peak, q, k, v, heard[None, :], scale_log2, NEGATIVE, log_counts)
            blind = blind & (tl.max(heard.to(tl.int32), 0) == 0)
    total = tl.where(blind, 1.0, total)
    acc = acc / total[:, None]
    out_base = out + (b.to(tl.int64) * num_queries * num_heads + h) * HEAD_DIM
    out_offsets = tokens[:, None] * (num_heads * HEAD_DIM) + dims[None, :]
    tl.store(out_base + out_offsets, acc.to(out.dtype.element_ty), mask=row_mask & dim_mask)
    if lse is not None:
        natural = tl.where(blind, -float("inf"), (peak + tl.log2(total)) * 0.6931471805599453)
        tl.store(lse + (b * num_heads + h).to(tl.int64) * num_queries + tokens, natural, mask=rows < num_queries)


@triton.jit
def gather_kernel(
    key,
    value,
    order,
    key_out,
    value_out,
    key_stride_b,
    key_stride_s,
    key_stride_h,
    value_stride_b,
    value_stride_s,
    value_stride_h,
    order_stride,
    length,
    num_heads,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """Some tokens of one head, keys and values, into `[B, G, S, D]`."""
    head = tl.program_id(0)
    batch = tl.program_id(2)
    rows = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    dims = tl.arange(0, PADDED_DIM)
    mask = (rows < length)[:, None] & (dims < HEAD_DIM)[None, :]
    tokens = tl.load(order + head.to(tl.int64) * order_stride + rows, mask=rows < length, other=0)
    key_base = key + batch.to(tl.int64) * key_stride_b + head.to(tl.int64) * key_stride_h
    value_base = value + batch.to(tl.int64) * value_stride_b + head.to(tl.int64) * value_stride_h
    places = ((batch * num_heads + head).to(tl.int64) * length + rows)[:, None] * HEAD_DIM + dims[None, :]
    k = tl.load(key_base + tokens[:, None] * key_stride_s + dims[None, :], mask=mask)
    v = tl.load(value_base + tokens[:, None] * value_stride_s + dims[None, :], mask=mask)
    tl.store(key_out + places, k, mask=mask)
    tl.store(value_out + places, v, mask=mask)


@triton.jit
def _attend(acc, total, peak, q, k, v, seen, scale_log2, NEGATIVE: tl.constexpr, bias=None):
    """One step of the online softmax. `peak` is the largest scaled score so far, in powers of two.

    `bias`: per key, in powers of two, added to the scaled scores; keys that are not `seen` may have any.
    """
    scores = tl.dot(q, k.T)
    if NEGATIVE:
        scores = -scores
    if bias is not None:
        scores = scores * scale_log2 + bias[None, :]
        scale_log2 = 1.0
    if seen is not None:
        scores = tl.where(seen, scores, -float("inf"))
    higher = tl.maximum(peak, tl.max(scores, 1) * scale_log2)
    # a row whose scores are all -inf so far must not turn into NaN here
    shift = tl.where(higher == -float("inf"), 0.0, higher)
    weights = tl.exp2(scores * scale_log2 - shift[:, None])
    if seen is not None:
        weights = tl.where(seen, weights, 0.0)
    decay = tl.exp2(peak - shift)
    total = total * decay + tl.sum(weights, 1)
    acc = tl.dot(weights.to(v.dtype), v, acc * decay[:, None])
    return acc, total, higher


@triton.jit
def _num_below(kept, count, bound):
    """How many of the first `count` ascending block numbers are below `bound`."""
    low = count * 0
    high = count
    while low < high:
        middle = (low + high) // 2
        below = tl.load(kept + middle) < bound
        low = tl.where(below, middle + 1, low)
        high = tl.where(below, high, middle)
    return low


@triton.jit
def _rows(base, start, stride, HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, NUM: tl.constexpr):
    """`[NUM, PADDED_DIM]`: tokens from `start` on, zeros past the head size."""
    dims = tl.arange(0, PADDED_DIM)
    pointers = base + start.to(tl.int64) * stride + tl.arange(0, NUM)[:, None] * stride + dims[None, :]
    if HEAD_DIM == PADDED_DIM:
        return tl.load(pointers)
    return tl.load(pointers, mask=(dims < HEAD_DIM)[None, :], other=0.0)


@triton.jit
def _rows_below(base, start, limit, stride, HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, NUM: tl.constexpr):
    """As `_rows`, with zeros for tokens from `limit` on: what stands there may be NaN."""
    dims = tl.arange(0, PADDED_DIM)
    tokens = start + tl.arange(0, NUM)
    pointers = base + tokens.to(tl.int64)[:, None] * stride + dims[None, :]
    return tl.load(pointers, mask=(tokens < limit)[:, None] & (dims < HEAD_DIM)[None, :], other=0.0)
