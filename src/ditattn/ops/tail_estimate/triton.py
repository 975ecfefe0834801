"""The summary of keys and values and the cost of their means, in Triton. `ops.tail_estimate` has the formulas.

Three kernels. `summary_kernel` reads every key and value once, in the order asked for. `output_kernel` is attention over the means of
sub-blocks, one program for some groups of queries; `cost_kernel` forms the same weights again, with the output that the first one found, so
that no score is ever stored. Products are in TF32, which is enough to compare costs; keys and values are taken relative to their mean, so
that what all of them share costs no digits.

This module imports triton; it is loaded when its row of the table is taken.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ditattn.ops.tail_estimate.summary import LEAST_SQUARE, PER_BLOCK, QUERY_GROUPS, SUB_TOKENS, Estimator, KeySummary, Summarized
from ditattn.plan.block_plan import BLOCK_SIZE
from ditattn.plan.token_order import TokenOrder

__all__ = ["cost", "cost_kernel", "estimator", "output_kernel", "summary", "summary_kernel"]

# blocks per step of the loop over means of blocks
BLOCKS = 16
SUMMARY_WARPS = 1


def summary(mean_query: Tensor, key: Tensor, value: Tensor, order: TokenOrder, key_lengths: Tensor | None, scale: float) -> Summarized:
    """As `ops.tail_estimate.key_summary`."""
    if key.device.type == "cpu" and key.dtype == torch.bfloat16:
        # the interpreter knows bf16 only as integers
        key, value = key.float(), value.float()
    key, value = (x if x.stride(3) == 1 else x.contiguous() for x in (key, value))
    batch, length, heads, dim = key.shape
    made, places = Summarized.empty(key), order.forward
    blocks = made.tail_key.shape[1]
    # heads run fastest: they lie side by side in memory
    with torch.cuda.device_of(key):
        summary_kernel[(heads, blocks, batch)](
            key,
            value,
            mean_query.contiguous(),
            None if places is None else places.contiguous(),
            None if key_lengths is None else key_lengths.contiguous(),
            *made,
            *key.stride()[:3],
            *value.stride()[:3],
            length if places is not None and places.ndim == 2 else 0,
            length,
            blocks,
            heads,
            dim,
            scale,
            LEAST_SQUARE,
            BLOCK=BLOCK_SIZE,
            SUB=SUB_TOKENS,
            PADDED_DIM=triton.next_power_of_2(dim),
            num_warps=SUMMARY_WARPS,
        )
    return made


def cost(groups: Tensor, found: KeySummary, scale: float) -> Tensor:
    """As `ops.tail_estimate.tail_cost`."""
    batch, heads, num_groups, dim = groups.shape
    blocks, key_heads = found.tail.key.shape[1:3]
    # relative to their mean, which changes neither weights nor differences of values
    tail_key, tail_value = (x - x.mean(1, keepdim=True) for x in (found.tail.key, found.tail.value))
    keys = found.means - found.tail.key.mean(1).unsqueeze(2)
    values = found.value_means - found.tail.value.mean(1).unsqueeze(2)
    of_blocks = tail_value.transpose(1, 2).unsqueeze(3)
    # the values of a block around its mean; where there is no token there is no difference either
    around = (values.unflatten(2, (blocks, PER_BLOCK)) - of_blocks).mul_((found.counts > 0).view(-1, 1, blocks, PER_BLOCK, 1))
    to_mean, products = (around * of_blocks).sum(-1), around @ around.mT
    scaled, squares = groups * scale, groups.square() * (scale * scale / 2)
    results = (
        torch.empty_like(scaled),
        groups.new_empty(batch, heads, num_groups),
        groups.new_empty(batch, heads, num_groups, blocks),
        groups.new_empty(batch, heads, num_groups, blocks),
    )
    costs = groups.new_empty(batch, heads, num_groups // QUERY_GROUPS, blocks)
    sizes = (num_groups, blocks, heads, heads // key_heads, dim)
    counts, tail_counts = found.counts.contiguous(), found.tail.counts.contiguous()
    strides = (counts.shape[1] if counts.shape[0] > 1 else 0, blocks if tail_counts.shape[0] > 1 else 0)
    tiles = tiles_for(groups.device)
    options = {"GROUPS": tiles.groups, "SUBS": tiles.subs, "PER_BLOCK": PER_BLOCK, "PADDED_DIM": triton.next_power_of_2(dim)}
    launch = {"num_warps": tiles.num_warps, "num_stages": tiles.num_stages}
    grid = (triton.cdiv(num_groups, tiles.groups), batch * heads)
    shared = (scaled.contiguous(), squares.contiguous(), keys, found.variances.contiguous())
    with torch.cuda.device_of(groups):
        output_kernel[grid](
            *shared, values, counts, tail_key, tail_value, tail_counts, *results, *sizes, *strides, BLOCKS=BLOCKS, **options, **launch
        )
        cost_kernel[grid](*shared, around, to_mean, products, counts, *results, costs, *sizes, strides[0], **options, **launch)
    return costs


@dataclass(frozen=True)
class Tiles:
    """Groups of queries per program, sub-blocks per step."""

    groups: int
    subs: int
    num_warps: int
    num_stages: int


# found by compiling: no registers spilled, and what fits the shared memory of the part; Hopper and data-centre Blackwell, and the others
LARGE, SMALL = Tiles(64, 32, 8, 2), Tiles(32, 16, 4, 1)


def tiles_for(device: torch.device) -> Tiles:
    if device.type != "cuda" or torch.version.cuda is None:
        return SMALL
    return LARGE if torch.cuda.get_device_capability(device)[0] in (9, 10) else SMALL


def estimator() -> Estimator:
    """The row of the table."""
    return Estimator(summary, cost)


@triton.jit
def summary_kernel(
    key,
    value,
    mean_query,
    order,
    key_lengths,
    means,
    variances,
    value_means,
    tail_key,
    tail_value,
    key_stride_b,
    key_stride_s,
    key_stride_h,
    value_stride_b,
    value_stride_s,
    value_stride_h,
    order_stride,
    length,
    num_blocks,
    num_heads,
    head_dim,
    scale,
    least_square,
    BLOCK: tl.constexpr,
    SUB: tl.constexpr,
    PADDED_DIM: tl.constexpr,
):
    """One block of one key head. Strides are in elements; `order_stride` is 0 where all heads share the order."""
    PARTS: tl.constexpr = BLOCK // SUB
    head = tl.program_id(0)
    block = tl.program_id(1)
    batch = tl.program_id(2)
    limit = length
    if key_lengths is not None:
        limit = tl.minimum(tl.maximum(tl.load(key_lengths + batch), 0), length).to(tl.int32)
    dims = tl.arange(0, PADDED_DIM)
    in_head = dims < head_dim
    m = tl.load(mean_query + (batch * num_heads + head).to(tl.int64) * head_dim + dims, mask=in_head, other=0.0)
    key_base = key + batch.to(tl.int64) * key_stride_b + head.to(tl.int64) * key_stride_h
    value_base = value + batch.to(tl.int64) * value_stride_b + head.to(tl.int64) * value_stride_h
    fine = ((batch * num_heads + head).to(tl.int64) * num_blocks + block) * PARTS * head_dim + dims

    # the softmax over the block runs online, a sub-block at a time
    key_sum = tl.zeros([PADDED_DIM], dtype=tl.float32)
    value_sum = tl.zeros([PADDED_DIM], dtype=tl.float32)
    total = 0.0
    peak = -float("inf")
    for part in tl.range(0, PARTS):
        rows = block * BLOCK + part * SUB + tl.arange(0, SUB)
        real = rows < limit
        if order is not None:
            tokens = tl.load(order + head.to(tl.int64) * order_stride + rows, mask=rows < length, other=0)
        else:
            tokens = rows.to(tl.int64)
        mask = real[:, None] & in_head[None, :]
        k = tl.load(key_base + tokens[:, None] * key_stride_s + dims[None, :], mask=mask, other=0.0).to(tl.float32)
        v = tl.load(value_base + tokens[:, None] * value_stride_s + dims[None, :], mask=mask, other=0.0).to(tl.float32)
        divisor = tl.minimum(tl.maximum(limit - block * BLOCK - part * SUB, 1), SUB).to(tl.float32)
        mean = tl.sum(k, 0) / divisor
        off = tl.where(real[:, None], k - mean[None, :], 0.0)
        tl.store(means + fine + part * head_dim, mean, mask=in_head)
        tl.store(variances + fine + part * head_dim, tl.sum(off * off, 0) / divisor, mask=in_head)
        tl.store(value_means + fine + part * head_dim, tl.sum(v, 0) / divisor, mask=in_head)
        scores = tl.where(real, tl.sum(k * m[None, :], 1) * scale, -float("inf"))
        higher = tl.maximum(peak, tl.max(scores, 0))
        # a block of padding alone has no peak
        shift = tl.where(higher == -float("inf"), 0.0, higher)
        weights = tl.exp(scores - shift)
        decay = tl.exp(peak - shift)
        total = total * decay + tl.sum(weights, 0)
        key_sum = key_sum * decay + tl.sum(weights[:, None] * k, 0)
        value_sum = value_sum * decay + tl.sum(weights[:, None] * v, 0)
        peak = higher
    divisor = tl.where(total == 0.0, 1.0, total)
    key_mean = key_sum / divisor
    count = tl.minimum(tl.maximum(limit - block * BLOCK, 0), BLOCK)
    log_weight = peak + tl.log(divisor)
    missing = log_weight - scale * tl.sum(key_mean * m, 0) - tl.log(tl.maximum(count, 1).to(tl.float32))
    along = tl.where(count > 0, missing, 0.0) / (scale * tl.maximum(tl.sum(m * m, 0), least_square))
    coarse = ((batch.to(tl.int64) * num_blocks + block) * num_heads + head) * head_dim + dims
    tl.store(tail_key + coarse, key_mean + along * m, mask=in_head)
    tl.store(tail_value + coarse, value_sum / divisor, mask=in_head)


@triton.jit
def output_kernel(
    scaled,
    squares,
    keys,
    variances,
    values,
    counts,
    tail_key,
    tail_value,
    tail_counts,
    out,
    norms,
    shares,
    distances,
    num_groups,
    num_blocks,
    num_heads,
    heads_per_key_head,
    head_dim,
    counts_stride,
    tail_counts_stride,
    BLOCKS: tl.constexpr,
    GROUPS: tl.constexpr,
    SUBS: tl.constexpr,
    PER_BLOCK: tl.constexpr,
    PADDED_DIM: tl.constexpr,
):
    """Of some groups of queries: the output and the log-sum-exp; and for every block, the share of the weights that its mean would take and
    the squared distance of its mean value from the output."""
    row = tl.program_id(1)
    b = row // num_heads
    g = (row % num_heads) // heads_per_key_head
    key_row = (b * (num_heads // heads_per_key_head) + g).to(tl.int64)
    num_subs = num_blocks * PER_BLOCK
    places = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
    here = places < num_groups
    dims = tl.arange(0, PADDED_DIM)
    in_head = (dims < head_dim)[None, :]
    of_groups = (row.to(tl.int64) * num_groups + places)[:, None] * head_dim + dims[None, :]
    q = tl.load(scaled + of_groups, mask=here[:, None] & in_head, other=0.0)
    q_squares = tl.load(squares + of_groups, mask=here[:, None] & in_head, other=0.0)

    acc = tl.zeros([GROUPS, PADDED_DIM], dtype=tl.float32)
    total = tl.zeros([GROUPS], dtype=tl.float32)
    peak = tl.full([GROUPS], -float("inf"), dtype=tl.float32)
    for start in tl.range(0, num_subs, SUBS):
        subs = start + tl.arange(0, SUBS)
        mask = (subs < num_subs)[:, None] & in_head
        of_subs = (key_row * num_subs + subs)[:, None] * head_dim + dims[None, :]
        k = tl.load(keys + of_subs, mask=mask, other=0.0)
        var = tl.load(variances + of_subs, mask=mask, other=0.0)
        v = tl.load(values + of_subs, mask=mask, other=0.0)
        logs = tl.log(tl.load(counts + b * counts_stride + subs, mask=subs < num_subs, other=0.0))
        scores = tl.dot(q_squares, var.T, tl.dot(q, k.T)) + logs[None, :]
        higher = tl.maximum(peak, tl.max(scores, 1))
        shift = tl.where(higher == -float("inf"), 0.0, higher)
        weights = tl.exp(scores - shift[:, None])
        decay = tl.exp(peak - shift)
        total = total * decay + tl.sum(weights, 1)
        acc = tl.dot(weights, v, acc * decay[:, None])
        peak = higher
    o = acc / total[:, None]
    norm = peak + tl.log(total)
    tl.store(out + of_groups, o, mask=here[:, None] & in_head)
    tl.store(norms + row.to(tl.int64) * num_groups + places, norm, mask=here)

    o_square = tl.sum(o * o, 1)
    key_heads = num_heads // heads_per_key_head
    for start in tl.range(0, num_blocks, BLOCKS):
        blocks = start + tl.arange(0, BLOCKS)
        there = blocks < num_blocks
        of_blocks = ((b.to(tl.int64) * num_blocks + blocks) * key_heads + g)[:, None] * head_dim + dims[None, :]
        k = tl.load(tail_key + of_blocks, mask=there[:, None] & in_head, other=0.0)
        v = tl.load(tail_value + of_blocks, mask=there[:, None] & in_head, other=0.0)
        logs = tl.log(tl.load(tail_counts + b * tail_counts_stride + blocks, mask=there, other=0.0))
        # a mean that outweighs everything by this much is no stand-in, and its square must not overflow
        share = tl.exp(tl.minimum(tl.dot(q, k.T) + logs[None, :] - norm[:, None], 40.0))
        distance = tl.sum(v * v, 1)[None, :] - 2 * tl.dot(o, v.T) + o_square[:, None]
        of_pairs = (row.to(tl.int64) * num_groups + places)[:, None] * num_blocks + blocks[None, :]
        tl.store(shares + of_pairs, share, mask=here[:, None] & there[None, :])
        tl.store(distances + of_pairs, tl.where(distance < 0.0, 0.0, distance), mask=here[:, None] & there[None, :])


@triton.jit
def cost_kernel(
    scaled,
    squares,
    keys,
    variances,
    around,
    to_mean,
    products,
    counts,
    out,
    norms,
    shares,
    distances,
    costs,
    num_groups,
    num_blocks,
    num_heads,
    heads_per_key_head,
    head_dim,
    counts_stride,
    GROUPS: tl.constexpr,
    SUBS: tl.constexpr,
    PER_BLOCK: tl.constexpr,
    PADDED_DIM: tl.constexpr,
):
    """Of some groups of queries, for every block: || sum_b w_b (v_b - v) + (sum_b w_b - w) (v - o) ||^2 as the mean over a query block.

    `around` are the v_b - v, `to_mean` their products with v, `products` those with each other within a block.
    """
    NUM: tl.constexpr = SUBS // PER_BLOCK
    row = tl.program_id(1)
    b = row // num_heads
    g = (row % num_heads) // heads_per_key_head
    key_row = (b * (num_heads // heads_per_key_head) + g).to(tl.int64)
    num_subs = num_blocks * PER_BLOCK
    places = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
    here = places < num_groups
    dims = tl.arange(0, PADDED_DIM)
    in_head = (dims < head_dim)[None, :]
    of_groups = (row.to(tl.int64) * num_groups + places)[:, None] * head_dim + dims[None, :]
    q = tl.load(scaled + of_groups, mask=here[:, None] & in_head, other=0.0)
    q_squares = tl.load(squares + of_groups, mask=here[:, None] & in_head, other=0.0)
    o = tl.load(out + of_groups, mask=here[:, None] & in_head, other=0.0)
    norm = tl.load(norms + row.to(tl.int64) * num_groups + places, mask=here, other=0.0)
    rows = tl.program_id(0) * (GROUPS // 2) + tl.arange(0, GROUPS // 2)

    for start in tl.range(0, num_subs, SUBS):
        subs = start + tl.arange(0, SUBS)
        blocks = start // PER_BLOCK + tl.arange(0, NUM)
        inside, there = subs < num_subs, blocks < num_blocks
        of_subs = (key_row * num_subs + subs)[:, None] * head_dim + dims[None, :]
        k = tl.load(keys + of_subs, mask=inside[:, None] & in_head, other=0.0)
        var = tl.load(variances + of_subs, mask=inside[:, None] & in_head, other=0.0)
        a = tl.load(around + of_subs, mask=inside[:, None] & in_head, other=0.0)
        logs = tl.log(tl.load(counts + b * counts_stride + subs, mask=inside, other=0.0))
        meeting = tl.load(to_mean + key_row * num_subs + subs, mask=inside, other=0.0)
        # of eight rows by eight columns for each block, as blocks on a diagonal
        together = (subs // PER_BLOCK)[:, None] == (subs // PER_BLOCK)[None, :]
        of_products = (key_row * num_subs + subs)[:, None] * PER_BLOCK + (subs % PER_BLOCK)[None, :]
        within = tl.load(products + of_products, mask=together & inside[:, None], other=0.0)
        of_pairs = (row.to(tl.int64) * num_groups + places)[:, None] * num_blocks + blocks[None, :]
        share = tl.load(shares + of_pairs, mask=here[:, None] & there[None, :], other=0.0)
        distance = tl.load(distances + of_pairs, mask=here[:, None] & there[None, :], other=0.0)
        weights = tl.exp(tl.dot(q_squares, var.T, tl.dot(q, k.T)) + logs[None, :] - norm[:, None])
        excess = tl.sum(tl.reshape(weights, [GROUPS, NUM, PER_BLOCK]), 2) - share
        spread_out = tl.reshape(tl.broadcast_to(excess[:, :, None], [GROUPS, NUM, PER_BLOCK]), [GROUPS, SUBS])
        inner = tl.dot(weights, within) + 2 * spread_out * (meeting[None, :] - tl.dot(o, a.T))
        spread = tl.sum(tl.reshape(weights * inner, [GROUPS, NUM, PER_BLOCK]), 2)
        found = spread + excess * excess * distance
        # not a maximum, which would make a number of NaN
        found = tl.where(found < 0.0, 0.0, found)
        by_block = tl.sum(tl.reshape(found, [GROUPS // 2, 2, NUM]), 1) * 0.5
        of_costs = (row.to(tl.int64) * (num_groups // 2) + rows)[:, None] * num_blocks + blocks[None, :]
        tl.store(costs + of_costs, by_block, mask=(rows < num_groups // 2)[:, None] & there[None, :])
