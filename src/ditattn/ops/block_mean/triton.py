"""Block means in Triton: every token is read once, in the order asked for, and summed in fp32.

This module imports triton; it is loaded when its row of the table is taken.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["mean_kernel", "run"]

# tokens per step; a power of two, as Triton wants
STEP = 64


def run(x: Tensor, block_size: int, order: Tensor | None = None) -> Tensor:
    batch, length, heads, dim = x.shape
    if x.device.type == "cpu" and x.dtype == torch.bfloat16:
        # the interpreter knows bf16 only as integers
        x = x.float()
    rows = triton.cdiv(length, block_size)
    out = torch.empty(batch, rows, heads, dim, dtype=torch.float32, device=x.device)
    # heads run fastest: they lie side by side in memory
    with torch.cuda.device_of(x):
        mean_kernel[(heads, rows, batch)](
            x,
            out,
            None if order is None else order.contiguous(),
            *x.stride(),
            *((length, heads // order.shape[0]) if order is not None and order.ndim == 2 else (0, 1)),
            length,
            rows,
            heads,
            dim,
            BLOCK=block_size,
            STEP=STEP,
            PADDED_DIM=triton.next_power_of_2(dim),
            num_warps=4,
        )
    return out


@triton.jit
def mean_kernel(
    x,
    out,
    order,
    stride_b,
    stride_s,
    stride_h,
    stride_d,
    order_stride,
    order_group,
    length,
    num_rows,
    num_heads,
    head_dim,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
    PADDED_DIM: tl.constexpr,
):
    """One block of one head. Strides are in elements; `order` dense int64, `[S]` or one row for each `order_group` heads, or None."""
    h, m, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    dims = tl.arange(0, PADDED_DIM)
    base = x + b.to(tl.int64) * stride_b + h.to(tl.int64) * stride_h
    first = m * BLOCK
    last = tl.minimum(first + BLOCK, length)
    # a fixed number of steps lets the loads of the next overlap the sum of this one
    total = tl.zeros([PADDED_DIM], dtype=tl.float32)
    for start in tl.static_range(0, BLOCK, STEP):
        tokens = first + start + tl.arange(0, STEP)
        places = tokens.to(tl.int64)
        if order is not None:
            places = tl.load(order + (h // order_group) * order_stride + tokens, mask=tokens < last, other=0)
        pointers = base + places[:, None] * stride_s + dims[None, :] * stride_d
        part = tl.load(pointers, mask=(tokens < last)[:, None] & (dims < head_dim)[None, :], other=0.0)
        total += tl.sum(part.to(tl.float32), 0)
    row = (b.to(tl.int64) * num_rows + m) * num_heads + h
    tl.store(out + row * head_dim + dims, total / (last - first).to(tl.float32), mask=dims < head_dim)
