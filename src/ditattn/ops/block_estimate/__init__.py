"""Which key blocks hold the most softmax mass, by an operator that does it in one go: contract and table of implementations.

Unlike the other ops this one chooses no portable row: where no operator takes a call, the selection picks
from the estimate of `pure_torch`.
"""

from __future__ import annotations

from functools import lru_cache

from torch import Tensor

from ditattn.ops.block_estimate.pure_torch import STRIDE
from ditattn.ops.contract import call_facts, check_qkv
from ditattn.ops.table import HALF, PADDED_HEAD_DIMS, CallFacts, Implementation, load
from ditattn.packages import ATTENTIONS, MINDIESD, SGL_KERNEL_NPU, TORCH_NPU, Package
from ditattn.plan.block_plan import BLOCK_SIZE

__all__ = ["PORTABLE", "STRIDE", "TABLE", "block_estimate", "serving"]


def _on_ascend(name: str, provider: str, package: Package) -> Implementation:
    return Implementation(
        name,
        provider,
        devices=("npu",),
        dtypes=HALF,
        head_dims=PADDED_HEAD_DIMS,
        honours=frozenset({"gqa"}),
        packages=(TORCH_NPU, package),
        provider=True,
    )


TABLE: tuple[Implementation, ...] = (
    _on_ascend("estimate_sgl_kernel_npu", "ditattn.ops.block_estimate.ascend:ESTIMATE_SGL_KERNEL_NPU", SGL_KERNEL_NPU),
    _on_ascend("estimate_attentions", "ditattn.ops.block_estimate.ascend:ESTIMATE_ATTENTIONS", ATTENTIONS),
    _on_ascend("estimate_mindiesd", "ditattn.ops.block_estimate.ascend:ESTIMATE_MINDIESD", MINDIESD),
)

# what a listing adds: never chosen here, since the selection itself goes on where this op returns None
PORTABLE = (
    Implementation(
        "torch",
        "ditattn.ops.block_estimate.pure_torch:estimate",
        honours=frozenset({"causal", "key_lengths", "gqa", "unequal_lengths", "free_columns", "other_block_size"}),
    ),
)


def block_estimate(
    query: Tensor,
    key: Tensor,
    *,
    scale: float,
    sparsity: float,
    threshold: float,
    causal: bool,
    forced_columns: bool,
    key_lengths: Tensor | None,
    stride: int,
    block_size: int,
) -> Tensor | None:
    """The kept blocks, bool `[B, H, M, N]`; None where no operator of this machine takes the call.

    Arguments as in `antidiagonal.select`; `forced_columns` says that the first and the last block of every row are kept, which the
    operators cannot leave.
    """
    check_qkv(query, key, key, key_lengths)
    facts = call_facts(
        query,
        key,
        causal=causal,
        key_lengths=key_lengths is not None,
        free_columns=not forced_columns,
        other_block_size=(stride, block_size) != (STRIDE, BLOCK_SIZE),
    )
    row = serving(facts)
    return None if row is None else load(row)(query, key, scale, sparsity, threshold)


@lru_cache(maxsize=1024)
def serving(facts: CallFacts) -> Implementation | None:
    """The first row that takes the call. Decided once per call signature."""
    return next((row for row in TABLE if row.refusal(facts) is None), None)
