"""Block-sparse attention through the compiled CPU kernel, which applies a token order while it packs and writes: no copy is made for it."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from ditattn.ops import cpu_call
from ditattn.plan.block_plan import BlockPlan


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
    *,
    fast_fp32: bool = False,
) -> tuple[Tensor, Tensor | None]:
    return cpu_call.attention(query, key, value, plan, scale, causal, key_lengths, return_lse=return_lse, fast_fp32=fast_fp32, order=order)


run_fast_fp32 = partial(run, fast_fp32=True)
"""As `run`, multiplying fp32 tensors as bf16."""
