"""Block-sparse attention through the compiled CPU kernel, which applies a token order while it packs and writes: no copy is made for it."""

from __future__ import annotations

from torch import Tensor

from ditattn.attention.plan import BlockPlan
from ditattn.ops import cpu_call


def run(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: BlockPlan,
    scale: float,
    causal: bool,
    key_lengths: Tensor | None,
    return_lse: bool,
    order: Tensor | None = None,
    inverse: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    return cpu_call.attention(query, key, value, plan, scale, causal, key_lengths, return_lse=return_lse, order=order)


def run_fast_fp32(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: BlockPlan,
    scale: float,
    causal: bool,
    key_lengths: Tensor | None,
    return_lse: bool,
    order: Tensor | None = None,
    inverse: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """As `run`, multiplying fp32 tensors as bf16."""
    return cpu_call.attention(query, key, value, plan, scale, causal, key_lengths, return_lse=return_lse, fast_fp32=True, order=order)
