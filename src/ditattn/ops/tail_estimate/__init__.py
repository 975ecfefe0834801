"""What it costs to let means stand for key blocks: contract, custom ops and table of implementations.

Two steps, whose results fit together whatever implementation made them: a summary of keys and values, and from it, for every query block
and every key block, the error of the output where the block's mean stands for its tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ditattn.arguments import check_instance
from ditattn.errors import UnsupportedCall
from ditattn.ops.contract import check_like, check_qkv, checked_scale, joined, split
from ditattn.ops.pooled_tail import PooledTail
from ditattn.ops.table import PADDED_HEAD_DIMS, WIDE_FLOATS, CallFacts, Implementation, Names, choose, load, names_of
from ditattn.ops.tail_estimate.summary import PER_BLOCK, QUERY_GROUPS, SUB_TOKENS, Estimator, KeySummary, Summarized
from ditattn.packages import TRITON
from ditattn.plan.block_plan import BLOCK_SIZE, num_blocks
from ditattn.plan.token_order import TokenOrder

__all__ = ["PER_BLOCK", "QUERY_GROUPS", "SUB_TOKENS", "TABLE", "KeySummary", "key_summary", "tail_cost"]

TABLE: tuple[Implementation, ...] = (
    Implementation(
        "triton",
        "ditattn.ops.tail_estimate.triton:estimator",
        devices=("cuda",),
        head_dims=PADDED_HEAD_DIMS,
        packages=(TRITON,),
        probe="ditattn.ops.triton_targets:why_not_cuda",
    ),
    # the same kernels on CPU tensors in triton's interpreter: for checking, never for running
    Implementation(
        "triton",
        "ditattn.ops.tail_estimate.triton:estimator",
        devices=("cpu",),
        head_dims=PADDED_HEAD_DIMS,
        packages=(TRITON,),
        probe="ditattn.ops.triton_targets:why_not_interpreted",
        automatic=False,
    ),
    Implementation(
        "cpu",
        "ditattn.ops.tail_estimate.cpu:estimator",
        devices=("cpu",),
        head_dims=PADDED_HEAD_DIMS,
        probe="ditattn.ops.cpu_library:problem",
    ),
    Implementation("torch", "ditattn.ops.tail_estimate.pure_torch:estimator", dtypes=WIDE_FLOATS),
)


def key_summary(
    mean_query: Tensor,
    key: Tensor,
    value: Tensor,
    order: TokenOrder,
    key_lengths: Tensor | None,
    scale: float,
    *,
    implementation: Names = None,
) -> KeySummary:
    """Means and variances of keys and values, and the tail that is exact for the mean query in weight and in value.

    For a block of n tokens with keys k_i and values v_i, and the mean query m: p_i is the softmax of scale m.k_i over the block, key and
    value of the tail are the sums of p_i k_i and p_i v_i. Then exp(scale m.key + log n) is not yet the block's weight, the sum of
    exp(scale m.k_i); the difference of the logarithms is added to the key along m, so that the tail needs no term of its own for it.

    Args:
        mean_query: fp32 `[B, G, D]`, for each key head.
        key, value: `[B, T, G, D]`.
        order: the plan's order of the tokens.
        key_lengths: `[B]`; tokens from there on, in that order, count for nothing.
        scale: factor on the scores.
        implementation: a name from `TABLE`, or several in order of preference; None takes the first possible one.

    Raises:
        UnsupportedCall: mean query, value or key lengths do not fit the key, the order is for another length, device or number of key
            heads, the scale is not finite, or no implementation takes the call.
    """
    if value.shape != key.shape or value.dtype != key.dtype or value.device != key.device:
        found = f"{value.dtype} {list(value.shape)} on {value.device}"
        raise UnsupportedCall(f"value must be {key.dtype} {list(key.shape)} on {key.device} like key, not {found}")
    check_qkv(key, key, value, key_lengths)
    check_like("mean_query", mean_query, (key.shape[0], *key.shape[2:]), key.device)
    check_instance("order", order, TokenOrder, "ditattn.plan.token_order.token_order makes one")
    order.check_length(key.shape[1])
    order.check_key_heads(key.shape[2])
    order.check_device(key.device)
    scale = checked_scale(scale, key.shape[3])
    if scale == 0:
        # all tokens weigh alike, as they do for a mean query of zeros; implementations divide by the scale
        mean_query, scale = torch.zeros_like(mean_query), 1.0
    names = _named(key, implementation)
    made = Summarized(*_summary_op(mean_query, key, value, order.forward, order.inverse, key_lengths, scale, names))
    fine, coarse = (_counts(key, size, key_lengths) for size in (SUB_TOKENS, BLOCK_SIZE))
    return KeySummary(*made[:3], fine, PooledTail(made.tail_key, made.tail_value, coarse))


def tail_cost(groups: Tensor, summary: KeySummary, scale: float, *, implementation: Names = None) -> Tensor:
    """Squared error of the output where a mean stands for a block, fp32 `[B, H, M, N]`: the mean over the groups of a query block.

    For query q, a block with sub-block means k_b, v_b of n_b tokens, the tail's key k and value v for its n tokens, the sum Z of all
    weights, and the output o: || sum_b w_b (v_b - o) - w (v - o) ||^2 / Z^2, where w = n exp(scale q.k) and
    w_b = n_b exp(scale q.k_b + scale^2 q^2.var_b / 2), which is what n_b tokens weigh on average whose keys have the sub-block's
    variances var_b.

    Args:
        groups: fp32 `[B, H, M * 2, D]`, means of the groups of every query block; H is a multiple of G.
        summary: of keys and values.
        scale: factor on the scores.
        implementation: as above.

    Raises:
        UnsupportedCall: the groups are not of the summary's batch, heads or size, or no implementation takes the call.
    """
    batch, key_heads, _, dim = summary.means.shape
    heads, rows = groups.shape[1:3] if groups.ndim == 4 else (0, 0)
    if not heads or heads % key_heads or not rows or rows % QUERY_GROUPS:
        wanted = f"[{batch}, a multiple of {key_heads}, a multiple of {QUERY_GROUPS}, {dim}]"
        raise UnsupportedCall(f"groups must be {wanted}, not {list(groups.shape)}")
    check_like("groups", groups, (batch, heads, rows, dim), summary.means.device)
    tail = summary.tail
    names = _named(groups, implementation)
    out: Tensor = _cost_op(groups, *summary[:4], tail.key, tail.value, tail.counts, scale, names)
    return out


def _named(x: Tensor, implementation: Names) -> str:
    names = names_of(implementation)
    # a graph that is being traced keeps the choice open: the op takes it, once, when it first runs
    if not torch.compiler.is_compiling():
        names = (_row(x, names).name,)
    return joined(names)


def _row(x: Tensor, names: tuple[str, ...] | None) -> Implementation:
    return choose(TABLE, CallFacts(x.device.type, x.dtype, x.shape[3]), names)


def _counts(key: Tensor, size: int, key_lengths: Tensor | None) -> Tensor:
    """fp32 `[B or 1, N * 128 / size]`: real tokens in every `size` of the blocks."""
    length = key.shape[1]
    starts = torch.arange(0, num_blocks(length) * BLOCK_SIZE, size, device=key.device)
    ends = length if key_lengths is None else key_lengths.clamp(0, length).unsqueeze(1)
    return (ends - starts).clamp(0, size).float().view(-1, len(starts))


@torch.library.custom_op("ditattn::key_summary", mutates_args=())
def _summary_op(
    mean_query: Tensor,
    key: Tensor,
    value: Tensor,
    order: Tensor | None,
    inverse: Tensor | None,
    key_lengths: Tensor | None,
    scale: float,
    implementations: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    length = key.shape[1]
    ordered = TokenOrder(order, inverse, (0, 0), (0, length), length)
    estimator: Estimator = load(_row(key, split(implementations)))()
    made = estimator.summary(mean_query, key, value, ordered, key_lengths, scale)
    return made[0].contiguous(), made[1].contiguous(), made[2].contiguous(), made[3].contiguous(), made[4].contiguous()


@_summary_op.register_fake
def _(
    mean_query: Tensor,
    key: Tensor,
    value: Tensor,
    order: Tensor | None,
    inverse: Tensor | None,
    key_lengths: Tensor | None,
    scale: float,
    implementations: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return tuple(Summarized.empty(key))  # type: ignore[return-value]


@torch.library.custom_op("ditattn::tail_cost", mutates_args=())
def _cost_op(
    groups: Tensor,
    means: Tensor,
    variances: Tensor,
    value_means: Tensor,
    counts: Tensor,
    tail_key: Tensor,
    tail_value: Tensor,
    tail_counts: Tensor,
    scale: float,
    implementations: str,
) -> Tensor:
    summary = KeySummary(means, variances, value_means, counts, PooledTail(tail_key, tail_value, tail_counts))
    estimator: Estimator = load(_row(groups, split(implementations)))()
    out = estimator.cost(groups, summary, scale)
    return out.contiguous()


@_cost_op.register_fake
def _(
    groups: Tensor,
    means: Tensor,
    variances: Tensor,
    value_means: Tensor,
    counts: Tensor,
    tail_key: Tensor,
    tail_value: Tensor,
    tail_counts: Tensor,
    scale: float,
    implementations: str,
) -> Tensor:
    return groups.new_empty(*groups.shape[:2], groups.shape[2] // QUERY_GROUPS, tail_key.shape[1])
