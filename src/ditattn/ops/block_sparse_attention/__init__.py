"""Attention over the key blocks that a BlockPlan keeps: contract, custom op and table of implementations.

Forward only. The custom op `ditattn::block_sparse_attention` has a fake, so that compiled graphs keep it whole.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ditattn.arguments import check_flag, check_instance, check_tensors
from ditattn.errors import UnsupportedCall
from ditattn.ops.block_sparse_attention.tail_merge import merged
from ditattn.ops.calls import SparseCall
from ditattn.ops.contract import check_qkv, checked_scale, joined, refuse_gradients, split, without_autocast
from ditattn.ops.pooled_tail import PooledTail
from ditattn.ops.table import FLOATS, HALF, PADDED_HEAD_DIMS, WIDE_FLOATS, Implementation, Names, choose_to_run, load, names_of
from ditattn.packages import ATTENTIONS, MINDIESD, SGL_KERNEL_NPU, TORCH_NPU, TRITON, Package
from ditattn.plan.block_plan import BlockPlan
from ditattn.plan.token_order import TokenOrder, reordered

__all__ = ["TABLE", "block_sparse_attention", "block_sparse_attention_with_lse", "check_plan", "check_tail", "compute"]

_MOST = frozenset({"causal", "key_lengths", "lse", "tail", "gqa", "unequal_lengths"})
_FLEX_HONOURS = frozenset({"gqa", "unequal_lengths"})
_EVERYTHING = _MOST | {"other_block_size"}
_MASKED = _MOST - {"causal"}
_LISTED = frozenset({"gqa", "unequal_lengths"})


def _on_ascend(name: str, provider: str, honours: frozenset[str], *packages: Package) -> Implementation:
    return Implementation(
        name,
        provider,
        devices=("npu",),
        dtypes=HALF,
        head_dims=PADDED_HEAD_DIMS,
        honours=honours,
        packages=(TORCH_NPU, *packages),
        orders_tokens=True,
        provider=True,
    )


def _on_cpu(name: str, target: str, dtypes: tuple[str, ...], probe: str, **rest: Any) -> Implementation:
    """A row of the compiled kernels for CPUs."""
    return Implementation(
        name,
        target,
        devices=("cpu",),
        dtypes=dtypes,
        head_dims=PADDED_HEAD_DIMS,
        honours=_MOST,
        probe=probe,
        orders_tokens=True,
        orders_heads=True,
        fuses_tail=True,
        **rest,
    )


TABLE: tuple[Implementation, ...] = (
    Implementation(
        "triton",
        "ditattn.ops.block_sparse_attention.triton:run",
        devices=("cuda",),
        dtypes=HALF,
        head_dims=PADDED_HEAD_DIMS,
        honours=_MOST,
        packages=(TRITON,),
        probe="ditattn.ops.triton_targets:why_not_cuda",
        orders_tokens=True,
        orders_heads=True,
        fuses_tail=True,
    ),
    # the same kernel on CPU tensors in triton's interpreter: for checking, never for running
    Implementation(
        "triton",
        "ditattn.ops.block_sparse_attention.triton:run",
        devices=("cpu",),
        dtypes=HALF,
        head_dims=PADDED_HEAD_DIMS,
        honours=_MOST,
        packages=(TRITON,),
        probe="ditattn.ops.triton_targets:why_not_interpreted",
        automatic=False,
        orders_tokens=True,
        orders_heads=True,
        fuses_tail=True,
    ),
    # true masks per batch element and head first, then index lists, then masks with counts
    _on_ascend("mask_torch_npu", "ditattn.ops.block_sparse_attention.ascend:MASK_TORCH_NPU", _MASKED),
    _on_ascend("mask_mindiesd", "ditattn.ops.block_sparse_attention.ascend:MASK_MINDIESD", _MASKED, MINDIESD),
    _on_ascend("index_attentions", "ditattn.ops.block_sparse_attention.ascend:INDEX_ATTENTIONS", _LISTED, ATTENTIONS),
    _on_ascend("index_mindiesd", "ditattn.ops.block_sparse_attention.ascend:INDEX_MINDIESD", _LISTED, MINDIESD),
    _on_ascend("counted_sgl_kernel_npu", "ditattn.ops.block_sparse_attention.ascend:COUNTED_SGL_KERNEL_NPU", _LISTED, SGL_KERNEL_NPU),
    _on_ascend("counted_attentions", "ditattn.ops.block_sparse_attention.ascend:COUNTED_ATTENTIONS", _LISTED, ATTENTIONS),
    _on_ascend("counted_mindiesd", "ditattn.ops.block_sparse_attention.ascend:COUNTED_MINDIESD", _LISTED, MINDIESD),
    _on_cpu("cpu", "ditattn.ops.block_sparse_attention.cpu:run", FLOATS, "ditattn.ops.cpu_library:problem"),
    _on_cpu(
        "cpu_fast_fp32",
        "ditattn.ops.block_sparse_attention.cpu:run_fast_fp32",
        ("float32",),
        "ditattn.ops.cpu_library:bf16_problem",
        automatic=False,
        computes_in="bfloat16",
    ),
    # the two schedules of `cpu` for bf16 tensors on a tile unit, which takes the faster one by itself
    _on_cpu(
        "cpu_sequential",
        "ditattn.ops.block_sparse_attention.cpu:run_sequential",
        ("bfloat16",),
        "ditattn.ops.cpu_library:tile_problem",
        automatic=False,
    ),
    _on_cpu(
        "cpu_overlapped",
        "ditattn.ops.block_sparse_attention.cpu:run_overlapped",
        ("bfloat16",),
        "ditattn.ops.cpu_library:tile_problem",
        automatic=False,
    ),
    # fp32 products from bf16 products of the tile unit: never timed on one, so they run by name only
    _on_cpu(
        "cpu_bf16x3",
        "ditattn.ops.block_sparse_attention.cpu:run_bf16x3",
        ("float32", "float16"),
        "ditattn.ops.cpu_library:parts_problem",
        automatic=False,
        computes_in="bfloat16",
        parts=2,
    ),
    _on_cpu(
        "cpu_bf16x6",
        "ditattn.ops.block_sparse_attention.cpu:run_bf16x6",
        ("float32",),
        "ditattn.ops.cpu_library:parts_problem",
        automatic=False,
    ),
    Implementation("torch", "ditattn.ops.block_sparse_attention.pure_torch:run", dtypes=WIDE_FLOATS, honours=_EVERYTHING, slow_on=("npu",)),
    Implementation(
        "flex",
        "ditattn.ops.block_sparse_attention.flex:run",
        devices=("cuda",),
        honours=_FLEX_HONOURS | {"lse", "tail"},
        packages=(TRITON,),
        probe="ditattn.ops.triton_targets:why_not_cuda",
        automatic=False,
    ),
    Implementation(
        "flex",
        "ditattn.ops.block_sparse_attention.flex:run",
        devices=("cpu",),
        honours=_FLEX_HONOURS,
        probe="ditattn.ops.block_sparse_attention.flex:why_not_compiled",
        automatic=False,
    ),
    Implementation(
        "reference",
        "ditattn.ops.block_sparse_attention.reference:run",
        dtypes=WIDE_FLOATS,
        honours=_EVERYTHING,
        automatic=False,
        fuses_tail=True,
    ),
)


def block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: BlockPlan,
    *,
    scale: float | None = None,
    causal: bool = False,
    key_lengths: Tensor | None = None,
    order: TokenOrder | None = None,
    tail: PooledTail | None = None,
    implementation: Names = None,
) -> Tensor:
    """Exact attention over the kept blocks of `plan`.

    Args:
        query: `[B, S, H, D]`, any strides; S is `plan.query_length`.
        key: `[B, T, G, D]`, H a multiple of G; T is `plan.key_length`.
        value: of the key's shape.
        plan: kept key blocks per batch element and query head. Its values are trusted here (`BlockPlan.check` verifies them).
        scale: factor on the scores, 1 / sqrt(D) when None; applied in fp32.
        causal: within the kept blocks query i sees keys 0..i.
        key_lengths: int32 or int64 `[B]` on the tensors' device; only that many leading keys of each batch element are real.
        order: the order of the tokens that the plan and `key_lengths` speak of, where it is not that of the tensors: query, key, value and
            the result stay as they are, and the implementation reads and writes them in this order, or copies them. Needs S = T. With an
            order per key head, block numbers of the plan are those of each head's own order. Its values are trusted too.
        tail: means that stand in for the blocks that the plan drops, in the plan's order (`PooledTail.of`). Its values are trusted.
        implementation: a name from `TABLE`, or several in order of preference; None takes the first possible one.

    Returns:
        `[B, S, H, D]`, contiguous, in the query's dtype. Rows that see no key are zero.

    Raises:
        UnsupportedCall: tensors, plan, order and tail do not fit together, the call is causal in another order or with a tail, the scale is
            not finite, or no implementation takes the call.
        BackendUnavailable: the named implementation cannot run here.

    Examples:
        Each block of 128 tokens sees itself:

        >>> import torch
        >>> from ditattn import BlockPlan, block_sparse_attention
        >>> query, key, value = torch.randn(3, 1, 512, 4, 64)
        >>> plan = BlockPlan.from_mask(torch.eye(4, dtype=torch.bool)[None, None], 512, 512)
        >>> block_sparse_attention(query, key, value, plan).shape
        torch.Size([1, 512, 4, 64])
        >>> plan.density()
        0.25
    """
    return _call(query, key, value, plan, scale, causal, key_lengths, order, tail, False, implementation)[0]


def block_sparse_attention_with_lse(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: BlockPlan,
    *,
    scale: float | None = None,
    causal: bool = False,
    key_lengths: Tensor | None = None,
    order: TokenOrder | None = None,
    tail: PooledTail | None = None,
    implementation: Names = None,
) -> tuple[Tensor, Tensor]:
    """As `block_sparse_attention`; also the natural log-sum-exp of the scaled scores, fp32 `[B, H, S]`, -inf where no key is seen.

    With a tail its terms are in the sum.
    """
    return _call(query, key, value, plan, scale, causal, key_lengths, order, tail, True, implementation)


def _call(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: BlockPlan,
    scale: float | None,
    causal: bool,
    key_lengths: Tensor | None,
    order: TokenOrder | None,
    tail: PooledTail | None,
    return_lse: bool,
    implementation: Names,
) -> tuple[Tensor, Tensor]:
    check_tensors(query=query, key=key, value=value, **({} if key_lengths is None else {"key_lengths": key_lengths}))
    check_flag("causal", causal)
    check_instance("plan", plan, BlockPlan, "BlockPlan.from_mask makes one of a block mask")
    if order is not None:
        check_instance("order", order, TokenOrder, "ditattn.plan.token_order.token_order makes one")
    check_qkv(query, key, value, key_lengths)
    check_plan(query, key, plan)
    if tail is not None:
        check_instance("tail", tail, PooledTail, "PooledTail.of makes one of key and value")
        check_tail(key, plan, tail, causal)
    forward, inverse = _ordering(query, key, causal, order)
    scale = checked_scale(scale, query.shape[3])
    names = names_of(implementation)
    # a graph that is being traced keeps the choice open: the op takes it, once, when it first runs
    if not torch.compiler.is_compiling():
        call = SparseCall(query, key, value, plan, scale, causal, key_lengths, return_lse, forward, inverse, tail)
        names = (choose_to_run(TABLE, call.facts(), names).name,)
    listed = (plan.indices, plan.counts, plan.block_size)
    means = () if tail is None else (tail.key, tail.value, tail.counts)
    out, lse = _op(query, key, value, *listed, scale, causal, key_lengths, return_lse, joined(names), forward, inverse, *means)
    return out, lse


def compute(call: SparseCall, row: Implementation) -> tuple[Tensor, Tensor | None]:
    """The call by a chosen row, unchecked and without an op around it: for code that torch sees as one operation already."""
    merges = call.tail is not None and not row.fuses_tail
    with without_autocast(call.query.device):
        # the tail speaks of the plan's order: where the op merges it, the rows stand in that order
        if call.order is None or call.inverse is None or (row.takes_order(call.order) and not merges):
            out, lse = _attended(call, row, merges)
        else:
            out, lse = _attended(call.ordered(), row, merges)
            out = reordered(out, call.inverse)
            lse = None if lse is None else reordered(lse.transpose(1, 2), call.inverse).transpose(1, 2)
    return out.contiguous(), lse.contiguous() if lse is not None and call.return_lse else None


def _attended(call: SparseCall, row: Implementation, merges: bool) -> tuple[Tensor, Tensor | None]:
    run = load(row)
    if not merges:
        out, lse = run(call)
        return out, lse if call.return_lse else None
    out, lse = run(replace(call, tail=None, return_lse=True))
    return merged(call, out, lse)


def _ordering(query: Tensor, key: Tensor, causal: bool, order: TokenOrder | None) -> tuple[Tensor | None, Tensor | None]:
    if order is None or (order.forward is None and order.inverse is None):
        return None, None
    if causal:
        raise UnsupportedCall("a causal call takes no token order: the tokens before a token would not be its past")
    order.check_length(query.shape[1])
    order.check_length(key.shape[1])
    order.check_key_heads(key.shape[2])
    order.check_device(query.device)
    return order.forward, order.inverse


def check_plan(query: Tensor, key: Tensor, plan: BlockPlan) -> None:
    """Raise UnsupportedCall unless the plan is one for such tensors. Its values are not read: that would wait for the device."""
    if (plan.query_length, plan.key_length) != (query.shape[1], key.shape[1]):
        raise UnsupportedCall(
            f"the plan is for {plan.query_length} x {plan.key_length} tokens, the call has {query.shape[1]} x {key.shape[1]}"
        )
    plan.check_form(query.shape[0], query.shape[2])
    if plan.indices.device != query.device:
        raise UnsupportedCall(f"the plan is on {plan.indices.device}, the query on {query.device}")


def check_tail(key: Tensor, plan: BlockPlan, tail: PooledTail, causal: bool) -> None:
    """Raise UnsupportedCall unless the tail is one for such a call. Its values are not read."""
    if causal:
        raise UnsupportedCall("a causal call takes no tail: the mean of a block would tell a query of tokens after it")
    tail.check(key, plan)


@torch.library.custom_op("ditattn::block_sparse_attention", mutates_args=())
def _op(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    indices: Tensor,
    counts: Tensor,
    block_size: int,
    scale: float,
    causal: bool,
    key_lengths: Tensor | None,
    return_lse: bool,
    implementations: str,
    order: Tensor | None = None,
    inverse: Tensor | None = None,
    tail_key: Tensor | None = None,
    tail_value: Tensor | None = None,
    tail_counts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    plan = BlockPlan(indices, counts, query.shape[1], key.shape[1], block_size)
    tail = None
    if tail_key is not None and tail_value is not None and tail_counts is not None:
        tail = PooledTail(tail_key, tail_value, tail_counts)
    call = SparseCall(query, key, value, plan, scale, causal, key_lengths, return_lse, order, inverse, tail)
    out, lse = compute(call, choose_to_run(TABLE, call.facts(), split(implementations)))
    return out, query.new_empty(0, dtype=torch.float32) if lse is None else lse


@_op.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    indices: Tensor,
    counts: Tensor,
    block_size: int,
    scale: float,
    causal: bool,
    key_lengths: Tensor | None,
    return_lse: bool,
    implementations: str,
    order: Tensor | None = None,
    inverse: Tensor | None = None,
    tail_key: Tensor | None = None,
    tail_value: Tensor | None = None,
    tail_counts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    batch, length, heads, _ = query.shape
    lse_shape = (batch, heads, length) if return_lse else (0,)
    return query.new_empty(query.shape), query.new_empty(lse_shape, dtype=torch.float32)


_op.register_autograd(refuse_gradients)
