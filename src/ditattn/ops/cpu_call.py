"""Tensors to C structures and back: the one place where the CPU kernels are called."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from ditattn.errors import UnsupportedCall
from ditattn.ops import amx_schedule, cpu_library
from ditattn.ops.calls import DenseCall, SparseCall
from ditattn.ops.cpu_library import Library, Tensor4
from ditattn.ops.pooled_tail import PooledTail
from ditattn.ops.table import kernel_head_dim
from ditattn.plan.block_plan import BLOCK_SIZE, BlockPlan

__all__ = ["attention", "block_mean", "key_summary"]

# the kernel divides log n by the scale, and the quotient must be finite
SMALLEST_TAIL_SCALE = 1e-30

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def attention(call: DenseCall | SparseCall, *, bf16_parts: int = 0, overlapped: bool | None = None) -> tuple[Tensor, Tensor | None]:
    """Dense attention, or block-sparse.

    Args:
        bf16_parts: form the products of fp32 and fp16 tensors from so many bf16 parts of each number, 1 (not for fp16) to 3; 0 forms them
            in fp32. bf16 tensors are multiplied as bf16 where the CPU can.
        overlapped: on a tile unit, whether the overlapped or the sequential schedule forms products of single bf16 numbers; None takes the
            faster one, measured once.

    Returns:
        `[B, S, H, D]` in the query's dtype, and the log-sum-exp fp32 `[B, H, S]` where asked for.

    Raises:
        UnsupportedCall: the plan breaks an invariant or the order is no permutation; checked here because the kernel trusts them.
    """
    library = _library()
    head_dim = call.query.shape[3]
    call = call.widened(kernel_head_dim(head_dim))
    query, key, value, scale = call.query, call.key, call.value, call.scale
    sparse = call if isinstance(call, SparseCall) else None
    batch, length, heads, dim = query.shape
    if scale == 0:
        # hidden scores are -infinity, and -infinity times 0 is NaN; a NaN or infinity of the query stays one
        query, scale = query * 0, 1.0
    query, key, value = (_dense_rows(x) for x in (query, key, value))
    out = torch.empty(query.shape, dtype=query.dtype)
    lse = torch.empty(batch, heads, length, dtype=torch.float32) if sparse and sparse.return_lse else None
    parts = min(1, library.most_bf16_parts) if query.dtype == torch.bfloat16 else bf16_parts
    if overlapped is None:
        overlapped = parts == 1 and library.most_bf16_parts > 1 and amx_schedule.measurement(dim, _by_schedule).overlapped
    structure = cpu_library.Attention(
        query=_tensor(query),
        key=_tensor(key),
        value=_tensor(value),
        out=_tensor(out),
        lse=None if lse is None else lse.data_ptr(),
        batch=batch,
        heads=heads,
        key_heads=key.shape[2],
        query_length=length,
        key_length=key.shape[1],
        head_dim=dim,
        dtype=_DTYPES[query.dtype],
        bf16_parts=parts,
        causal=call.causal,
        num_threads=torch.get_num_threads(),
        scale=scale,
        overlapped=overlapped,
    )
    # locals keep alive what the structure points to
    lengths = None if call.key_lengths is None else call.key_lengths.clamp(0, key.shape[1]).to(torch.int32).contiguous()
    structure.key_lengths = None if lengths is None else lengths.data_ptr()
    if sparse is not None:
        _set_plan(structure, sparse.plan, batch, heads)
        order = _permutation(sparse.order, length, key.shape[2])
        structure.order, structure.order_stride = _head_rows(order)
        tail = None if sparse.tail is None else _dense_tail(sparse.tail, scale)
        _set_tail(structure, tail)
    _run(library.functions.ditattn_attention, structure)
    return out[..., :head_dim], lse


def _by_schedule(call: DenseCall, overlapped: bool) -> Tensor:
    return attention(call, overlapped=overlapped)[0]


def block_mean(x: Tensor, block_size: int, order: Tensor | None = None) -> Tensor:
    """fp32 `[B, ceil(S / block_size), H, D]` of `[B, S, H, D]`, whose blocks hold tokens `order[..., 0]`, `order[..., 1]`, ..."""
    library = _library()
    x = _dense_rows(x)
    batch, length, heads, dim = x.shape
    out = torch.empty(batch, -(-length // block_size), heads, dim, dtype=torch.float32)
    order = _permutation(order, length, heads)
    address, stride = _head_rows(order)
    structure = cpu_library.BlockMean(
        input=_tensor(x),
        out=out.data_ptr(),
        order=address,
        order_stride=stride,
        order_group=heads // order.shape[0] if order is not None and order.ndim == 2 else 1,
        batch=batch,
        length=length,
        heads=heads,
        head_dim=dim,
        # the structure holds 32 bits, and one block needs no more tokens than there are
        block_size=min(block_size, length),
        dtype=_DTYPES[x.dtype],
        num_threads=torch.get_num_threads(),
    )
    _run(library.functions.ditattn_block_mean, structure)
    return out


def key_summary(
    mean_query: Tensor,
    key: Tensor,
    value: Tensor,
    order: Tensor | None,
    key_lengths: Tensor | None,
    scale: float,
    least_square: float,
    made: Sequence[Tensor],
) -> None:
    """Writes means, variances and value means `[B, G, N * 8, D]`, and the tail's keys and values `[B, N, G, D]`, all fp32, into `made`."""
    library = _library()
    key, value, mean_query = _dense_rows(key), _dense_rows(value), mean_query.contiguous()
    batch, length, heads, dim = key.shape
    order = _permutation(order, length, heads)
    lengths = None if key_lengths is None else key_lengths.clamp(0, length).to(torch.int32).contiguous()
    address, stride = _head_rows(order)
    places = dict(zip(("means", "variances", "value_means", "tail_key", "tail_value"), (x.data_ptr() for x in made), strict=True))
    structure = cpu_library.KeySummary(
        key=_tensor(key),
        value=_tensor(value),
        mean_query=mean_query.data_ptr(),
        order=address,
        key_lengths=None if lengths is None else lengths.data_ptr(),
        batch=batch,
        length=length,
        heads=heads,
        head_dim=dim,
        dtype=_DTYPES[key.dtype],
        num_threads=torch.get_num_threads(),
        scale=scale,
        least_square=least_square,
        order_stride=stride,
        **places,
    )
    _run(library.functions.ditattn_key_summary, structure)


