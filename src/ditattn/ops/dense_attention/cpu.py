"""Dense attention through the compiled CPU kernel: the plan that keeps everything."""

from __future__ import annotations

from torch import Tensor

from ditattn.ops import cpu_call


def run(
    query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool, key_lengths: Tensor | None, attn_mask: Tensor | None
) -> Tensor:
    assert attn_mask is None, "the table refuses calls with a mask"
    return cpu_call.attention(query, key, value, None, scale, causal, key_lengths)[0]


def run_fast_fp32(
    query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool, key_lengths: Tensor | None, attn_mask: Tensor | None
) -> Tensor:
    """As `run`, multiplying fp32 tensors as bf16."""
    assert attn_mask is None, "the table refuses calls with a mask"
    return cpu_call.attention(query, key, value, None, scale, causal, key_lengths, fast_fp32=True)[0]