def _library() -> Library:
    library = cpu_library.selection().library
    assert library is not None, "the table's probe lets no call through without a library"
    return library


def _run(function: object, structure: cpu_library.Attention | cpu_library.BlockMean | cpu_library.KeySummary) -> None:
    structure.struct_bytes = ctypes.sizeof(structure)
    structure.host = ctypes.pointer(cpu_library.host())
    cpu_library.raise_for(function(ctypes.byref(structure)))  # type: ignore[operator]


def _dense_rows(x: Tensor) -> Tensor:
    return x if x.stride(3) == 1 else x.contiguous()


def _permutation(order: Tensor | None, length: int, heads: int) -> Tensor | None:
    """The order, dense, once it is known that the kernel may follow it: every token of every head is read and written exactly once."""
    if order is None:
        return None
    fits = order.ndim == 1 or (order.ndim == 2 and order.shape[0] > 0 and heads % order.shape[0] == 0)
    if order.dtype != torch.int64 or not fits or order.shape[-1] != length:
        wanted = f"int64 [{length}], or [G, {length}] with G key heads that divide {heads}"
        raise UnsupportedCall(f"a token order for {length} tokens is {wanted}, not {order.dtype} {list(order.shape)}")
    order = order.contiguous()
    status = _library().functions.ditattn_check_order(order.data_ptr(), order.numel() // length, length)
    if status == cpu_library.BAD_ARGUMENT:
        raise UnsupportedCall(f"the token order is no permutation of 0 .. {length - 1}")
    cpu_library.raise_for(status)
    return order


def _head_rows(order: Tensor | None) -> tuple[int | None, int]:
    """Address of a dense order, and the step from one key head's to the next: 0 where all share one."""
    if order is None:
        return None, 0
    return order.data_ptr(), order.shape[1] if order.ndim == 2 else 0


def _tensor(x: Tensor) -> Tensor4:
    return Tensor4(x.data_ptr(), x.stride(0), x.stride(1), x.stride(2))


def _dense_tail(tail: PooledTail, scale: float) -> PooledTail:
    """The tail as the kernel reads it: rows dense, counts in fp32, nothing but zeros as values of empty blocks."""
    if abs(scale) < SMALLEST_TAIL_SCALE:
        raise UnsupportedCall(f"with a tail the CPU kernel takes scales from {SMALLEST_TAIL_SCALE:.0e} on and zero, not {scale:.0e}")
    return PooledTail(_dense_rows(tail.key), _dense_rows(tail.real_value()), tail.counts.float().contiguous())


def _set_tail(structure: cpu_library.Attention, tail: PooledTail | None) -> None:
    if tail is None:
        return
    structure.tail_key, structure.tail_value, structure.tail_counts = _tensor(tail.key), _tensor(tail.value), tail.counts.data_ptr()
    structure.tail_counts_stride = tail.counts.shape[1] if tail.counts.shape[0] > 1 else 0


def _is_valid(plan: BlockPlan, batch: int, heads: int) -> bool:
    """A quick look at every invariant of `BlockPlan.check`, for plans whose tensors are dense."""
    indices, counts = plan.indices, plan.counts
    rows, columns = plan.num_query_blocks, indices.shape[-1]
    return (
        indices.dtype == counts.dtype == torch.int32
        and indices.is_contiguous()
        and counts.is_contiguous()
        and indices.ndim == 4
        and indices.shape[:3] == counts.shape
        and indices.shape[0] in (1, batch)
        and indices.shape[1] in (1, heads)
        and indices.shape[2] == rows > 0
        and columns > 0
        and _library().functions.ditattn_check_plan(indices.data_ptr(), counts.data_ptr(), counts.numel(), columns, plan.num_key_blocks)
        == cpu_library.OK
    )


def _set_plan(structure: cpu_library.Attention, plan: BlockPlan, batch: int, heads: int) -> None:
    if plan.block_size != BLOCK_SIZE:
        raise UnsupportedCall(f"the CPU kernel has blocks of {BLOCK_SIZE} tokens, the plan {plan.block_size}")
    indices, counts = plan.indices, plan.counts
    if not _is_valid(plan, batch, heads):
        # says what is wrong, and takes strided plans, which the quick look does not
        plan.check(batch, heads)
    # the stride of an axis of length 1 means nothing, and torch calls such tensors contiguous whatever it is
    if indices.stride(3) != 1 and indices.shape[3] > 1:
        raise UnsupportedCall("the last axis of the plan's indices must be dense")
    structure.indices, structure.counts = indices.data_ptr(), counts.data_ptr()
    for axis in range(3):
        # an axis of length 1 is shared by all
        structure.indices_stride[axis] = indices.stride(axis) if indices.shape[axis] > 1 else 0
        structure.counts_stride[axis] = counts.stride(axis) if counts.shape[axis] > 1 else 0
